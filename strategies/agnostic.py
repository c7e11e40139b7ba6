"""Agnostic federated learning: the best model for the worst mixture of clients. Mohri, Sivek and Suresh, ICML 2019.

min over w, max over lambda in the simplex, of sum_k lambda_k F_k(w): clients descend on w, the server ascends on
lambda by their losses at the global model and projects back to the simplex. With local steps and sampled clients this
is algorithm 1 of Deng, Kamani and Mahdavi (NeurIPS 2020, "DRFA"), with lambda moved every round by the losses of
those that answered. A client's weight in the mean is lambda_k. Running statistics are weighted alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp import strategy

from core.server_side import ServerSide
from core.training import LocalRound, LocalUpdate, global_loss, local_sgd
from strategies.robust import client_of

GLOBAL_LOSS = "global-loss"


class Agnostic(strategy.FedAvg):
    """FedAvg with weights lambda that grow where the global model is bad; lambda's step is lambda_learning_rate."""

    def __init__(self, *, lambda_learning_rate: float = 0.1, **fedavg: Any) -> None:
        super().__init__(**fedavg)
        self.lambda_learning_rate = lambda_learning_rate
        self.mixture = np.ones(1)

    def set_up(self, server: ServerSide) -> None:
        """Begin with the mixture of all examples."""
        sizes = np.asarray(server.sizes, dtype=np.float64)
        self.mixture = sizes / sizes.sum()

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the mean of the models weighted by lambda, and move lambda by the losses."""
        replies = list(replies)
        losses = np.zeros_like(self.mixture)
        answered = [reply for reply in replies if reply.has_content()]
        for reply in answered:
            client, own = client_of(reply.content), next(iter(reply.content.metric_records.values()))
            # A weight of zero for all who answered would leave nothing to divide by.
            own[self.weighted_by_key] = max(float(self.mixture[client]), 1e-12)
            losses[client] = float(own[GLOBAL_LOSS])  # type: ignore[arg-type]
        arrays, metrics = super().aggregate_train(server_round, replies)
        if answered:
            # Those who did not answer stand in with the unbiased share of those who did.
            step = self.lambda_learning_rate * len(self.mixture) / len(answered)
            self.mixture = project(self.mixture + step * losses)
        return arrays, metrics

    @staticmethod
    def local_update(r: LocalRound) -> LocalUpdate:
        """Return the cohort after local SGD, and each client's mean loss under the global model, (C,)."""
        loss = global_loss(r)
        return replace(local_sgd(r), metrics={GLOBAL_LOSS: loss})


def project(v: np.ndarray) -> np.ndarray:
    """Return the point of the simplex nearest to v (n,): Duchi et al., ICML 2008, figure 1."""
    # What is taken from all changes nothing; beside a large loss the 1 below would drown in rounding.
    v = v - v.max()
    down = np.sort(v)[::-1]
    excess = np.cumsum(down) - 1
    last = np.flatnonzero(down - excess / np.arange(1, len(v) + 1) > 0)[-1]
    nearest: np.ndarray = np.maximum(v - excess[last] / (last + 1), 0)
    return nearest
