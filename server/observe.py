"""A Grid that watches: it counts traffic, remembers the last replies, and lists nodes in the order of their clients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from core import records
from core.config import RunConfig
from core.errors import RunError
from server.intake import refuse_odd, take_in
from server.secure_grid import SecureGrid
from server.wrapped import WrappedGrid

# How often a strategy may list the nodes of one round: Flower's asks again every second for those it waits for.
PATIENCE = 10
COLUMNS = (records.NUM_EXAMPLES, records.TRAIN_LOSS, records.TRAIN_SECONDS)
# A round's line names so many failures; the others are only counted.
NAMED = 20


Taken = tuple[int, int, int]
"""A client, its examples, and the private steps or updates that it says to have taken."""


@dataclass
class Observed:
    """What passed since `take` was last called: who trained, and why the others did not."""

    clients: dict[str, list[Any]] = field(
        default_factory=lambda: {key.replace("-", "_"): [] for key in (records.CLIENT, *COLUMNS)}
    )
    """A column per number that every client has, `client` first, in the order of the replies."""
    failures: list[dict[str, Any]] = field(default_factory=list)
    """Client and reason of each answer that is missing; those that were lost as configured stand last."""
    running: records.WeightedMean = field(default_factory=records.WeightedMean)
    """Of the normalisation statistics of the models that came back."""
    sampled: int = 0
    lost: int = 0
    """Answers that did not come because the client was out of reach or late, as configured."""
    rejected: int = 0
    """Answers that would have poisoned the model."""
    dropped: int = 0
    """Examples that private steps left out because their gradients were not finite."""
    canaries: list[tuple[int, bytes]] = field(default_factory=list)
    """Client and what its canary examples look like, in an audited run."""
    virtual_seconds: float = 0.0
    """Until the last answer that counts, by the clients' virtual clocks."""
    of_sums: records.WeightedMean = field(default_factory=records.WeightedMean)
    """Training loss by secure sums, where nobody's own is known."""
    downlink_bytes: int = 0
    """Bytes of arrays to the clients and, below, back: as if every client had its own connection."""
    uplink_bytes: int = 0

    @property
    def mean_loss(self) -> float:
        """Return the clients' training loss, weighted by examples; nan where nobody trained."""
        if found := self.of_sums.mean():
            return float(found[records.TRAIN_LOSS])
        weights = self.clients["num_examples"]
        return float(np.average(self.clients["train_loss"], weights=weights)) if weights else float("nan")


