"""The numbers of a comparison: a row per variant with means over seeds and confidence intervals.

A variant is one combination of what is compared; `by` names it: "Strategy", or the keys that vary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from reports.load import nested
from reports.words import bounded, finite, metric, number, ordered

POOLED, ALONE = "pooled data", "clients alone"
STRATEGY = "Strategy"
HEADINGS = {"mean": "Clients", "worst": "Worst client"}
# Where in a summary, and the units with their size, the largest first.
COSTS: dict[str, tuple[tuple[str, ...], list[tuple[str, float]]]] = {
    "Virtual": (("virtual_seconds",), [("hours", 3600.0), ("seconds", 1.0)]),
    "Uplink": (("traffic", "uplink_bytes"), [("GB", 1e9), ("MB", 1e6), ("kB", 1e3)]),
    "Backdoor success": (("attack", "backdoor_success"), [("", 1.0)]),
}
# Which of them lie between 0 and 1.
SHARES = ("backdoor_success",)
Row = Mapping[str, Any]


# Below every table of a comparison.
HOW = (
    "Means over completed runs with 95 % confidence intervals (Student's t; one run has none): [low\N{EN DASH}high], "
    "cut to 0 and 1, for metrics that lie between these, \N{PLUS-MINUS SIGN} half the width for other numbers."
)


@dataclass(frozen=True)
class Interval:
    """A mean over n runs and the half-width of its 95 % confidence interval, None where n < 2."""

    mean: float | None
    half_width: float | None
    n: int
    digits: int = 3
    bounded: bool = False
    """Whether such numbers lie between 0 and 1: what is shown of the interval does too."""

    @property
    def ends(self) -> tuple[float, float]:
        """Return the interval's ends as they are shown; twice the mean where there is no interval."""
        mean, half = self.mean or 0.0, self.half_width or 0.0
        low, high = mean - half, mean + half
        return (max(0.0, low), min(1.0, high)) if self.bounded else (low, high)

    def __str__(self) -> str:
        shown = number(self.mean, self.digits)
        if self.half_width is None:
            return shown
        if self.bounded:
            # Without a space, so that a narrow terminal does not break it.
            low, high = (number(end, self.digits) for end in self.ends)
            return f"{shown} [{low}\N{EN DASH}{high}]"
        return f"{shown} ± {number(self.half_width, self.digits)}"


def interval(values: Iterable[object], digits: int = 3, bounded: bool = False) -> Interval:
    """Return mean and 95 % confidence interval by Student's t; None and nan do not count."""
    known = [value for value in map(finite, values) if value is not None]
    if len(known) < 2:
        return Interval(known[0] if known else None, None, len(known), digits, bounded)
    from scipy.special import stdtrit

    t = float(stdtrit(len(known) - 1, 0.975))
    half_width = t * stdev(known) / math.sqrt(len(known))
    return Interval(fmean(known), half_width, len(known), digits, bounded)


def of_metric(name: str, values: Iterable[object]) -> Interval:
    """Return mean and confidence interval of a metric's values."""
    return interval(values, bounded=bounded(name))


def table(rows: Sequence[Row], by: str = STRATEGY) -> list[dict[str, Any]]:
    """Return a dict per variant, in order of appearance, and one per baseline where the runs have them.

    `rows` are the runs: {"strategy", "seed", "path", "summary"}, with a "variant" where that is not the strategy. Keys
    are headings: `by`, Runs, a metric's title, "Clients <metric>" (their mean) and "Worst client <metric>" for the most
    telling one, Clients/s. Numbers are `Interval`s, whose text is what the page shows. Only completed runs count: a run
    that was cut short would pull the mean down.
    """
    done = completed(rows)
    names = metrics(done)
    out = []
    for variant, own in summaries(rows).items():
        values = {metric(name).title: of_metric(name, (nested(s, "metrics", name) for s in own)) for name in names}
        fare = {
            heading(part, name): of_metric(name, (of_clients(s, name, part) for s in own))
            for name in names[:1]
            for part in HEADINGS
        }
        speed = interval((s.get("clients_per_second") for s in own), digits=1)
        out.append({by: variant, "Runs": len(own), **values, **fare, "Clients/s": speed})
    return out + _baselines(done, names, by)


def details(rows: Sequence[Row], by: str = STRATEGY) -> list[dict[str, Any]]:
    """Return a dict per variant of what `table` leaves out: `by`, how the clients fare, and what `costs` says.

    The clients' mean and the worst client are of the most telling metric that clients have.
    """
    done = completed(rows)
    known = (n for n in metrics(done) if any(of_clients(row["summary"], n, "mean") is not None for row in done))
    name = next(known, None)
    out = []
    for (variant, own), cost in zip(summaries(rows).items(), costs(rows, by), strict=True):
        fare = (
            {heading(part, name): of_metric(name, (of_clients(s, name, part) for s in own)) for part in HEADINGS}
            if name
            else {}
        )
        out.append({by: variant, **fare, **cost})
    return out


