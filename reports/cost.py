"""The section on what a run cost: seconds of this machine, virtual seconds of the clients' devices, bytes."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reports import look
from reports.load import RunData, nested, series
from reports.markup import Html, Section, element, figure, join, key, paragraph
from reports.words import duration, finite, percent, plural, rate, size

if TYPE_CHECKING:
    import plotly.graph_objects as go

# A first round that starts processes takes a hundred times a later one: only a log scale shows both.
LOG_FROM_RATIO = 20
HEIGHT = 220
# Flower sends an array as a NumPy file.
HEADER_BYTES = 128
# Of each number of a round: caption and axis.
PANELS = {
    "seconds": ("Time of a round", "seconds per round"),
    "clients_per_second": ("Clients trained per second", "clients per second"),
    "virtual_round_seconds": ("Virtual time of a round", "virtual seconds per round"),
}


def speed(run: RunData) -> Section | None:
    """Return seconds, clients per second and virtual seconds of each round, and bytes where updates are compressed."""
    charts = {name: _against_rounds(run, name) for name in PANELS}
    panels = [figure(chart, PANELS[name][0]) for name, chart in charts.items() if chart is not None]
    said = [_virtual(run)]
    compressed = run.config.get("compression.kind", "none") != "none"
    answered = _answered(run) if compressed else {}
    if answered:
        model = model_bytes(run.path)
        said.append(_compression(run, answered, model))
        marks = [("line", look.FEDERATED, "as sent"), ("dash", look.GREY, "as many float32 models")]
        panels.append(figure(_uplink(run, answered, model), "Answers of a round to the server", key(marks)))
    if not panels:
        return None
    body = join([*filter(None, said), element("div", *panels, class_="halves")])
    return Section("speed", "Speed and traffic" if answered else "Speed", body)


def model_bytes(folder: Path) -> int | None:
    """Return the bytes of a run's model as it travels, each array with its header; None where there is no model."""
    try:
        with (folder / "model.safetensors").open("rb") as file:
            [length] = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        return max(ends) + HEADER_BYTES * len(ends)
    except (OSError, ValueError, struct.error):
        return None


def _answered(run: RunData) -> dict[int, int]:
    """Return how many clients' answers counted in each round, rounds without any left out."""
    if run.clients is None:
        return {}
    trained = run.clients.dropna(subset=["num_examples"])["round"].tolist()
    return dict(Counter(trained))


def _virtual(run: RunData) -> Html | None:
    seconds, rounds = finite(run.summary.get("virtual_seconds")), len(run.rounds)
    if seconds is None or not rounds:
        return None
    return paragraph(
        f"Virtual time: {duration(seconds)} in {plural(rounds, 'round')}, {duration(seconds / rounds)} each. "
        f"So long the clients' devices (devices.kind={run.config.get('devices.kind')}) would have taken to train and "
        "to send; nobody waited for it."
    )


def _compression(run: RunData, answered: Mapping[int, int], model: int | None) -> Html:
    """Return what a round's answers take, and how that compares with as many uncompressed models."""
    sent = {row["round"]: row.get("uplink_bytes") or 0 for row in run.rounds if row["round"] in answered}
    total, clients = sum(sent.values()), sum(answered[number] for number in sent)
    each = size(total / clients) if clients else size(None)
    said = f"Updates travel as {run.config['compression.kind']}: the answers of a round take "
    said += f"{size(total / max(len(sent), 1))}, {each} a client. "
    if model and total:
        times = model * clients / total
        said += (
            f"That is {rate(times)} times less than float32 models ({size(model)} a client), or {percent(1 / times)}. "
            if times > 1
            else f"That is not less than float32 models ({size(model)} a client): what {run.config.get('strategy')} "
            "sends beside the model stays float32. "
        )
    down = size(nested(run.summary, "traffic", "downlink_bytes"))
    return paragraph(f"{said}To the clients everything goes uncompressed: {down} in the whole run.")


def _uplink(run: RunData, answered: Mapping[int, int], model: int | None) -> go.Figure:
    """Return the bytes of each round's answers beside those of as many uncompressed models."""
    hover: dict[str, Any] = {"hovertemplate": "%{y:.3~s}B"}
    rounds, values = series(run.rounds, "uplink_bytes")
    traces = [look.line(rounds, values, "as sent", look.FEDERATED, **hover)]
    if model:
        whole: list[float | None] = [float(model * answered.get(number, 0)) for number in rounds]
        traces.append(look.line(rounds, whole, "as many float32 models", look.GREY, dash="dash", width=1.6, **hover))
    y = {"title": {"text": "bytes"}, "rangemode": "tozero", "tickformat": "~s"}
    return look.figure(traces, look.round_axis(len(run.rounds)), y, height=HEIGHT, hovermode="x unified")


def _against_rounds(run: RunData, name: str) -> go.Figure | None:
    """Return a number of every round against the round; None where no round has it."""
    title = PANELS[name][1]
    rounds, values = series(run.rounds, name)
    known = [value for value in map(finite, values) if value]
    if not known:
        return None
    log = max(known) > LOG_FROM_RATIO * min(known)
    y = {"title": {"text": f"{title} (log scale)"}, "type": "log", "dtick": 1} if log else {"title": {"text": title}}
    trace = look.line(rounds, values, title, look.FEDERATED, hovertemplate="round %{x}: %{y:.3~g}<extra></extra>")
    axis = y if log else {**y, "rangemode": "tozero"}
    return look.figure([trace], look.round_axis(len(run.rounds)), axis, height=HEIGHT)
