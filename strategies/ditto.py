"""Ditto: a model of its own for each client, held near the global one. Li et al., ICML 2021, algorithm 1.

Clients train the global model as in FedAvg, and beside it v_k on F_k(v) + lambda/2 ||v - w_t||^2, with as many steps
on the same batches. v_k never leaves; clients evaluate it. The server is FedAvg, and so is the traffic. Running
statistics are plain weighted means; v_k has its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from core.config import RunConfig
from core.records import Tensors
from core.training import LocalRound, LocalUpdate, local_sgd
from strategies.linear import Linear
from strategies.requirements import needs_small_steps

PERSONAL = "personal"


class Ditto(Linear):
    """FedAvg, with a personal model of proximity `proximity` (the paper's lambda) on every client."""

    private_by_example = True

    def __init__(self, *, proximity: float = 0.1, **fedavg: Any) -> None:
        super().__init__(**fedavg)
        self.proximity = proximity

    @staticmethod
    def check(config: RunConfig, model: nn.Module) -> None:
        """Refuse a pull that plain SGD would turn into oscillation."""
        needs_small_steps(config, "proximity", 0.1)

    @staticmethod
    def initial_state(r: LocalRound) -> dict[str, Tensors]:
        """Return the global model as it is when a client first trains."""
        return {PERSONAL: dict(r.global_params)}

    @staticmethod
    def local_update(r: LocalRound) -> LocalUpdate:
        """Return the client's share of the global model, and keep v_k."""
        near, origin = r.options["proximity"], r.global_params

        def towards(w: Tensors) -> Tensors:
            return {name: near * (p - origin[name]) for name, p in w.items()}

        # What never leaves needs no noise.
        own = local_sgd(replace(r, private=None), start=r.state[PERSONAL], correction=towards)
        return replace(local_sgd(r), state={PERSONAL: own.params})

    @staticmethod
    def personal_model(r: LocalRound) -> Tensors:
        """Return v_k."""
        return r.state[PERSONAL]
