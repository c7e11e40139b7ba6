"""Figures of one run: learning curves, clients, baselines. A figure without data is None or left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from reports import look
from reports.load import RunData, described, series
from reports.words import SCORES, finite, metric, ordered

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

# Clients of very different sizes: only a log scale shows all.
LOG_FROM_RATIO = 20
# Figures that stand beside each other are equally high.
BESIDE = 270
OUTLINE = {"width": 1, "color": "white"}


class Curves(NamedTuple):
    """What is measured where, in words."""

    central: str
    mean: str
    worst: str


CURVES = {
    False: Curves("central test set", "clients' mean", "worst client"),
    True: Curves("central test set, global model", "clients' mean, own models", "worst client, own model"),
}


def learning_curves(run: RunData) -> dict[str, go.Figure]:
    """Return a figure per metric: central test set, clients' mean, band to the worst; `loss` has the train loss."""
    words = CURVES[run.personal]
    names = {name for row in run.rounds for kind in ("central", "clients") for name in row.get(kind) or {}}
    trained = any(finite(row.get("train_loss")) is not None for row in run.rounds)
    figures = {}
    for name in ordered(names | ({"loss"} if trained else set())):
        traces = [*_clients(run.rounds, name, words), _central(run.rounds, name, words)]
        if name == "loss":
            traces.append(_line(series(run.rounds, "train_loss"), "training", look.GREY, dash="dash", width=1.6))
        traces = [trace for trace in traces if any(finite(value) is not None for value in trace["y"])]
        if traces:
            y = look.metric_axis(name, [value for trace in traces for value in trace["y"]])
            x = look.round_axis(len(run.rounds))
            figures[name] = look.figure(traces, x, y, hovermode="x unified", shapes=_kept_round(run))
    return figures


def virtual_curve(run: RunData, name: str) -> go.Figure | None:
    """Return a metric against virtual time; None for a run without devices."""
    rounds, values = series(run.rounds, "virtual_seconds")
    unit, each = _time_unit(max((value for value in values if value is not None), default=0.0))
    passed = {number: value / each for number, value in zip(rounds, values, strict=True) if value is not None}
    words = CURVES[run.personal]
    traces = [*_clients(run.rounds, name, words), _central(run.rounds, name, words)]
    for trace in traces:
        timed = [(passed[r], y) for r, y in zip(trace["x"], trace["y"], strict=True) if r in passed]
        trace["x"], trace["y"] = [x for x, _ in timed], [y for _, y in timed]
    traces = [trace for trace in traces if any(finite(value) is not None for value in trace["y"])]
    if not traces:
        return None
    kept = [{**at, "x0": passed[at["x0"]], "x1": passed[at["x0"]]} for at in _kept_round(run) if at["x0"] in passed]
    x = {"title": {"text": f"virtual {unit}"}, "rangemode": "tozero"}
    y = look.metric_axis(name, [value for trace in traces for value in trace["y"]])
    return look.figure(traces, x, y, hovermode="x unified", shapes=kept)


def client_spread(run: RunData) -> go.Figure | None:
    """Return where the clients' scores lie: mean, standard deviation each way, worst client, and the central score."""
    spread = run.summary.get("clients_metrics") or {}
    central = run.summary.get("metrics") or {}
    names = [name for name in ordered(spread) if name in SCORES and finite(spread[name].get("mean")) is not None]
    if not names:
        return None
    words, titles = CURVES[run.personal], [metric(name).title for name in names]
    means = [spread[name]["mean"] for name in names]
    stds = [finite(spread[name].get("std")) or 0.0 for name in names]
    # A score cannot leave 0..1, so its whisker does not either.
    whiskers: dict[str, Any] = {
        "type": "data",
        "symmetric": False,
        "array": [min(std, 1 - mean) for mean, std in zip(means, stds, strict=True)],
        "arrayminus": [min(std, mean) for mean, std in zip(means, stds, strict=True)],
        "color": look.CLIENTS,
        "thickness": 1.6,
        "width": 5,
    }
    worst = [spread[name].get("worst") for name in names]
    traces = [
        _dots(worst, titles, words.worst, look.CLIENTS, "line-ns", 14, line={"width": 2.5, "color": look.CLIENTS}),
        _dots(means, titles, words.mean, look.CLIENTS, "circle", 11, error_x=whiskers),
        _dots([central.get(name) for name in names], titles, words.central, look.FEDERATED, "diamond", 11),
    ]
    ends = [mean - down for mean, down in zip(means, whiskers["arrayminus"], strict=True)]
    ends += [mean + up for mean, up in zip(means, whiskers["array"], strict=True)]
    return _score_chart(traces, titles, "score (1 is perfect)", reach=ends, least_height=BESIDE)


def client_scores(run: RunData) -> tuple[str, go.Figure] | None:
    """Return a metric's name and each client's own test score in it, last evaluation, against its training examples.

    The metric is the most telling one that the clients' test splits define.
    """
    sizes = (run.heterogeneity.get("sizes") or {}).get("train")
    if run.clients is None or not sizes:
        return None
    size_of = dict(zip(described(run.heterogeneity), sizes, strict=True))
    measured = {column.removeprefix("test_") for column in run.clients.columns if column.startswith("test_")}
    for name in (known for known in ordered(measured) if known in SCORES):
        rows = run.clients.dropna(subset=[f"test_{name}"]).sort_values("round", kind="stable")
        last = rows.drop_duplicates("client", keep="last")
        last = last[last["client"].isin(list(size_of))]
        if not last.empty:
            return name, _score_by_size(run, last, name, [size_of[client] for client in map(int, last["client"])])
    return None


