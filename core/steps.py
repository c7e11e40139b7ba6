"""One local step of a cohort, in three ways: any model mapped, plain layers written out, and plain SGD in place.

A step takes the batch of every client, x (C, B, ...), y (C, B) and example weights (C, B) that add up to 1 for each
client (or to 0 for one that has finished), moves the cohort's weights, and returns each client's loss (C,).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from core.records import Tensors
from core.stacked import stack

if TYPE_CHECKING:
    from core.training import LocalRound

Penalty = Callable[[Mapping[str, Tensor]], Tensor]
Correction = Callable[[Tensors], Mapping[str, Tensor]]
Objective = Callable[[Tensors, Tensors, Tensor, Tensor, Tensor], Tensor | tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]
MakeOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]
Step = Callable[[Tensor, Tensor, Tensor], Tensor]
Gradients = Callable[[Tensors, Tensor, Tensor, Tensor], tuple[Tensors, Tensor]]
"""(weights, x, y, example weights) -> (gradients, each client's loss)."""


@dataclass(frozen=True)
class Terms:
    """What a strategy's client half adds to plain local training. C clients, B examples in a batch."""

    penalty: Penalty | None = None
    """One client's weights -> a scalar that is added to its loss; the kernel maps it over the cohort."""
    correction: Correction | None = None
    """The cohort's weights (C, ...) by name -> new tensors of these shapes, which are added to the gradient.

    The same as a penalty with that gradient, without the time that autograd takes for it.
    """
    objective: Objective | None = None
    """One client's (weights, `beside`, x (B, ...), y (B,), example weights (B,)) -> its loss, not the model's own.

    Or a pair of it and the loss to report. Example weights add up to 1.
    """
    beside: Tensors = field(default_factory=dict)
    """What the objective needs of each client beside its weights, (C, ...) by name; it stays as it is."""
    only: Collection[str] | None = None
    """Names of the tensors that move; all by default."""


class Private(Protocol):
    """Local steps that hide each example (privacy/dpsgd.py)."""

    def gradients(self, model: nn.Module, loss: Loss, terms: Terms) -> Gradients:
        """Return the function to every client's clipped and noised gradient of the loss, or of the objective.

        Penalties and corrections depend on no example: they are not in it.
        """
        ...

    def only(self, i: int) -> Private:
        """Return client i's steps alone."""
        ...

    def count(self, steps: Tensor) -> None:
        """Hear how many steps each client has taken, (C,) int64."""
        ...


def make_step(r: LocalRound, params: Tensors, terms: Terms) -> Step:
    """Return the fastest step that moves `params` (C, ...), in place, by the round's optimiser on loss and terms."""
    rate = plain_rate(r.optimizer)
    other = terms.penalty or terms.objective or terms.only is not None
    # Autocast and torch.compile take autograd's own operations, not one that moves weights.
    if rate is not None and not (other or r.gradient_clip or r.bf16 or r.compiled or r.private):
        descent = _descent(r.model, r.loss, params, rate, terms.correction)
        if descent is not None:
            return descent
    # What is compiled is kept between rounds; a penalty or an objective is a new function in each.
    compiled = r.compiled and not (terms.penalty or terms.objective)
    if r.private:
        gradients = _with_penalty(r.private.gradients(r.model, r.loss, terms), terms.penalty)
    else:
        gradients = _compiled(r.model, r.loss) if compiled else _gradients(r.model, r.loss, terms)
    moving = {name: p for name, p in params.items() if terms.only is None or name in terms.only}
    advance = advancing(list(moving.values()), r.optimizer)

    def step(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=r.bf16):
            found, losses = gradients(params, x, y, weight)
        if terms.correction:
            more = terms.correction(params)
            found = {name: found[name] + more[name] if name in more else found[name] for name in moving}
        if r.gradient_clip:
            found = _clipped({name: found[name] for name in moving}, r.gradient_clip)
        for name, p in moving.items():
            p.grad = found[name]
        advance()
        return losses

    return step


def advancing(params: list[Tensor], optimizer: MakeOptimizer) -> Callable[[], object]:
    """Return what takes the optimiser's step by the gradients in `.grad`; plain SGD is one call.

    To make an optimiser for each client and to ask it takes longer than its sums do.
    """
    rate = plain_rate(optimizer)
    if rate is None:
        return optimizer(params).step

    def step() -> None:
        moved = [(p, p.grad) for p in params if p.grad is not None]
        with torch.no_grad():
            torch._foreach_add_([p for p, _ in moved], [gradient for _, gradient in moved], alpha=-rate)

    return step


def plain_rate(optimizer: MakeOptimizer) -> float | None:
    """Return the learning rate of SGD without momentum or weight decay; None for any other optimiser."""
    if not (isinstance(optimizer, functools.partial) and optimizer.func is torch.optim.SGD):
        return None
    options = dict(optimizer.keywords)
    rate = options.pop("lr", None)
    return None if optimizer.args or any(options.values()) else rate


def _descent(model: nn.Module, loss: Loss, params: Tensors, rate: float, correction: Correction | None) -> Step | None:
    """Return a step of plain SGD on plain layers; None where the model has others.

    The gradient of a matrix is added to it as it is computed: on 160,000 parameters a third of the time of a step is
    what writing gradients to memory and reading them again would take.
    """
    forward = stack(model, rate)
    if forward is None:
        return None
    own = {name: p.requires_grad_() for name, p in params.items()}

    def step(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        with torch.no_grad():
            # Of the weights before the step, as the gradient is.
            more = correction(own) if correction else {}
        losses = _losses(loss, forward(own, x), y, weight)
        losses.sum().backward()
        with torch.no_grad():
            for p in own.values():
                if p.grad is not None:
                    p.sub_(p.grad, alpha=rate)
                    p.grad = None
            if more:
                torch._foreach_add_([own[name] for name in more], list(more.values()), alpha=-rate)
        return losses.detach()

    return step


def _gradients(model: nn.Module, loss: Loss, terms: Terms) -> Gradients:
    """Return the function from weights and batches to every client's gradient."""
    if terms.objective:
        return _of_objective(terms.objective, terms.beside, terms.penalty)
    return _written_out(model, loss, terms.penalty) or _mapped(model, loss, terms.penalty)


def cohort_gradients(r: LocalRound) -> Gradients:
    """Return the function from weights (C, ...) and batches to the gradient of every client's own loss."""
    return _gradients(r.model, r.loss, Terms())


def _with_penalty(gradients: Gradients, penalty: Penalty | None) -> Gradients:
    """Return the gradients of a loss plus those of a penalty, which no example enters."""
    if penalty is None:
        return gradients
    pull = vmap(grad(penalty))

    def both(params: Tensors, x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensors, Tensor]:
        found, losses = gradients(params, x, y, weight)
        return {name: found[name] + more for name, more in pull(params).items()}, losses

    return both


@functools.lru_cache(maxsize=4)
def _compiled(model: nn.Module, loss: Loss) -> Gradients:
    compiled: Gradients = torch.compile(_gradients(model, loss, Terms()))
    return compiled


def _written_out(model: nn.Module, loss: Loss, penalty: Penalty | None) -> Gradients | None:
    """Return the gradients of a model of plain layers; None where it has others."""
    forward = stack(model)
    if forward is None:
        return None

    def gradients(params: Tensors, x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensors, Tensor]:
        own = {name: p.detach().requires_grad_() for name, p in params.items()}
        losses = _losses(loss, forward(own, x), y, weight)
        total = losses + vmap(penalty)(own) if penalty else losses
        # A client's loss depends on its own weights alone: the gradient of the sum is every client's gradient.
        found = torch.autograd.grad(total.sum(), list(own.values()))
        return dict(zip(own, found, strict=True)), losses.detach()

    return gradients


def _mapped(model: nn.Module, loss: Loss, penalty: Penalty | None) -> Gradients:
    """Return the gradients of any model, mapped over the cohort."""
    # Every name of a trainable parameter is left out: a tied one has several and functional_call wants one.
    trainable = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    fixed = {name: t for name, t in model.state_dict().items() if name not in trainable}

    def objective(w: Tensors, x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        own = (loss(functional_call(model, (w, fixed), (x,)), y) * weight).sum()
        return (own + penalty(w) if penalty else own), own

    mapped = vmap(grad_and_value(objective, has_aux=True), randomness="different")

    def gradients(params: Tensors, x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensors, Tensor]:
        # Fused attention cannot be mapped: vmap would call it client by client.
        with sdpa_kernel(SDPBackend.MATH):
            found, (_, losses) = mapped(params, x, y, weight)
        return found, losses

    return gradients


def _of_objective(objective: Objective, beside: Tensors, penalty: Penalty | None) -> Gradients:
    """Return the gradients of an objective of one client, mapped over the cohort."""

    def total(w: Tensors, own: Tensors, x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        found = objective(w, own, x, y, weight)
        loss, reported = found if isinstance(found, tuple) else (found, found)
        return (loss + penalty(w) if penalty else loss), reported.detach()

    mapped = vmap(grad_and_value(total, has_aux=True), randomness="different")

    def gradients(params: Tensors, x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensors, Tensor]:
        with sdpa_kernel(SDPBackend.MATH):
            found, (_, losses) = mapped(params, beside, x, y, weight)
        return found, losses

    return gradients


def _losses(loss: Loss, logits: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    # A loss is each example's own, so that all clients' examples can be handed over as one batch.
    return (loss(logits.flatten(0, 1), y.flatten(0, 1)).view(weight.shape) * weight).sum(1)


def _clipped(gradients: Tensors, norm: float) -> Tensors:
    """Return the gradients with each client's norm at most `norm`, by the formula of torch's clip_grad_norm_."""
    norms = torch.stack([g.reshape(len(g), -1).pow(2).sum(1) for g in gradients.values()]).sum(0).sqrt()
    scale = (norm / (norms + 1e-6)).clamp(max=1.0)
    return {name: g * scale.view(-1, *[1] * (g.ndim - 1)) for name, g in gradients.items()}
