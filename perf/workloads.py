"""The benchmarks' federations: generated data of the published shapes, and the models that go with them.

A workload is a Fedra task (`task=perf.workloads:Mlp2k`) and the settings it is run with. Every peer trains the same
model on the same rows with the same sampling, batches and optimiser.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from core.config import RunConfig, dotted
from core.data import Federation, Split
from simulations.run import preset
from tasks.base import classification_loss

POOL = 20_000
VOCABULARY = 2000


@dataclass(frozen=True)
class Pooled:
    """A split of `clients` clients, each a window of `size` rows into one pool: a million clients in little memory."""

    x: np.ndarray
    y: np.ndarray
    clients: int
    size: int

    def __len__(self) -> int:
        return self.clients

    def start(self, client: int) -> int:
        """Return the row of the pool where a client's window begins."""
        # A prime stride: neighbours share no row, and the windows cover the pool.
        return (client * 7919) % (len(self.y) - self.size)

    def __getitem__(self, client: int) -> Split:
        start = self.start(client)
        return Split(self.x[start : start + self.size], self.y[start : start + self.size])

    @property
    def sizes(self) -> np.ndarray:
        """Return every client's number of examples, (clients,) int64, in no memory."""
        return np.broadcast_to(np.int64(self.size), (self.clients,))


class Workload:
    """What the tasks of this file share; a subclass says shapes and model."""

    metrics = ("loss", "accuracy")
    standardise = "none"
    tuned_threshold = False
    shape: tuple[int, ...] = (30,)
    classes = 2
    examples = 60
    pool = POOL

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.labels = tuple(str(label) for label in range(self.classes))

    def rows(self, generator: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return x (n, *shape) float32 and labels (n,) that a linear model can learn in part."""
        x = generator.standard_normal((n, *self.shape), dtype=np.float32)
        weights = generator.standard_normal((int(np.prod(self.shape)), self.classes)).astype(np.float32)
        return x, (x.reshape(n, -1) @ weights).argmax(axis=1).astype(np.int64)

    def federation(self) -> Federation:
        """Return the federation; a tenth of an epoch each for validation and test."""
        generator = np.random.default_rng(self.config.seed)
        x, y = self.rows(generator, self.pool + 1000)
        pool, central = (x[:-1000], y[:-1000]), Split(x[-1000:], y[-1000:])
        clients, few = self.config.clients, max(1, self.examples // 10)
        train, validation, test = (Pooled(*pool, clients, size) for size in (self.examples, few, few))
        return Federation(train, validation, test, central, ())

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return cross-entropy, (B,)."""
        return classification_loss(logits, y)


class Mlp2k(Workload):
    """(a) 30-64-1, 2,049 parameters, 60 examples a client."""

    def model(self) -> nn.Module:
        """Return the network."""
        return nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 1), nn.Flatten(0))


class Mlp160k(Workload):
    """(b) 784-200-10, 159,010 parameters, 60 examples a client."""

    shape, classes = (784,), 10

    def model(self) -> nn.Module:
        """Return the network."""
        return nn.Sequential(nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 10))


class Femnist(Workload):
    """(c) McMahan et al.'s CNN on 28x28 images of 62 characters, 1,690,046 parameters, 100 examples a client."""

    shape, classes, examples, pool = (1, 28, 28), 62, 100, 8000

    def model(self) -> nn.Module:
        """Return the network."""
        return nn.Sequential(
            nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 7 * 7, 512), nn.ReLU(), nn.Linear(512, self.classes),
        )  # fmt: skip


class LrMnist(Workload):
    """(d) FLUTE's logistic regression on MNIST's shape, 7,850 parameters, 60 examples a client."""

    shape, classes = (784,), 10

    def model(self) -> nn.Module:
        """Return the network."""
        return nn.Linear(784, 10)


class _Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.encode = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encode(self.embed(x)).mean(dim=1))


class Transformer(Workload):
    """(e) Two encoder layers of width 64 over 32 tokens, 195,654 parameters, 60 examples a client."""

    shape, classes = (32,), 6

    def rows(self, generator: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens x (n, 32) int64 that differ in frequency between labels, and labels (n,)."""
        y = generator.integers(0, self.classes, n)
        own = generator.integers(0, VOCABULARY // self.classes, (n, 32)) + (y * (VOCABULARY // self.classes))[:, None]
        common = generator.integers(0, VOCABULARY, (n, 32))
        return np.where(generator.random((n, 32)) < 0.2, own, common), y

    def model(self) -> nn.Module:
        """Return the network."""
        return _Transformer()


class Cifar(Workload):
    """(g) pfl-research's CIFAR-10 setting on generated images: its simple CNN, 50 images a client."""

    shape, classes, examples, pool = (3, 32, 32), 10, 50, 5000

    def model(self) -> nn.Module:
        """Return the network."""
        return nn.Sequential(
            nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 14 * 14, 128), nn.ReLU(), nn.Linear(128, self.classes),
        )  # fmt: skip


SETTINGS: dict[str, dict[str, Any]] = {
    "a": {"task": "perf.workloads:Mlp2k", "clients": 1000, "sampled": 100, "batch-size": 20, "learning-rate": 0.1},
    "b": {"task": "perf.workloads:Mlp160k", "clients": 1000, "sampled": 100, "batch-size": 20, "learning-rate": 0.1},
    "c": {"task": "perf.workloads:Femnist", "clients": 100, "sampled": 10, "batch-size": 20, "learning-rate": 0.1},
    "d": {"task": "perf.workloads:LrMnist", "clients": 1000, "sampled": 10, "batch-size": 10, "learning-rate": 0.03},
    "e": {"task": "perf.workloads:Transformer", "clients": 100, "sampled": 20, "batch-size": 20, "learning-rate": 0.1},
    "g": {"task": "perf.workloads:Cifar", "clients": 1000, "sampled": 50, "batch-size": 10, "learning-rate": 0.1},
}


def config(name: str, rounds: int, **changes: Any) -> RunConfig:
    """Return a workload's (or a preset's) configuration, evaluated at the end only and by few clients.

    Training is what is timed.
    """
    quiet = {"evaluate-every": rounds, "evaluated": 1, "rounds": rounds, "preset": name, "baselines": False}
    settings = SETTINGS[name] if name in SETTINGS else preset(name).flat()
    return RunConfig.of({**settings, **quiet, **{dotted(key): value for key, value in changes.items()}})
