"""IFCA: several global models, and every client trains the one that fits it best. Ghosh et al., NeurIPS 2020.

The server sends all `clusters` models; a client takes the one with the least loss on its training examples (algorithm
1, line 6), trains it and sends it back with its number; the server averages within clusters, weighted by examples.
Models begin as different random initialisations. Running statistics go with their model. Downlink grows by the number
of models. The model that a run keeps, and its central metrics, are those of the cluster with most examples; clients
evaluate their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid, strategy
from torch import nn

from core import bundle, records
from core.config import RunConfig
from core.errors import InputError
from core.records import Tensors, WeightedMean, to_arrays, to_numpy, travelling
from core.seeding import derive
from core.server_side import ServerSide
from core.training import LocalRound, LocalUpdate, global_loss, local_sgd

CLUSTER = "cluster"


class IFCA(strategy.FedAvg):
    """FedAvg within clusters that find themselves."""

    def __init__(self, *, clusters: int = 2, **fedavg: Any) -> None:
        if clusters < 2:
            raise ValueError("clusters must be at least 2")
        super().__init__(**fedavg)
        self.clusters = int(clusters)
        self.models: list[dict[str, np.ndarray]] = []

    @staticmethod
    def check(config: RunConfig, model: nn.Module) -> None:
        """Refuse what looks at a client's update: the server does not know which model it is an update of."""
        if config.compression.kind == "top-k" or config.attack.kind not in ("none", "label-flip", "backdoor"):
            raise InputError(
                "ifca's clients send one of several models, not an update: choose compression.kind other than top-k "
                "and attack.kind=label-flip or backdoor."
            )

    def set_up(self, server: ServerSide) -> None:
        """Begin with the run's initial model and others from seeds of their own."""
        seeds = [server.config.seed, *(derive(server.config.seed, CLUSTER, k) for k in range(1, self.clusters))]
        fresh = [travelling(server.fresh_model(seed)) for seed in seeds]
        self.models = [{name: t.numpy().copy() for name, t in model.items()} for model in fresh]

    def for_evaluation(self, arrays: ArrayRecord) -> ArrayRecord:
        """Return what clients need to find their own model: all of them."""
        return bundle.join(arrays, {f"{CLUSTER}-{k}": to_arrays(model) for k, model in enumerate(self.models)})

    def outgoing(self, arrays: ArrayRecord) -> ArrayRecord:
        """Return all models: those who train look for their own too."""
        return self.for_evaluation(arrays)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send all models to the round's clients."""
        return super().configure_train(server_round, self.outgoing(arrays), config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the largest cluster's model, after each has become the mean of its clients'."""
        answered, _ = self._check_and_log_replies(replies, is_train=True)
        if not answered:
            return None, None
        means = [WeightedMean() for _ in self.models]
        examples = np.zeros(self.clusters)
        for reply in answered:
            metrics = records.metrics_of(reply.content)
            # A client may say what it likes: beyond the last one it is the last one.
            k = min(max(int(metrics[CLUSTER]), 0), self.clusters - 1)
            weight = float(metrics[self.weighted_by_key])
            [arrays] = reply.content.array_records.values()
            means[k].add({name: to_numpy(array) for name, array in arrays.items()}, weight)
            examples[k] += weight
        for k in np.flatnonzero(examples).tolist():
            self.models[k] = {n: v.astype(self.models[k][n].dtype) for n, v in means[k].mean().items()}
        metrics_ = self.train_metrics_aggr_fn([reply.content for reply in answered], self.weighted_by_key)
        return to_arrays(self.models[int(examples.argmax())]), metrics_

    @staticmethod
    def local_update(r: LocalRound) -> LocalUpdate:
        """Return each client's cluster, trained, and which one it is."""
        which, start = _nearest(r)
        return replace(local_sgd(r, start=start), metrics={CLUSTER: which.to(torch.float32)})

    @staticmethod
    def personal_model(r: LocalRound) -> Tensors:
        """Return the model with the least loss on each client's training examples."""
        return _nearest(r)[1]


def _nearest(r: LocalRound) -> tuple[torch.Tensor, Tensors]:
    """Return which model has the least loss for each client, (C,) int64, and that model, (C, ...) by name."""
    models = [r.sent[f"{CLUSTER}-{k}"] for k in range(len(r.sent))]
    which = torch.stack([global_loss(replace(r, global_params=model)) for model in models]).argmin(0)
    return which, {name: torch.stack([model[name] for model in models])[which] for name in models[0]}
