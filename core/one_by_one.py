"""Training one client after the other through autograd: for models that cannot be mapped, or are faster so."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from core.records import Tensors, travelling
from core.steps import Terms, advancing

if TYPE_CHECKING:
    from core.training import LocalRound


def one_by_one(r: LocalRound, terms: Terms, start: Tensors | None = None) -> tuple[Tensors, Tensor]:
    """Return every client's trained tensors (C, ...) by name and its mean training loss (C,).

    Hooks that see the cohort's own tensors take one client: `train_each` sees to that.
    """
    if terms.objective:
        return _by_objective(r, terms, start)
    layout = torch.channels_last if takes_channels_last(r.model, r.x.shape[1:]) else torch.contiguous_format
    model = _twin(r.model, layout).train()
    tensors = travelling(model)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    cohort = len(r.batches.steps)
    finished = {name: tensor.new_empty(cohort, *tensor.shape) for name, tensor in tensors.items()}
    losses = r.batches.weights.new_empty(cohort)
    moving = {name: p for name, p in params.items() if terms.only is None or name in terms.only}
    own: list[Tensor] = list(moving.values())
    for client, steps in enumerate(r.batches.steps.tolist()):
        with torch.no_grad():
            for buffer, untouched in zip(model.buffers(), r.model.buffers(), strict=True):
                buffer.copy_(untouched)
            for name, tensor in tensors.items():
                tensor.copy_(start[name][client] if start and name in start else r.global_params[name])
        advance = advancing(own, r.optimizer)
        total = seen = 0.0
        for s in range(steps):
            real = r.batches.weights[s, client] > 0
            rows, weight = r.batches.rows[s, client][real], r.batches.weights[s, client][real]
            with torch.autocast(r.x.device.type, torch.bfloat16, enabled=r.bf16):
                loss = _weighted_mean(r.loss(model(r.x[rows].contiguous(memory_format=layout)), r.y[rows]), weight)
            _backward(loss + terms.penalty(params) if terms.penalty else loss, moving, terms, r.gradient_clip)
            advance()
            total += float(loss.detach()) * float(weight.sum())
            seen += float(weight.sum())
        for name, tensor in tensors.items():
            finished[name][client] = tensor
        losses[client] = total / max(seen, 1e-12)
    return finished, losses


def _backward(loss: Tensor, moving: Mapping[str, Tensor], terms: Terms, gradient_clip: float) -> None:
    """Put the gradient of loss and terms into `.grad` of the tensors that move."""
    own = list(moving.values())
    gradients = torch.autograd.grad(loss, own, allow_unused=True)
    for p, gradient in zip(own, gradients, strict=True):
        p.grad = gradient
    if terms.correction:
        with torch.no_grad():
            more = terms.correction({name: p.unsqueeze(0) for name, p in moving.items()})
            for name in more.keys() & moving.keys():
                p, extra = moving[name], more[name].view_as(moving[name])
                p.grad = extra if p.grad is None else p.grad + extra
    if gradient_clip:
        nn.utils.clip_grad_norm_(own, gradient_clip)


def _by_objective(r: LocalRound, terms: Terms, start: Tensors | None) -> tuple[Tensors, Tensor]:
    """Return what `one_by_one` does of one client under an objective, which calls the model itself."""
    assert terms.objective
    [steps] = r.batches.steps.tolist()
    trainable = {name for name, p in r.model.named_parameters() if p.requires_grad}
    statistics = {name: tensor for name, tensor in travelling(r.model).items() if name not in trainable}
    begin = start or {name: p.unsqueeze(0) for name, p in r.global_params.items()}
    with torch.no_grad():
        for name, tensor in statistics.items():
            tensor.copy_(begin[name][0] if name in begin else r.global_params[name])
    params = {name: p[0].clone().requires_grad_() for name, p in begin.items() if name not in statistics}
    moving = {name: p for name, p in params.items() if terms.only is None or name in terms.only}
    advance = advancing(list(moving.values()), r.optimizer)
    beside = {name: tensor[0] for name, tensor in terms.beside.items()}
    r.model.train()
    total = seen = 0.0
    for s in range(steps):
        real = r.batches.weights[s, 0] > 0
        rows, weight = r.batches.rows[s, 0][real], r.batches.weights[s, 0][real]
        with torch.autocast(r.x.device.type, torch.bfloat16, enabled=r.bf16):
            found = terms.objective(params, beside, r.x[rows], r.y[rows], weight / weight.sum().clamp_min(1e-12))
        loss, reported = found if isinstance(found, tuple) else (found, found)
        _backward(loss + terms.penalty(params) if terms.penalty else loss, moving, terms, r.gradient_clip)
        advance()
        total += float(reported.detach()) * float(weight.sum())
        seen += float(weight.sum())
    done = {name: tensor.detach().clone().unsqueeze(0) for name, tensor in {**params, **statistics}.items()}
    return done, r.batches.weights.new_tensor([total / max(seen, 1e-12)])


@functools.lru_cache(maxsize=2)
def _twin(model: nn.Module, layout: torch.memory_format) -> nn.Module:
    """Return a copy of the model to train. One serves all clients and rounds: copying takes longer than a step."""
    twin: nn.Module = copy.deepcopy(model).to(memory_format=layout)  # type: ignore[call-overload]
    return twin


@functools.lru_cache(maxsize=2)
def takes_channels_last(model: nn.Module, shape: torch.Size) -> bool:
    """Return whether a model of images (channels, height, width) computes the same with the channels stored last.

    Convolutions and pooling on CPUs are faster so, by a tenth or more; a model that looks at strides (`view` after a
    convolution) may refuse.
    """
    if len(shape) != 3 or not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return False
    device = next(model.parameters()).device
    x = torch.linspace(-1, 1, 2 * math.prod(shape), device=device).view(2, *shape)
    with torch.no_grad():
        wanted = copy.deepcopy(model).eval()(x)
        try:
            twin = _twin(model, torch.channels_last).eval()
            return torch.allclose(twin(x.contiguous(memory_format=torch.channels_last)), wanted, rtol=1e-3, atol=1e-4)
        except RuntimeError:
            return False


def _weighted_mean(losses: Tensor, weight: Tensor) -> Tensor:
    # A finished client's batch has no weight at all: 0 / tiny is 0, where 0 / 0 would poison the cohort.
    return (losses * weight).sum() / weight.sum().clamp_min(1e-12)