def costs(rows: Sequence[Row], by: str = STRATEGY) -> list[dict[str, Any]]:
    """Return a dict per variant: `by`, and where a run has them virtual seconds, a backdoor's success, uplink bytes."""
    done = completed(rows)
    columns = {}
    for cost, (keys, units) in COSTS.items():
        known = [value for row in done if (value := _in(row["summary"], keys, 1.0)) is not None]
        if known:
            unit, each = next(((u, e) for u, e in units if max(known) >= e), units[-1])
            columns[f"{cost} {unit}".strip()] = (keys, each, 1 if max(known) >= 10 * each else 3)
    out = []
    for variant, own in summaries(rows).items():
        values = {
            h: interval((_in(s, keys, each) for s in own), n, bounded=keys[-1] in SHARES)
            for h, (keys, each, n) in columns.items()
        }
        out.append({by: variant, **values})
    return out


def failure(row: Row) -> str:
    """Return why a run failed, on one line; empty where it did not."""
    if row["summary"].get("status") != "failed":
        return ""
    return " ".join(str(row["summary"].get("error") or "the error was not recorded").split())


def failures(rows: Sequence[Row]) -> list[str]:
    """Return a line for each failed run: which it is, and why."""
    return [f"{variant_of(row)}, seed {row['seed']}: {why}" for row in rows if (why := failure(row))]


def warnings(rows: Sequence[Row]) -> list[str]:
    """Return what the runs warn of, each sentence once."""
    return list(dict.fromkeys(said for row in rows for said in row["summary"].get("warnings") or []))


def personal(rows: Sequence[Row]) -> str:
    """Return a sentence on the variants whose clients evaluate models of their own, empty where none does."""
    own = names_of([row for row in rows if row["summary"].get("personal")])
    if not own:
        return ""
    which = "" if len(own) == len(names_of(rows)) else f" under {'; '.join(own)}"
    return f"Numbers of clients{which} are of each client's own model; all others are of the global model."


def _baselines(done: Sequence[Row], names: Sequence[str], by: str) -> list[dict[str, Any]]:
    """Return a row for pooled training and one for clients alone.

    They depend on the seed and not on the strategy; where another key that varies changes them, each variant has its
    own.
    """
    groups: dict[str, dict[int, Mapping[str, Any]]] = {}
    shared: dict[int, Mapping[str, Any]] = {}
    agree = True
    for row in done:
        if found := row["summary"].get("baselines"):
            groups.setdefault(f", {variant_of(row)}", {})[row["seed"]] = found
            agree = agree and shared.setdefault(row["seed"], found) == found
    out = []
    for variant, by_seed in ({"": shared} if agree or by == STRATEGY else groups).items():
        for title, kind in ((POOLED, "central"), (ALONE, "local")):
            own = [found[kind] for found in by_seed.values() if found.get(kind)]
            if own:
                values = {metric(name).title: of_metric(name, (found.get(name) for found in own)) for name in names}
                fare = {
                    heading(part, n): of_metric(n, (nested(found, "own_test", n, part) for found in own))
                    for n in names[:1]
                    for part in HEADINGS
                }
                counted = {by: f"{title}{variant}", "Runs": len(own)}
                out.append({**counted, **values, **fare, "Clients/s": interval([])})
    return out


def completed(rows: Sequence[Row]) -> list[Row]:
    """Return the runs that were not cut short."""
    return [row for row in rows if row["summary"].get("status") == "completed"]


def variant_of(row: Row) -> str:
    """Return what a run's variant is called."""
    return str(row.get("variant", row["strategy"]))


def names_of(rows: Sequence[Row]) -> list[str]:
    """Return the variants' names in order of appearance."""
    return list(dict.fromkeys(map(variant_of, rows)))


def summaries(rows: Sequence[Row]) -> dict[str, list[Mapping[str, Any]]]:
    """Return the summaries of each variant's completed runs, in order of appearance."""
    done = completed(rows)
    return {variant: [row["summary"] for row in done if variant_of(row) == variant] for variant in names_of(rows)}


def metrics(rows: Sequence[Row]) -> list[str]:
    """Return the central metrics of the runs, the most telling first."""
    return ordered(name for row in rows for name in row["summary"].get("metrics") or {})


def heading(part: str, name: str) -> str:
    """Return the heading of the clients' `mean` or `worst` of a metric."""
    return f"{HEADINGS[part]} {metric(name).title}"


def of_clients(summary: Mapping[str, Any], name: str, part: str) -> float | None:
    """Return the clients' `mean` or `worst` of a metric."""
    return finite(nested(summary, "clients_metrics", name, part))


def _in(summary: Mapping[str, Any], keys: Sequence[str], each: float) -> float | None:
    value = finite(nested(summary, *keys))
    return None if value is None else value / each
