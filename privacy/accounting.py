"""One ledger for every kind of differential privacy: what was spent, by whom, and the epsilon that it adds up to.

Everything that is released is a Gaussian mechanism, maybe on a Poisson sample: an `Event`. Events compose by privacy
loss distributions (Koskela, Jalko and Honkela, AISTATS 2020; Doroshenko et al., PoPETs 2022: Google's dp-accounting),
which agree with the truth to the grid of their losses. Two data sets are neighbours when one has a client, or an
example, that the other lacks (add or remove).
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, RecordDict

from core.errors import InputError
from privacy.losses import epsilon_of, losses

# Of privacy losses, for an epsilon up to 8; twice as much has one twice as wide. The deviation of each event's losses
# has as many steps at least: then epsilon is too large by 0.3 % at most (the finest one: of rates below 1 in 3000).
GRID, FINEST = 1e-3, 1e-3 / 64
GRID_UP_TO = 8.0
STEPS = 6
# Whole ones: at others the sum for a Poisson sample may not converge.
ORDERS = (*range(2, 9), 10, 12, 16, 24, 32, 64)
# Larger epsilons protect nobody, and exp(loss) would not fit in a float: moments answer for them.
PLD_MOST = 300.0
# A calibrated noise multiplier has so many digits, and is at least this; the search for it begins with this step.
DIGITS = 4
LEAST = 0.05
STEP = 0.1
EVERYBODY = -1
STATE = "spent-privacy"


@dataclass(frozen=True, order=True)
class Event:
    """A Gaussian mechanism of standard deviation noise_multiplier x sensitivity on a Poisson sample of rate `rate`."""

    rate: float
    noise_multiplier: float
    moments: bool = False
    """Whether it is another mechanism, whose Renyi moments at `ORDERS` are no larger than that Gaussian's."""


Spent = Mapping[Event, int]
"""How often each event took place."""


def epsilon(spent: Spent, delta: float) -> float:
    """Return the epsilon at `delta` of all these events together, 0 for none; infinite where one had no noise."""
    counts = tuple(sorted((event, count) for event, count in spent.items() if count and event.rate))
    return _epsilon(counts, delta) if counts else 0.0


@functools.lru_cache(maxsize=4096)
def _epsilon(counts: tuple[tuple[Event, int], ...], delta: float) -> float:
    bound = by_moments(dict(counts), delta)
    if bound > PLD_MOST or any(event.moments for event, _ in counts):
        return bound
    if all(event.rate >= 1 for event, _ in counts):
        # Gaussians on the same data are one Gaussian, whose losses are known exactly (Balle and Wang, ICML 2018).
        precision = sum(count * event.noise_multiplier**-2 for event, count in counts)
        return float(_gaussians().get_epsilon_gaussian(precision**-0.5, delta))
    grid = _grid([event for event, _ in counts], bound)
    return epsilon_of([(losses(event.rate, event.noise_multiplier, grid), count) for event, count in counts], delta)


def _grid(events: Iterable[Event], bound: float) -> float:
    """Return the grid for losses of these events that may add up to this epsilon."""
    # The deviation of a loss is nearly q sqrt(exp(z^-2) - 1); rounding to a grid h adds h^2 / 6 to its variance.
    smallest = min(event.rate * math.sqrt(math.expm1(min(event.noise_multiplier**-2, 50.0))) for event in events)
    wide = max(0, math.ceil(math.log2(max(bound, GRID) / GRID_UP_TO)))
    fine = math.floor(math.log2(smallest / STEPS / GRID))
    return float(max(FINEST, GRID * 2.0 ** min(wide, fine)))


def by_moments(spent: Spent, delta: float) -> float:
    """Return an upper bound of the same epsilon by Renyi moments (Mironov, Talwar and Zhang, 2019): looser, quick."""
    from dp_accounting.rdp import compute_epsilon

    if any(event.noise_multiplier <= 0 for event in spent):
        return math.inf
    total = sum(count * _moments(event) for event, count in spent.items())
    return float(compute_epsilon(ORDERS, total, delta)[0])


@functools.lru_cache(maxsize=4096)
def _moments(event: Event) -> np.ndarray:
    """Return the Renyi divergences of one event at each of `ORDERS`."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    once = RdpAccountant(ORDERS)
    once.compose(PoissonSampledDpEvent(event.rate, GaussianDpEvent(event.noise_multiplier)))
    moments: np.ndarray = once.rdp
    return moments


def accountant(found: float, spent: Iterable[Spent] = ()) -> str:
    """Return the name of the method that gave an epsilon for these events."""
    return "RDP" if found > PLD_MOST or any(event.moments for own in spent for event in own) else "PLD"


@functools.lru_cache(maxsize=1024)
def calibrate(rate: float, count: int, target: float, delta: float, *, moments: bool = False) -> float:
    """Return the smallest noise multiplier, up to its digits, at which `count` events stay within (target, delta).

    With `moments` the events are known by their moments alone.
    """
    from scipy.optimize import brentq

    def over(logarithm: float) -> float:
        found = epsilon({Event(rate, math.exp(logarithm), moments): count}, delta)
        return math.log(max(found, 1e-9) / target)

    # Everybody in everything is one Gaussian. Many samples come near one (Bu et al., 2020): only where to begin.
    deviation = _gaussians().get_sigma_gaussian(target, delta)
    root = math.log(deviation * math.sqrt(count))
    if rate < 1 or moments:
        low = high = -0.5 * math.log(math.log1p(1 / (rate * deviation) ** 2 / count))
        while over(high) > 0:
            low, high = high, high + STEP
        while over(low) < 0 and low > math.log(LEAST):
            low, high = low - STEP, low
        root = brentq(over, low, high, xtol=10.0**-DIGITS / 10) if over(low) > 0 else low
    units = math.ceil(math.exp(root) * 10**DIGITS)
    while epsilon({Event(rate, units / 10**DIGITS, moments): count}, delta) > target:
        units += 1
    return units / 10**DIGITS


def _gaussians() -> Any:
    """Return dp-accounting's closed forms. Only who has privacy needs them, and they take a second to import."""
    from dp_accounting import gaussian_mechanism

    return gaussian_mechanism


