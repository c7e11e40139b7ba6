"""APFL: each client mixes a model of its own with the global one. Deng, Kamani and Mahdavi, 2020, algorithm 1.

The personal model is v_bar = alpha v + (1 - alpha) w. Every local step moves w by grad f(w), v by the gradient of
f(v_bar) with respect to v and, if it is `adaptive`, alpha by that with respect to alpha, <grad f(v_bar), v - w>. Only w
leaves, so the server is FedAvg and so is the traffic. Running statistics are those of w's forward passes, and plain
weighted means.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from core.config import RunConfig
from core.errors import InputError
from core.records import Tensors
from core.training import LocalRound, LocalUpdate, everybody, local_sgd
from strategies.linear import Linear

OWN, MIXTURE, ALPHA = "own", "mixture", "alpha"


class APFL(Linear):
    """FedAvg with a personal mixture; alpha begins at `mixture`."""

    private_by_example = True

    def __init__(self, *, mixture: float = 0.5, adaptive: bool = True, **fedavg: Any) -> None:
        if not 0 <= mixture <= 1:
            raise ValueError("mixture must be from 0 to 1")
        super().__init__(**fedavg)
        self.mixture, self.adaptive = mixture, adaptive

    @staticmethod
    def check(config: RunConfig, model: nn.Module) -> None:
        """Refuse what would act on w, v and alpha as if they were one model."""
        if config.gradient_clip or config.weight_decay or config.optimizer != "sgd":
            raise InputError(
                "apfl moves w, v and the mixture together, each by its own gradient: it takes optimizer=sgd, "
                "gradient-clip=0 and weight-decay=0."
            )

    @staticmethod
    def initial_state(r: LocalRound) -> dict[str, Tensors]:
        """Return v = w and the first alpha."""
        alpha = next(iter(r.global_params.values())).new_tensor([float(r.options["mixture"])])
        names = [name for name, p in r.model.named_parameters() if p.requires_grad]
        return {OWN: {name: r.global_params[name] for name in names}, MIXTURE: {ALPHA: alpha}}

    @staticmethod
    def local_update(r: LocalRound) -> LocalUpdate:
        """Return w, and keep v and alpha."""
        names = [name for name, p in r.model.named_parameters() if p.requires_grad]
        cohort = len(r.batches.steps)

        def objective(p: Tensors, _: Tensors, x: Tensor, y: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
            loss = r.mean_loss({name: p[name] for name in names}, x, y, share)
            fixed = {name: p[name].detach() for name in names}
            v = {name: p[f"{OWN}:{name}"] for name in names}
            return loss + r.mean_loss(mixed(v, fixed, p[ALPHA]), x, y, share, aside=True), loss

        start = everybody({name: r.global_params[name] for name in names}, cohort)
        start |= {f"{OWN}:{name}": r.state[OWN][name] for name in names} | {ALPHA: r.state[MIXTURE][ALPHA]}
        only = [name for name in start if name != ALPHA or r.options["adaptive"]]
        update = local_sgd(r, objective=objective, start=start, only=only)
        own = {name: update.params[f"{OWN}:{name}"] for name in names}
        params = {name: p for name, p in update.params.items() if name in r.global_params}
        kept = {OWN: own, MIXTURE: {ALPHA: update.params[ALPHA].clamp(0, 1)}}
        return LocalUpdate(params, update.loss, state=kept)

    @staticmethod
    def personal_model(r: LocalRound) -> Tensors:
        """Return alpha v + (1 - alpha) w, with w's running statistics."""
        w = everybody(r.global_params, len(r.batches.steps))
        return {**w, **mixed(r.state[OWN], w, r.state[MIXTURE][ALPHA])}


def mixed(v: Tensors, w: Tensors, alpha: Tensor) -> Tensors:
    """Return alpha v + (1 - alpha) w; alpha is (1,) for one client, or (C, 1) for tensors (C, ...)."""
    out = {}
    for name, own in v.items():
        share = alpha.view(alpha.shape[:-1] + (1,) * (own.ndim - alpha.ndim + 1)) if alpha.ndim > 1 else alpha.squeeze()
        out[name] = share * own + (1 - share) * w[name]
    return out
