"""Handwritten digits: 1,797 images of 8 x 8 pixels (Alpaydin and Kaynak, UCI 1998), bundled with scikit-learn.

Images small enough that a federation of convolutional networks takes seconds, for whatever tables cannot show: filters,
normalisation statistics that travel or stay (`model=cnn-batchnorm`), and clients who see the same things differently
(`dataset=rotated`: rotated MNIST as in Ghosh et al., An Efficient Framework for Clustered Federated Learning,
NeurIPS 2020).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import nn

from core.config import RunConfig
from core.seeding import rng
from tasks.base import Dataset, Table, choose
from tasks.many_classes import ManyClasses

LABELS = tuple(str(digit) for digit in range(10))
SIDE, ROTATIONS = 8, 4
CHANNELS, HIDDEN = (16, 32), 64


class Digits(ManyClasses):
    """Which of ten digits a small image shows: x (B, 1, 8, 8) float32 in [0, 1] -> logits (B, 10)."""

    labels = LABELS

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        _, self.dataset = choose(DATASETS, config)
        self.models = {"cnn": cnn, "mlp": mlp, "cnn-batchnorm": lambda: cnn(nn.BatchNorm2d)}


def cnn(norm: type[nn.BatchNorm2d] | None = None) -> nn.Module:
    """Return two 3 x 3 convolutions without padding and a linear layer; `norm` follows each convolution."""
    layers: list[nn.Module] = []
    channels, side = 1, SIDE
    for wider in CHANNELS:
        layers += [nn.Conv2d(channels, wider, 3), *([norm(wider)] if norm else []), nn.ReLU()]
        channels, side = wider, side - 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side**2, len(LABELS)))


def mlp() -> nn.Module:
    """Return a network with one hidden layer of 64."""
    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, len(LABELS)))


def read_images(config: RunConfig, folder: Path | None) -> Table:
    """Return the images as they are; there are no natural groups."""
    # Only who reads the data needs it: scikit-learn takes a second to import, and workers read none.
    from sklearn.datasets import load_digits

    data = load_digits()
    # Pixels are counts from 0 to 16.
    return Table(x=(data.images[:, None] / 16).astype(np.float32), y=data.target.astype(np.int64))


def read_rotated(config: RunConfig, folder: Path | None) -> Table:
    """Return the images dealt at random to `config.clients` natural groups, turned by 90 degrees times group mod 4.

    Turns are counter-clockwise. The clients of one turn have the same task, so four clusters are the truth;
    partition.kind=feature sorts by the turn.
    """
    upright = read_images(config, folder)
    group = rng(config.seed, "digits", "groups").permutation(len(upright.y)) % config.clients
    turns = group % ROTATIONS
    x = np.empty_like(upright.x)
    for turn in range(ROTATIONS):
        x[turns == turn] = np.rot90(upright.x[turns == turn], turn, axes=(2, 3))
    names = tuple(f"client {k} ({90 * (k % ROTATIONS)} degrees)" for k in range(config.clients))
    return Table(x, upright.y, group, names, feature=90.0 * turns)


DATASETS = {
    "plain": Dataset(
        "1,797 handwritten digits of 8 x 8 pixels (UCI; bundled with scikit-learn)", read_images, LABELS, SIDE**2
    ),
    "rotated": Dataset(
        "the same, dealt to clients who see them turned by 0, 90, 180 or 270 degrees: four clusters of clients",
        read_rotated, LABELS, SIDE**2,
    ),
}  # fmt: skip
