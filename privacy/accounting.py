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
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, RecordDict

# Of the privacy loss: with it, epsilon agrees with ten times finer grids to the fifth digit.
GRID = 1e-3
# Whole ones: at others the sum for a Poisson sample may not converge.
ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512, 1024)
# Larger epsilons protect nobody, and their loss distributions would not fit in memory: moments answer for them.
PLD_MOST = 100.0
# A calibrated noise multiplier has so many digits.
DIGITS = 4
EVERYBODY = -1
STATE = "spent-privacy"


@dataclass(frozen=True, order=True)
class Event:
    """A Gaussian mechanism of standard deviation noise_multiplier x sensitivity on a Poisson sample of rate `rate`."""

    rate: float
    noise_multiplier: float


Spent = Mapping[Event, int]
"""How often each event took place."""


def epsilon(spent: Spent, delta: float) -> float:
    """Return the epsilon at `delta` of all these events together, 0 for none; infinite where one had no noise."""
    counts = tuple(sorted((event, count) for event, count in spent.items() if count and event.rate))
    return _epsilon(counts, delta) if counts else 0.0


@functools.lru_cache(maxsize=4096)
def _epsilon(counts: tuple[tuple[Event, int], ...], delta: float) -> float:
    if any(event.noise_multiplier <= 0 for event, _ in counts):
        return math.inf
    bound = by_moments(dict(counts), delta)
    if bound > PLD_MOST:
        return bound
    whole = None
    for event, count in counts:
        composed = _loss_distribution(event).self_compose(count)
        whole = composed if whole is None else whole.compose(composed)
    assert whole is not None
    return float(whole.get_epsilon_for_delta(delta))


@functools.lru_cache(maxsize=256)
def _loss_distribution(event: Event) -> Any:
    # Only who has privacy needs it, and it takes a second to import.
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        event.noise_multiplier, value_discretization_interval=GRID, sampling_prob=event.rate
    )


def by_moments(spent: Spent, delta: float) -> float:
    """Return an upper bound of the same epsilon by Renyi moments (Mironov, Talwar and Zhang, 2019): looser, quick."""
    from dp_accounting.rdp import compute_epsilon

    total = sum(count * _moments(event) for event, count in spent.items())
    return float(compute_epsilon(ORDERS, total, delta)[0])


@functools.lru_cache(maxsize=256)
def _moments(event: Event) -> np.ndarray:
    """Return the Renyi divergences of one event at each of `ORDERS`."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    once = RdpAccountant(ORDERS)
    once.compose(PoissonSampledDpEvent(event.rate, GaussianDpEvent(event.noise_multiplier)))
    moments: np.ndarray = np.asarray(once._rdp)
    return moments


def accountant(found: float) -> str:
    """Return the name of the method that gave an epsilon."""
    return "RDP" if found > PLD_MOST else "PLD"


@functools.lru_cache(maxsize=1024)
def calibrate(rate: float, count: int, target: float, delta: float) -> float:
    """Return the smallest noise multiplier, up to its digits, at which `count` events stay within (target, delta)."""
    from scipy.optimize import brentq

    def over(logarithm: float) -> float:
        return epsilon({Event(rate, math.exp(logarithm)): count}, delta) - target

    low, high = math.log(0.1), math.log(1.0)
    while over(high) > 0:
        low, high = high, high + 1
    while over(low) < 0 and low > -8:
        low, high = low - 1, low
    root = math.exp(brentq(over, low, high, xtol=10.0**-DIGITS) if over(low) > 0 else low)
    unit = 10.0**-DIGITS
    found = math.ceil(root / unit) * unit
    while epsilon({Event(rate, found): count}, delta) > target:
        found += unit
    return round(found, DIGITS)


def spent_by(state: RecordDict) -> Counter[Event]:
    """Return what a client has spent, as it stands in its own `Context.state`."""
    kept: Mapping[str, Any] = state.config_records.get(STATE, {})
    events = map(Event, kept.get("rate", []), kept.get("noise-multiplier", []))
    return Counter(dict(zip(events, kept.get("count", []), strict=True)))


def keep_spent(state: RecordDict, spent: Spent) -> None:
    """Let a client keep what it has spent."""
    state[STATE] = ConfigRecord({
        "rate": [event.rate for event in spent],
        "noise-multiplier": [event.noise_multiplier for event in spent],
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
            for row in map(json.loads, self.file.read_text(encoding="utf-8").splitlines()):
                self._rounds.add(row["round"])
                for owner, rate, noise_multiplier, count in row["events"]:
                    self._add(owner, Event(rate, noise_multiplier), count)

    def spend(self, server_round: int, events: Iterable[tuple[int, Event, int]]) -> None:
        """Record a round's events: (owner, event, how often)."""
        events = list(events)
        self._rounds.add(server_round)
        for owner, event, count in events:
            self._add(owner, event, count)
        if self.file is not None:
            rows = [[owner, event.rate, event.noise_multiplier, count] for owner, event, count in events]
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"round": server_round, "events": rows}) + "\n")
                file.flush()

    def knows(self, server_round: int) -> bool:
        """Return whether the round has cost something before: it is being repeated."""
        return server_round in self._rounds

    def _add(self, owner: int, event: Event, count: int) -> None:
        self.spent.setdefault(owner, Counter())[event] += count

    def of(self, owner: int) -> float:
        """Return the epsilon of one owner."""
        return epsilon(self.spent.get(owner, {}), self.delta)

    def worst(self, more: Spent | None = None) -> float:
        """Return the largest epsilon of any owner; with `more`, as if each owner had spent that besides."""
        found: set[tuple[tuple[Event, int], ...]] = set()
        most: dict[Event, int] = {}
        for counts in self.spent.values():
            whole = counts + Counter(more or {})
            if len(whole) == 1:
                # Of owners with one kind of event only the one with most of them can be the worst.
                [(event, count)] = whole.items()
                most[event] = max(count, most.get(event, 0))
            else:
                found.add(tuple(sorted(whole.items())))
        found |= {((event, count),) for event, count in most.items()}
        return max((epsilon(dict(counts), self.delta) for counts in found), default=epsilon(more or {}, self.delta))
