"""Update processors: what an honest client does to its update before it leaves, in this order, in every runtime.

Anybody's come by entry point (group `fedra.processors`) or `module:attr`: a callable `(update, r) -> update` on a
cohort's LocalUpdate and LocalRound. Compression, where it is asked for, is the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from core.config import RunConfig
from core.errors import InputError
from core.plugins import load
from core.training import LocalRound, LocalUpdate

GROUP = "fedra.processors"


class Processor(Protocol):
    """One step on the way out. It may have `initial_state(r)`, as a strategy has, and use `r.state`."""

    def __call__(self, update: LocalUpdate, r: LocalRound) -> LocalUpdate:
        """Return the cohort's update after this step; tensors keep their shapes."""
        ...


def processors_of(config: RunConfig) -> Sequence[Processor]:
    """Return the configured processors; `InputError` names one that cannot be loaded."""
    found = []
    for name in filter(None, (part.strip() for part in config.processors.split(","))):
        processor = load("processor", name, {}, GROUP)
        if isinstance(processor, type):
            processor = processor()
        if not callable(processor):
            raise InputError(f"processor '{name}' is {processor!r}, not a function of (update, r).")
        found.append(processor)
    return found
