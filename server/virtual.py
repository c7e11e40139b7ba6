"""The virtual clock of a round: when it ends, and which of too many clients were the first to answer."""

from __future__ import annotations

import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp.strategy import Strategy

from core import records
from core.config import RunConfig
from core.server_side import ServerSide
from server.observe import Observed


class VirtualClock:
    """Counts virtual seconds; without devices it stays at None."""

    def __init__(self, config: RunConfig, server: ServerSide, before: float | None) -> None:
        self._config, self._server = config, server
        self.seconds: float | None = (before or 0.0) if config.devices.kind != "none" else None
        self._deadline = config.devices.deadline_seconds

    def set_deadline(self, messages: list[Message]) -> None:
        """Write into a round's messages when it ends: with over-selection, when as many as wanted have answered.

        Server and clients compute the same times, so that the clients know by themselves who comes too late.
        """
        self._deadline = self._config.devices.deadline_seconds
        if self._config.sampling.over_selection == 1 or not messages:
            return
        wanted = self._config.count(self._config.sampled)
        content = messages[0].content
        clients = np.array([self._server.client_of(message.metadata.dst_node_id) for message in messages])
        work = self._server.work(clients, content)
        # Who is out of reach, or will not finish, is not among the first to answer.
        seconds = np.sort(work.seconds[work.steps > 0])
        last = float(seconds[min(wanted, len(seconds)) - 1]) if len(seconds) else 0.0
        self._deadline = min(last, self._deadline) if self._deadline else last
        for each in {id(message.content): message.content for message in messages}.values():
            each.config_records[records.CONFIG][records.DEADLINE] = self._deadline

    def seconds_of(self, client: int, content: RecordDict) -> float:
        """Return the virtual seconds after which a client answers a training message: nobody has to be believed."""
        default = self._config.devices.deadline_seconds
        deadline = float(records.config_of(content).get(records.DEADLINE, default))
        return float(self._server.work(np.array([client]), content, deadline).seconds[0])

    def advance(self, observed: Observed, strategy: Strategy) -> float | None:
        """Count the round that was observed and return its virtual seconds: until the last answer or the deadline.

        A strategy that works without rounds keeps time itself.
        """
        if self.seconds is None:
            return None
        if hasattr(strategy, "virtual_seconds"):
            took, self.seconds = float(strategy.virtual_seconds) - self.seconds, strategy.virtual_seconds
            return took
        took = observed.virtual_seconds
        if observed.lost and self._deadline:
            took = self._deadline
        self.seconds += took
        return took
