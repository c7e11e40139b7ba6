"""FedProx: a proximal term holds each client near the global model. Li et al., MLSys 2020, equation 2.

Running statistics are plain weighted means.
"""

from __future__ import annotations

from flwr.serverapp import strategy
from torch import nn

from core.config import RunConfig
from core.training import LocalRound, LocalUpdate, local_sgd
from strategies.requirements import needs_small_steps


class FedProx(strategy.FedProx):
    """FedAvg where client k minimises F_k(w) + mu/2 ||w - w_global||^2."""

    private_by_example = True

    def __init__(self, *, proximal_mu: float = 0.1, **fedavg: object) -> None:
        super().__init__(proximal_mu=proximal_mu, **fedavg)  # type: ignore[arg-type]

    @staticmethod
    def check(config: RunConfig, model: nn.Module) -> None:
        """Refuse a pull that plain SGD would turn into oscillation."""
        needs_small_steps(config, "proximal-mu", 0.1)

    @staticmethod
    def local_update(r: LocalRound) -> LocalUpdate:
        """Return the cohort after local SGD on the loss plus the proximal term."""
        mu, origin = r.config["proximal-mu"], r.global_params
        return local_sgd(r, correction=lambda w: {name: mu * (p - origin[name]) for name, p in w.items()})
