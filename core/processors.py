"""Update processors: what an honest client does to its update before it leaves, in this order, in every runtime.

Anybody's come by entry point (group `fedra.processors`) or `module:attr`: a callable `(update, r) -> update` on a
cohort's LocalUpdate and LocalRound. Compression, where it is asked for, is the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from core.config import RunConfig
from core.errors import InputError
from core.plugins import first_line, foreign, load
from core.training import LocalRound, LocalUpdate

GROUP = "fedra.processors"


class Processor(Protocol):
    """One step on the way out. It may have `initial_state(r)`, as a strategy has, and use `r.state`."""

    def __call__(self, update: LocalUpdate, r: LocalRound) -> LocalUpdate:
        """Return the cohort's update after this step; tensors keep their shapes."""
        ...


def plugins() -> dict[str, str]:
    """Return the processors of other packages: where each comes from, and a sentence."""
    return foreign("processors", {}, GROUP, lambda name, found: first_line(_checked(name, found)))


def processors_of(config: RunConfig) -> Sequence[Processor]:
    """Return the configured processors; `InputError` names one that cannot be loaded."""
    names = filter(None, (part.strip() for part in config.processors.split(",")))
    return [_checked(name, load("processors", name, {}, GROUP)) for name in names]


def _checked(name: str, found: object) -> Processor:
    """Return the processor, made if it is a class; `InputError` when it cannot be called."""
    try:
        made = found() if isinstance(found, type) else found
    except TypeError as error:
        raise InputError(f"processor '{name}' cannot be made without arguments: {error}.") from None
    if not callable(made):
        raise InputError(f"processor '{name}' is {made!r}, not a function of (update, r).")
    return made
