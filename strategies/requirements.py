"""What some strategies ask of the local optimiser and of the model."""

from __future__ import annotations

import functools

import torch

from core.config import RunConfig
from core.errors import InputError
from core.server_side import ServerSide
from core.training import LocalRound


def needs_plain_sgd(config: RunConfig, what: str, *, momentum: bool = False) -> None:
    """Raise `InputError` unless local steps are plain SGD; with `momentum` its momentum is fine too."""
    if config.optimizer != "sgd" or (config.momentum and not momentum):
        raise InputError(
            f"optimizer={config.optimizer} with momentum={config.momentum:g}: {what} take local steps of plain SGD; "
            "set optimizer=sgd momentum=0 with a learning-rate of its kind."
        )
    if config.gradient_clip and not momentum:
        raise InputError(f"gradient-clip={config.gradient_clip:g}: {what} are no longer what the paper sums up; set 0.")


def needs_small_steps(config: RunConfig, option: str, default: float) -> None:
    """Raise `InputError` where a pull of strength `option` would overshoot in every step of plain SGD."""
    pull = config.strategy_options.get(option, default)
    if config.optimizer == "sgd" and isinstance(pull, int | float) and config.learning_rate * pull >= 1:
        raise InputError(
            f"strategy-options.{option}={pull} times learning-rate={config.learning_rate:g} is 1 or more: every "
            "step would overshoot; lower one of them."
        )


def local_rate(r: LocalRound) -> float:
    """Return the local learning rate of the round's optimiser."""
    assert isinstance(r.optimizer, functools.partial)
    return float(r.optimizer.keywords["lr"])


def trainable(server: ServerSide) -> list[str]:
    """Return the names of the model's trainable parameters: running statistics are not among them."""
    return [name for name, p in server.fresh_model(server.config.seed).named_parameters() if p.requires_grad]


def per_client(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return numbers (C,) in a shape that multiplies tensors (C, ...)."""
    return values.to(like.device).view(-1, *[1] * (like.ndim - 1))
