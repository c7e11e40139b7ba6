"""How unlike the clients are: numbers, and pictures that stay legible from two clients to thousands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from reports import look
from reports.load import RunData
from reports.words import percent, plural

if TYPE_CHECKING:
    import plotly.graph_objects as go

# More clients than this are sorted and grouped: single bars would no longer be seen.
BARS = 60
# More labels than this have no colour each; a heat map shows their shares.
COLORS = len(look.PALETTE)
# Longer names would take the room of the bars.
NAME = 18


@dataclass(frozen=True)
class Counts:
    """Training examples of each client and label, (clients, labels) int64, with names and the sizes of all splits."""

    labels: list[str]
    names: list[str]
    table: np.ndarray
    sizes: dict[str, list[int]]

    @classmethod
    def of(cls, run: RunData) -> Counts | None:
        """Return the counts that the clients reported, or None when they did not."""
        about = run.heterogeneity
        if not about.get("label_counts"):
            return None
        table = np.array(about["label_counts"], dtype=np.int64)
        return cls([str(label) for label in about["labels"]], [str(n) for n in about["names"]], table, about["sizes"])

    @property
    def totals(self) -> np.ndarray:
        """Return each client's training examples, (clients,)."""
        totals: np.ndarray = self.table.sum(axis=1)
        return totals

    @property
    def shares(self) -> np.ndarray:
        """Return each client's label shares, (clients, labels); all 0 for a client without examples."""
        shares: np.ndarray = self.table / np.maximum(self.totals, 1)[:, None]
        return shares

    @property
    def has_colors(self) -> bool:
        """Return whether every label can have a colour of its own."""
        return len(self.labels) <= COLORS

    @property
    def height(self) -> int:
        """Return the height of the pictures in pixels: a heat map needs a row per label."""
        return 250 if self.has_colors else max(250, min(90 + 18 * len(self.labels), 700))

    @property
    def sentence(self) -> str:
        """Return the counts in words."""
        totals = self.totals
        said = (
            f"{plural(len(totals), 'client')} with {plural(int(totals.sum()), 'training example')}: "
            f"{totals.min():,} to {totals.max():,} each, median {np.median(totals):,.0f}. "
        )
        if self.single_label:
            said += f"{plural(self.single_label, 'client')} with a single label. "
        moved = percent(self.label_distance)
        return (
            said
            + f"On average {moved} of a client's examples would need another label to match the label shares of all."
        )

    @property
    def label_distance(self) -> float:
        """Return the mean total-variation distance between a client's label shares and those of all data, in 0..1."""
        overall = self.table.sum(axis=0) / max(int(self.table.sum()), 1)
        return float(0.5 * np.abs(self.shares - overall).sum(axis=1).mean())

    @property
    def single_label(self) -> int:
        """Return how many clients have training examples of one label alone."""
        return int(((self.table > 0).sum(axis=1) == 1).sum())


def examples(counts: Counts) -> go.Figure:
    """Return training examples per client: bars stacked by label, or with many clients their sizes, largest first."""
    y = {"title": {"text": "training examples"}, "rangemode": "tozero"}
    if len(counts.names) <= BARS:
        x = _client_axis(counts)
        if counts.has_colors:
            return look.figure(_stack(counts, counts.table, "%{y:,} examples"), x, y, barmode="stack", bargap=0.25)
        bars = _bar(
            _distinct(counts.names), counts.totals, "examples", look.BLUE, "%{x}: %{y:,} examples<extra></extra>"
        )
        return look.figure([bars], x, y, counts.height, bargap=0.25)
    sizes = np.sort(counts.totals)[::-1]
    # At most 500 points: a curve of thousands looks the same and weighs more.
    at = np.unique(np.linspace(0, len(sizes) - 1, min(len(sizes), 500)).astype(int))
    trace = {
        **look.line((at + 1).tolist(), sizes[at].tolist(), "examples", look.BLUE, width=1.6),
        "line": {"color": look.BLUE, "shape": "hv", "width": 1.6},
        "fill": "tozeroy",
        "fillcolor": look.faint(look.BLUE, 0.3),
        "hovertemplate": "client %{x} by size: %{y:,} examples<extra></extra>",
    }
    return look.figure([trace], {"title": {"text": "clients, largest first"}, "tickformat": ",d"}, y, counts.height)


def label_shares(counts: Counts) -> go.Figure:
    """Return the share of each label in each client: stacked bars, or a heat map when the labels outnumber the colours.

    More clients than bars are sorted by their commonest label and its share, and neighbours are averaged.
    """
    grouped, x, names = _grouped(counts)
    y: dict[str, Any]
    if counts.has_colors:
        y = {"title": {"text": "share of training examples"}, "range": [0, 1], "tickformat": ".0%"}
        traces = _stack(counts, grouped, "%{y:.0%}", names)
        return look.figure(traces, x, y, barmode="stack", bargap=0.25 if len(names) <= BARS else 0)
    trace = {
        "type": "heatmap",
        "x": names,
        "y": _distinct(counts.labels),
        "z": grouped.T.tolist(),
        "zmin": 0,
        "colorscale": [[0, look.faint(look.BLUE, 0.03)], [1, look.BLUE]],
        "colorbar": {"title": {"text": "share"}, "tickformat": ".0%", "thickness": 10, "outlinewidth": 0},
        "hovertemplate": "%{x}<br>%{y}: %{z:.0%}<extra></extra>",
    }
    y = {"autorange": "reversed", "showgrid": False}
    return look.figure([trace], x, y, counts.height)


def _grouped(counts: Counts) -> tuple[np.ndarray, dict[str, Any], list[str]]:
    """Return shares (columns, labels), the axis and the columns' names: clients, or groups of alike clients."""
    shares = counts.shares
    if len(shares) <= BARS:
        return shares, _client_axis(counts), _distinct(counts.names)
    commonest = shares.argmax(axis=1)
    order = np.lexsort((-shares.max(axis=1), commonest))
    groups = np.array_split(order, min(len(order), 4 * BARS))
    names = [f"clients {low + 1} to {low + len(group)}" for low, group in zip(_starts(groups), groups, strict=True)]
    title = "clients, those with the same commonest label side by side"
    x = {"title": {"text": title}, "showticklabels": False, "ticks": ""}
    return np.stack([shares[group].mean(axis=0) for group in groups]), x, names


def _starts(groups: list[np.ndarray]) -> list[int]:
    return np.cumsum([0, *(len(group) for group in groups[:-1])]).tolist()


def _stack(counts: Counts, values: np.ndarray, shown: str, names: list[str] | None = None) -> list[dict[str, Any]]:
    bars = names or _distinct(counts.names)
    return [
        _bar(
            bars,
            values[:, k],
            look.text(label),
            look.PALETTE[k],
            f"%{{x}}<br>{look.text(label)}: {shown}<extra></extra>",
        )
        for k, label in enumerate(counts.labels)
    ]


def _bar(x: list[str], y: np.ndarray, name: str, color: str, hover: str) -> dict[str, Any]:
    marker = {"color": color, "line": {"width": 0}}
    return {"type": "bar", "x": x, "y": y.tolist(), "name": name, "marker": marker, "hovertemplate": hover}


def _distinct(names: list[str]) -> list[str]:
    """Return short names, with numbers in front where they repeat: plotly lays bars of one name over each other."""
    short = [look.text(name, NAME) for name in names]
    return short if len(set(short)) == len(short) else [look.text(f"{i}: {name}", NAME) for i, name in enumerate(names)]


def _client_axis(counts: Counts) -> dict[str, Any]:
    return {"title": {"text": "client"}, "type": "category"}
