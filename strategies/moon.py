"""MOON: features drawn to those of the global model and away from the client's previous ones. Li et al., CVPR 2021.

Loss + mu l_con with l_con = -log(exp(cos(z, z_glob) / t) / (exp(cos(z, z_glob) / t) + exp(cos(z, z_prev) / t))),
where z is what the model's last layer receives and z_prev comes from the model that the client sent last. The server is
FedAvg, and so is the traffic; a client keeps its last model. Running statistics are plain weighted means.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from core.records import Tensors
from core.training import LocalRound, LocalUpdate, everybody, local_sgd
from strategies.linear import Linear
from strategies.personal_layers import last_module

PREVIOUS = "previous"


class Moon(Linear):
    """FedAvg with a contrastive term of weight `mu`."""

    private_by_example = True

    def __init__(self, *, mu: float = 1.0, temperature: float = 0.5, **fedavg: Any) -> None:
        if temperature <= 0:
            raise ValueError("temperature must be above 0")
        super().__init__(**fedavg)
        self.mu, self.temperature = mu, temperature

    @staticmethod
    def initial_state(r: LocalRound) -> dict[str, Tensors]:
        """Return the global model: a client that has sent none yet has nothing to move away from."""
        return {PREVIOUS: dict(r.global_params)}

    @staticmethod
    def local_update(r: LocalRound) -> LocalUpdate:
        """Return the cohort after local steps, and keep what it sends."""
        mu, temperature = r.options["mu"], r.options["temperature"]
        trainable = [name for name, p in r.model.named_parameters() if p.requires_grad]

        def objective(w: Tensors, previous: Tensors, x: Tensor, y: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
            logits, z = _features(r.model, w, x)
            loss = (r.loss(logits, y) * share).sum()
            near = F.cosine_similarity(z, _features(r.model, r.aside(shared), x)[1].detach(), dim=1) / temperature
            far = F.cosine_similarity(z, _features(r.model, r.aside(previous), x)[1].detach(), dim=1) / temperature
            # -log(e^near / (e^near + e^far)) is softplus(far - near).
            return loss + mu * (F.softplus(far - near) * share).sum(), loss

        shared = {name: r.global_params[name] for name in trainable}
        before = {name: r.state[PREVIOUS][name] for name in trainable}
        start = everybody(shared, len(r.batches.steps))
        update = local_sgd(r, objective=objective, beside=before, start=start)
        return LocalUpdate(update.params, update.loss, state={PREVIOUS: {**r.state[PREVIOUS], **update.params}})


def _features(model: nn.Module, weights: Tensors, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits, and what the last layer receives, (B, d)."""
    seen: list[Tensor] = []
    hook = last_module(model).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        logits = functional_call(model, weights, (x,))
    finally:
        hook.remove()
    return logits, seen[-1].flatten(1)
