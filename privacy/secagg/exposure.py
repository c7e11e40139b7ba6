"""What many sums together give away: the server knows who is in each, and may solve for single clients.

Row t of the participation matrix has a 1 for everybody in sum t. A client whose unit vector is a combination of rows is
solvable: the same combination of sums is its update, if clients send nearly the same in every round (So et al., AAAI
2023, "Securing secure aggregation: mitigating multi-round privacy leakage in federated learning", section 3: with
random sampling everybody is after about as many rounds as there are clients). Where clients take part in fixed groups,
all of a group or nobody (`sampling.kind=cyclic`), no sum is of fewer than a group, ever.

The rows' span is kept as an orthonormal basis; a unit vector lies in it where the basis has a column of norm 1.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

# A column of the basis is as long as 1, or a row is a combination of others, up to this.
TOLERANCE = 1e-7


class Exposure:
    """Watches the sums of a run: who was in each, by client from 0 to `clients` - 1."""

    def __init__(self, clients: int) -> None:
        self._clients = clients
        self._sums: list[tuple[int, ...]] = []
        self._basis = np.zeros((0, clients))
        self._squares = np.zeros(clients)
        """The squared length of each of the basis's columns."""
        self.smallest = 0
        """Clients in the smallest sum so far; 0 before the first."""
        self.solvable: dict[int, int] = {}
        """The round in which a client became solvable, by client."""

    def observe(self, server_round: int, sums: Collection[Sequence[int]]) -> None:
        """Hear of who was in the sums of a round."""
        for members in sums:
            self._add(tuple(sorted(members)))
        for client in np.flatnonzero(self._squares > 1 - TOLERANCE).tolist():
            self.solvable.setdefault(client, server_round)

    def _add(self, members: tuple[int, ...]) -> None:
        self.smallest = min(self.smallest, len(members)) if self.smallest else len(members)
        self._sums.append(members)
        row = np.zeros(self._clients)
        row[list(members)] = 1.0
        row /= np.linalg.norm(row)
        # Twice is enough (Giraud et al., 2005).
        for _ in range(2):
            row -= self._basis.T @ (self._basis @ row)
        if (length := np.linalg.norm(row)) > TOLERANCE:
            self._basis = np.vstack([self._basis, row / length])
            self._squares += self._basis[-1] ** 2

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"sums": [list(members) for members in self._sums], "solvable": list(self.solvable.items())}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Remember what `state` returned."""
        for members in state["sums"]:
            self._add(tuple(members))
        self.solvable = {int(client): int(server_round) for client, server_round in state["solvable"]}
