"""What `fedra tune` searches: learning-rate=0.001..0.1 local-epochs=1..5 strategy=fedavg,fedprox."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.config import Scalar, parse_override
from core.errors import InputError
from strategies import options_of, strategy_class

if TYPE_CHECKING:
    from optuna.trial import Trial

OPTION = "strategy-options."
# Dots and commas of these are part of one value.
PLAIN = ("preset", "out", "data-dir", "dataset", "processors", "devices.trace", "engine.address")
# A range over this factor or more is searched by orders of magnitude.
LOG_FROM_RATIO = 10
INSIDE = 0.382


@dataclass(frozen=True)
class Range:
    """Numbers from low to high: whole ones where both ends are, else decimals, by magnitude where `log` is true."""

    low: float
    high: float
    whole: bool
    log: bool

    @classmethod
    def parse(cls, key: str, text: str) -> Range:
        """Return the range written as LOW..HIGH; `InputError` when it is none."""
        low, high = (_number(part) for part in text.split("..", 1))
        if low is None or high is None or low >= high:
            raise InputError(
                f"{key}={text} is not a range; write LOW..HIGH with numbers and the smaller one first, "
                "for example learning-rate=0.001..0.1 or local-epochs=1..5."
            )
        whole = isinstance(low, int) and isinstance(high, int)
        return cls(low, high, whole, log=not whole and low > 0 and high / low >= LOG_FROM_RATIO)

    def suggest(self, trial: Trial, key: str) -> Scalar:
        """Return the trial's number."""
        if self.whole:
            return trial.suggest_int(key, int(self.low), int(self.high))
        return trial.suggest_float(key, self.low, self.high, log=self.log)

    def examples(self) -> tuple[Scalar, ...]:
        """Return both ends and, of decimals, one between them: what a setting refuses is refused before the start."""
        inside = self.low + INSIDE * (self.high - self.low)
        return (self.low, self.high) if self.whole else (self.low, self.high, inside)

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}{' (log)' if self.log else ''}"


@dataclass(frozen=True)
class Choices:
    """A few values of which each trial takes one."""

    values: tuple[Scalar, ...]

    @classmethod
    def parse(cls, key: str, text: str) -> Choices:
        """Return the values of a comma-separated list, each once; `InputError` when one is empty."""
        parts = [part.strip() for part in text.split(",")]
        if not all(parts):
            raise InputError(f"{key}={text} has an empty choice; write for example strategy=fedavg,fedprox.")
        return cls(tuple(dict.fromkeys(parse_override(f"{key}={part}")[1] for part in parts)))

    def suggest(self, trial: Trial, key: str) -> Scalar:
        """Return the trial's choice."""
        chosen = trial.suggest_categorical(key, self.values)
        assert chosen is not None
        return chosen

    def examples(self) -> tuple[Scalar, ...]:
        """Return every choice."""
        return self.values

    def __str__(self) -> str:
        return " | ".join(map(str, self.values))


@dataclass(frozen=True)
class Space:
    """What is searched and what is fixed. An option holds for those of the searched strategies that have it."""

    searched: dict[str, Range | Choices]
    fixed: dict[str, Scalar]

    @classmethod
    def of(cls, settings: Mapping[str, Scalar]) -> Space:
        """Return the space of `key=value` settings; `InputError` where a range is none or nothing is searched."""
        if isinstance(seed := settings.get("seed", 0), str):
            raise InputError(f"seed={seed} cannot be searched, the luckiest one would win; give one, such as seed=0.")
        searched: dict[str, Range | Choices] = {}
        for key, value in settings.items():
            if isinstance(value, str) and key not in PLAIN:
                if ".." in value:
                    searched[key] = Range.parse(key, value)
                elif "," in value:
                    searched[key] = Choices.parse(key, value)
        if not searched:
            raise InputError(
                "there is nothing to search; give a setting a range or choices, "
                "for example learning-rate=0.001..0.1 or strategy=fedavg,fedprox."
            )
        # The strategy is chosen first: it says which options there are.
        order = sorted(searched, key=lambda key: key != "strategy")
        fixed = {key: value for key, value in settings.items() if key not in searched}
        return cls({key: searched[key] for key in order}, fixed)

    def suggest(self, trial: Trial) -> dict[str, Scalar]:
        """Return what the trial tries."""
        params: dict[str, Scalar] = {}
        for key, dimension in self.searched.items():
            if self._holds(key, params):
                params[key] = dimension.suggest(trial, key)
        return params

    def settings(self, params: Mapping[str, Scalar]) -> dict[str, Any]:
        """Return the settings of a trial: what is fixed, and what it tries."""
        return {**{key: value for key, value in self.fixed.items() if self._holds(key, params)}, **params}

    def examples(self) -> Iterator[dict[str, Scalar]]:
        """Yield params that together have every end and choice, the first for each strategy; `InputError` if idle."""
        strategies = self.searched["strategy"].examples() if "strategy" in self.searched else (None,)
        used: set[str] = set()
        for strategy in strategies:
            chosen: dict[str, Scalar] = {} if strategy is None else {"strategy": strategy}
            others = {k: d.examples() for k, d in self.searched.items() if k != "strategy" and self._holds(k, chosen)}
            used |= {*others, *self.settings(chosen)}
            first = {**chosen, **{key: values[0] for key, values in others.items()}}
            yield first
            for key, values in others.items():
                yield from ({**first, key: value} for value in values[1:])
        for key in (*self.searched, *self.fixed):
            if key not in used:
                raise InputError(f"{key} is an option of none of strategy={','.join(map(str, strategies))}; drop it.")

    def _holds(self, key: str, params: Mapping[str, Scalar]) -> bool:
        return "strategy" not in params or holds(key, str(params["strategy"]))


def holds(key: str, strategy: str) -> bool:
    """Return whether a setting is none of strategies' options, or one that this strategy has."""
    return not key.startswith(OPTION) or key.removeprefix(OPTION) in options_of(strategy_class(strategy))


def _number(text: str) -> int | float | None:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            value = kind(text)
            return value if math.isfinite(value) else None
    return None
