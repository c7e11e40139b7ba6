"""FedDyn: a dynamic regulariser makes the clients' optima agree with the global one. Acar et al., ICLR 2021, alg. 1.

Client k minimises L_k(w) - <g_k, w> + alpha/2 ||w - w_t||^2 and then keeps g_k <- g_k - alpha (w_k - w_t). The server
keeps h <- h - alpha / m sum_{k in P} (w_k - w_t), with m all clients, and takes w <- mean_{k in P}(w_k) - h / alpha.
Clients count the same. Running statistics are averaged. Traffic is FedAvg's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from flwr.app import MetricRecord
from torch import nn

from core.config import RunConfig
from core.records import Tensors
from core.server_side import ServerSide
from core.training import LocalRound, LocalUpdate, local_sgd
from strategies.linear import Uniform, Vectors
from strategies.requirements import needs_small_steps, trainable

GRADIENT = "gradient"


class FedDyn(Uniform):
    """FedAvg with a dynamic regulariser of strength alpha."""

    private_by_example = True

    def __init__(self, *, alpha: float = 0.1, **fedavg: Any) -> None:
        if alpha <= 0:
            raise ValueError("alpha must be above 0")
        super().__init__(**fedavg)
        self.alpha = alpha
        self.h: Vectors = {}
        self.clients = 1

    @staticmethod
    def check(config: RunConfig, model: nn.Module) -> None:
        """Refuse a regulariser that plain SGD would turn into oscillation."""
        needs_small_steps(config, "alpha", 0.1)

    def set_up(self, server: ServerSide) -> None:
        """Begin with h = 0."""
        self.clients = server.config.clients
        self.h = {name: np.zeros(server.initial[name].shape, np.float32) for name in trainable(server)}

    def combine(self, mean: Vectors, beside: dict[str, Vectors], metrics: MetricRecord, weight: float) -> Vectors:
        """Return mean(w_k) - h / alpha."""
        share = self.alpha * weight / self.clients
        self.h = {n: (h - share * (mean[n] - self.current[n])).astype(np.float32) for n, h in self.h.items()}
        return mean | {name: mean[name] - h / self.alpha for name, h in self.h.items()}

    @staticmethod
    def initial_state(r: LocalRound) -> dict[str, Tensors]:
        """Return g_k = 0."""
        return {GRADIENT: {name: torch.zeros_like(p) for name, p in r.global_params.items()}}

    @staticmethod
    def local_update(r: LocalRound) -> LocalUpdate:
        """Return w_k and keep the new g_k."""
        alpha, own, origin = r.options["alpha"], r.state[GRADIENT], r.global_params
        # -g_k + alpha (w - w_t), of which all but alpha w stays for the round: one pass over the weights a step.
        fixed = {name: torch.add(g, origin[name], alpha=alpha).neg_() for name, g in own.items()}

        def correction(w: Tensors) -> Tensors:
            return {name: torch.add(fixed[name], p, alpha=alpha) for name, p in w.items()}

        update = local_sgd(r, correction=correction)
        names = {name for name, p in r.model.named_parameters() if p.requires_grad}
        kept = {
            name: torch.sub(g, update.params[name] - origin[name], alpha=alpha) if name in names else g
            for name, g in own.items()
        }
        return LocalUpdate(update.params, update.loss, {}, {GRADIENT: kept}, {}, torch.ones_like(update.loss))