def _score_by_size(run: RunData, last: pd.DataFrame, name: str, sizes: list[int]) -> go.Figure:
    values = [float(value) for value in last[f"test_{name}"]]
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": sizes,
        "y": values,
        "text": _hover(last, run.heterogeneity),
        "hovertemplate": "%{text}<br>%{x:,} examples<br>%{y:.3f}<extra></extra>",
        "marker": {"size": 10 if len(last) <= 60 else 6, "color": look.CLIENTS, "opacity": 0.75},
    }
    x: dict[str, Any] = {"title": {"text": "training examples of the client"}, "tickformat": ",d"}
    if max(sizes) > LOG_FROM_RATIO * max(min(sizes), 1) and min(sizes) > 0:
        x |= {"type": "log", "title": {"text": "training examples of the client (log scale)"}, "dtick": 1}
    y = {"title": {"text": metric(name).axis}, "range": look.score_range(values)}
    return look.figure([trace], x, y, height=BESIDE)


def baselines(run: RunData) -> go.Figure | None:
    """Return scores on the central test set: each client alone, their mean, the federated model, pooled training."""
    found = run.summary.get("baselines") or {}
    federated = run.summary.get("metrics") or {}
    pooled, alone = found.get("central") or {}, found.get("local") or {}
    names = [name for name in ordered(federated) if name in SCORES and (name in pooled or name in alone)]
    if not names:
        return None
    titles = [metric(name).title for name in names]
    each = [(row.get(name), metric(name).title) for row in alone.get("each") or [] for name in names]
    gain = [(value.get(name), metric(name).title) for name in names for value in (alone, federated)]
    faint = 0.4 if len(alone.get("each") or []) <= 60 else 0.12
    # Two ends and a gap per metric: one trace draws all connecting lines.
    ends = [point for i in range(0, len(gain), 2) for point in (*gain[i : i + 2], (None, gain[i][1]))]
    traces = [
        _dots([x for x, _ in each], [y for _, y in each], "a client alone", look.ALONE, "circle", 8, opacity=faint),
        {
            **_dots([x for x, _ in ends], [y for _, y in ends], "gain", look.FEDERATED, "circle", 1),
            "mode": "lines",
            "line": {"color": look.faint(look.FEDERATED, 0.45), "width": 3},
            "hoverinfo": "skip",
            "hovertemplate": None,
        },
        _dots(
            [alone.get(name) for name in names], titles, "clients alone, mean", look.ALONE, "diamond", 13, line=OUTLINE
        ),
        _dots([pooled.get(name) for name in names], titles, "pooled data", look.POOLED, "square", 11, line=OUTLINE),
        _dots([federated.get(name) for name in names], titles, "federated", look.FEDERATED, "circle", 13, line=OUTLINE),
    ]
    return _score_chart(traces, titles, "score on the central test set (1 is perfect)")


def _line(points: tuple[list[int], list[float | None]], name: str, color: str, **style: Any) -> dict[str, Any]:
    return look.line(*points, name, color, hovertemplate="%{y:.3f}", **style)


def _central(rounds: list[dict[str, Any]], name: str, words: Curves) -> dict[str, Any]:
    return _line(series(rounds, "central", name), words.central, look.FEDERATED)


def _clients(rounds: list[dict[str, Any]], name: str, words: Curves) -> list[dict[str, Any]]:
    worst = _line(series(rounds, "clients", name, "worst"), words.worst, look.CLIENTS, dash="dot", width=1.2)
    mean = _line(series(rounds, "clients", name, "mean"), words.mean, look.CLIENTS)
    return [worst, {**mean, "fill": "tonexty", "fillcolor": look.faint(look.CLIENTS)}]


def _time_unit(longest: float) -> tuple[str, float]:
    """Return the unit in which so many seconds are read, and the seconds in it."""
    return ("hours", 3600.0) if longest >= 7200 else ("minutes", 60.0) if longest >= 120 else ("seconds", 1.0)


def _kept_round(run: RunData) -> list[dict[str, Any]]:
    best = run.summary.get("best")
    if run.summary.get("kept") != "best" or not best:
        return []
    at = best["round"]
    line = {"color": look.GREY, "width": 1, "dash": "dot"}
    return [{"type": "line", "x0": at, "x1": at, "y0": 0, "y1": 1, "yref": "paper", "line": line}]


def _dots(
    x: Sequence[object], y: Sequence[str], name: str, color: str, symbol: str, size: int, **more: Any
) -> dict[str, Any]:
    marker = {"color": color, "symbol": symbol, "size": size, "opacity": more.pop("opacity", 1)}
    if "line" in more:
        marker["line"] = more.pop("line")
    hover = f"{name}: %{{x:.3f}}<extra></extra>"
    points = {"x": [finite(value) for value in x], "y": list(y)}
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        **points,
        "marker": marker,
        "hovertemplate": hover,
        **more,
    }


def _score_chart(
    traces: list[dict[str, Any]], titles: Sequence[str], axis: str, reach: Sequence[float] = (), least_height: int = 0
) -> go.Figure:
    """Return a horizontal dot chart with a row per title; its axis covers the dots and `reach`."""
    x = {
        "title": {"text": axis},
        "range": look.score_range([*reach, *(value for trace in traces for value in trace["x"])]),
        "showgrid": True,
    }
    y = {"categoryorder": "array", "categoryarray": list(titles)[::-1], "showgrid": False, "ticksuffix": "  "}
    return look.figure(traces, x, y, height=max(70 + 46 * len(titles), least_height))


def _hover(rows: pd.DataFrame, heterogeneity: Mapping[str, Any]) -> list[str]:
    names = dict(zip(described(heterogeneity), heterogeneity.get("names") or [], strict=False))
    return [look.text(names.get(client, f"client {client}")) for client in map(int, rows["client"])]
