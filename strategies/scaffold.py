"""SCAFFOLD: control variates take the drift of unlike clients out of local steps. Karimireddy et al., ICML 2020.

Server c, client c_i (both begin at 0). Local steps (algorithm 1, line 10): y_i <- y_i - eta_l (g_i(y_i) - c_i + c);
option II of line 12: c_i+ = c_i - c + (x - y_i) / (K eta_l). Server: x <- x + eta_g mean(y_i - x) and c <- c + |S| / N
mean(c_i+ - c_i). Clients count the same, as in the paper. Running statistics are averaged, they have no control.
Uplink and downlink are twice those of FedAvg.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import MetricRecord
from torch import nn

from core.config import RunConfig
from core.records import Tensors, travelling
from core.server_side import ServerSide
from core.training import LocalRound, LocalUpdate, local_sgd
from strategies.linear import Uniform, Vectors
from strategies.requirements import local_rate, needs_plain_sgd, trainable

CONTROL = "control"


class Scaffold(Uniform):
    """FedAvg with control variates, eta_g = server_learning_rate."""

    private_by_example = True

    def __init__(self, *, server_learning_rate: float = 1.0, **fedavg: Any) -> None:
        super().__init__(**fedavg)
        self.server_learning_rate = server_learning_rate
        self.control: Vectors = {}
        self.clients = 1

    @staticmethod
    def check(config: RunConfig, model: nn.Module) -> None:
        """Refuse local optimisers whose steps are not eta_l times a gradient."""
        needs_plain_sgd(config, "scaffold's control variates")

    def set_up(self, server: ServerSide) -> None:
        """Begin with a control of zero."""
        self.clients = server.config.clients
        names = trainable(server)
        self.control = {name: np.zeros(t.shape, np.float32) for name, t in server.initial.items() if name in names}

    def beside(self) -> dict[str, Vectors]:
        """Return the server's control variate c."""
        return {CONTROL: self.control}

    def combine(self, mean: Vectors, beside: dict[str, Vectors], metrics: MetricRecord, weight: float) -> Vectors:
        """Return x + eta_g mean(y_i - x), and move c by the mean change of the clients' controls."""
        share = weight / self.clients
        self.control = {
            name: (c + share * beside[CONTROL][name]).astype(np.float32) for name, c in self.control.items()
        }
        eta = self.server_learning_rate
        return {name: self.current[name] + eta * (y - self.current[name]) for name, y in mean.items()}

    @staticmethod
    def initial_state(r: LocalRound) -> dict[str, Tensors]:
        """Return c_i = 0."""
        return {CONTROL: {name: torch.zeros_like(p) for name, p in r.global_params.items()}}

    @staticmethod
    def sends(model: nn.Module, options: Mapping[str, Any]) -> list[str]:
        """Return the model's tensors, and as much beside them."""
        return [*travelling(model), *(f"{CONTROL}/{n}" for n, p in model.named_parameters() if p.requires_grad)]

    @staticmethod
    def local_update(r: LocalRound) -> LocalUpdate:
        """Return y_i, and c_i+ - c_i beside it."""
        c, own = r.sent[CONTROL], r.state[CONTROL]
        drift = {name: c[name] - own[name] for name in c}
        update = local_sgd(r, correction=lambda w: drift)
        steps = r.batches.steps.to(r.x.device) * local_rate(r)
        change, kept = {}, dict(own)
        for name in c:
            scale = steps.view(-1, *[1] * c[name].ndim)
            change[name] = (r.global_params[name] - update.params[name]).div_(scale).sub_(c[name])
            kept[name] = own[name] + change[name]
        ones = torch.ones_like(update.loss)
        return LocalUpdate(update.params, update.loss, {}, {CONTROL: kept}, {CONTROL: change}, ones)
