"""FedProx: a proximal term holds each client near the global model. Li et al., MLSys 2020, equation 2.

Running statistics are plain weighted means.
"""

from __future__ import annotations

from flwr.serverapp import strategy

from core.training import LocalRound, LocalUpdate, local_sgd


class FedProx(strategy.FedProx):
    """FedAvg where client k minimises F_k(w) + mu/2 ||w - w_global||^2."""

    def __init__(self, *, proximal_mu: float = 0.1, **fedavg: object) -> None:
        super().__init__(proximal_mu=proximal_mu, **fedavg)  # type: ignore[arg-type]

    @staticmethod
    def local_update(r: LocalRound) -> LocalUpdate:
        """Return the cohort after local SGD on the loss plus the proximal term."""
        mu, origin = r.config["proximal-mu"], r.global_params
        return local_sgd(r, correction=lambda w: {name: mu * (p - origin[name]) for name, p in w.items()})
