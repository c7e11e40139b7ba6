"""A round of secure aggregation whose every byte is kept: messages and states travel as bytes, as they do for real."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from core.seeding import rng
from privacy.secagg import messages
from privacy.secagg.client import Client, State
from privacy.secagg.graph import MALICIOUS
from privacy.secagg.keys import Entropy, Identity, Roster
from privacy.secagg.masking import expand
from privacy.secagg.messages import ADVERTISE, CONFIRM, MASK, SHARE, UNMASK, Message, Terms
from privacy.secagg.server import Server

CONTENT = bytes(range(32))
RUN = "run"
ANSWERS: dict[str, Any] = {
    ADVERTISE: messages.Advertisement, SHARE: messages.Shares, MASK: messages.Masked, CONFIRM: messages.Confirmation,
    UNMASK: messages.Unmasking,
}  # fmt: skip


def drawn(*path: int | str) -> Entropy:
    """Return "random" bytes that belong to a path: the next of a stream at every call."""
    seed, count = rng(0, *path).bytes(32), itertools.count(1)
    return lambda size: expand(seed[:31] + bytes([next(count)]), -(-size // 4)).tobytes()[:size]


class Party:
    """Clients with odd ids and vectors, a server, and all that it gets to see. `terms` changes Terms."""

    def __init__(self, clients: int = 5, length: int = 7, bits: int = 32, server_round: int = 1, **terms: Any) -> None:
        self.ids = [2 * i + 10**12 * (i % 3) + 1 for i in range(clients)]
        self.terms = Terms(RUN, server_round, CONTENT, length, bits, **terms)
        self.identities = {client: Identity.generate(drawn("identity", client)) for client in self.ids}
        self.roster = Roster({client: identity.public for client, identity in self.identities.items()})
        self.states = {client: State().to_bytes() for client in self.ids}
        generator = rng(1, "vectors", server_round)
        self.vectors = {c: generator.integers(0, 1 << bits, length, dtype=np.uint32) for c in self.ids}
        self.secrets: list[bytes] = []
        """All random bytes that any client has drawn."""
        self.begin(self.terms)

    def begin(self, terms: Terms) -> None:
        """Begin a round, with what is left of the last one."""
        self.terms, self.seen = terms, []
        self.server = Server(terms, self.ids, self.roster)
        self._entropy = {client: self._drawing(client) for client in self.ids}

    def next_round(self) -> None:
        """Begin the next round."""
        self.begin(replace(self.terms, round=self.terms.round + 1))

    def _drawing(self, client: int) -> Entropy:
        source = drawn("client", client, self.terms.round)

        def draw(size: int) -> bytes:
            self.secrets.append(source(size))
            return self.secrets[-1]

        return draw

    @property
    def stages(self) -> list[str]:
        """Return the stages of this round, in their order."""
        return [s for s in messages.STAGES if s != CONFIRM or self.terms.profile == MALICIOUS]

    def client(self, client: int) -> Client:
        """Return a client made from the bytes that it has kept; `keep` keeps its new ones."""
        state = State.from_bytes(self.states[client])
        return Client(
            client, RUN, self.identities[client], self.roster, profile=self.terms.profile, state=state,
            entropy=self._entropy[client],
        )  # fmt: skip

    def answer(self, client: int, stage: str, message: Any, content: bytes = CONTENT) -> Any:
        """Return a client's answer, and keep its state, whether it answers or raises."""
        own = self.client(client)
        arguments = (self.vectors[client].copy(), content) if stage == MASK else ()
        try:
            return getattr(own, stage)(message, *arguments)
        finally:
            self.states[client] = own.state.to_bytes()

    def outgoing(self, stage: str) -> dict[int, Any]:
        """Close the last stage and return what the server sends for this one to whom, each as it arrives."""
        if stage == ADVERTISE:
            found: Mapping[int, Message] = dict.fromkeys(self.ids, self.terms)
        elif stage == SHARE:
            found = self.server.participants()
        elif stage == MASK:
            found = self.server.deliveries()
        elif stage == CONFIRM:
            survivors = self.server.survivors()
            found = dict.fromkeys(survivors.ids, survivors)
        else:
            if self.terms.profile != MALICIOUS:
                self.server.survivors()
            request = self.server.unmask_request()
            found = dict.fromkeys(self.server.answered[CONFIRM if self.terms.profile == MALICIOUS else MASK], request)
        return {client: type(message).from_bytes(message.to_bytes()) for client, message in found.items()}

    def send(self, client: int, stage: str, answer: Message) -> bool:
        """Return whether the server counts an answer, as it arrives."""
        data = answer.to_bytes()
        self.seen.append(data)
        return self.server.take(client, ANSWERS[stage].from_bytes(data))

    def run(self, stage: str, outgoing: Mapping[int, Any], absent: Collection[int] = ()) -> None:
        """Let all but some clients answer in a stage."""
        for client, message in outgoing.items():
            if client not in absent:
                assert self.send(client, stage, self.answer(client, stage, message)), self.server.refused

    def until(self, stage: str, absent: Mapping[str, Collection[int]] | None = None) -> dict[int, Any]:
        """Run all stages before one, without who is absent in them; return what the server sends for this one."""
        for before in self.stages[: self.stages.index(stage)]:
            self.run(before, self.outgoing(before), (absent or {}).get(before, ()))
        return self.outgoing(stage)

    def total(self, absent: Mapping[str, Collection[int]] | None = None) -> np.ndarray:
        """Run the whole round and return the sum."""
        self.run(UNMASK, self.until(UNMASK, absent), (absent or {}).get(UNMASK, ()))
        return self.server.total()

    def expected(self, clients: Collection[int]) -> list[int]:
        """Return the sum of these clients' vectors, added as int64."""
        total = sum((self.vectors[client].astype(np.int64) for client in clients), np.int64(0))
        return list(total % (1 << self.terms.bits))
