"""A Grid that watches: it counts traffic, remembers the last replies, and lists nodes in the order of their clients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from core import records


@dataclass
class Observed:
    """What passed since `take` was last called: a row per client that trained, and why the others did not."""

    clients: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    sampled: int = 0
    downlink_bytes: int = 0
    """Bytes of arrays to the clients and, below, back: as if every client had its own connection."""
    uplink_bytes: int = 0


class ObservedGrid(Grid):
    """Wraps any Flower Grid. Strategies see a Grid; the recorder sees what happened in the round."""

    def __init__(self, grid: Grid) -> None:
        self.inner = grid
        self.order: Mapping[int, int] = {}
        """Client number by node id: Flower's node ids are random, and sampling must not depend on them."""
        self._observed = Observed()
        self._payload: tuple[RecordDict | None, int] = (None, 0)

    def take(self) -> Observed:
        """Return what was observed since the last call, and start anew."""
        observed, self._observed = self._observed, Observed()
        return observed

    def set_run(self, run: Run) -> None:
        """Set the run of the wrapped grid."""
        self.inner.set_run(run)

    @property
    def run(self) -> Run:
        """Return the run of the wrapped grid."""
        return self.inner.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a new message of the wrapped grid."""
        return self.inner.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return the node ids, in the order of their clients once that is known."""
        nodes = self.inner.get_node_ids()
        return sorted(nodes, key=lambda node: self.order.get(node, node)) if self.order else nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push the messages and count them."""
        return self.inner.push_messages(self._sent(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull replies and count them."""
        return self._received(self.inner.pull_messages(message_ids))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send the messages, wait for the replies and count both."""
        replies = self._received(self.inner.send_and_receive(self._sent(messages), timeout=timeout))
        # Flower's own grids return replies as they arrive; a sum of floats must not depend on that.
        return sorted(replies, key=lambda reply: self._place(reply.metadata.src_node_id))

    def _place(self, node: int) -> int:
        return self.order.get(node, node)

    def _sent(self, messages: Iterable[Message]) -> list[Message]:
        messages = list(messages)
        self._payload = (None, 0)
        for message in messages:
            if self._payload[0] is not message.content:
                self._payload = (message.content, records.array_bytes(message.content))
            self._observed.downlink_bytes += self._payload[1]
        self._observed.sampled += sum(message.metadata.message_type == "train" for message in messages)
        return messages

    def _received(self, replies: Iterable[Message]) -> list[Message]:
        replies = list(replies)
        for reply in replies:
            if reply.has_error():
                client = self._place(reply.metadata.src_node_id)
                self._observed.failures.append({"client": client, "reason": str(reply.error.reason)})
                continue
            content = reply.content
            rows: dict[str, Any] = dict(content.config_records.get(records.CLIENTS, ConfigRecord()))
            covered = rows.get(records.CLIENT, [self._place(reply.metadata.src_node_id)])
            self._observed.uplink_bytes += records.array_bytes(content) * len(covered)
            if reply.metadata.message_type == "train":
                self._observed.clients.extend(_rows(rows, covered, content))
        return replies


def _rows(columns: dict[str, Any], clients: list[int], content: RecordDict) -> list[dict[str, Any]]:
    metrics = records.metrics_of(content)
    keys = (records.NUM_EXAMPLES, records.TRAIN_LOSS, records.TRAIN_SECONDS)
    table = {key: columns.get(key, [metrics.get(key, float("nan"))] * len(clients)) for key in keys}
    return [
        {"client": client, **{key.replace("-", "_"): values[i] for key, values in table.items()}}
        for i, client in enumerate(clients)
    ]
