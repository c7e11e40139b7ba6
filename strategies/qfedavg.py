"""q-FedAvg: clients on which the global model does badly weigh more. Li et al., ICLR 2020, algorithm 2.

Running statistics move as parameters do, by the same rule.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp import strategy

from core.records import in_dtypes_of
from core.training import LocalRound, LocalUpdate, global_loss, local_sgd

GLOBAL_LOSS = "global-loss"


class QFedAvg(strategy.QFedAvg):
    """Flower's class, with the loss that the paper's formula takes: F_k at the global model, before any local step."""

    def __init__(self, *, client_learning_rate: float, q: float = 0.1, **fedavg: Any) -> None:
        super().__init__(client_learning_rate, q=q, train_loss_key=GLOBAL_LOSS, **fedavg)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the new global arrays, float32 as they were, and the aggregated metrics."""
        before = dict(self.current_arrays or {})  # Flower's class empties the record while it reads it.
        arrays, metrics = super().aggregate_train(server_round, replies)
        return arrays and in_dtypes_of(arrays, before), metrics

    @staticmethod
    def local_update(r: LocalRound) -> LocalUpdate:
        """Return the cohort after local SGD, and each client's mean loss under the global model, (C,)."""
        return replace(local_sgd(r), metrics={GLOBAL_LOSS: global_loss(r)})
