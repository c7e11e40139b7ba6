"""What malicious clients achieved: how often a rule let them in, and whether a backdoor opens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from core.adversary import malicious, triggered
from core.config import RunConfig
from core.data import Split
from strategies import options_of, strategy_class
from tasks.base import predict


class Malice:
    """Counts, over the rounds, malicious clients that answered and those that the rule took into its model."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._bad = malicious(config)
        self.totals: dict[str, float] = {"answered": 0, "selected": 0, "weight": 0.0, "rounds": 0}

    def observe(self, clients: Sequence[int], influence: Mapping[int, float] | None) -> dict[str, Any]:
        """Return a round's line on malicious clients, empty where there are none.

        `influence` is each client's share of the new model, where the strategy's rule has such a thing.
        """
        bad = [client for client in clients if self._bad[client]]
        if self._config.attack.kind == "none":
            return {}
        self.totals["answered"] += len(bad)
        row: dict[str, Any] = {"malicious": len(bad)}
        if influence is not None and influence:
            whole = sum(influence.values()) or 1.0
            row["malicious_selected"] = sum(influence.get(client, 0.0) > 0 for client in bad)
            row["malicious_weight"] = round(sum(influence.get(client, 0.0) for client in bad) / whole, 6)
            self.totals["selected"] += row["malicious_selected"]
            self.totals["weight"] += row["malicious_weight"]
            self.totals["rounds"] += 1
        return row

    def summary(self, backdoor: float | None) -> dict[str, Any] | None:
        """Return the whole run's numbers; None where all clients are honest."""
        if self._config.attack.kind == "none":
            return None
        rounds, answered = self.totals["rounds"], self.totals["answered"]
        return {
            "kind": self._config.attack.kind,
            "malicious": int(self._bad.sum()),
            "selected": self.totals["selected"] / answered if rounds and answered else None,
            "weight": self.totals["weight"] / rounds if rounds else None,
            "backdoor_success": backdoor,
        }


def warnings(config: RunConfig) -> list[str]:
    """Return a sentence where clients are malicious and a robust rule is told to expect none; else nothing."""
    bad = int(malicious(config).sum())
    options = {**options_of(strategy_class(config.strategy)), **config.strategy_options}
    if bad and options.get("num-malicious-nodes") == 0:
        told, remedy = "num-malicious-nodes=0", "as many as a round may have"
    elif bad and config.strategy == "fedtrimmedavg" and options["beta"] == 0:
        told, remedy = "beta=0", f"their share, {bad / config.clients:.2g}, or more"
    else:
        return []
    return [
        f"{config.strategy} is told that nobody is malicious (strategy-options.{told}), but with attack.kind="
        f"{config.attack.kind} {bad} of {config.clients} clients are; set that to {remedy}."
    ]


def backdoor_success(config: RunConfig, model: nn.Module, central: Split, threshold: float) -> float | None:
    """Return the share of the central test set's other examples that carry the label `attack.target` once triggered."""
    if config.attack.kind != "backdoor":
        return None
    rows = central.y != config.attack.target
    p = predict(model, torch.from_numpy(triggered(central.x[rows])))
    found = (p >= threshold).astype(np.int64) if p.ndim == 1 else p.argmax(axis=1)
    return float((found == config.attack.target).mean())
