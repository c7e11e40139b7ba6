"""Figures of a search: values by trial, against each setting, and Optuna's own in the look of the page."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from reports import look
from reports.words import metric, setting

if TYPE_CHECKING:
    import optuna
    import plotly.graph_objects as go

COMPLETED, PRUNED, BEST = look.BLUE, look.GREY, look.ORANGE
# Fewer different values say nothing about what made them differ.
COMPARABLE = 2
Results = Mapping[str, Any]


def history(results: Results) -> go.Figure | None:
    """Return each trial's value and the best so far."""
    valued, completed = _valued(results), _valued(results, "completed")
    if not valued:
        return None
    pick = max if results["higher_is_better"] else min
    numbers, values = [r["trial"] for r in completed], [r["value"] for r in completed]
    so_far = [pick(values[: i + 1]) for i in range(len(values))]
    steps = look.line(numbers, so_far, "best so far", BEST, hovertemplate="%{y:.4f}<extra></extra>")
    steps |= {"mode": "lines", "line": {**steps["line"], "shape": "hv"}}
    x = {**look.round_axis(max(record["trial"] for record in valued)), "title": {"text": "trial"}}
    return look.figure([steps, *_points(results, None)], x, _axis(results), height=300)


def against(results: Results) -> dict[str, go.Figure]:
    """Return a figure for each searched setting: the trials' values against it."""
    figures = {}
    for key, about in results["space"].items():
        if any(key in record["params"] for record in _valued(results)):
            x: dict[str, Any] = {"title": {"text": look.text(key)}, "type": "log" if about.get("log") else "-"}
            if "values" in about:
                # Choices stand side by side, numbers too.
                x |= {"type": "category", "categoryorder": "array"}
                x |= {"categoryarray": [look.text(setting(value)) for value in about["values"]]}
            figures[key] = look.figure(_points(results, key), x, _axis(results))
    return figures


def importances(results: Results, study: optuna.Study) -> go.Figure | None:
    """Return Optuna's bars of which setting mattered; None where trials are too few or too equal to tell."""
    from optuna.visualization import plot_param_importances

    values = {record["value"] for record in _valued(results, "completed")}
    if len(values) < COMPARABLE or len(results["space"]) < COMPARABLE:
        return None
    height = 70 + 40 * len(results["space"])
    with warnings.catch_warnings():
        # That few trials are a weak ground needs no saying on the terminal.
        warnings.simplefilter("ignore", UserWarning)
        bars = plot_param_importances(study)
    return _dressed(bars, height, xaxis_title="importance", yaxis_title=None)


def combinations(results: Results, study: optuna.Study) -> go.Figure | None:
    """Return Optuna's parallel coordinates of the completed trials, the better ones stronger."""
    from optuna.visualization import plot_parallel_coordinate

    if len(_valued(results, "completed")) < COMPARABLE:
        return None
    chart = plot_parallel_coordinate(study, target_name=look.text(metric(results["metric"]).title))
    # The first axis is the value. Colours are ours: Optuna's weakest ones cannot be seen on white.
    lines = sorted((trace for trace in chart.data if trace.mode == "lines"), key=lambda trace: trace.y[0])
    lines = lines if results["higher_is_better"] else lines[::-1]
    for rank, line in enumerate(lines, start=1):
        share = rank / len(lines)
        line.update(line={"color": COMPLETED, "width": 0.8 + 1.7 * share}, opacity=0.12 + 0.88 * share**3)
    chart.data = lines
    # Of the page's colour, which a dark screen swaps.
    chart.update_annotations(font={"color": None})
    return _dressed(chart, 340)


def _valued(results: Results, state: str = "") -> list[Mapping[str, Any]]:
    return [r for r in results["trials"] if r["value"] is not None and state in ("", r["state"])]


def _points(results: Results, key: str | None) -> list[dict[str, Any]]:
    """Return dots of the pruned and of the completed trials: values against their numbers, or against a setting."""
    best = (results["best"] or {}).get("trial")
    return [
        _dots([r for r in _valued(results, state) if key is None or key in r["params"]], results, key, color, best)
        for state, color in (("pruned", PRUNED), ("completed", COMPLETED))
    ]


def _dots(
    records: Sequence[Mapping[str, Any]], results: Results, key: str | None, color: str, best: int | None
) -> dict[str, Any]:
    x = [r["trial"] if key is None else r["params"][key] for r in records]
    choices = key is not None and "values" in results["space"][key]
    sizes = [13 if r["trial"] == best else 8 for r in records]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [look.text(setting(value)) for value in x] if choices else x,
        "y": [r["value"] for r in records],
        "text": [f"trial {r['trial']}" for r in records],
        "hovertemplate": "%{text}: %{y:.4f}<br>%{x}<extra></extra>",
        "marker": {"color": color, "size": sizes, "opacity": 0.8},
    }


def _axis(results: Results) -> dict[str, Any]:
    return look.metric_axis(results["metric"], [record["value"] for record in _valued(results)])


def _dressed(chart: go.Figure, height: int, **layout: Any) -> go.Figure:
    """Return a figure of Optuna's in the look of the page."""
    template = look.figure([], "", "").layout.template
    chart.update_layout(template=template, title=None, height=height, plot_bgcolor="rgba(0,0,0,0)", showlegend=False)
    return chart.update_layout(**layout)
