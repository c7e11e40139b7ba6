"""Local optimisers by name, and the learning rate of a round."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from core.config import RunConfig
from core.errors import unknown

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}


def learning_rate(config: RunConfig, server_round: int) -> float:
    """Return the local learning rate of a round (from 1) by `learning-rate-schedule`."""
    done = max(server_round - 1, 0)
    factor = {
        "constant": 1.0,
        "cosine": (1 + math.cos(math.pi * done / config.rounds)) / 2,
        "exponential": config.learning_rate_decay**done,
    }
    return config.learning_rate * factor[config.learning_rate_schedule]


def make_optimizer(config: RunConfig, rate: float, name: str = "") -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    """Return a function from parameters to the torch optimiser called `name`, by default the clients' own.

    An optimiser that has no momentum option is not given any.
    """
    name = name or config.optimizer
    if name not in OPTIMIZERS:
        raise unknown("optimizer", name, OPTIMIZERS)
    options: dict[str, Any] = {"lr": rate, "weight_decay": config.weight_decay}
    if name in ("sgd", "rmsprop"):
        options["momentum"] = config.momentum
    return functools.partial(OPTIMIZERS[name], **options)
