"""Canary examples in DP-SGD: drawn as every example, of the clipping norm's length, noised in the same sum, watched.

Nasr et al., USENIX Security 2023: a gradient along a direction of its own in place of an example's. The observer sees
every step's noisy sum, as the ledger assumes, and knows the honest examples' gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.config import RunConfig
from core.records import Tensors
from privacy.accounting import Event
from privacy.audit.canaries import Noise, coins, directions, in_each_client, log_likelihood
from privacy.noise import Source


@dataclass(frozen=True)
class CanarySteps:
    """The canaries of C clients in a round's steps, m of each."""

    clipping_norm: float
    seed: int
    events: Sequence[Event]
    expected: Sequence[float]
    """By what the sum of each client's step is divided."""
    sources: Sequence[Source]
    included: np.ndarray
    """(C, m) bool."""
    left: np.ndarray
    """Steps that each client has yet to take, (C,) int64: what its slot does afterwards reaches nobody."""
    seen: np.ndarray
    """What the observer makes of each, then squares of the noise and of how many numbers, (C, m + 2) float64."""

    @staticmethod
    def of(
        config: RunConfig,
        clients: Sequence[int],
        events: Sequence[Event],
        expected: Sequence[float],
        sources: Sequence[Source],
    ) -> CanarySteps:
        """Return the configured canaries of these clients before their first step of a round."""
        included = np.stack([coins(in_each_client(config), config.seed, client) for client in clients])
        left = np.zeros(len(clients), dtype=np.int64)
        norm = config.privacy.clipping_norm
        seen = np.zeros((len(clients), included.shape[1] + 2))
        return CanarySteps(norm, config.seed, events, expected, sources, included, left, seen)

    def only(self, i: int) -> CanarySteps:
        """Return client i's canaries alone; what is seen of them stands here too."""
        one = slice(i, i + 1)
        return CanarySteps(
            self.clipping_norm, self.seed, self.events[one], self.expected[one], self.sources[one],
            self.included[one], self.left[one], self.seen[one],
        )  # fmt: skip

    def begin(self, steps: Tensor) -> None:
        """Hear how many steps each client will take, (C,)."""
        self.left[:] = steps.cpu().numpy()

    def hide(self, sums: Tensors, noised: Callable[[Tensors], Tensors]) -> Tensors:
        """Return noised(sums + the canaries' own), tensors (C, ...) by name, after a look at what is released."""
        m = self.included.shape[1]
        flat = _flat(sums)
        to = directions(m, flat.shape[1], self.seed)
        drawn = [source.sampled(event.rate, m) for source, event in zip(self.sources, self.events, strict=True)]
        amounts = (torch.stack(drawn) & torch.from_numpy(self.included)) * self.clipping_norm
        hidden = to.together(amounts)
        parts = hidden.split([t[0].numel() for t in sums.values()], dim=1)
        out = noised({name: t + own.view(t.shape).to(t) for (name, t), own in zip(sums.items(), parts, strict=True)})
        released = _flat(out) * torch.tensor(self.expected, dtype=torch.float64)[:, None]
        along = to.along((released - flat) / self.clipping_norm)[:, :m].numpy()
        for i in np.flatnonzero(self.left > 0).tolist():
            z = self.events[i].noise_multiplier
            noise = Noise()
            noise.add(released[i] - flat[i] - hidden[i], z * self.clipping_norm)
            scores = log_likelihood(along[i], self.events[i].rate, z)
            self.seen[i] += np.concatenate([scores, [noise.squares, noise.numbers]])
            self.left[i] -= 1
        return out

    def columns(self) -> list[bytes]:
        """Return what was seen of each client, m + 2 float64."""
        return [own.tobytes() for own in self.seen]


def _flat(tensors: Tensors) -> Tensor:
    return torch.cat([t.reshape(len(t), -1) for t in tensors.values()], dim=1).cpu().double()
