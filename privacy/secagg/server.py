"""The server's side of a round: it forwards what it cannot read, adds up what looks like noise, and unmasks the sum.

Stages are closed by asking for the next one's messages; an answer counts if it comes before that, is the client's
first, and can be right. Whoever has not answered has dropped out and is no part of later stages. Dropping out before
the secrets are shared costs nothing; after that, before the vector came, the masks with that client are reconstructed
from its key; after that, nothing again, for the vector is in the sum and its self mask is removed like all others'.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from core.errors import InputError
from privacy.secagg import checks, messages
from privacy.secagg.client import SHARE_BYTES, commitment
from privacy.secagg.errors import ForgedError, InconsistentError, OutOfTurnError, SecAggError
from privacy.secagg.graph import MALICIOUS, holders_of
from privacy.secagg.keys import Agreement, KeyPair, Roster, check_public
from privacy.secagg.masking import add_masks, in_ring, unpack, word_bytes
from privacy.secagg.messages import ADVERTISE, CONFIRM, MASK, SHARE, UNMASK, Terms
from privacy.secagg.shamir import combine

Answer = messages.Advertisement | messages.Shares | messages.Masked | messages.Confirmation | messages.Unmasking


class Server:
    """One round with these clients. What they sign is checked before it reaches others, who would end the round.

    `answered` says who was counted in which stage, `refused` why an answer was not.
    """

    def __init__(self, terms: Terms, clients: Sequence[int], roster: Roster) -> None:
        if terms.problem:
            raise InputError(f"no round can have these terms: {terms.problem}.")
        self.terms, self._roster = terms, roster
        self.answered: dict[str, tuple[int, ...]] = {}
        self.refused: dict[int, str] = {}
        self._stage = ADVERTISE
        self._expected = set(clients)
        self._came: dict[int, Any] = {}
        self._total = np.zeros(terms.length, dtype=np.uint32)
        self._ids: tuple[int, ...] = ()
        self._context = b""
        self._keys: dict[int, messages.Advertisement] = {}
        self._neighbours: dict[int, list[int]] = {}
        self._shares: dict[int, messages.Shares] = {}
        checks.enough(len(self._expected), terms.minimum, "are asked to take part")

    def take(self, client: int, answer: Answer) -> bool:
        """Return whether the answer that came from this client counts. One that is late, second or wrong does not."""
        stage, check = _ANSWERS[type(answer)]
        if stage != self._stage or client not in self._expected or client in self._came:
            return False
        try:
            if (answer.client, answer.round) != (client, self.terms.round):
                raise OutOfTurnError(f"the answer is that of client {answer.client} in round {answer.round}")
            self._came[client] = check(self, answer)
        except (SecAggError, ValueError) as error:
            self.refused[client] = str(error)
            return False
        return True

    def participants(self) -> dict[int, messages.Participants]:
        """Close `advertise`; return what to send to whom. Raises `TooFewError`, as all that follow do."""
        self._keys, self._ids = self._came, tuple(sorted(self._came))
        self._close(ADVERTISE, self.terms.smallest(len(self._ids)), "have advertised keys")
        digests = b"".join(self._keys[client].digest(self._roster[client]) for client in self._ids)
        self._context = self.terms.context(self._ids, digests)
        near = self.terms.graph(self._ids, digests).all.tolist()
        self._neighbours = {c: [self._ids[place] for place in near[i]] for i, c in enumerate(self._ids)}
        written = {client: keys.to_bytes() for client, keys in self._keys.items()}
        self._open(SHARE, self._ids)
        return {
            client: messages.Participants(self.terms.round, self._ids, digests, {o: written[o] for o in others})
            for client, others in self._neighbours.items()
        }

    def deliveries(self) -> dict[int, messages.Delivery]:
        """Close `share`; return what to send to whom."""
        least = self.terms.smallest(len(self._ids))
        self._close(SHARE, least, "have shared their secrets")
        # Whoever is left with too few neighbours for its masks to be removed cannot go on.
        while alone := [client for client in self._came if self._holders(client) < self._needed]:
            for client in alone:
                self.refused[client] = "too few of its neighbours have shared their secrets"
                del self._came[client]
        self._close(SHARE, least, "have neighbours enough that have shared their secrets")
        self._shares = self._came
        self._open(MASK, self.answered[SHARE])
        sealed = {client: self._shares.keys() & set(self._neighbours[client]) for client in self._shares}
        return {
            client: messages.Delivery(self.terms.round, {o: self._shares[o].sealed[client] for o in others})
            for client, others in sealed.items()
        }

    def survivors(self) -> messages.Survivors:
        """Close `mask`; return what to send to all whose vectors came, to confirm it (profile malicious)."""
        self._close(MASK, self.terms.smallest(len(self._ids)), "have sent their vectors")
        self._open(CONFIRM if self.terms.profile == MALICIOUS else UNMASK, self.answered[MASK])
        return messages.Survivors(self.terms.round, self.answered[MASK])

    def unmask_request(self) -> messages.UnmaskRequest:
        """Close `confirm`, where there is one; return what to send to all that are left (`answered` says who)."""
        signatures: dict[int, bytes] = {}
        if self.terms.profile == MALICIOUS:
            self._close(CONFIRM, self._needed, "have confirmed the survivors")
            # As many as a client asks for: to check one takes it a tenth of a millisecond.
            first = self.answered[CONFIRM][: self._needed]
            signatures = {client: self._came[client].signature for client in first}
            self._open(UNMASK, self.answered[CONFIRM])
        return messages.UnmaskRequest(self.terms.round, self.answered[MASK], signatures)

    def total(self) -> np.ndarray:
        """Close `unmask`; return the sum of the survivors' vectors modulo 2^m, (length,) uint32.

        Raises `TooFewError` if too few shares of a secret came, `ForgedError` if they make another than was shared.
        """
        self._close(UNMASK, self._needed, "have answered to remove the masks")
        survivors = set(self.answered[MASK])
        dropped = self._shares.keys() - survivors
        secrets = self._secrets(sorted(self._shares))
        added: list[bytes] = []
        subtracted: list[bytes] = []
        for client in survivors:
            if commitment(self._context, client, secrets[client]) != self._shares[client].commitment:
                raise ForgedError(f"the shares of client {client}'s self mask make another seed than it has used")
            subtracted.append(secrets[client])
        for client in dropped:
            pair = KeyPair.of(secrets[client])
            if pair.public != self._keys[client].mask:
                raise ForgedError(f"the shares of client {client}'s mask key make another than it has advertised")
            agree = Agreement("mask", client, pair, self._context)
            for other in survivors.intersection(self._neighbours[client]):
                # What the survivor has added is subtracted, and the other way round.
                (subtracted if other < client else added).append(agree(other, self._keys[other].mask))
        add_masks(self._total, added, subtracted)
        self._open("", ())
        return in_ring(self._total, self.terms.bits)

    @property
    def _needed(self) -> int:
        return self.terms.needed(len(self._ids))

    def _holders(self, client: int) -> int:
        return 1 + sum(other in self._came for other in self._neighbours[client])

    def _close(self, stage: str, least: int, what: str) -> None:
        if self._stage != stage:
            raise OutOfTurnError(f"the round is at stage '{self._stage}', not '{stage}'")
        self.answered[stage] = tuple(sorted(self._came))
        checks.enough(len(self._came), least, what)

    def _open(self, stage: str, clients: Sequence[int]) -> None:
        self._stage, self._expected, self._came = stage, set(clients), {}

    def _advertised(self, answer: messages.Advertisement) -> messages.Advertisement:
        signed = messages.Advertisement.signed_part(self.terms.hash, answer.client, answer.channel, answer.mask)
        self._roster.verify(answer.client, signed, answer.signature)
        own = {answer.channel, answer.mask}
        for key in own:
            check_public(key)
        if len(own) < 2 or any(own & {keys.channel, keys.mask} for keys in self._came.values()):
            raise InconsistentError("its keys are not new")
        return answer

    def _shared(self, answer: messages.Shares) -> messages.Shares:
        if sorted(answer.sealed) != self._neighbours[answer.client]:
            raise InconsistentError("its shares are not for its neighbours")
        return answer

    def _masked(self, answer: messages.Masked) -> None:
        if len(answer.vector) != self.terms.length * word_bytes(self.terms.bits):
            raise InconsistentError(f"its vector has not {self.terms.length} numbers")
        # A running sum: all vectors together would not fit in memory.
        np.add(self._total, unpack(answer.vector, self.terms.bits), out=self._total)

    def _confirmed(self, answer: messages.Confirmation) -> messages.Confirmation:
        signed = messages.Confirmation.signed_part(self._context, self.answered[MASK])
        self._roster.verify(answer.client, signed, answer.signature)
        return answer

    def _unmasked(self, answer: messages.Unmasking) -> dict[int, bytes]:
        held = self._shares.keys() & {answer.client, *self._neighbours[answer.client]}
        if answer.shares.keys() != held or any(len(share) != SHARE_BYTES for share in answer.shares.values()):
            raise InconsistentError("its shares are not those that it holds")
        return answer.shares

    def _secrets(self, owners: Sequence[int]) -> dict[int, bytes]:
        """Return the secrets of which shares came: those with the same holders are combined together."""
        together: dict[tuple[int, ...], list[tuple[int, list[bytes]]]] = defaultdict(list)
        for owner in owners:
            holders = holders_of(owner, self._neighbours[owner])
            found = {x: self._came[holder][owner] for x, holder in enumerate(holders, 1) if holder in self._came}
            together[tuple(found)].append((owner, list(found.values())))
        out: dict[int, bytes] = {}
        for points, group in together.items():
            words = np.frombuffer(b"".join(share for _, shares in group for share in shares), "<u4")
            # (owners, holders, words) -> (holders, owners and words)
            side_by_side = words.reshape(len(group), len(points), -1).transpose(1, 0, 2).reshape(len(points), -1)
            secrets = combine(points, side_by_side, self._needed)
            size = len(secrets) // len(group)
            out |= {owner: secrets[i * size : (i + 1) * size] for i, (owner, _) in enumerate(group)}
        return out


_ANSWERS: dict[type, tuple[str, Callable[[Server, Any], Any]]] = {
    messages.Advertisement: (ADVERTISE, Server._advertised),
    messages.Shares: (SHARE, Server._shared),
    messages.Masked: (MASK, Server._masked),
    messages.Confirmation: (CONFIRM, Server._confirmed),
    messages.Unmasking: (UNMASK, Server._unmasked),
}
