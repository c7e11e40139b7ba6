"""One look for every figure: a colour-blind-safe palette (Okabe and Ito, 2008), quiet axes, no titles inside."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from reports.words import SCORES, finite, metric

if TYPE_CHECKING:
    import plotly.graph_objects as go

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, VERMILLION, YELLOW, GREY = "#56B4E9", "#D55E00", "#F0E442", "#8A94A0"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION, GREY, YELLOW)
# One colour for one thing: the global model is blue wherever it is drawn.
FEDERATED, CLIENTS, POOLED, ALONE = BLUE, VERMILLION, GREEN, ORANGE
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
INK, LINE = "#55606E", "#E3E7EC"
# Beyond this many points markers would run together.
MARKERS_UP_TO = 25


def figure(
    traces: Iterable[dict[str, Any]], x: str | dict[str, Any], y: str | dict[str, Any], height: int = 250, **layout: Any
) -> go.Figure:
    """Return a figure of trace dicts; x and y are axis titles or whole axis settings.

    Colours of text and grid stand in the template alone, so that a page can swap them for a dark screen.
    """
    import plotly.graph_objects as go

    axis = {
        "gridcolor": LINE,
        "linecolor": LINE,
        "zeroline": False,
        "automargin": True,
        "fixedrange": True,
        "title": {"standoff": 8, "font": {"size": 12}},
    }
    look = {
        "font": {"family": FONT, "size": 12, "color": INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "colorway": PALETTE,
        "xaxis": {**axis, "showgrid": False, "showline": True, "ticks": "outside", "ticklen": 4, "tickcolor": LINE},
        "yaxis": axis,
        "hoverlabel": {"font": {"family": FONT, "size": 12}, "bordercolor": LINE, "namelength": -1},
        "margin": {"l": 8, "r": 12, "t": 10, "b": 8},
    }
    axes = {"xaxis": _axis(x), "yaxis": _axis(y)}
    settings = {"template": {"layout": look}, "showlegend": False, "height": height, **axes, **layout}
    return go.Figure({"data": list(traces), "layout": settings})


def line(
    x: Sequence[float],
    y: Sequence[float | None],
    name: str,
    color: str,
    *,
    dash: str = "solid",
    width: float = 2.2,
    **more: Any,
) -> dict[str, Any]:
    """Return a line trace; a few points also get markers, so that a single one is seen."""
    mode = "lines+markers" if (len(x) <= MARKERS_UP_TO and dash == "solid") or len(x) == 1 else "lines"
    trace = {"type": "scatter", "x": list(x), "y": list(y), "name": name, "mode": mode, "marker": {"size": 5}}
    return {**trace, "line": {"color": color, "dash": dash, "width": width}, **more}


def round_axis(rounds: int) -> dict[str, Any]:
    """Return the axis of rounds 1 to `rounds`, with a tick on whole rounds only."""
    margin = max(0.3, 0.02 * rounds)
    axis = {"title": {"text": "round"}, "range": [max(1 - margin, 0.3), rounds + margin], "tickformat": "d"}
    return {**axis, "dtick": 1} if rounds <= 10 else axis


def metric_axis(name: str, values: Sequence[object]) -> dict[str, Any]:
    """Return the axis of a metric: scores close to the values, losses from zero."""
    axis: dict[str, Any] = {"title": {"text": metric(name).axis}}
    return {**axis, "range": score_range(values)} if name in SCORES else {**axis, "rangemode": "tozero"}


def score_range(values: Sequence[object]) -> list[float]:
    """Return the axis range of scores: from a little below the smallest to a little above the largest, within 0..1."""
    known = [value for value in map(finite, values) if value is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    margin = max(0.06 * (high - low), 0.005)
    return [max(low - margin, -0.02), min(high + margin, 1.02)]


def faint(color: str, alpha: float = 0.13) -> str:
    """Return a #RRGGBB colour as a see-through one, for bands."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def text(value: object, most: int = 60) -> str:
    """Return text for a figure, cut after `most` characters.

    Plotly reads HTML in names, and a client's name must not become a link.
    """
    shown = str(value)
    return html.escape(shown if len(shown) <= most else f"{shown[: most - 1]}…", quote=False)


def _axis(setting: str | dict[str, Any]) -> dict[str, Any]:
    return {"title": {"text": setting}} if isinstance(setting, str) else setting
