"""Server optimisers as published: Reddi et al., ICLR 2021, algorithm 2; momentum: Hsu et al., 2019, "FedAvgM".

Flower's classes do the work. Its FedAvgM has no momentum unless it is given one, its FedAdam adds a bias correction
that the paper does not have, and its FedAdagrad drops the first moment: here all three follow the paper, and
`bias-correction` brings Flower's FedAdam back; FedYogi is Flower's as it is. Both moments begin at 0, where the
paper's v begins at tau^2 or more, and d is weighted by examples. Running statistics take no server step: they are plain
weighted means.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp import strategy

from core.records import in_dtypes_of


class FedAvgM(strategy.FedAvgM):
    """v = beta v + d;  x = x + eta v, with beta = server_momentum and eta = server_learning_rate."""

    def __init__(self, *, server_momentum: float = 0.9, **fedavgm: Any) -> None:
        super().__init__(server_momentum=server_momentum, **fedavgm)


class FedAdam(strategy.FedAdam):
    """m = beta_1 m + (1 - beta_1) d;  v = beta_2 v + (1 - beta_2) d^2;  x = x + eta m / (sqrt(v) + tau)."""

    def __init__(self, *, bias_correction: bool = False, **fedopt: Any) -> None:
        super().__init__(**fedopt)
        self.bias_correction = bias_correction

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the new global arrays and the aggregated metrics."""
        # Flower multiplies eta by the correction: dividing by it beforehand leaves the published step.
        correction = np.sqrt(1 - self.beta_2 ** (server_round + 1.0)) / (1 - self.beta_1 ** (server_round + 1.0))
        eta, self.eta = self.eta, self.eta if self.bias_correction else self.eta / correction
        try:
            arrays, metrics = super().aggregate_train(server_round, replies)
        finally:
            self.eta = eta
        return arrays and in_dtypes_of(arrays, self.current_arrays or {}), metrics


class FedAdagrad(strategy.FedAdagrad):
    """v = v + d^2; m and x as in FedAdam, with beta_1 = 0 unless given."""

    def __init__(self, *, beta_1: float = 0.0, **fedopt: Any) -> None:
        super().__init__(**fedopt)
        self.beta_1 = beta_1
