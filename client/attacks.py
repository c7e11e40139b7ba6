"""What malicious clients send: they see the global model, their own data, and, where they collude, each other's.

Colluding attacks (alie, ipm, min-max) are made of the updates that all malicious clients would have sent honestly: each
of them trains them all, so that every one sends the same and none depends on who else is sampled. A process does that
once for a round and global model, and not again for every cohort.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist

import numpy as np
import torch
from flwr.app import Error, RecordDict
from torch import Tensor

from core import records
from core.adversary import COLLUDING, STRENGTHS, malicious
from core.config import RunConfig
from core.records import Tensors
from core.seeding import derive
from core.training import LocalRound, LocalUpdate

ON_UPDATES = (*COLLUDING, "sign-flip", "scaling", "gaussian", "zero", "non-finite", "wrong-shape")
# More of them would only cost time: the statistics of so many are good enough.
COLLUDERS = 32


@dataclass(frozen=True)
class Attack:
    """An attack on updates by the clients in `bad` (clients,) bool."""

    config: RunConfig
    bad: np.ndarray
    _agreed: dict[bytes, Tensors] = field(default_factory=dict, compare=False, repr=False)
    """What the colluders send in the last round that they were asked in."""

    @staticmethod
    def of(config: RunConfig) -> Attack | None:
        """Return the configured attack on updates; None where there is none."""
        return Attack(config, malicious(config)) if config.attack.kind in ON_UPDATES else None

    @property
    def strength(self) -> float:
        """Return the attack's factor: the configured one, or the usual."""
        return self.config.attack.strength or STRENGTHS.get(self.config.attack.kind, 0.0)

    def colluders(self) -> list[int]:
        """Return the clients that collude."""
        return np.flatnonzero(self.bad)[:COLLUDERS].tolist()

    def __call__(
        self, update: LocalUpdate, r: LocalRound, clients: Sequence[int], honest: Callable[[list[int]], LocalUpdate]
    ) -> LocalUpdate:
        """Return the cohort's update with that of its malicious clients replaced.

        `honest` trains clients as if they were honest and returns their update.
        """
        at = torch.from_numpy(self.bad[np.asarray(clients)])
        if not at.any():
            return update
        new = self._together(r, honest) if self.config.attack.kind in COLLUDING else None
        params: Tensors = {}
        for name, own in update.params.items():
            origin = r.global_params[name]
            bad = self._alone(own - origin, r, name) if new is None else new[name].expand_as(own)
            mask = at.to(own.device).view(-1, *[1] * (own.ndim - 1))
            params[name] = torch.where(mask, origin + bad, own)
        return replace(update, params=params)

    def careless(self, clients: Sequence[int]) -> np.ndarray:
        """Return which of the clients (C,) bool send what no server should take."""
        found: np.ndarray = self.bad[np.asarray(clients)] & (self.config.attack.kind in ("non-finite", "wrong-shape"))
        return found

    def spoil(self, answers: Sequence[RecordDict | Error]) -> None:
        """Change the shapes of what careless clients send, if that is the attack."""
        for answer in answers:
            if self.config.attack.kind == "wrong-shape" and isinstance(answer, RecordDict):
                arrays = answer.array_records[records.ARRAYS]
                one_more = {name: np.append(records.to_numpy(a), np.float32(0)) for name, a in arrays.items()}
                answer[records.ARRAYS] = records.to_arrays(one_more)

    def _alone(self, own: Tensor, r: LocalRound, name: str) -> Tensor:
        kind = self.config.attack.kind
        if kind in ("sign-flip", "scaling"):
            return own * (-self.strength if kind == "sign-flip" else self.strength)
        if kind == "gaussian":
            drawn = [_gaussian(own[0], derive(seed, "attack", name)) for seed in r.seeds]
            return self.strength * torch.stack(drawn).to(own.device)
        return torch.full_like(own, math.nan) if kind == "non-finite" else torch.zeros_like(own)

    def _together(self, r: LocalRound, honest: Callable[[list[int]], LocalUpdate]) -> Tensors:
        """Return what all colluders send, made once for equal rounds."""
        key = _fingerprint(r)
        if key not in self._agreed:
            new = self._collusion(honest(self.colluders()), r)
            self._agreed.clear()
            self._agreed[key] = new
        return self._agreed[key]

    def _collusion(self, honest: LocalUpdate, r: LocalRound) -> Tensors:
        """Return the update (by name, no client axis) that all malicious clients send."""
        updates = {name: p - r.global_params[name] for name, p in honest.params.items()}
        mean = {name: u.mean(0) for name, u in updates.items()}
        if self.config.attack.kind == "ipm":
            return {name: -self.strength * m for name, m in mean.items()}
        deviation = {name: u.std(0, unbiased=False) for name, u in updates.items()}
        gamma = self._z() if self.config.attack.kind == "alie" else _min_max(updates, mean, deviation)
        return {name: mean[name] - gamma * deviation[name] for name in mean}

    def _z(self) -> float:
        """Return how many deviations are little enough: Baruch et al., algorithm 3, n clients of which m are bad."""
        if self.config.attack.strength:
            return self.config.attack.strength
        n, m = len(self.bad), int(self.bad.sum())
        supporters = n // 2 + 1 - m
        return max(0.0, NormalDist().inv_cdf(min(max((n - m - supporters) / (n - m), 1e-6), 1 - 1e-6)))


def _fingerprint(r: LocalRound) -> bytes:
    """Return a hash of all that the server sent for a round: what clients learn from it is a function of that."""
    found = hashlib.blake2b(repr(sorted(r.config.items())).encode())
    for kind, own in {"": r.global_params, **r.sent}.items():
        for name, tensor in own.items():
            found.update(f"{kind}/{name}".encode())
            found.update(tensor.detach().cpu().contiguous().numpy().data)
    return found.digest()


def _gaussian(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


def _min_max(updates: Tensors, mean: Tensors, deviation: Tensors) -> float:
    """Return the largest gamma at which mean - gamma deviation is no farther from any update than two are apart.

    Shejwalkar and Houmansadr, NDSS 2021, "Min-Max", by bisection.
    """
    flat = torch.cat([u.reshape(len(u), -1) for u in updates.values()], dim=1).double()
    m = torch.cat([t.flatten() for t in mean.values()]).double()
    d = torch.cat([t.flatten() for t in deviation.values()]).double()
    most = float(torch.cdist(flat, flat).max())
    low, high = 0.0, 10.0
    for _ in range(30):
        gamma = (low + high) / 2
        if float((flat - (m - gamma * d)).norm(dim=1).max()) <= most:
            low = gamma
        else:
            high = gamma
    return low
