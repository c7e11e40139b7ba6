"""Strategies compared over seeds: one table for the terminal and the page, curves, and links to each run's report."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from reports import look, markup
from reports.load import nested, read_rounds, series
from reports.markup import Section, cell, element, figure, join, key, paragraph
from reports.words import SCORES, duration, finite, metric, number, ordered, plural

if TYPE_CHECKING:
    import plotly.graph_objects as go

POOLED, ALONE = "pooled data", "clients alone"
# A title that lists more strategies than this is not read.
NAMED = 4
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Interval:
    """A mean over n runs and the half-width of its 95 % confidence interval, None where n < 2."""

    mean: float | None
    half_width: float | None
    n: int
    digits: int = 3

    def __str__(self) -> str:
        if self.half_width is None:
            return number(self.mean, self.digits)
        return f"{number(self.mean, self.digits)} ± {number(self.half_width, self.digits)}"


def interval(values: Iterable[object], digits: int = 3) -> Interval:
    """Return mean and 95 % confidence interval by Student's t; None and nan do not count."""
    known = [value for value in map(finite, values) if value is not None]
    if len(known) < 2:
        return Interval(known[0] if known else None, None, len(known), digits)
    from scipy.special import stdtrit

    t = float(stdtrit(len(known) - 1, 0.975))
    return Interval(fmean(known), t * stdev(known) / math.sqrt(len(known)), len(known), digits)


def table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return a dict per strategy, in order of appearance, and one per baseline where the runs have them.

    `rows` are the runs: {"strategy", "seed", "path", "summary"}. Keys are headings: Strategy, Runs, a metric's title,
    "Clients <metric>" (their mean) and "Worst client <metric>" for the most telling one, Clients/s. Numbers are
    `Interval`s, whose text is what the page shows. Only completed runs count: a run that was cut short would pull the
    mean down.
    """
    done = _completed(rows)
    names = _metrics(done)
    out = []
    for strategy in _strategies(rows):
        own = [row["summary"] for row in done if row["strategy"] == strategy]
        values = {metric(name).title: interval(nested(s, "metrics", name) for s in own) for name in names}
        each = {
            heading(name): interval(finite(nested(s, "clients_metrics", name, kind)) for s in own)
            for name in names[:1]
            for heading, kind in ((clients_mean, "mean"), (_worst, "worst"))
        }
        speed = interval((s.get("clients_per_second") for s in own), digits=1)
        out.append({"Strategy": strategy, "Runs": len(own), **values, **each, "Clients/s": speed})
    return out + _baselines(done, names)


def write_comparison(path: Path, rows: Sequence[Row], title: str = "") -> Path:
    """Write the page of a comparison and return its path; links to the runs' reports are relative to it."""
    strategies = _strategies(rows)
    compared = ", ".join(strategies) if len(strategies) <= NAMED else f"{len(strategies)} strategies"
    title = title or f"{rows[0]['summary'].get('task', 'runs')}: {compared}"
    parts = [_overview(rows), _curves(rows), _worst_clients(rows), _runs(rows, path.parent)]
    found = [part for part in parts if part is not None]
    about = element("p", _about(rows), class_="about")
    top = join([element("div", element("h1", title), class_="head"), about])
    path.write_text(markup.page(title, top, "", found, "Written by Fedra. This page loads nothing."), encoding="utf-8")
    return path


def _overview(rows: Sequence[Row]) -> Section:
    summary = table(rows)
    headings = list(summary[0])
    best = {heading: _best(heading, summary, name) for heading, name in _headings(rows).items()}
    reference = [row["Strategy"] in (POOLED, ALONE) for row in summary]

    def shown(heading: str, value: object, marked: bool) -> object:
        is_best = marked and isinstance(value, Interval) and value.mean is not None and value.mean == best.get(heading)
        return element("b", value) if is_best else value

    body = [
        [shown(heading, value, not aside) for heading, value in row.items()]
        for row, aside in zip(summary, reference, strict=True)
    ]
    classes = ["reference" if aside else "" for aside in reference]
    note = (
        "Mean over completed runs ± half the width of its 95 % confidence interval (Student's t); one run has none. "
        "The best mean is in colour: where intervals overlap, it may be chance. "
        "Runs of one seed share partitions and first weights."
    )
    content = [markup.table(headings, body, classes=classes), paragraph(note, quiet=True)]
    return Section("strategies", "Strategies", join(content))


def _curves(rows: Sequence[Row]) -> Section | None:
    """Return the central metrics by round: each strategy's mean over seeds with its confidence band."""
    strategies = _strategies(rows)
    runs = [(row["strategy"], read_rounds(Path(row["path"]))) for row in _completed(rows)]
    panels = []
    for name in ordered(name for _, rounds in runs for row in rounds for name in row.get("central") or {}):
        curves = {s: [series(rounds, "central", name) for own, rounds in runs if own == s] for s in strategies}
        panels.append(figure(_curve_figure(name, curves), metric(name).title))
    if not panels:
        return None
    legend = key(("dash" if dash == "dash" else "line", color, name) for dash, color, name in _styles(strategies))
    note = paragraph("On the central test set; bands are 95 % confidence intervals of the mean.", quiet=True)
    return Section("curves", "Learning curves", join([note, legend, element("div", *panels, class_="grid")]))


