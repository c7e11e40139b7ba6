"""What robust rules share: centred updates, buckets, and who was let in.

Rules see updates (local minus global model) and not models: distances between models in float32 drown in rounding, and
Krum on them picks attackers. `bucket_size` s averages random groups of s clients before the rule (Karimireddy, He and
Jaggi, ICLR 2022, algorithm 1): under label skew honest clients then look more alike. Numbers of examples do not weigh
unless a rule says so: a client could claim any. Running statistics pass through the rule like everything else.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, strategy

from core import records
from core.records import WeightedMean, to_arrays, to_numpy

Aggregated = tuple[ArrayRecord | None, MetricRecord | None]


class Robust(strategy.FedAvg):
    """Stands before one of Flower's strategies: hands it centred, bucketed replies and undoes the centring."""

    centred = True

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
        self.refused = 0
        """How many answers of the round the server took nothing of."""

    def rule(
        self, server_round: int, updates: np.ndarray, replies: list[Message]
    ) -> tuple[np.ndarray | None, MetricRecord | None]:
        """Return one update (d,) from those of n buckets (n, d) float32, and the aggregated metrics.

        By default it is what Flower's class makes of them. `replies` (n,) have the buckets' metrics and first clients.
        """
        for row, reply in zip(updates, replies, strict=True):
            reply.content[records.ARRAYS] = to_arrays(self._by_name(row))
        arrays, metrics = super().aggregate_train(server_round, replies)
        return None if arrays is None else _flat({name: to_numpy(a) for name, a in arrays.items()}), metrics

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Remember the global model and send it."""
        self.current = {name: to_numpy(array) for name, array in arrays.items()}
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        """Return the global model plus what the rule makes of the updates, and the aggregated metrics."""
        answered, failed = self._check_and_log_replies(replies, is_train=True)
        self.refused = sum(str(reply.error.reason).startswith(records.REJECTED) for reply in failed)
        if not answered:
            return None, None
        first = arrays_of(answered[0].content)
        if not self.current:
            # Whoever calls a rule without a round has no global model to centre on.
            self.current = {name: np.zeros(array.shape, array.dtype) for name, array in first.items()}
        # Python's generator is seeded anew for every round.
        order = answered if self.bucket_size == 1 else random.sample(answered, len(answered))
        updates = self._updates([reply.content for reply in order])
        buckets = [range(i, min(i + self.bucket_size, len(order))) for i in range(0, len(order), self.bucket_size)]
        clients = [[client_of(order[i].content) for i in bucket] for bucket in buckets]
        if self.bucket_size > 1:
            updates = np.stack([updates[bucket.start : bucket.stop].mean(0) for bucket in buckets])
            for bucket in buckets:
                order[bucket.start].content = self._joined([order[i].content for i in bucket])
        self.shares = None
        update, metrics = self.rule(server_round, updates, [order[bucket.start] for bucket in buckets])
        shares: Sequence[float] = self.shares or []
        self.influence = {
            client: float(share) / len(bucket)
            for bucket, share in zip(clients, shares, strict=bool(shares))
            for client in bucket
        }
        if update is None:
            return None, None
        if self.centred:
            update = update + _flat(self.current)
        return to_arrays({n: v.astype(self.current[n].dtype) for n, v in self._by_name(update).items()}), metrics

    def _updates(self, contents: Sequence[RecordDict]) -> np.ndarray:
        """Return what every client adds to the global model, (n, d) float32; models where the rule is not centred."""
        sizes = [value.size for value in self.current.values()]
        rows = np.empty((len(contents), sum(sizes)), np.float32)
        ends = np.cumsum(sizes)
        for row, content in zip(rows, contents, strict=True):
            arrays = arrays_of(content)
            for (name, origin), end, size in zip(self.current.items(), ends, sizes, strict=True):
                own, out = to_numpy(arrays[name]).ravel(), row[end - size : end]
                if self.centred:
                    np.subtract(own, origin.ravel(), out=out)
                else:
                    out[:] = own
        return rows

    def _by_name(self, row: np.ndarray) -> dict[str, np.ndarray]:
        """Return a vector (d,) as the model's tensors."""
        parts = np.split(row, np.cumsum([value.size for value in self.current.values()])[:-1])
        return {name: part.reshape(v.shape) for (name, v), part in zip(self.current.items(), parts, strict=True)}

    def _joined(self, contents: Sequence[RecordDict]) -> RecordDict:
        """Return a bucket's metrics, their mean but examples summed, and its first client."""
        metrics = WeightedMean()
        for content in contents:
            metrics.add(records.metrics_of(content), 1.0)
        mean = {name: value.item() for name, value in metrics.mean().items()}
        mean[self.weighted_by_key] *= len(contents)
        return RecordDict({records.METRICS: MetricRecord(mean), records.CLIENTS: _columns(contents[0])})


class Rule(Robust):
    """A rule that is a function of all updates as one matrix."""

    def combine(self, updates: np.ndarray, examples: np.ndarray) -> np.ndarray:
        """Return one update (d,) from those of n buckets, (n, d) float32, with their numbers of examples (n,)."""
        raise NotImplementedError

    def rule(
        self, server_round: int, updates: np.ndarray, replies: list[Message]
    ) -> tuple[np.ndarray | None, MetricRecord | None]:
        """Return the rule's update, and the aggregated metrics."""
        contents = [reply.content for reply in replies]
        examples = np.array([float(records.metrics_of(content)[self.weighted_by_key]) for content in contents])
        return self.combine(updates, examples), self.train_metrics_aggr_fn(contents, self.weighted_by_key)


def arrays_of(content: RecordDict) -> ArrayRecord:
    """Return the one record of arrays that a reply has."""
    return next(iter(content.array_records.values()))


def client_of(content: RecordDict) -> int:
    """Return the number of the client that a reply is from; -1 where a foreign client does not say."""
    return int(_columns(content).get(records.CLIENT, [-1])[0])  # type: ignore[index]


def _columns(content: RecordDict) -> ConfigRecord:
    return content.config_records.get(records.CLIENTS, ConfigRecord())


def _flat(tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([value.ravel() for value in tensors.values()])