def spent_by(state: RecordDict) -> Counter[Event]:
    """Return what a client has spent, as it stands in its own `Context.state`."""
    kept: Mapping[str, Any] = state.config_records.get(STATE, {})
    events = map(Event, kept.get("rate", []), kept.get("noise-multiplier", []), kept.get("moments", []))
    return Counter(dict(zip(events, kept.get("count", []), strict=True)))


def keep_spent(state: RecordDict, spent: Spent) -> None:
    """Let a client keep what it has spent."""
    state[STATE] = ConfigRecord({
        "rate": [event.rate for event in spent],
        "noise-multiplier": [event.noise_multiplier for event in spent],
        "moments": [event.moments for event in spent],
        "count": list(spent.values()),
    })  # fmt: skip


@dataclass
class Ledger:
    """What has been spent in a run. With a file, an event stands there before its outcome is used.

    A killed run may repeat its last round with new noise: both have cost, and both stand in the file. `owner` is the
    client whose data an event was on, or `EVERYBODY` where one event protects all clients alike.
    """

    delta: float
    file: Path | None = None
    spent: dict[int, Counter[Event]] = field(default_factory=dict)
    """By owner."""
    _rounds: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.file is not None and self.file.exists():
            text = self.file.read_text(encoding="utf-8")
            # The outcome of a line that a kill has cut in two was not used.
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                with self.file.open("r+", encoding="utf-8") as file:
                    file.truncate(len(whole.encode()))
            for number, line in enumerate(whole.splitlines(), start=1):
                self._read(line, number)

    def _read(self, line: str, number: int) -> None:
        try:
            row = json.loads(line)
            self._rounds.add(int(row["round"]))
            for owner, rate, noise_multiplier, count, *moments in row["events"]:
                self._add(int(owner), Event(float(rate), float(noise_multiplier), moments == [True]), int(count))
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{self.file} line {number} cannot be read, and what the run has spent is not known without it; start "
                "a new run."
            ) from None

    def spend(self, server_round: int, events: Iterable[tuple[int, Event, int]]) -> None:
        """Record a round's events: (owner, event, how often)."""
        events = list(events)
        self._rounds.add(server_round)
        for owner, event, count in events:
            self._add(owner, event, count)
        if self.file is not None:
            rows = [
                [owner, event.rate, event.noise_multiplier, count, *([True] if event.moments else [])]
                for owner, event, count in events
            ]
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"round": server_round, "events": rows}) + "\n")
                file.flush()
                # A checkpoint survives when the machine stops, and must not remember more than the ledger.
                os.fsync(file.fileno())

    def knows(self, server_round: int) -> bool:
        """Return whether the round has cost something before: it is being repeated."""
        return server_round in self._rounds

    def missing(self, rounds: int) -> list[int]:
        """Return which of the rounds from 1 on are not in the ledger."""
        return sorted(set(range(1, rounds + 1)) - self._rounds)

    def _add(self, owner: int, event: Event, count: int) -> None:
        self.spent.setdefault(owner, Counter())[event] += count

    def of(self, owner: int) -> float:
        """Return the epsilon of one owner."""
        return epsilon(self.spent.get(owner, {}), self.delta)

    def worst(self, more: Spent | None = None) -> float:
        """Return the largest epsilon of any owner; with `more`, as if each owner had spent that besides."""
        found: set[tuple[tuple[Event, int], ...]] = set()
        most: dict[Event, int] = {}
        for own in self.spent.values():
            whole = own + Counter(more or {})
            if len(whole) == 1:
                # Of owners with one kind of event only the one with most of them can be the worst.
                [(event, count)] = whole.items()
                most[event] = max(count, most.get(event, 0))
            elif whole:
                found.add(tuple(sorted(whole.items())))
        found |= {((event, count),) for event, count in most.items()}
        worst = epsilon(more or {}, self.delta)
        bounds = {counts: by_moments(dict(counts), self.delta) for counts in found}
        for counts in sorted(found, key=bounds.__getitem__, reverse=True):
            if bounds[counts] <= worst:
                # Nor can those after it be worse.
                break
            worst = max(worst, epsilon(dict(counts), self.delta))
        return worst
