"""What some strategies need before they run at all."""

from __future__ import annotations

from typing import Any

from core.config import RunConfig

SETTINGS: dict[str, dict[str, Any]] = {
    "fedbuff": {"strategy-options.buffer-size": 2},
    "fedtrimmedavg": {"strategy-options.beta": 0.25},
}


def with_needs(config: RunConfig) -> RunConfig:
    """Return the configuration with what its strategy cannot do without."""
    return RunConfig.of({**config.flat(), **SETTINGS.get(config.strategy, {})})
