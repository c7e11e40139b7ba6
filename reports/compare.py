"""The page of a comparison: tables, curves of every variant, and links to each run's report."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from reports import look, markup
from reports.load import nested, read_rounds, series
from reports.markup import Section, cell, element, figure, join, key, paragraph
from reports.protection import compared
from reports.variants import (
    HEADINGS,
    HOW,
    STRATEGY,
    Interval,
    Row,
    completed,
    costs,
    failure,
    heading,
    metrics,
    names_of,
    of_clients,
    of_metric,
    personal,
    summaries,
    table,
    variant_of,
    warnings,
)
from reports.words import SCORES, duration, metric, number, ordered, plural

if TYPE_CHECKING:
    import plotly.graph_objects as go

# A title that lists more variants than this is not read.
NAMED = 4
FARES = {"mean": "Mean over clients.", "worst": "Worst client."}


def write_comparison(path: Path, rows: Sequence[Row], title: str = "", by: str = STRATEGY) -> Path:
    """Write the page of a comparison and return its path; links to the runs' reports are relative to it."""
    names = names_of(rows)
    compared = ", ".join(names) if len(names) <= NAMED else f"{len(names)} strategies"
    task = rows[0]["summary"].get("task", "runs")
    title = title or (f"{task}: {compared}" if by == STRATEGY else f"{task} by {by}")
    parts = [_overview(rows, by), _curves(rows), _clients(rows, by), _runs(rows, path.parent, by)]
    found = [part for part in parts if part is not None]
    about = element("p", _about(rows, by), class_="about")
    warned = [element("p", f"Warning: {said}", class_="banner warning") for said in warnings(rows)]
    top = join([element("div", element("h1", title), class_="head"), about, *warned])
    path.write_text(markup.page(title, top, "", found, "Written by Fedra. This page loads nothing."), encoding="utf-8")
    return path


def _overview(rows: Sequence[Row], by: str) -> Section:
    summary = table(rows, by)
    headings, many = list(summary[0]), len(names_of(rows))
    best = {title: _best(title, summary[:many], name) for title, name in _headings(rows).items()}
    reference = [i >= many for i in range(len(summary))]

    def shown(title: str, value: object, marked: bool) -> object:
        is_best = marked and isinstance(value, Interval) and value.mean is not None and value.mean == best.get(title)
        return element("b", value) if is_best else value

    body = [
        [shown(title, value, not aside) for title, value in row.items()]
        for row, aside in zip(summary, reference, strict=True)
    ]
    classes = ["reference" if aside else "" for aside in reference]
    note = (
        f"{HOW} The best mean is in colour: where intervals overlap, it may be chance. "
        "Runs of one seed share partitions and first weights."
    )
    said = " ".join(filter(None, (note, personal(rows), compared(rows))))
    content = [markup.table(headings, body, classes=classes), paragraph(said, quiet=True)]
    return Section("strategies", "Strategies" if by == STRATEGY else f"By {by}", join(content))


def _curves(rows: Sequence[Row]) -> Section | None:
    """Return the central metrics by round: each variant's mean over seeds with its confidence band."""
    variants = names_of(rows)
    runs = [(variant_of(row), read_rounds(Path(row["path"]))) for row in completed(rows)]
    panels = []
    for name in ordered(name for _, rounds in runs for row in rounds for name in row.get("central") or {}):
        curves = {v: [series(rounds, "central", name) for own, rounds in runs if own == v] for v in variants}
        panels.append(figure(_curve_figure(name, curves), metric(name).title))
    if not panels:
        return None
    legend = key(("dash" if dash == "dash" else "line", color, name) for dash, color, name in _styles(variants))
    note = paragraph("On the central test set; bands are 95 % confidence intervals of the mean.", quiet=True)
    return Section("curves", "Learning curves", join([note, legend, element("div", *panels, class_="grid")]))


def _curve_figure(name: str, curves: Mapping[str, Sequence[tuple[list[int], list[float | None]]]]) -> go.Figure:
    traces, longest = [], 1
    for dash, color, variant in _styles(curves):
        values = [dict(zip(*run, strict=True)) for run in curves[variant]]
        # Only rounds that all runs reached: a mean over the survivors would bend where a run stops early.
        rounds = sorted(set.intersection(*(set(run) for run in values))) if values else []
        means = [of_metric(name, (run[r] for run in values)) for r in rounds]
        longest = max([longest, *rounds])
        if any(m.half_width is not None for m in means):
            traces.append(_band(rounds, means, color))
        y = [m.mean for m in means]
        traces.append(look.line(rounds, y, look.text(variant), color, dash=dash, hovertemplate="%{y:.3f}"))
    axis = look.metric_axis(name, [value for trace in traces for value in trace["y"]])
    return look.figure(traces, look.round_axis(longest), axis, hovermode="x unified")


