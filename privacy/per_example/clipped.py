"""DP-SGD's sum of clipped per-example gradients (Abadi et al., CCS 2016), for C clients and B examples of each at once.

sum_i g_i min(1, S / |g_i|), where S is the clipping norm and g_i the gradient of example i's own loss over all weights
that move. No noise here. One forward and one backward pass, by book-keeping (gradients.py); an objective of a strategy,
which may do anything with the model, is differentiated example by example instead.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from core.records import Tensors
from core.steps import Loss, Objective
from privacy.per_example.gradients import PerExample, written_out
from privacy.per_example.recording import Recording


class Clipped(NamedTuple):
    """What a batch of every client adds up to."""

    sums: Tensors
    """(C, ...) by name: each client's sum of clipped per-example gradients."""
    losses: Tensor
    """(C, B): each example's loss, 0 where it is not used."""
    norms: Tensor
    """(C, B): the norm of each example's gradient before clipping, 0 where it is not used."""
    dropped: Tensor
    """(C,) int64: examples whose gradient is not finite. They add nothing and are not used."""


class ClippedSum(Protocol):
    """How to get the clipped sum."""

    def __call__(
        self,
        params: Mapping[str, Tensor],
        x: Tensor,
        y: Tensor,
        real: Tensor,
        clipping_norm: float,
        only: Collection[str] | None = None,
    ) -> Clipped:
        """Return the sums for weights (C, ...), inputs x (C, B, ...) and labels y (C, B).

        `real` (C, B) bool says which places hold an example: those that only pad a batch add nothing. `only` are the
        names of the weights that move, by default all: gradients are of those alone.
        """
        ...


class ClippedGradients:
    """The clipped sum for a model; `fitness.clipped_gradients` makes one that is known to be right."""

    def __init__(self, recording: Recording, loss: Loss) -> None:
        """Take the model's recording and (logits, y) -> each example's loss (B,)."""
        self.recording, self._loss = recording, loss

    def __call__(
        self,
        params: Mapping[str, Tensor],
        x: Tensor,
        y: Tensor,
        real: Tensor,
        clipping_norm: float,
        only: Collection[str] | None = None,
    ) -> Clipped:
        """Return the sums, as `ClippedSum` says."""
        moving = _moving(params, only)
        if not real.numel():
            return _nothing(moving, real)
        with torch.enable_grad():
            logits, notes = self.recording(params, x)
            losses = self._loss(logits, y.flatten(0, 1))
            places: Any = [note.at for note in notes]
            # Of whatever the loss does not depend on there is no gradient: it counts as zero.
            found = torch.autograd.grad(losses @ real.flatten().to(losses), places, allow_unused=True)
        taken = [(note, g) for note, g in zip(notes, found, strict=True) if g is not None]

        def gradients(broken: Tensor | None) -> dict[str, PerExample]:
            each: dict[str, PerExample] = {}
            for note, g in taken:
                each.update(note.gradients(_without(note.seen, broken), _without(g, broken)))
            return each

        with torch.no_grad():
            return _clip(gradients, losses.detach().view(real.shape), moving, real, clipping_norm)


class ClippedObjective:
    """The clipped sum for a strategy's objective of one client (core.steps.Terms), with each example as its batch."""

    def __init__(self, objective: Objective, beside: Tensors | None = None) -> None:
        """Take the objective and what it needs of each client beside its weights, (C, ...) by name."""
        self._beside = beside or {}

        def of_example(w: Tensors, others: Tensors, own: Tensors, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            share = torch.ones(1, device=x.device)
            found = objective({**others, **w}, own, x.unsqueeze(0), y.unsqueeze(0), share)
            loss, reported = found if isinstance(found, tuple) else (found, found)
            return loss, reported.detach()

        of_client = vmap(
            grad_and_value(of_example, has_aux=True), in_dims=(None, None, None, 0, 0), randomness="different"
        )
        self._gradients = vmap(of_client, randomness="different")

    def __call__(
        self,
        params: Mapping[str, Tensor],
        x: Tensor,
        y: Tensor,
        real: Tensor,
        clipping_norm: float,
        only: Collection[str] | None = None,
    ) -> Clipped:
        """Return the sums, as `ClippedSum` says; every gradient is written out, (C, B, ...)."""
        moving = _moving(params, only)
        if not real.numel():
            return _nothing(moving, real)
        others = {name: p for name, p in params.items() if name not in moving}
        # Fused attention cannot be mapped.
        with sdpa_kernel(SDPBackend.MATH):
            found, (_, losses) = self._gradients(moving, others, self._beside, x, y)

        def gradients(broken: Tensor | None) -> dict[str, PerExample]:
            return {name: written_out(_without(g.flatten(0, 1), broken)) for name, g in found.items()}

        with torch.no_grad():
            return _clip(gradients, losses, moving, real, clipping_norm)


def _moving(params: Mapping[str, Tensor], only: Collection[str] | None) -> Tensors:
    return {name: p for name, p in params.items() if only is None or name in only}


def _nothing(moving: Tensors, real: Tensor) -> Clipped:
    """Return the sum over batches without any place."""
    none = next(iter(moving.values())).new_zeros(real.shape)
    zeros = {name: torch.zeros_like(p) for name, p in moving.items()}
    return Clipped(zeros, none, none, real.sum(1))


def _without(t: Tensor, broken: Tensor | None) -> Tensor:
    """Return t (N, ...), in any arrangement of as many numbers, with zeros for examples that are `broken` (N,)."""
    if broken is None:
        return t
    return t.reshape(len(broken), -1).masked_fill(broken.unsqueeze(1), 0).view(t.shape)


def _clip(
    gradients: Callable[[Tensor | None], dict[str, PerExample]],
    losses: Tensor,
    moving: Tensors,
    real: Tensor,
    clipping_norm: float,
) -> Clipped:
    """Return the clipped sum; `gradients` gives those of every weight without the examples that are named to it."""
    each = {name: found for name, found in gradients(None).items() if name in moving}
    squared = sum((found.squared_norms for found in each.values()), losses.new_zeros(losses.numel()))
    finite = squared.isfinite()
    if not finite.all():
        # A factor of zero is not enough: zero times nan is nan.
        each = {name: found for name, found in gradients(~finite).items() if name in moving}
    used = real & finite.view(real.shape)
    squared = squared.view(real.shape).masked_fill(~used, 0.0)
    norms = squared.sqrt()
    # A gradient of zero is divided by zero here: infinite, so that it is left as it is.
    factors = (clipping_norm / norms).clamp(max=1.0).masked_fill(~used, 0.0)
    sums = {name: each[name].total(factors) if name in each else torch.zeros_like(p) for name, p in moving.items()}
    return Clipped(sums, losses.masked_fill(~used, 0.0), norms, (real & ~used).sum(1))
