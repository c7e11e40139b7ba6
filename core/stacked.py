"""Plain layers for many clients at once, without vmap: matrix products of stacked weights.

`torch.func.vmap` takes any model, but a step of a small one then spends more time in its bookkeeping than in
arithmetic: 1.8 ms against 0.7 ms for 100 clients of a network of 2,049 parameters. What is made of nothing but the
layers of this file is therefore written out; everything else is mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Forward = Callable[[Mapping[str, Tensor], Tensor], Tensor]
_ELEMENTWISE = (
    nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Dropout, nn.Identity,
)  # fmt: skip


def stack(model: nn.Module, rate: float | None = None) -> Forward | None:
    """Return the model as a function of stacked parameters (C, ...) and inputs x (C, B, ...); None where it cannot be.

    It computes what the model computes for each of C clients. Dropout draws a mask of its own for every client. With
    a rate, the backward pass moves the linear layers' parameters by it, in place, and gives them no gradient.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    plain = all(p.requires_grad for p in parameters.values()) and len(set(map(id, parameters.values()))) == len(
        parameters
    )
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return _layer(model, "", rate) if plain and not hooked else None


def _layer(module: nn.Module, prefix: str, rate: float | None) -> Forward | None:
    kind = type(module)
    if kind is nn.Sequential:
        # Not named_children(): it leaves out a module that stands in the model twice, as an activation may.
        layers = [_layer(child, f"{prefix}{name}.", rate) for name, child in module._modules.items() if child]
        return _chain([layer for layer in layers if layer]) if all(layers) else None
    if isinstance(module, nn.Linear) and kind is nn.Linear:
        return _linear(prefix, module.bias is not None) if rate is None else _descending(prefix, rate)
    if isinstance(module, nn.LayerNorm) and kind is nn.LayerNorm:
        return _layer_norm(module, prefix)
    if isinstance(module, nn.Flatten) and kind is nn.Flatten:
        # Every dimension of one client's tensor is one further in the stacked one.
        start, end = (d + 1 if d >= 0 else d for d in (module.start_dim, module.end_dim))
        return lambda _, x: x.flatten(start, end)
    return (lambda _, x: module(x)) if kind in _ELEMENTWISE else None


def _chain(layers: list[Forward]) -> Forward:
    def forward(w: Mapping[str, Tensor], x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(w, x)
        return x

    return forward


def _linear(prefix: str, has_bias: bool) -> Forward:
    def forward(w: Mapping[str, Tensor], x: Tensor) -> Tensor:
        weight, columns = w[f"{prefix}weight"], x.flatten(1, -2).transpose(1, 2)
        # Weights on the left: their gradient then lies in memory as they do, and an optimiser's step is four times
        # as fast as with the transpose that weights on the right would give.
        if has_bias:
            out = torch.baddbmm(w[f"{prefix}bias"].unsqueeze(2), weight, columns).transpose(1, 2)
        else:
            out = torch.bmm(weight, columns).transpose(1, 2)
        return out.reshape(*x.shape[:-1], -1)

    return forward


def _descending(prefix: str, rate: float) -> Forward:
    def forward(w: Mapping[str, Tensor], x: Tensor) -> Tensor:
        out = _Descent.apply(x.flatten(1, -2), w[f"{prefix}weight"], w.get(f"{prefix}bias"), rate)
        return out.view(*x.shape[:-1], -1)

    return forward


class _Descent(torch.autograd.Function):
    """A linear layer of every client whose backward pass takes the step of plain SGD."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rate: float) -> Tensor:
        """Return (C, B, out) from x (C, B, in), weight (C, out, in) and bias (C, out)."""
        ctx.save_for_backward(x, weight, bias)
        ctx.rate = rate
        product = x.bmm(weight.transpose(1, 2))
        return product if bias is None else product.add_(bias.unsqueeze(1))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        """Return the gradient of x and move weight and bias: W <- W - rate * gradient^T x."""
        x, weight, bias = ctx.saved_tensors
        to_x = gradient.bmm(weight) if ctx.needs_input_grad[0] else None
        weight.baddbmm_(gradient.transpose(1, 2), x, alpha=-ctx.rate)
        if bias is not None:
            bias.sub_(gradient.sum(1), alpha=ctx.rate)
        return to_x, None, None, None


def _layer_norm(module: nn.LayerNorm, prefix: str) -> Forward:
    def forward(w: Mapping[str, Tensor], x: Tensor) -> Tensor:
        out = F.layer_norm(x, module.normalized_shape, eps=module.eps)
        # (C, *shape) to (C, 1, ..., *shape): the batch's dimensions are in between.
        between = [1] * (x.ndim - 1 - len(module.normalized_shape))
        for name, apply in (("weight", torch.mul), ("bias", torch.add)):
            if getattr(module, name) is not None:
                p = w[f"{prefix}{name}"]
                out = apply(out, p.view(p.shape[0], *between, *p.shape[1:]))
        return out

    return forward