def _band(rounds: list[int], means: list[Interval], color: str) -> dict[str, Any]:
    known = [(r, *m.ends) for r, m in zip(rounds, means, strict=True) if m.mean is not None]
    upper = [(r, high) for r, _, high in known]
    lower = [(r, low) for r, low, _ in reversed(known)]
    points = {"x": [r for r, _ in upper + lower], "y": [y for _, y in upper + lower]}
    style = {"fill": "toself", "fillcolor": look.faint(color), "line": {"width": 0}, "hoverinfo": "skip"}
    return {"type": "scatter", "mode": "lines", **points, **style}


def _clients(rows: Sequence[Row], by: str) -> Section | None:
    done = completed(rows)
    parts: list[Any] = []
    for part, note in FARES.items():
        names = [n for n in metrics(done) if any(of_clients(row["summary"], n, part) is not None for row in done)]
        if names:
            body = [
                [variant, *(of_metric(name, (of_clients(s, name, part) for s in own)) for name in names)]
                for variant, own in summaries(rows).items()
            ]
            parts += [paragraph(note), markup.table([by, *(metric(n).title for n in names)], body, even=True)]
    cost = costs(rows, by)
    if len(cost[0]) > 1:
        body = [list(row.values()) for row in cost]
        parts += [paragraph("Cost."), markup.table(list(cost[0]), body, even=True)]
    if not parts:
        return None
    whose = personal(rows) or "Numbers of clients are of the global model on their own test splits."
    note = paragraph(f"{whose} Means over runs.", quiet=True)
    return Section("clients", "Clients and cost", join([note, *parts]))


def _runs(rows: Sequence[Row], start: Path, by: str) -> Section:
    names = [name for name in metrics(rows) if name in SCORES]
    body = []
    for row in rows:
        summary = row["summary"]
        link: object = ""
        if row["path"] is not None:
            report = Path(os.path.relpath(Path(row["path"]) / "report.html", start)).as_posix()
            link = element("a", "report", href=quote(report))
        status = str(summary.get("status", ""))
        words = [variant_of(row), row["seed"], link, f"{status}: {why}" if (why := failure(row)) else status]
        numbers = [number(nested(summary, "metrics", name)) for name in names]
        body.append(
            [
                *(cell(word, "text wide" if word is words[-1] else "text") for word in words),
                *numbers,
                summary.get("rounds"),
                duration(summary.get("seconds")),
            ]
        )
    headings = [by, "Seed", "Report", "Status", *(metric(name).title for name in names), "Rounds", "Time"]
    return Section("runs", "Runs", markup.table(headings, body, text=4))


def _best(title: str, variants: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Return the best variant's mean in a column, None where they do not differ."""
    known = [row[title].mean for row in variants if row[title].mean is not None]
    pick = max if metric(name).higher_is_better else min
    return pick(known) if len(set(known)) > 1 else None


def _headings(rows: Sequence[Row]) -> dict[str, str]:
    """Return the metric behind each heading that holds one."""
    names = metrics(completed(rows))
    own = {heading(part, name): name for name in names[:1] for part in HEADINGS}
    return {metric(name).title: name for name in names} | own


def _about(rows: Sequence[Row], by: str) -> str:
    first, done = rows[0]["summary"], completed(rows)
    seeds = len({row["seed"] for row in rows})
    one, many = ("strategy", "strategies") if by == STRATEGY else ("variant", "variants")
    said = f"{plural(len(names_of(rows)), one, many)}, {plural(seeds, 'seed')}"
    unfinished = (
        f" · {plural(len(rows) - len(done), 'run')} not completed and not counted" if len(done) < len(rows) else ""
    )
    data = " · ".join(str(first[k]) for k in ("dataset", "preset") if first.get(k))
    return " · ".join(part for part in (data, said) if part) + unfinished


def _styles(variants: Iterable[str]) -> list[tuple[str, str, str]]:
    """Return (dash, colour, variant) of each: dashed lines when the colours are used up."""
    many = len(look.PALETTE)
    return [("dash" if i >= many else "solid", look.PALETTE[i % many], name) for i, name in enumerate(variants)]
