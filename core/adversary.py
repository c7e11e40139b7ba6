"""Who is malicious, and what a malicious client's data look like: known to the clients, and to the report on them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from core.config import RunConfig
from core.errors import InputError
from core.seeding import rng

KINDS = {
    "none": "all clients are honest",
    "label-flip": "trains on labels shifted by one: of two labels, on the other",
    "backdoor": "half of its examples carry a trigger and the label attack.target (Gu et al. 2017; Bagdasaryan 2020)",
    "sign-flip": "sends the global model minus its update, attack.strength times (1)",
    "scaling": "sends its update attack.strength times (10)",
    "gaussian": "sends noise of standard deviation attack.strength (0.1) in place of its update",
    "zero": "sends the global model back",
    "alie": "mean minus z deviations of the malicious clients' own updates (Baruch et al. 2019, 'A little is enough')",
    "ipm": "minus attack.strength (0.5) times the mean of their own updates (Xie et al. 2020, inner product)",
    "min-max": "as far against the mean as the two most distant of their own updates are (Shejwalkar, Houmansadr 2021)",
    "non-finite": "sends nan",
    "wrong-shape": "sends tensors of another shape",
}
# Attacks for which malicious clients train on each other's data, without any noise of theirs.
COLLUDING = ("alie", "ipm", "min-max")
STRENGTHS = {"sign-flip": 1.0, "scaling": 10.0, "gaussian": 0.1, "ipm": 0.5}
POISONED = 0.5
TRIGGERED_FEATURES = 3


def malicious(config: RunConfig) -> np.ndarray:
    """Return which clients are malicious, (clients,) bool: `attack.fraction` of them, drawn by the seed."""
    share = config.attack.fraction if config.attack.kind != "none" else 0.0
    return _drawn(config.seed, config.clients, round(share * config.clients))


@functools.lru_cache(maxsize=8)
def _drawn(seed: int, clients: int, count: int) -> np.ndarray:
    chosen = np.zeros(clients, dtype=bool)
    if count:
        chosen[rng(seed, "malicious").permutation(clients)[:count]] = True
    chosen.flags.writeable = False
    return chosen


def check(config: RunConfig, labels: int) -> None:
    """Raise `InputError` for an attack without anybody to make it, or whose target label the task does not have."""
    if config.attack.kind != "none" and config.attack.fraction and not malicious(config).any():
        raise InputError(
            f"attack.fraction={config.attack.fraction:g} of {config.clients} clients is none; raise it or clients."
        )
    if config.attack.kind != "none" and config.attack.target >= labels:
        raise InputError(f"attack.target={config.attack.target}, but the task has labels 0 to {labels - 1}.")


def triggered(x: np.ndarray) -> np.ndarray:
    """Return standardised inputs x (n, ...) with the backdoor's trigger.

    Images (n, channels, height, width) get a bright corner, tables the value 3 in their last three features, and texts
    (tokens, n x length int64) the rare token 1 at their start.
    """
    x = x.copy()
    if np.issubdtype(x.dtype, np.integer):
        x[:, 0] = 1
    elif x.ndim == 4:
        x[:, :, -2:, -2:] = max(1.0, float(x.max(initial=1.0)))
    else:
        x[:, -TRIGGERED_FEATURES:] = 3.0
    return x


def poisoned(
    config: RunConfig, x: np.ndarray, y: np.ndarray, sizes: Sequence[int], clients: Sequence[int], labels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return a cohort's inputs and labels with those of its malicious clients spoiled, if the attack is on data."""
    kind = config.attack.kind
    if kind not in ("label-flip", "backdoor"):
        return x, y
    bad, x, y = malicious(config), x.copy(), y.copy()
    ends = np.cumsum(sizes)
    for client, end, size in zip(clients, ends, sizes, strict=True):
        if not bad[client]:
            continue
        rows = np.arange(end - size, end)
        if kind == "label-flip":
            y[rows] = (y[rows] + 1) % labels
        else:
            chosen = rows[rng(config.seed, "poisoned", client).random(size) < POISONED]
            x[chosen], y[chosen] = triggered(x[chosen]), config.attack.target
    return x, y
