"""A client's side of a round: a machine that answers each stage once, in order, or not at all.

It trusts no server. Whatever contradicts what was said before ends the round: the keys and shares are forgotten and a
`SecAggError` says why. Only a message of another round leaves the state as it is, since it may be a late one. What lies
between two stages is one serialisable `State`; forgetting means that no state holds it any more, not that memory is
overwritten, which Python cannot promise. A client that loses its state can be asked into a round twice, but where
its front keeps a journal (`privacy/secagg/journal.py`).

One unmasking answer a round, to one list of survivors: for each client a share of its self mask or of its mask key,
never both (Bonawitz et al., CCS 2017, section 4). The list names survivors alone, and who else had shared its secrets
has dropped out, so that no server can name a client as both.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from privacy.secagg import checks, messages
from privacy.secagg.channel import seal, unseal
from privacy.secagg.errors import ForgedError, InconsistentError, OutOfTurnError, RefusedError
from privacy.secagg.graph import MALICIOUS, MINIMUM, holders_of
from privacy.secagg.keys import Agreement, Derived, Entropy, Identity, KeyPair, Roster, digest
from privacy.secagg.masking import SEED_BYTES, add_masks, in_ring, pack
from privacy.secagg.messages import Message, Terms
from privacy.secagg.shamir import split

# A share of a secret of 32 bytes: 16 words.
SHARE_BYTES = 64


@dataclass(frozen=True)
class State(Message):
    """What a client remembers between two stages: no more than the next ones need."""

    round: int = 0
    """The last round it has answered in."""
    stage: str = messages.ADVERTISE
    """The next that it answers."""
    terms: bytes = b""
    channel: bytes = b""
    mask: bytes = b""
    ids: tuple[int, ...] = ()
    context: bytes = b""
    channel_keys: dict[int, bytes] = field(default_factory=dict)
    mask_seeds: dict[int, bytes] = field(default_factory=dict)
    seed: bytes = b""
    shares: dict[int, bytes] = field(default_factory=dict)
    survivors: tuple[int, ...] = ()


class Client:
    """One client of a run. `state` after each answer is what to make the next one from.

    It accepts no weaker profile and no smaller cohort than its own, no ring but that of `bits` (0: any), and nobody who
    is not on its roster.
    """

    def __init__(
        self, client: int, run: str, identity: Identity, roster: Roster, *, profile: str = MALICIOUS,
        minimum: int = MINIMUM, bits: int = 0, state: State | None = None, entropy: Entropy = os.urandom,
        derived: Derived | None = None,
    ) -> None:  # fmt: skip
        self.client, self.run, self.state = client, run, state or State()
        self._identity, self._roster, self._entropy = identity, roster, entropy
        self._profile, self._minimum, self._bits, self._derived = profile, minimum, bits, derived

    def advertise(self, terms: Terms) -> messages.Advertisement:
        """Return this round's public keys. What is left of an earlier round is forgotten.

        Raises `OutOfTurnError` for a round that is not later than the last one, `RefusedError` for terms that are not
        the client's own; neither touches the state.
        """
        checks.acceptable(terms, self.run, self.state.round, self._profile, self._minimum, self._bits)
        channel, mask = KeyPair.generate(self._entropy), KeyPair.generate(self._entropy)
        signed = messages.Advertisement.signed_part(terms.hash, self.client, channel.public, mask.public)
        self.state = State(terms.round, messages.SHARE, terms.to_bytes(), channel.secret, mask.secret)
        signature = self._identity.sign(signed)
        return messages.Advertisement(terms.round, self.client, channel.public, mask.public, signature)

    def share(self, participants: messages.Participants) -> messages.Shares:
        """Return shares of this client's self mask and mask key, sealed for its neighbours."""
        with self._answering(messages.SHARE, participants.round) as (state, terms):
            channel, mask = KeyPair.of(state.channel), KeyPair.of(state.mask)
            own = messages.Advertisement(terms.round, self.client, channel.public, mask.public, b"")
            others = checks.neighbours(terms, participants, own, self._roster)
            context = terms.context(participants.ids, participants.digests)
            agree_channel = Agreement("channel", self.client, channel, context, self._derived)
            agree_mask = Agreement("mask", self.client, mask, context, self._derived)
            channel_keys = {other: agree_channel(other, keys.channel) for other, keys in others.items()}
            mask_seeds = {other: agree_mask(other, keys.mask) for other, keys in others.items()}
            seed = self._entropy(SEED_BYTES)
            holders = holders_of(self.client, others)
            rows = split(seed + mask.secret, len(holders), terms.needed(len(participants.ids)), self._entropy)
            shares = {holder: row.astype("<u4").tobytes() for holder, row in zip(holders, rows, strict=True)}
            kept = shares.pop(self.client)
            sealed = {
                other: seal(channel_keys[other], self.client, other, terms.round, context, share, self._entropy)
                for other, share in shares.items()
            }
            self.state = State(
                terms.round, messages.MASK, state.terms, ids=participants.ids, context=context,
                channel_keys=channel_keys, mask_seeds=mask_seeds, seed=seed, shares={self.client: kept},
            )  # fmt: skip
            return messages.Shares(terms.round, self.client, sealed, commitment(context, self.client, seed))

    def mask(
        self, delivery: messages.Delivery, vector: np.ndarray, content: bytes, *, least: int = 0, most: int = 0
    ) -> messages.Masked:
        """Return the vector (n,) uint32 below 2^m under its masks; the vector itself is masked in place.

        `content` is the hash of what the client has trained from: another than the terms announce is inconsistent. Was
        the vector made for a sum of `least` to `most` clients, no other may be possible.
        """
        with self._answering(messages.MASK, delivery.round) as (state, terms):
            if content != terms.content:
                raise InconsistentError("the model and config that came are not those announced to everybody")
            clients = len(state.ids)
            if most and clients > most:
                raise InconsistentError(f"{clients} clients take part, and their vectors are made for {most}")
            if terms.smallest(clients) < least:
                raise RefusedError(f"a sum of {terms.smallest(clients)} clients may be opened, and {least} are needed")
            if vector.dtype != np.uint32 or vector.shape != (terms.length,):
                raise ValueError(f"a vector of {vector.shape} {vector.dtype} is not {terms.length} numbers of uint32")
            if strangers := delivery.sealed.keys() - state.channel_keys.keys():
                raise InconsistentError(f"client {min(strangers)} is no neighbour and has no share to send")
            checks.enough(1 + len(delivery.sealed), terms.needed(len(state.ids)), "have shared their secrets")
            shares = dict(state.shares)
            for other, sealed in delivery.sealed.items():
                share = unseal(state.channel_keys[other], other, self.client, terms.round, state.context, sealed)
                if len(share) != 2 * SHARE_BYTES:
                    raise ForgedError(f"the share of client {other} is not of two secrets")
                shares[other] = share
            above = [state.mask_seeds[other] for other in delivery.sealed if other > self.client]
            below = [state.mask_seeds[other] for other in delivery.sealed if other < self.client]
            add_masks(vector, [state.seed, *above], below)
            after = messages.CONFIRM if terms.profile == MALICIOUS else messages.UNMASK
            self.state = State(
                terms.round, after, state.terms, ids=state.ids, context=state.context, shares=shares
            )  # fmt: skip
            return messages.Masked(terms.round, self.client, pack(in_ring(vector, terms.bits), terms.bits))

    def confirm(self, survivors: messages.Survivors) -> messages.Confirmation:
        """Return a signature under the survivors: later the client answers to no other list."""
        with self._answering(messages.CONFIRM, survivors.round) as (state, terms):
            self._check_survivors(survivors.ids)
            self.state = replace(state, stage=messages.UNMASK, survivors=survivors.ids)
            signed = messages.Confirmation.signed_part(state.context, survivors.ids)
            return messages.Confirmation(terms.round, self.client, self._identity.sign(signed))

    def unmask(self, request: messages.UnmaskRequest) -> messages.Unmasking:
        """Return the shares that remove the masks, and forget everything of the round."""
        with self._answering(messages.UNMASK, request.round) as (state, terms):
            self._check_survivors(request.ids)
            if terms.profile == MALICIOUS:
                if request.ids != state.survivors:
                    raise InconsistentError("the survivors are not those that this client has confirmed")
                checks.confirmed(terms, request, state.context, len(state.ids), self._roster)
            self.forget()
            # The first half is of the self mask, the second of the mask key.
            survivors = set(request.ids)
            shares = {
                other: share[:SHARE_BYTES] if other in survivors else share[SHARE_BYTES:]
                for other, share in state.shares.items()
            }
            return messages.Unmasking(terms.round, self.client, shares)

    def forget(self) -> None:
        """Forget the round: all that is left is that it has been."""
        self.state = State(self.state.round)

    @contextlib.contextmanager
    def _answering(self, stage: str, server_round: int) -> Iterator[tuple[State, Terms]]:
        """Let a stage be answered if it is its turn; whatever goes wrong ends the round."""
        if server_round != self.state.round:
            raise OutOfTurnError(f"client {self.client} is in round {self.state.round}, not in round {server_round}")
        state = self.state
        try:
            if stage != state.stage:
                raise OutOfTurnError(
                    f"client {self.client} is asked to {stage}, and its next answer is to {state.stage}"
                )
            yield state, Terms.from_bytes(state.terms)
        except BaseException:
            self.forget()
            raise

    def _check_survivors(self, ids: tuple[int, ...]) -> None:
        state, terms = self.state, Terms.from_bytes(self.state.terms)
        # Of others than its neighbours a client knows only that they take part.
        known = state.ids if terms.neighbours else state.shares
        checks.survivors(terms, self.client, ids, len(state.ids), known)
        checks.enough(len(state.shares.keys() & set(ids)), terms.needed(len(state.ids)), "hold shares together")


def commitment(context: bytes, client: int, seed: bytes) -> bytes:
    """Return the hash that a client publishes of its self mask's seed."""
    return digest("self mask", context, client, seed)
