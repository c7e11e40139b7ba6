"""Mime Lite: the server's momentum, held fixed, in every local step. Karimireddy et al., NeurIPS 2021, "Breaking the
centralized barrier for cross-device federated learning".

With SGD and momentum beta: y <- y - eta ((1 - beta) g_i(y) + beta m); the server takes x = mean(y_i) and
m <- (1 - beta) mean(grad f_i(x)) + beta m, with the clients' full-batch gradients at x (under local-steps those of the
round's batches). Clients count the same. Running statistics are averaged. Uplink and downlink are twice those of
FedAvg.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from flwr.app import MetricRecord
from torch import nn

from core.config import RunConfig
from core.errors import InputError
from core.records import travelling
from core.server_side import ServerSide
from core.training import LocalRound, LocalUpdate, global_gradient, local_sgd
from strategies.linear import Uniform, Vectors
from strategies.requirements import local_rate, needs_plain_sgd, trainable

MOMENTUM = "momentum"


class MimeLite(Uniform):
    """FedAvg whose clients step with the server's momentum, beta = server_momentum."""

    def __init__(self, *, server_momentum: float = 0.9, **fedavg: Any) -> None:
        if not 0 <= server_momentum < 1:
            raise ValueError("server-momentum must be from 0 and below 1")
        super().__init__(**fedavg)
        self.server_momentum = server_momentum
        self.momentum: Vectors = {}

    @staticmethod
    def check(config: RunConfig, model: nn.Module) -> None:
        """Refuse local optimisers other than that whose momentum the server keeps."""
        needs_plain_sgd(config, "mimelite's local steps")
        if config.weight_decay:
            raise InputError(
                "weight-decay acts on the part 1 - server-momentum of mimelite's step only; set weight-decay=0."
            )

    def set_up(self, server: ServerSide) -> None:
        """Begin with a momentum of zero."""
        self.momentum = {name: np.zeros(server.initial[name].shape, np.float32) for name in trainable(server)}

    def beside(self) -> dict[str, Vectors]:
        """Return the server's momentum m."""
        return {MOMENTUM: self.momentum}

    def combine(self, mean: Vectors, beside: dict[str, Vectors], metrics: MetricRecord, weight: float) -> Vectors:
        """Return mean(y_i), and move m by the mean of the full-batch gradients."""
        beta, gradient = self.server_momentum, beside[MOMENTUM]
        self.momentum = {n: ((1 - beta) * gradient[n] + beta * m).astype(np.float32) for n, m in self.momentum.items()}
        return mean

    @staticmethod
    def sends(model: nn.Module, options: Mapping[str, Any]) -> list[str]:
        """Return the model's tensors, and as much beside them."""
        return [*travelling(model), *(f"{MOMENTUM}/{n}" for n, p in model.named_parameters() if p.requires_grad)]

    @staticmethod
    def local_update(r: LocalRound) -> LocalUpdate:
        """Return y_i, and grad f_i(x) beside it."""
        beta = r.options["server-momentum"]
        # eta ((1 - beta) g + beta m) is SGD with rate eta (1 - beta) on g + beta / (1 - beta) m.
        assert isinstance(r.optimizer, functools.partial)
        scaled = functools.partial(r.optimizer, lr=local_rate(r) * (1 - beta))
        ahead = {name: beta / (1 - beta) * m for name, m in r.sent[MOMENTUM].items()}
        gradient = global_gradient(r)
        update = local_sgd(
            replace(r, optimizer=scaled),
            correction=lambda w: {name: ahead[name].expand_as(p) for name, p in w.items()},
        )
        return LocalUpdate(update.params, update.loss, {}, {}, {MOMENTUM: gradient}, torch.ones_like(update.loss))
