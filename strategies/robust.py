"""What robust rules share: centred updates, buckets, and who was let in.

Rules see updates (local minus global model) and not models: distances between models in float32 drown in rounding, and
Krum on them picks attackers. `bucket_size` s averages random groups of s clients before the rule (Karimireddy, He and
Jaggi, ICLR 2022, algorithm 1): under label skew honest clients then look more alike. Numbers of examples do not weigh
unless a rule says so: a client could claim any. Running statistics pass through the rule like everything else.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, strategy

from core import records
from core.records import WeightedMean, to_arrays, to_numpy

Aggregated = tuple[ArrayRecord | None, MetricRecord | None]


class Robust(strategy.FedAvg):
    """Stands before one of Flower's strategies: hands it centred, bucketed replies and undoes the centring."""

    def __init__(self, *, bucket_size: int = 1, **options: Any) -> None:
        if bucket_size < 1:
            raise ValueError("bucket-size must be at least 1")
        super().__init__(**options)
        self.bucket_size = int(bucket_size)
        self.current: dict[str, np.ndarray] = {}
        self.shares: Sequence[float] | None = None
        """Each bucket's share in the last model, where the rule gives shares."""
        self.influence: dict[int, float] = {}
        """Each client's share in the last model: the report counts malicious ones."""

    def rule(self, server_round: int, replies: list[Message]) -> Aggregated:
        """Return one update and the aggregated metrics from centred replies; by default what Flower's class makes."""
        return super().aggregate_train(server_round, replies)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Remember the global model and send it."""
        self.current = {name: to_numpy(array) for name, array in arrays.items()}
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        """Return the global model plus what the rule makes of the updates, and the aggregated metrics."""
        answered, _ = self._check_and_log_replies(replies, is_train=True)
        if not answered:
            return None, None
        # Python's generator is seeded anew for every round.
        order = answered if self.bucket_size == 1 else random.sample(answered, len(answered))
        buckets = [order[i : i + self.bucket_size] for i in range(0, len(order), self.bucket_size)]
        clients = [[client_of(reply.content) for reply in bucket] for bucket in buckets]
        for bucket in buckets:
            bucket[0].content = self._mean_update([reply.content for reply in bucket])
        self.shares = None
        update, metrics = self.rule(server_round, [bucket[0] for bucket in buckets])
        shares: Sequence[float] = self.shares or []
        self.influence = {
            client: float(share) / len(bucket)
            for bucket, share in zip(clients, shares, strict=bool(shares))
            for client in bucket
        }
        if update is None:
            return None, None
        moved = {name: to_numpy(array) for name, array in update.items()}
        new = {name: value + self.current[name] if self.current else value for name, value in moved.items()}
        return to_arrays({name: value.astype(np.float32) for name, value in new.items()}), metrics

    def _mean_update(self, contents: Sequence[RecordDict]) -> RecordDict:
        """Return replies as one, centred: the plain mean of updates and metrics, and the sum of examples."""
        arrays, metrics = WeightedMean(), WeightedMean()
        for content in contents:
            own = {name: to_numpy(array) for name, array in arrays_of(content).items()}
            own = {name: value - self.current.get(name, np.float32(0)) for name, value in own.items()}
            if len(contents) == 1:
                return RecordDict({records.ARRAYS: to_arrays(own), records.METRICS: _metrics(content),
                                   records.CLIENTS: _columns(content)})  # fmt: skip
            arrays.add(own, 1.0)
            metrics.add(dict(_metrics(content)), 1.0)
        mean = {name: value.item() for name, value in metrics.mean().items()}
        mean[self.weighted_by_key] *= len(contents)
        return RecordDict({
            records.ARRAYS: to_arrays({n: v.astype(np.float32) for n, v in arrays.mean().items()}),
            records.METRICS: MetricRecord(mean),
            records.CLIENTS: _columns(contents[0]),
        })  # fmt: skip


class Rule(Robust):
    """A rule that is a function of all updates as one matrix."""

    def combine(self, updates: np.ndarray, examples: np.ndarray) -> np.ndarray:
        """Return one update (d,) from those of n buckets, (n, d) float32, with their numbers of examples (n,)."""
        raise NotImplementedError

    def rule(self, server_round: int, replies: list[Message]) -> Aggregated:
        """Return the rule's update by name, and the aggregated metrics."""
        contents = [reply.content for reply in replies]
        updates = np.stack([np.concatenate([to_numpy(a).ravel() for a in arrays_of(c).values()]) for c in contents])
        examples = np.array([float(records.metrics_of(content)[self.weighted_by_key]) for content in contents])
        update, parts, at = self.combine(updates, examples), {}, 0
        for name, array in arrays_of(contents[0]).items():
            size = int(np.prod(array.shape))
            parts[name] = update[at : at + size].reshape(array.shape).astype(np.float32)
            at += size
        return to_arrays(parts), self.train_metrics_aggr_fn(contents, self.weighted_by_key)


def arrays_of(content: RecordDict) -> ArrayRecord:
    """Return the one record of arrays that a reply has."""
    return next(iter(content.array_records.values()))


def client_of(content: RecordDict) -> int:
    """Return the number of the client that a reply is from; -1 where a foreign client does not say."""
    return int(_columns(content).get(records.CLIENT, [-1])[0])  # type: ignore[index]


def _columns(content: RecordDict) -> ConfigRecord:
    return content.config_records.get(records.CLIENTS, ConfigRecord())


def _metrics(content: RecordDict) -> MetricRecord:
    return next(iter(content.metric_records.values()))
