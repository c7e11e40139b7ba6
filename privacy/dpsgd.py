"""DP-SGD in the cohort kernel: every client's gradient from its examples' own, clipped, summed and noised.

Abadi et al., CCS 2016, algorithm 1. The kernel asks for gradients where it would compute its own (core/steps.py); what
a strategy adds to them, a proximal term or a control variate, depends on no example and is added afterwards.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from core.records import Tensors
from core.steps import Gradients, Loss, Terms
from privacy.noise import Source, noised
from privacy.per_example.clipped import ClippedObjective, ClippedSum
from privacy.per_example.fitness import EXAMPLES, clipped_gradients


class Guests(Protocol):
    """Examples of an audited run that only pretend to be some (client/canaries.py)."""

    def begin(self, steps: Tensor) -> None:
        """Hear how many steps each client will take, (C,) int64."""
        ...

    def hide(self, sums: Tensors, noised: Callable[[Tensors], Tensors]) -> Tensors:
        """Return noised(sums + the canaries' own), and look at it."""
        ...

    def only(self, i: int) -> Guests:
        """Return those of client i alone."""
        ...


@dataclass(frozen=True)
class PrivateSteps:
    """The private steps of C clients."""

    clipping_norm: float
    noise_multipliers: Sequence[float]
    """z of each client, (C,)."""
    expected: Sequence[float]
    """Examples that a batch of each client has on average, (C,)."""
    sources: Sequence[Source]
    taken: np.ndarray
    """Steps that each client has taken, (C,) int64: the kernel counts, and the ledger believes it."""
    dropped: np.ndarray
    """Examples of each client whose gradient was not finite and added nothing, (C,) int64."""
    guests: Guests | None = None

    @staticmethod
    def begin(
        clipping_norm: float, noise_multipliers: Sequence[float], expected: Sequence[float],
        sources: Sequence[Source], guests: Guests | None = None,
    ) -> PrivateSteps:  # fmt: skip
        """Return the steps of clients that have taken none yet."""
        taken, dropped = np.zeros((2, len(sources)), dtype=np.int64)
        return PrivateSteps(clipping_norm, noise_multipliers, expected, sources, taken, dropped, guests)

    def only(self, i: int) -> PrivateSteps:
        """Return client i's steps alone; they are counted here too."""
        one = slice(i, i + 1)
        own = (self.noise_multipliers[one], self.expected[one], self.sources[one], self.taken[one], self.dropped[one])
        return PrivateSteps(self.clipping_norm, *own, self.guests.only(i) if self.guests else None)

    def count(self, steps: Tensor) -> None:
        """Count `steps` (C,) of each client."""
        np.add(self.taken, steps.cpu().numpy(), out=self.taken)
        if self.guests:
            self.guests.begin(steps)

    def gradients(self, model: nn.Module, loss: Loss, terms: Terms) -> Gradients:
        """Return the function from weights and batches to every client's private gradient."""
        objective = ClippedObjective(terms.objective, terms.beside) if terms.objective else None

        def found(params: Tensors, x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensors, Tensor]:
            real = weight > 0
            clipped = (objective or _of_model(model, loss, x, y))(params, x, y, real, self.clipping_norm, terms.only)
            np.add(self.dropped, clipped.dropped.cpu().numpy(), out=self.dropped)
            noisy = self.guests.hide(clipped.sums, self._noised) if self.guests else self._noised(clipped.sums)
            # A client whose loss is not finite does not count: one example must not be able to silence it.
            losses = clipped.losses.masked_fill(~clipped.losses.isfinite(), 0.0)
            return noisy, losses.sum(1) / real.sum(1).clamp(min=1)

        return found

    def _noised(self, sums: Mapping[str, Tensor]) -> Tensors:
        """Return each client's (sum + noise) / expected batch."""
        flat = torch.cat([total.reshape(len(total), -1) for total in sums.values()], dim=1)
        deviations = self.clipping_norm * torch.tensor(self.noise_multipliers, dtype=torch.float64)
        noisy = noised(flat, self._normal(*flat.shape).to(flat.device), deviations.to(flat.device).unsqueeze(1))
        noisy /= torch.tensor(self.expected).to(flat.device).unsqueeze(1)
        parts = noisy.split([total[0].numel() for total in sums.values()], dim=1)
        return {name: part.view(total.shape) for (name, total), part in zip(sums.items(), parts, strict=True)}

    def _normal(self, clients: int, size: int) -> Tensor:
        """Return the clients' normals (C, D), float64: from one secret source all at once."""
        first = self.sources[0]
        if all(source is first for source in self.sources):
            return first.normal(clients, size, dtype=torch.float64)
        return torch.stack([source.normal(size, dtype=torch.float64) for source in self.sources])


_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[Loss, ClippedSum]] = weakref.WeakKeyDictionary()


def _of_model(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> ClippedSum:
    """Return the clipped sum of a model's loss, tried once a process on the first clients' examples, x (C, B, ...)."""
    known = _KNOWN.get(model)
    if known is None or known[0] != loss:
        known = loss, clipped_gradients(model, loss, x.flatten(0, 1)[:EXAMPLES], y.flatten(0, 1)[:EXAMPLES])
        _KNOWN[model] = known
    return known[1]
