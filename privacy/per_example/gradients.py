"""What a layer says of its weights' per-example gradients without their being written out.

A gradient of one example's loss at a linear layer is sum_t g_t a_t^T, of the layer's inputs a (T, d) and the gradients
g (T, p) at its outputs. Its norm is |a| |g| where T = 1 (Goodfellow, 2015, "Efficient per-example gradient
computations"), and in general the root of sum_ts (a a^T)_ts (g g^T)_ts (Li et al., ICLR 2022, "ghost norm"), which
takes less than the gradient itself where T is small beside p and d: a layer goes the cheaper way ("mixed ghost norm").
A weighted sum over examples is one product of matrices with g scaled ("book-keeping": Bu, Wang, Zha and Karypis, ICML
2023, "Differentially private optimization on large model at small cost").

Here C clients have weights of their own, (C, ...), and N = C * B examples stand client after client.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class PerExample:
    """One parameter's gradient of each of N examples."""

    squared_norms: Tensor
    """(N,)."""
    total: Callable[[Tensor], Tensor]
    """Factors (C, B) -> every client's sum of its examples' gradients times their factors, (C, ...)."""


class Output(NamedTuple):
    """What a layer makes of all clients' examples."""

    values: Tensor
    """(N, ...)."""
    anchor: Tensor
    """The tensor whose gradient is asked for: `values`, or what they are a view of.

    An activation in place takes a view out of autograd's graph, never what the view is of.
    """
    seen: Tensor
    """(N, ...): what the gradients are made of beside the anchor's."""


class Layer(Protocol):
    """How a layer of one type computes for all clients, and its gradients."""

    by_place: bool
    """Whether an example may have any number of axes before the last, all of them places with the same weights."""

    def forward(self, w: Weights, x: Tensor) -> Output:
        """Return the output for inputs x (N, ...) under weights w, (C, ...) by the layer's own names."""
        ...

    def gradients(self, seen: Tensor, g: Tensor) -> dict[str, PerExample]:
        """Return each weight's per-example gradients, given the gradient g at the anchor."""
        ...


def written_out(gradients: Tensor, squared_norms: Tensor | None = None) -> PerExample:
    """Return per-example gradients (N, ...) that are there as such; their norms need not be known."""

    def total(factors: Tensor) -> Tensor:
        of_clients = gradients.reshape(*factors.shape, -1)
        return torch.bmm(factors.unsqueeze(1), of_clients).view(factors.shape[0], *gradients.shape[1:])

    return PerExample(squares(gradients) if squared_norms is None else squared_norms, total)


def squares(t: Tensor) -> Tensor:
    """Return each example's sum of squares, (N,)."""
    return torch.linalg.vector_norm(t.reshape(t.shape[0], -1), dim=1).square()


def ghost(a: Tensor, g: Tensor, of_a: Tensor, of_g: Tensor) -> Tensor:
    """Return sum_ts (a a^T)_ts (g g^T)_ts, (N,), from the two products (N, T, T) and the squares of a and g.

    Terms may cancel, and rounding could then make a long gradient short: what it can have taken away is added.
    """
    return torch.linalg.vecdot(of_a.flatten(1), of_g.flatten(1)).clamp_min(0) + torch.finfo(g.dtype).eps * a * g
