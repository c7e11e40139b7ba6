"""q-FedAvg: clients on which the global model does badly weigh more. Li et al., ICLR 2020, algorithm 2.

Running statistics are plain weighted means.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp import strategy

from core.records import ARRAYS, WeightedMean, in_dtypes_of, metrics_of, to_arrays, to_numpy
from core.server_side import ServerSide
from core.training import LocalRound, LocalUpdate, global_loss, local_sgd
from strategies.requirements import trainable
from strategies.robust import arrays_of

GLOBAL_LOSS = "global-loss"


class QFedAvg(strategy.QFedAvg):
    """Flower's class, with the loss that the paper's formula takes: F_k at the global model, before any local step."""

    def __init__(self, *, client_learning_rate: float, q: float = 0.1, **fedavg: Any) -> None:
        if client_learning_rate <= 0:
            raise ValueError("client-learning-rate must be above 0")
        super().__init__(client_learning_rate, q=q, train_loss_key=GLOBAL_LOSS, **fedavg)

    def set_up(self, server: ServerSide) -> None:
        """Learn which tensors the formula is about: running statistics would drown its norm."""
        self.names = trainable(server)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the new global arrays, float32 as they were, and the aggregated metrics."""
        replies, before = list(replies), dict(self.current_arrays or {})
        names = getattr(self, "names", list(before))
        statistics = WeightedMean()
        for reply in replies:
            if reply.has_content():
                arrays = arrays_of(reply.content)
                own = {name: to_numpy(array) for name, array in arrays.items() if name not in names}
                statistics.add(own, float(metrics_of(reply.content)[self.weighted_by_key]))
                said = next(iter(reply.content.metric_records.values()))
                if said.get(GLOBAL_LOSS, 0) < 0:  # type: ignore[operator]
                    # F^q of less than 0 is no number, and neither would be the model.
                    said[GLOBAL_LOSS] = 0.0
                reply.content[ARRAYS] = ArrayRecord({name: arrays[name] for name in names})
        # Flower's class empties the record while it reads it.
        self.current_arrays = ArrayRecord({name: before[name] for name in names})
        arrays_, metrics = super().aggregate_train(server_round, replies)
        if arrays_ is None:
            return None, None
        new = {**arrays_, **to_arrays(statistics.mean())}
        return in_dtypes_of(ArrayRecord({name: new[name] for name in before}), before), metrics

    @staticmethod
    def local_update(r: LocalRound) -> LocalUpdate:
        """Return the cohort after local SGD, and each client's mean loss under the global model, (C,)."""
        return replace(local_sgd(r), metrics={GLOBAL_LOSS: global_loss(r)})
