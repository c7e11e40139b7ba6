"""Per-FedAvg: a global model from which one step on a client's own data leads far. Fallah et al., NeurIPS 2020.

Clients minimise f_k(w - alpha grad f_k(w)): the inner step on one half of each batch, the outer loss on the other. The
gradient goes through the inner step, or with `first_order` past it (their FO variant). A client evaluates the global
model after one step of rate alpha on its own training examples. The server is FedAvg, and so is the traffic. Running
statistics are plain weighted means.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.func import grad

from core.records import Tensors
from core.training import LocalRound, LocalUpdate, everybody, global_gradient, local_sgd
from strategies.linear import Linear


class PerFedAvg(Linear):
    """FedAvg of the meta-objective; alpha = inner_learning_rate."""

    def __init__(self, *, inner_learning_rate: float = 0.01, first_order: bool = False, **fedavg: Any) -> None:
        super().__init__(**fedavg)
        self.inner_learning_rate, self.first_order = inner_learning_rate, first_order

    @staticmethod
    def local_update(r: LocalRound) -> LocalUpdate:
        """Return the cohort after local steps on the meta-objective."""
        alpha, first_order = r.options["inner-learning-rate"], r.options["first-order"]
        names = [name for name, p in r.model.named_parameters() if p.requires_grad]

        def objective(w: Tensors, _: Tensors, x: Tensor, y: Tensor, share: Tensor) -> Tensor:
            inner, outer = _halves(share)
            own = {name: w[name] for name in names}
            gradient = _gradient(r, own, x, y, inner)
            if first_order:
                gradient = {name: g.detach() for name, g in gradient.items()}
            return r.mean_loss({name: p - alpha * gradient[name] for name, p in own.items()}, x, y, outer)

        start = everybody({name: r.global_params[name] for name in names}, len(r.batches.steps))
        return local_sgd(r, objective=objective, start=start)

    @staticmethod
    def personal_model(r: LocalRound) -> Tensors:
        """Return the global model after one step on each client's training examples."""
        step, alpha = global_gradient(r), r.options["inner-learning-rate"]
        own = everybody(r.global_params, len(r.batches.steps))
        return {name: p - alpha * step[name] if name in step else p for name, p in own.items()}


def _gradient(r: LocalRound, own: Tensors, x: Tensor, y: Tensor, share: Tensor) -> Tensors:
    """Return the gradient of the mean loss, through which one can differentiate again."""
    if r.vectorised:
        return grad(functools.partial(r.mean_loss, aside=True))(own, x, y, share)
    # torch.func refuses models that change a buffer.
    found = torch.autograd.grad(r.mean_loss(own, x, y, share, aside=True), list(own.values()), create_graph=True)
    return dict(zip(own, found, strict=True))


def _halves(share: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights (B,) of every other example and of the rest, each adding up to 1; one example is both."""
    even = (torch.arange(len(share), device=share.device) % 2 == 0).to(share.dtype)
    first, second = share * even, share * (1 - even)
    second = second + first * (second.sum() == 0).to(share.dtype)
    return first / first.sum().clamp_min(1e-12), second / second.sum().clamp_min(1e-12)