class ObservedGrid(WrappedGrid):
    """Wraps any Flower Grid. Strategies see a Grid; the recorder sees what happened in the round."""

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self.secure = grid if isinstance(grid, SecureGrid) else None
        # The local engine numbers its clients itself; elsewhere they say who they are at the start.
        self._client_of: Callable[[int], int] | None = getattr(grid, "client_of", None)
        self.running: Collection[str] = ()
        """Names of arrays that are normalisation statistics: their plain mean is observed."""
        self.config: RunConfig | None = None
        """Of the run, once there is one: how updates are encoded, and when a round ends."""
        self.before_training: Callable[[list[Message]], None] | None = None
        """Hears of a round's messages before they are sent."""
        self.virtual_seconds: Callable[[int, RecordDict], float] | None = None
        """(client, message) -> when it answers, where there is virtual time: what it says itself is not believed."""
        self.private: Callable[[list[Taken]], None] | None = None
        """Hears of the clients whose answers are private by themselves before anybody else does."""
        self._known: Sequence[int] = ()
        self._offered: Sequence[int] | None = None
        self._listed = 0
        self._observed = Observed()
        self._payload: tuple[RecordDict | None, int] = (None, 0)
        self._trained_on: dict[int, RecordDict] = {}

    def order_by(self, clients: Mapping[int, int]) -> None:
        """Learn the clients' numbers by node id: Flower's ids are random, and sampling must not depend on them.

        From then on these are the run's clients: one that goes is asked all the same, and missed.
        """
        if self._client_of is None:
            self._client_of = clients.__getitem__
            self._known = sorted(clients, key=self._client_of)
        if self.secure is not None:
            self.secure.order_by(clients)

    @property
    def numbered(self) -> bool:
        """Return whether the wrapped grid lists its nodes in the order of their clients."""
        return hasattr(self.inner, "client_of")

    @contextmanager
    def offering(self, nodes: Sequence[int]) -> Iterator[None]:
        """List these nodes alone meanwhile."""
        self._offered, self._listed = nodes, 0
        try:
            yield
        finally:
            self._offered = None

    def take(self) -> Observed:
        """Return what was observed since the last call, and start anew."""
        observed, self._observed = self._observed, Observed()
        return observed

    @property
    def client_states(self) -> dict[int, RecordDict]:
        """Return the clients' state by node where the wrapped grid keeps it; Flower's nodes keep their own."""
        return getattr(self.inner, "client_states", {})

    def take_changed_states(self) -> set[int]:
        """Return the nodes whose state has changed since the last call."""
        changed: set[int] = getattr(self.inner, "changed_states", set())
        taken = set(changed)
        changed.clear()
        return taken

    def get_node_ids(self) -> Iterable[int]:
        """Return the node ids, in the order of their clients once that is known; while some are offered, those."""
        if self._offered is not None:
            self._listed += 1
            if self._listed > PATIENCE:
                raise RunError(
                    f"the strategy waits for more clients than the {len(self._offered)} that this round offers; "
                    "let its min_available_nodes be 0, or set sampling.kind=uniform"
                )
            return self._offered
        return self._known or self.inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push the messages and count them."""
        return self.inner.push_messages(self._sent(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull replies and count them."""
        return self._received(self.inner.pull_messages(message_ids))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send the messages, wait for the replies and count both."""
        replies = self.inner.send_and_receive(self._sent(messages), timeout=timeout)
        # Flower's own grids return replies as they arrive; a sum of floats must not depend on that.
        return self._received(sorted(replies, key=lambda reply: self.client_of(reply.metadata.src_node_id)))

    def client_of(self, node: int) -> int:
        """Return the number of a node's client; the node id itself before that is known."""
        return node if self._client_of is None else self._client_of(node)

    def _sent(self, messages: Iterable[Message]) -> list[Message]:
        messages = list(messages)
        training = [message for message in messages if message.metadata.message_type == "train"]
        if training:
            self._refuse_twice(training)
            self._trained_on |= {message.metadata.dst_node_id: message.content for message in training}
            if self.before_training:
                self.before_training(training)
        self._payload = (None, 0)
        for message in messages:
            if self._payload[0] is not message.content:
                self._payload = (message.content, records.array_bytes(message.content))
            self._observed.downlink_bytes += self._payload[1]
        self._observed.sampled += len(training)
        return messages

    def _refuse_twice(self, training: Sequence[Message]) -> None:
        """Raise `RuntimeError` where a private run asks a client twice at once: both answers would cost it one."""
        asked = {message.metadata.dst_node_id for message in training}
        if len(asked) < len(training) and self.config is not None and self.config.privacy.level != "none":
            raise RunError("the strategy asks a client twice at once, which no epsilon is known for")

    def _received(self, replies: Iterable[Message]) -> list[Message]:
        replies = list(replies)
        for reply in replies:
            if reply.has_content() and self._client_of is not None:
                self._take_in(reply)
        refuse_odd([r for r in replies if r.has_content() and r.metadata.message_type == "train"])
        taken: list[Taken] = []
        for reply in replies:
            if reply.has_error():
                client = self.client_of(reply.metadata.src_node_id)
                lost = reply.error.code == records.LOST
                at = len(self._observed.failures) - (0 if lost else self._observed.lost)
                self._observed.failures.insert(at, {"client": client, "reason": str(reply.error.reason)})
                self._observed.lost += lost
                self._observed.rejected += str(reply.error.reason).startswith(records.REJECTED)
                continue
            content = reply.content
            rows: dict[str, Any] = dict(content.config_records.get(records.CLIENTS, ConfigRecord()))
            covered = rows.get(records.CLIENT, [self.client_of(reply.metadata.src_node_id)])
            each = rows.get(records.UPLINK_BYTES) or [records.array_bytes(content)] * len(covered)
            self._observed.uplink_bytes += sum(each)
            if reply.metadata.message_type == "train":
                self._trained(content, rows, covered)
                # Who is in a sum does not say how many examples it has, and pays alike for any.
                sizes = rows.get(records.NUM_EXAMPLES, [0] * len(covered))
                taken.extend(zip(covered, sizes, rows.get(records.PRIVATE_STEPS, ()), strict=False))
                if self.config is not None and self.config.privacy.level != "none":
                    _keep_losses_back(content)
        if self.secure is not None:
            self._observed.uplink_bytes += self.secure.traffic.pop("up", 0)
            self._observed.downlink_bytes += self.secure.traffic.pop("down", 0)
        if taken and self.private is not None:
            self.private(taken)
        return replies

    def _take_in(self, reply: Message) -> None:
        node, sent, server_round = reply.metadata.src_node_id, None, 0
        if reply.metadata.message_type == "train":
            content = self._trained_on.get(node, RecordDict())
            sent = next(iter(content.array_records.values()), ArrayRecord())
            server_round = records.server_round(content) or 0
        # The engine's own answers may speak for many clients, and say which, and what each of them sent; so do sums.
        ours = self.numbered or records.SECURE in reply.content.config_records.get(records.CLIENTS, {})
        size = records.array_bytes(reply.content)
        take_in(reply, sent, self.config, server_round, None if ours else self.client_of(node))
        if not ours and reply.has_content():
            rows = reply.content.config_records[records.CLIENTS]
            rows[records.UPLINK_BYTES] = [size]
            rows.pop(records.VIRTUAL_SECONDS, None)
            if self.virtual_seconds and node in self._trained_on and reply.metadata.message_type == "train":
                rows[records.VIRTUAL_SECONDS] = [self.virtual_seconds(self.client_of(node), self._trained_on[node])]

    def _trained(self, content: RecordDict, rows: dict[str, Any], covered: list[int]) -> None:
        metrics = records.metrics_of(content)
        self._observed.dropped += sum(rows.get(records.DROPPED, ()))
        self._observed.canaries.extend(zip(covered, rows.get(records.CANARIES, ()), strict=False))
        slowest = max(rows.get(records.VIRTUAL_SECONDS, [0.0]))
        self._observed.virtual_seconds = max(self._observed.virtual_seconds, slowest)
        self._observed.clients["client"].extend(covered)
        summed = records.SECURE in rows
        if summed:
            self._observed.of_sums.add(
                {records.TRAIN_LOSS: metrics.get(records.TRAIN_LOSS, float("nan"))}, len(covered)
            )
        for key in COLUMNS:
            values = rows.get(key, [float("nan") if summed else metrics.get(key, float("nan"))] * len(covered))
            self._observed.clients[key.replace("-", "_")].extend(values)
        if self.running:
            [arrays] = content.array_records.values()
            # A personal layer's statistics stay where they are.
            means = {name: records.to_numpy(arrays[name]) for name in self.running if name in arrays}
            # Weighted as the model is: where one answer stands for many, their mean was made so.
            weight = metrics.get(records.WEIGHT, metrics[records.NUM_EXAMPLES])
            self._observed.running.add(means, float(weight))


def _keep_losses_back(content: RecordDict) -> None:
    """Take clients' losses out of an answer: no noise covers them, and a strategy could move the model by them."""
    found: list[Any] = [*content.metric_records.values(), *content.config_records.values()]
    for record in found:
        record.pop(records.TRAIN_LOSS, None)
