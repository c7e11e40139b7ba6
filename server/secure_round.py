"""One round of secure aggregation over a Grid: stages as messages, each closed when all have answered or time is up.

Several parties may run side by side, each with a sum of its own. What goes wrong in one ends that one alone. An answer
counts only for the node that it came from, while its stage is open; one that comes later is never fetched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from core import records
from privacy.secagg import messages
from privacy.secagg.errors import MalformedError, SecAggError
from privacy.secagg.graph import MALICIOUS
from privacy.secagg.server import Server

_ANSWERS: dict[str, Any] = {
    messages.ADVERTISE: messages.Advertisement,
    messages.SHARE: messages.Shares,
    messages.MASK: messages.Masked,
    messages.CONFIRM: messages.Confirmation,
    messages.UNMASK: messages.Unmasking,
}
_QUERIES = {
    messages.ADVERTISE: records.QUERY_ADVERTISE,
    messages.SHARE: records.QUERY_SHARE,
    messages.CONFIRM: records.QUERY_CONFIRM,
    messages.UNMASK: records.QUERY_UNMASK,
}


@dataclass
class Party:
    """The clients of one sum, by their nodes, and the protocol's server."""

    server: Server | None
    nodes: Mapping[int, int]
    error: str = ""
    """Why there is no sum."""
    total: np.ndarray | None = None
    reasons: dict[int, str] = field(default_factory=dict)
    """Why clients did not answer, by client."""
    sent: Counter[int] = field(default_factory=Counter)
    """Bytes that each client has sent."""
    received: int = 0
    """Bytes that all clients were sent."""

    @property
    def counted(self) -> tuple[int, ...]:
        """Return who is in the sum, where there is one."""
        return self.server.answered[messages.MASK] if self.server and self.total is not None else ()

    @property
    def dropped(self) -> Counter[str]:
        """Return how many clients have dropped out at each stage."""
        found: Counter[str] = Counter()
        before = len(self.nodes)
        for stage, clients in (self.server.answered if self.server else {}).items():
            found[stage] += before - len(clients)
            before = len(clients)
        return found

    @property
    def recovered(self) -> int:
        """Return how many clients dropped out after they had shared their secrets, and yet there is a sum."""
        answered = self.server.answered if self.server else {}
        return len(answered[messages.SHARE]) - len(answered[messages.UNMASK]) if self.total is not None else 0

    @contextmanager
    def failing(self) -> Iterator[Server | None]:
        """Give the server while there is a round; an error of the protocol ends it."""
        try:
            yield self.server
        except SecAggError as error:
            self.error = f"{type(error).__name__}: {error}"


class SecureRound:
    """Asks clients over a Grid. `seconds` is how long they have for a message beside training, None without end."""

    def __init__(
        self, grid: Grid, client_of: Callable[[int], int], *, together: bool, seconds: float | None,
        server_round: int,
    ) -> None:  # fmt: skip
        self._grid, self._client_of, self._together = grid, client_of, together
        self._seconds, self._server_round = seconds, server_round

    def run(self, parties: Sequence[Party], message_type: str, content: RecordDict, timeout: float | None) -> None:
        """Run the protocol for all parties; each has a total after it, or an error.

        `content` is what all train from, in a message of `message_type`; training has `timeout` seconds.
        """
        self._stage(parties, messages.ADVERTISE, lambda s, p: dict.fromkeys(p.nodes, s.terms))
        self._stage(parties, messages.SHARE, lambda s, p: s.participants())
        self._stage(parties, messages.MASK, lambda s, p: s.deliveries(), message_type, content, timeout)
        self._stage(parties, messages.CONFIRM, _confirming)
        self._stage(parties, messages.UNMASK, _unmasking)
        for party in parties:
            with party.failing() as server:
                if server is not None and not party.error:
                    party.total = server.total()

    def _stage(
        self, parties: Sequence[Party], stage: str,
        outgoing: Callable[[Server, Party], Mapping[int, messages.Message]], message_type: str = "",
        content: RecordDict | None = None, timeout: float | None = None,
    ) -> None:  # fmt: skip
        party_of: dict[int, Party] = {}
        parts: dict[int, bytes] = {}
        for party in parties:
            with party.failing() as server:
                if server is None or party.error:
                    continue
                found = outgoing(server, party)
                # The same message for many is written once.
                written = {id(message): message.to_bytes() for message in {id(m): m for m in found.values()}.values()}
                own = {client: written[id(message)] for client, message in found.items()}
                party.received += sum(map(len, own.values()))
                parts |= own
                party_of |= dict.fromkeys(found, party)
        if not parts:
            return
        asked = [
            Message(own, party_of[client].nodes[client], message_type or _QUERIES[stage])
            for client, own in self._contents(parts, content).items()
        ]
        seconds = timeout if stage == messages.MASK else self._seconds
        for reply in self._grid.send_and_receive(asked, timeout=seconds):
            self._take(reply, stage, party_of)

    def _contents(self, parts: Mapping[int, bytes], content: RecordDict | None) -> dict[int, RecordDict]:
        """Return each client's message. On one machine all have one: what is shared travels once, and in cohorts."""

        def with_record(record: dict[str, Any]) -> RecordDict:
            own = RecordDict(dict(content.items()) if content is not None else {})
            own[records.SECURE] = ConfigRecord({records.SERVER_ROUND: self._server_round, **record})
            return own

        if len(set(map(id, parts.values()))) == 1:
            return dict.fromkeys(parts, with_record({records.PART: next(iter(parts.values()))}))
        if self._together:
            clients = sorted(parts)
            columns = {records.CLIENT: clients, records.PART: [parts[client] for client in clients]}
            return dict.fromkeys(clients, with_record(columns))
        return {client: with_record({records.PART: part}) for client, part in parts.items()}

    def _take(self, reply: Message, stage: str, party_of: Mapping[int, Party]) -> None:
        """Give the answers of a reply to their parties' servers; only the local engine answers for several clients."""
        sender = self._client_of(reply.metadata.src_node_id)
        if reply.has_error():
            party_of[sender].reasons[sender] = str(reply.error.reason)
            return
        try:
            record: dict[str, Any] = dict(reply.content.config_records[records.SECURE])
            answers: dict[int, Any] = dict(zip(record[records.CLIENT], record[records.PART], strict=True))
            if not self._together:
                answers = {sender: answers[sender]}
        except (KeyError, TypeError, ValueError):
            party_of[sender].reasons[sender] = "its answer is none of the protocol"
            return
        for client, data in answers.items():
            party = party_of[client]
            assert party.server is not None
            try:
                party.sent[client] += len(data)
                counts = party.server.take(client, _ANSWERS[stage].from_bytes(data))
            except (MalformedError, TypeError) as error:
                party.reasons[client] = f"its answer cannot be read: {error}"
                continue
            if not counts:
                party.reasons[client] = f"{records.REJECTED}: {party.server.refused.get(client, 'it does not count')}"


def _confirming(server: Server, party: Party) -> Mapping[int, messages.Message]:
    """Return whom to ask to confirm the survivors: nobody in a profile that has no such stage."""
    survivors = server.survivors()
    return dict.fromkeys(survivors.ids, survivors) if server.terms.profile == MALICIOUS else {}


def _unmasking(server: Server, party: Party) -> Mapping[int, messages.Message]:
    """Return whom to ask to remove the masks: all that are left."""
    request = server.unmask_request()
    last = messages.CONFIRM if server.terms.profile == MALICIOUS else messages.MASK
    return dict.fromkeys(server.answered[last], request)
