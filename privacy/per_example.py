"""The sum of clipped per-example gradients, mapped over clients and examples."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from core.records import Tensors


class ClippedGradients:
    def __init__(self, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], objective=None, beside=None) -> None:
        self.model, self.loss, self.objective, self.beside = model, loss, objective, beside or {}

    def __call__(self, params: Tensors, x: Tensor, y: Tensor, real: Tensor, clipping_norm: float):
        def one(w, own, x, y):
            if self.objective:
                found = self.objective(w, own, x[None], y[None], torch.ones(1))
                return found if isinstance(found, tuple) else (found, found)
            l = self.loss(functional_call(self.model, w, (x[None],)), y[None]).sum()
            return l, l

        g = vmap(
            vmap(grad_and_value(one, has_aux=True), in_dims=(None, None, 0, 0), randomness="different"),
            randomness="different",
        )
        with sdpa_kernel(SDPBackend.MATH):
            grads, (_, losses) = g(params, self.beside, x, y)
        norms = torch.stack([t.flatten(2).pow(2).sum(2) for t in grads.values()]).sum(0).sqrt()
        factor = torch.where(real, (clipping_norm / norms).clamp(max=1.0), 0.0)
        return (
            {n: torch.einsum("cb,cb...->c...", factor, t) for n, t in grads.items()},
            torch.where(real, losses, 0.0),
            norms,
        )
