"""Canary clients in the private sum: drawn and clipped as everybody, released in the same noisy sum, and watched.

Two observers guess who is in. One knows everything but the coins and the noise: it takes every honest client's update
off what was released. Epsilon holds whatever others do and whoever knows it, so the verdict is about this one. The
other sees what was released and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from core import records
from core.config import RunConfig
from core.records import to_arrays
from privacy.audit.canaries import Noise, coins, directions, in_each_client, log_likelihood, without_drift
from privacy.client_level import ClientLevel
from privacy.noise import Source

Vectors = Mapping[str, np.ndarray]


class CanaryClients:
    """The canaries of a run whose server adds the noise."""

    def __init__(self, level: ClientLevel, noise: Source) -> None:
        self._level, self._noise, self._seed = level, noise, level.config.seed
        self.count = level.config.audit.canaries
        self.included = coins(self.count, self._seed)
        self._known = np.zeros(self.count)
        self._seen: list[np.ndarray] = []
        self._measured = Noise()

    def answer(self, server_round: int, sent: Vectors, names: Sequence[str], clipping_norm: float) -> RecordDict | None:
        """Return the round's canaries as one cohort's answer, None where none was drawn.

        `sent` is what went out, by name; an answer holds `names`.
        """
        drawn = self._noise.at("canaries", server_round).sampled(self._level.rate, self.count).numpy()
        taking = np.flatnonzero(drawn & self.included)
        if not len(taking):
            return None
        amounts = torch.zeros(1, self.count)
        amounts[0, taking] = clipping_norm / len(taking)
        [mean] = directions(self.count, sum(sent[name].size for name in names), self._seed).together(amounts)
        arrays, start = {}, 0
        for name in names:
            part = mean[start : start + sent[name].size].view(sent[name].shape).numpy()
            arrays[name] = part if "/" in name else sent[name] + part
            start += part.size
        metrics: Any = {records.WEIGHT: float(len(taking))}
        who: Any = {records.CLIENT: [self._level.config.clients + int(i) for i in taking]}
        content = {records.METRICS: MetricRecord(metrics), records.CLIENTS: ConfigRecord(who)}
        return RecordDict({records.ARRAYS: to_arrays(arrays), **content})  # type: ignore[dict-item]

    def watch(self, released: Vectors, honest: Vectors, total: Vectors, clipping_norm: float) -> None:
        """See a round's noisy sum, as it can be had from what was released, and what is in it without noise: the sum
        of honest clients, and the total with canaries."""
        rows = torch.stack([_flat(vectors) for vectors in (released, honest, total)]) / clipping_norm
        self._measured.add(rows[0] - rows[2], self._level.sum_multiplier)
        seen, drift = directions(self.count, rows.shape[1], self._seed).along(rows[:2]).numpy()
        own = (seen - drift)[: self.count]
        self._known += log_likelihood(own, self._level.rate, self._level.sum_multiplier)
        self._seen.append(seen.astype(np.float32))

    def findings(self) -> dict[str, Any]:
        """Return what `canaries.json` holds: who was in, and both observers' scores."""
        return {
            "level": "client",
            "included": self.included.tolist(),
            "known": self._known.tolist(),
            "released": None if (scores := self._from_released()) is None else scores.tolist(),
            "noise": self._measured.ratio(),
        }

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"known": self._known, "seen": list(self._seen), "noise": vars(self._measured)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Remember what `state` returned."""
        self._known, self._seen = np.array(state["known"]), [np.asarray(seen) for seen in state["seen"]]
        self._measured = Noise(**state["noise"])

    def _from_released(self) -> np.ndarray | None:
        if not self._seen:
            return None
        z = self._level.sum_multiplier
        seen = without_drift(np.stack(self._seen).astype(np.float64), self.count, z)
        return None if seen is None else log_likelihood(seen, self._level.rate, z).sum(0)


class CanaryExamples:
    """The canaries of a run whose clients add noise in every step: client by client, as they tell the server."""

    def __init__(self, config: RunConfig) -> None:
        self._each = in_each_client(config)
        self.included = np.stack([coins(self._each, config.seed, client) for client in range(config.clients)])
        self._known = np.zeros(self.included.shape)
        self._measured = Noise()

    def take(self, seen: Sequence[tuple[int, bytes]]) -> None:
        """Add what an observer of each client's steps in a round saw (client/canaries.py)."""
        for client, own in seen:
            if len(own) != 8 * (self._each + 2):
                # A hostile client may say anything of its own.
                continue
            *scores, squares, numbers = np.frombuffer(own, dtype=np.float64)
            self._known[client] += scores
            self._measured = Noise(self._measured.squares + float(squares), self._measured.numbers + int(numbers))

    def findings(self) -> dict[str, Any]:
        """Return what `canaries.json` holds; who sees the clients' updates alone is not looked at."""
        included, known = self.included.reshape(-1).tolist(), self._known.reshape(-1).tolist()
        noise = self._measured.ratio()
        return {"level": "example", "included": included, "known": known, "released": None, "noise": noise}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"known": self._known, "noise": vars(self._measured)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Remember what `state` returned."""
        self._known, self._measured = np.array(state["known"]), Noise(**state["noise"])


def _flat(vectors: Vectors) -> Tensor:
    return torch.from_numpy(np.concatenate([vector.reshape(-1).astype(np.float64) for vector in vectors.values()]))