def _curve_figure(name: str, curves: Mapping[str, Sequence[tuple[list[int], list[float | None]]]]) -> go.Figure:
    traces, longest = [], 1
    for dash, color, strategy in _styles(curves):
        values = [dict(zip(*run, strict=True)) for run in curves[strategy]]
        # Only rounds that all runs reached: a mean over the survivors would bend where a run stops early.
        rounds = sorted(set.intersection(*(set(run) for run in values))) if values else []
        means = [interval(run[r] for run in values) for r in rounds]
        longest = max([longest, *rounds])
        if any(m.half_width is not None for m in means):
            traces.append(_band(rounds, means, color))
        y = [m.mean for m in means]
        traces.append(look.line(rounds, y, look.text(strategy), color, dash=dash, hovertemplate="%{y:.3f}"))
    axis = look.metric_axis(name, [value for trace in traces for value in trace["y"]])
    return look.figure(traces, look.round_axis(longest), axis, hovermode="x unified")


def _band(rounds: list[int], means: list[Interval], color: str) -> dict[str, Any]:
    known = [(r, m.mean, m.half_width or 0.0) for r, m in zip(rounds, means, strict=True) if m.mean is not None]
    upper = [(r, mean + half) for r, mean, half in known]
    lower = [(r, mean - half) for r, mean, half in reversed(known)]
    points = {"x": [r for r, _ in upper + lower], "y": [y for _, y in upper + lower]}
    style = {"fill": "toself", "fillcolor": look.faint(color), "line": {"width": 0}, "hoverinfo": "skip"}
    return {"type": "scatter", "mode": "lines", **points, **style}


def _worst_clients(rows: Sequence[Row]) -> Section | None:
    done = _completed(rows)
    names = [name for name in _metrics(done) if any(_clients_worst(row["summary"], name) is not None for row in done)]
    body = [
        [s, *(interval(_clients_worst(row["summary"], n) for row in done if row["strategy"] == s) for n in names)]
        for s in _strategies(rows)
    ]
    own = any(row["summary"].get("personal") for row in done)
    model = "its model (its own, where a strategy makes one)" if own else "the global model"
    note = paragraph(f"The client that {model} serves worst, on its own test split; mean over runs.", quiet=True)
    content = [note, markup.table(["Strategy", *(metric(name).title for name in names)], body, even=True)]
    return Section("worst", "Worst client", join(content)) if names else None


def _runs(rows: Sequence[Row], start: Path) -> Section:
    names = [name for name in _metrics(rows) if name in SCORES]
    body = []
    for row in rows:
        summary = row["summary"]
        report = Path(os.path.relpath(Path(row["path"]) / "report.html", start)).as_posix()
        link = element("a", "report", href=quote(report))
        words = [row["strategy"], row["seed"], summary.get("status", ""), link]
        numbers = [number(nested(summary, "metrics", name)) for name in names]
        body.append(
            [*(cell(word, "text") for word in words), *numbers, summary.get("rounds"), duration(summary.get("seconds"))]
        )
    headings = ["Strategy", "Seed", "Status", "Report", *(metric(name).title for name in names), "Rounds", "Time"]
    return Section("runs", "Runs", markup.table(headings, body, text=4))


def _baselines(done: Sequence[Row], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row for pooled training and one for clients alone; they depend on the seed, not on the strategy."""
    by_seed = {row["seed"]: row["summary"]["baselines"] for row in done if row["summary"].get("baselines")}
    out = []
    for title, kind in ((POOLED, "central"), (ALONE, "local")):
        own = [found[kind] for found in by_seed.values() if found.get(kind)]
        if own:
            values = {metric(name).title: interval(found.get(name) for found in own) for name in names}
            each = {
                heading(n): interval(nested(found, "own_test", n, key) for found in own)
                for n in names[:1]
                for heading, key in ((clients_mean, "mean"), (_worst, "worst"))
            }
            out.append({"Strategy": title, "Runs": len(own), **values, **each, "Clients/s": interval([])})
    return out


def _best(heading: str, summary: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Return the best strategy's mean in a column, None where they do not differ."""
    own = [row[heading].mean for row in summary if row["Strategy"] not in (POOLED, ALONE)]
    known = [mean for mean in own if mean is not None]
    pick = max if metric(name).higher_is_better else min
    return pick(known) if len(set(known)) > 1 else None


def _headings(rows: Sequence[Row]) -> dict[str, str]:
    """Return the metric behind each heading that holds one."""
    names = _metrics(_completed(rows))
    own = {heading(name): name for name in names[:1] for heading in (clients_mean, _worst)}
    return {metric(name).title: name for name in names} | own


def _about(rows: Sequence[Row]) -> str:
    first, done = rows[0]["summary"], _completed(rows)
    seeds = len({row["seed"] for row in rows})
    said = f"{plural(len(_strategies(rows)), 'strategy', 'strategies')}, {plural(seeds, 'seed')}"
    unfinished = (
        f" · {plural(len(rows) - len(done), 'run')} not completed and not counted" if len(done) < len(rows) else ""
    )
    data = " · ".join(str(first[k]) for k in ("dataset", "preset") if first.get(k))
    return " · ".join(part for part in (data, said) if part) + unfinished


def _completed(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["summary"].get("status") == "completed"]


def _strategies(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(str(row["strategy"]) for row in rows))


def _metrics(rows: Sequence[Row]) -> list[str]:
    return ordered(name for row in rows for name in row["summary"].get("metrics") or {})


def clients_mean(name: str) -> str:
    """Return the heading of the mean over clients of a metric on their own test splits."""
    return f"Clients {metric(name).title}"


def _worst(name: str) -> str:
    return f"Worst client {metric(name).title}"


def _clients_worst(summary: Mapping[str, Any], name: str) -> float | None:
    return finite(nested(summary, "clients_metrics", name, "worst"))


def _styles(strategies: Iterable[str]) -> list[tuple[str, str, str]]:
    """Return (dash, colour, strategy) of each: dashed lines when the colours are used up."""
    many = len(look.PALETTE)
    return [("dash" if i >= many else "solid", look.PALETTE[i % many], name) for i, name in enumerate(strategies)]
