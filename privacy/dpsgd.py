"""DP-SGD in the cohort kernel: every client's gradient from its examples' own, clipped, summed and noised.

Abadi et al., CCS 2016, algorithm 1. The kernel asks for gradients where it would compute its own (core/steps.py); what
a strategy adds to them, a proximal term or a control variate, depends on no example and is added afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from core.records import Tensors
from core.steps import Gradients, Loss, Terms
from privacy.noise import Source, noised
from privacy.per_example import ClippedGradients


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
    guests: Guests | None = None

    def only(self, i: int) -> PrivateSteps:
        """Return client i's steps alone; they are counted here too."""
        one = slice(i, i + 1)
        guests = self.guests.only(i) if self.guests else None
        return PrivateSteps(
            self.clipping_norm, self.noise_multipliers[one], self.expected[one], self.sources[one], self.taken[one],
            guests,
        )  # fmt: skip

    def count(self, steps: Tensor) -> None:
        """Count `steps` (C,) of each client."""
        np.add(self.taken, steps.cpu().numpy(), out=self.taken)
        if self.guests:
            self.guests.begin(steps)

    def gradients(self, model: nn.Module, loss: Loss, terms: Terms) -> Gradients:
        """Return the function from weights and batches to every client's private gradient."""
        clipped = ClippedGradients(model, loss, objective=terms.objective, beside=terms.beside)

        def found(params: Tensors, x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensors, Tensor]:
            real = weight > 0
            sums, losses, _ = clipped(params, x, y, real, self.clipping_norm)
            counts = real.sum(1).clamp(min=1)
            noisy = self.guests.hide(sums, self._noised) if self.guests else self._noised(sums)
            return noisy, losses.sum(1) / counts

        return found

    def _noised(self, sums: Mapping[str, Tensor]) -> Tensors:
        """Return each client's (sum + noise) / expected batch."""
        out: Tensors = {name: torch.empty_like(total) for name, total in sums.items()}
        for name, total in sums.items():
            for i, (z, expected, source) in enumerate(
                zip(self.noise_multipliers, self.expected, self.sources, strict=True)
            ):
                out[name][i] = noised(total[i], z * self.clipping_norm, source) / expected
        return out
