"""Tasks small enough to check by hand: clients whose loss is a parabola, and clients that do not agree on a label."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from core.config import RunConfig
from core.data import Federation, Ragged, Split
from tasks.medical import Medical


class Lines:
    """Client k fits y = w x through copies of one point; `dataset` is "x,y,copies;x,y,copies;...".

    Its loss is x^2/2 (w - y/x)^2, the step of plain SGD multiplies the distance from y/x by 1 - rate x^2.
    """

    labels = tuple(map(str, range(10)))
    metrics = ("accuracy",)
    standardise = "none"
    tuned_threshold = False

    def __init__(self, config: RunConfig) -> None:
        self._points = [tuple(map(float, point.split(","))) for point in config.dataset.split(";")]

    def federation(self) -> Federation:
        """Return the clients; validation is empty and the central test set is the first client's."""

        def split(x: float, y: float, copies: float) -> Split:
            n = int(copies)
            return Split(np.full((n, 1), x, np.float32), np.full(n, int(y), np.int64))

        clients = Ragged.stack([split(*point) for point in self._points])
        nothing = Ragged.stack([split(x, y, 0) for x, y, _ in self._points])
        return Federation(clients, nothing, clients, clients[0])

    def model(self) -> nn.Module:
        """Return w x with w = 0."""
        line = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(line.weight)
        return nn.Sequential(line, nn.Flatten(0))

    def loss(self, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return half the squared error, (B,)."""
        return 0.5 * (logits - y.to(logits.dtype)) ** 2


class Disagreeing(Medical):
    """The medical task, whose first client calls benign what the others call malignant."""

    def federation(self) -> Federation:
        """Return the clients with the first one's labels turned around in all its splits."""
        plain = super().federation()
        return replace(plain, **{name: _turned(getattr(plain, name)) for name in ("train", "validation", "test")})


def _turned(split: Ragged) -> Ragged:
    y = split.y.copy()
    y[: split.offsets[1]] = 1 - y[: split.offsets[1]]
    return replace(split, y=y)


class Shifted(Medical):
    """The medical task with batch normalisation, every client's inputs on a scale of its own."""

    standardise = "none"

    def federation(self) -> Federation:
        """Return the clients, client k's standardised inputs times 4^k, plus 10 k."""
        plain = super().federation()
        mean, std = plain.train.x.mean(0), plain.train.x.std(0)

        def moved(split: Ragged) -> Ragged:
            k = np.repeat(np.arange(len(split)), split.sizes)[:, None]
            x = (split.x - mean) / std * 4.0**k + 10 * k
            return replace(split, x=x.astype(np.float32))

        central = replace(plain.central, x=((plain.central.x - mean) / std).astype(np.float32))
        return replace(plain, train=moved(plain.train), validation=moved(plain.validation), test=moved(plain.test),
                       central=central)  # fmt: skip

    def model(self) -> nn.Module:
        """Return a network that normalises its inputs' features."""
        return nn.Sequential(
            nn.BatchNorm1d(30), nn.Linear(30, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1), nn.Flatten(0)
        )
