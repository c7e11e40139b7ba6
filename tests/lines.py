"""Tasks small enough to check by hand: clients whose loss is a parabola, and clients that do not agree on a label."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from core.config import RunConfig
from core.data import Federation, Ragged, Split
from simulations.run import Run, simulate
from tasks.base import classification_loss
from tasks.medical import Medical

# Losses 1/2 w^2 and 2 (w - 2)^2: a = 1 and b = 4. The mean of both is least where w + 4 (w - 2) = 0.
UNLIKE, OPTIMUM = "1,0,1;2,4,1", 1.6


def run_lines(
    smoke: Callable[..., RunConfig], strategy: str, dataset: str = UNLIKE, task: str = "lines:Lines", **changes: Any
) -> Run:
    """Return a run of a task of this file, one point at a time with rate 0.1; changes with a dot are as they are."""
    given = {key: changes.pop(key) for key in list(changes) if "." in key}
    config = smoke(
        task=task, dataset=dataset, strategy=strategy, evaluate_every=1000,
        **{"clients": len(dataset.split(";")), "batch_size": 1, "learning_rate": 0.1, **changes},
    )  # fmt: skip
    return simulate(RunConfig.of({**config.flat(), **given}))


def shared(run: Run) -> float:
    """Return the global model's first weight: w."""
    return float(run.model().get_submodule("0").weight.detach())


class Lines:
    """Client k fits y = w x through copies of one point; `dataset` is "x,y,copies;x,y,copies;...".

    Its loss is x^2/2 (w - y/x)^2, the step of plain SGD multiplies the distance from y/x by 1 - rate x^2. With
    `server-examples` the last point is the server's own.
    """

    labels = tuple(map(str, range(10)))
    metrics = ("accuracy", "loss")
    standardise = "none"
    tuned_threshold = False

    def __init__(self, config: RunConfig) -> None:
        self._points = [tuple(map(float, point.split(","))) for point in config.dataset.split(";")]
        self._own = self._points.pop() if config.server_examples else None

    def federation(self) -> Federation:
        """Return the clients; validation is empty and the central test set is the first client's."""

        def split(x: float, y: float, copies: float) -> Split:
            n = int(copies)
            return Split(np.full((n, 1), x, np.float32), np.full(n, int(y), np.int64))

        clients = Ragged.stack([split(*point) for point in self._points])
        nothing = Ragged.stack([split(x, y, 0) for x, y, _ in self._points])
        return Federation(clients, nothing, clients, clients[0], server=split(*self._own) if self._own else None)

    def model(self) -> nn.Module:
        """Return w x with w = 0."""
        line = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(line.weight)
        return nn.Sequential(line, nn.Flatten(0))

    def loss(self, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return half the squared error, (B,)."""
        return 0.5 * (logits - y.to(logits.dtype)) ** 2


def slopes(run: Run, dataset: str = UNLIKE) -> list[float]:
    """Return the w that each client of `Lines` evaluated at the end of a run, its own where it has one.

    As a logit w x has the cross-entropy log(1 + e^-wx) on label 1 and log(1 + e^wx) on any other.
    """
    rows = pd.read_parquet(run.path / "clients.parquet")
    losses = rows[rows["round"] == rows["round"].max()].sort_values("client")["test_loss"]
    points = [tuple(map(float, point.split(","))) for point in dataset.split(";")]
    signs = [-1 if y == 1 else 1 for _, y, _ in points]
    return [s * float(np.log(np.expm1(loss))) / x for loss, s, (x, _, _) in zip(losses, signs, points, strict=True)]


class Endless(Lines):
    """`Lines` on which the loss of label 2 is beyond float32, and its gradient as ever."""

    def loss(self, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return half the squared error, (B,), endless for label 2."""
        return super().loss(logits, y) + torch.where(y == 2, torch.inf, 0.0)


class Begun(Lines):
    """`Lines` that begin with a slope drawn between -1 and 1: models from unlike seeds are unlike."""

    def model(self) -> nn.Module:
        """Return w x."""
        return nn.Sequential(nn.Linear(1, 1, bias=False), nn.Flatten(0))


class Bent(Lines):
    """`Lines` in two layers: y = v u x with u = v = 1, u the body and v the head."""

    def model(self) -> nn.Module:
        """Return v u x."""
        layers = [nn.Linear(1, 1, bias=False) for _ in range(2)]
        for layer in layers:
            nn.init.ones_(layer.weight)
        return nn.Sequential(*layers, nn.Flatten(0))


class Scanners(Lines):
    """Two clients who tell the brighter of their own two shades, on scanners of unlike brightness: feature shift."""

    labels = ("dark", "bright")

    def __init__(self, config: RunConfig) -> None:
        pass

    def federation(self) -> Federation:
        """Return x = -1, 1, -1, 1 and x = 9, 9, 9, 11; 1 and 11 are bright."""
        x = [np.array(values, np.float32)[:, None] for values in ((-1, 1, -1, 1), (9, 9, 9, 11))]
        splits = [Split(own, (own[:, 0] == own.max()).astype(np.int64)) for own in x]
        clients = Ragged.stack(splits)
        nothing = Ragged.stack([Split(own.x[:0], own.y[:0]) for own in splits])
        return Federation(clients, nothing, clients, splits[0])

    def model(self) -> nn.Module:
        """Return w times the normalised x, plus b, with w = 1 and b = 0."""
        line = nn.Linear(1, 1)
        nn.init.ones_(line.weight)
        nn.init.zeros_(line.bias)
        return nn.Sequential(nn.BatchNorm1d(1), line, nn.Flatten(0))

    def loss(self, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy, (B,)."""
        return classification_loss(logits, y)


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


class _Slope(nn.Module):
    """w x, w a parameter without any dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return w x for x (B, 1), (B,)."""
        return self.slope * x[:, 0]


class Slopes(Lines):
    """As `Lines`, w being a scalar parameter."""

    def model(self) -> nn.Module:
        """Return w x with w = 0."""
        return _Slope()
