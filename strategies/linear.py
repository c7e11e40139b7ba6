"""What our strategies on Flower's FedAvg have in common: weights that are not example counts, and what travels beside.

Everything here is a weighted mean, so that cohorts may answer with one and secure aggregation can take it as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid, strategy

from core import bundle, records
from core.records import to_arrays, to_numpy

Vectors = dict[str, np.ndarray]


class Linear(strategy.FedAvg):
    """FedAvg that remembers the global model, sends things beside it, and hands all sums to `combine`."""

    partial_means = True

    def __init__(self, *, weighted_by_key: str = records.NUM_EXAMPLES, **fedavg: Any) -> None:
        super().__init__(weighted_by_key=weighted_by_key, **fedavg)
        self.current: Vectors = {}

    def beside(self) -> Mapping[str, Vectors]:
        """Return what is sent to clients beside the model, by kind and name."""
        return {}

    def outgoing(self, arrays: ArrayRecord) -> ArrayRecord:
        """Return the model with what is sent beside it."""
        return bundle.join(arrays, {kind: to_arrays(own) for kind, own in self.beside().items()})

    def combine(self, mean: Vectors, beside: dict[str, Vectors], metrics: MetricRecord, weight: float) -> Vectors:
        """Return the new global model from the weighted mean of the clients' models and of what came beside them.

        `weight` is the sum of all weights. Tensors that no client sends stay as they are.
        """
        return mean

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the global model, and what stands beside it, to the round's clients."""
        self.current = {name: to_numpy(array) for name, array in arrays.items()}
        return super().configure_train(server_round, self.outgoing(arrays), config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the new global model and the aggregated metrics; nothing where nobody answered."""
        replies = list(replies)
        arrays, metrics = super().aggregate_train(server_round, replies)
        if arrays is None or metrics is None:
            return None, None
        own, others = bundle.split(arrays)
        weight = sum(
            float(records.metrics_of(reply.content)[self.weighted_by_key]) for reply in replies if reply.has_content()
        )
        beside = {kind: _vectors(found) for kind, found in others.items()}
        new = {**self.current, **self.combine(_vectors(own), beside, metrics, weight)}
        return to_arrays({name: new[name].astype(self.current[name].dtype) for name in self.current}), metrics


class Uniform(Linear):
    """As `Linear`, every client counting the same: its client half gives `LocalUpdate.weight` as ones."""

    def __init__(self, *, weighted_by_key: str = records.WEIGHT, **fedavg: Any) -> None:
        super().__init__(weighted_by_key=weighted_by_key, **fedavg)


def _vectors(arrays: ArrayRecord) -> Vectors:
    return {name: to_numpy(array) for name, array in arrays.items()}
