"""How a federation's data lies in memory: one array for all clients and an offset per client, no object per client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """Examples x (n, ...) float32 or int64 and labels y (n,) int64 of one client, or of the central test set."""

    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Ragged:
    """One split of all clients: x (N, ...), y (N,); client i has rows offsets[i]:offsets[i + 1] (int64)."""

    x: np.ndarray
    y: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, client: int) -> Split:
        rows = slice(self.offsets[client], self.offsets[client + 1])
        return Split(self.x[rows], self.y[rows])

    @property
    def sizes(self) -> np.ndarray:
        """Return the number of examples of each client, (clients,) int64."""
        return np.diff(self.offsets)

    @staticmethod
    def stack(splits: Sequence[Split]) -> Ragged:
        """Lay the clients' splits one after the other."""
        offsets = np.concatenate([[0], np.cumsum([len(split) for split in splits])]).astype(np.int64)
        return Ragged(np.concatenate([s.x for s in splits]), np.concatenate([s.y for s in splits]), offsets)


@dataclass(frozen=True)
class Federation:
    """All clients' partitions, each split in train, validation, test; and the central test set that no client sees."""

    train: Ragged
    validation: Ragged
    test: Ragged
    central: Split
    names: tuple[str, ...] = ()
    """Hospitals, banks, authors; empty where clients have numbers only."""
    server: Split | None = None
    """Examples of the server's own, from the same source (`server-examples`); None where it has none."""

    def __len__(self) -> int:
        return len(self.train)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the data; an array that several splits have in common counts once."""
        arrays = [
            array for split in (self.train, self.validation, self.test, self.central) for array in (split.x, split.y)
        ]
        return sum({id(array): array.nbytes for array in arrays}.values())

    def name(self, client: int) -> str:
        """Return what a client is called."""
        return self.names[client] if self.names else f"client {client}"

    def client(self, client: int) -> dict[str, Split]:
        """Return one client's splits by name."""
        return {name: getattr(self, name)[client] for name in SPLITS}
