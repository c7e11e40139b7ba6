"""The page of a privacy plan, and the words that it shares with the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reports import look, markup
from reports.markup import Html, Section, element, figure, join, key, paragraph, tile
from reports.words import number, plural, rate

if TYPE_CHECKING:
    import plotly.graph_objects as go

Plan = Mapping[str, Any]
_FOOT = "Written by Fedra. This page loads nothing."
# Of the clients that a federation might have: multiples of the fewest and the most in the plan.
FEWEST, MOST, POINTS = 0.1, 10.0, 40


def write_plan_page(path: Path, plan: Plan) -> Path:
    """Write the page of a plan and return its path; `plan` is what privacy-plan.json holds."""
    title = f"Privacy plan: {plural(plan['clients'], 'client')}, {plural(plan['rounds'], 'round')}"
    head = join([element("div", element("h1", title), class_="head"), element("p", about(plan), class_="about")])
    parts = [_costs(plan), _rounds(plan), _clients(plan), _larger(plan), _run(plan)]
    page = markup.page(title, head, _headline(plan), [part for part in parts if part], _FOOT)
    path.write_text(page, encoding="utf-8")
    return path


def about(plan: Plan) -> str:
    """Return what is planned, in a line."""
    clients, sampled = plan["clients"], plan["sampled"]
    drawn = "all in every round"
    if sampled < clients:
        drawn = f"each in a round with probability {sampled / clients:.3g} ({sampled:,} on average)"
    said = f"{plural(clients, 'client')}, {drawn}, {plural(plan['rounds'], 'round')}. "
    said += f"{plan['level'].capitalize()} level, noise {plan['noise']}, delta {plan['delta']:g}."
    if plan["examples"]:
        steps = plural(plan["steps"], "step")
        said += (
            f" A client has {plural(plan['examples'], 'example')}: batches of {plan['batch_size']}, {steps} a round."
        )
    if plan["participations"] < plan["rounds"]:
        times = plural(plan["participations"], "round")
        said += f" Epsilon is of a client that takes part in {times}, two deviations above the mean."
    return said


def names(plan: Plan) -> list[str]:
    """Return what the rows are called where they are columns or lines."""
    return [f"z = {rate(row['noise_multiplier'])}" for row in plan["rows"]]


def columns(plan: Plan) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells of the main table."""
    headings = ["Epsilon", "Noise multiplier z", "Noise on a number", "Noise on the model", "Usable from clients"]
    return headings, [
        [
            rate(row["epsilon"]),
            number(row["noise_multiplier"], 4),
            f"{row['each']:.2g}",
            _length(row["length"]),
            f"{row['clients']:,}",
        ]
        for row in plan["rows"]
    ]


def lengths(plan: Plan) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells of the table of larger populations."""
    return ["Clients", "A round", *names(plan), "Added here"], [
        [f"{row['clients']:,}", f"{row['sampled']:,}", *map(_length, row["lengths"]), f"x {row['scale']:g}"]
        for row in plan["larger"]
    ]


def explained(plan: Plan) -> Iterator[str]:
    """Yield what the columns mean, what does not hold, and how to run it."""
    mean, formula = "the mean update", f"z / {plan['sampled']:,}"
    if plan["examples"]:
        mean, formula = "a step's mean gradient", f"z / ({plan['batch_size']} sqrt({plan['sampled']:,}))"
    elif plan["noise"] == "local":
        formula = f"z / sqrt({plan['sampled']:,})"
    yield (
        f"Noise is in clipping norms: on a number of {mean} its standard deviation, {formula}; on the model its length "
        f"over {plan['parameters']:,} numbers, {math.sqrt(plan['parameters']):.4g} times that."
    )
    yield (
        "Usable from clients: with so many, the same share of them a round, it is no longer than "
        f"{plan['usable']:g} clipping norm, a rule of thumb."
    )
    most = max(row["clients"] for row in plan["rows"])
    if plan["level"] == "client" and plan["delta"] * most >= 1:
        yield f"Delta {plan['delta']:g} is too large for {most:,} clients: it must be below {1 / most:.2g}. Plan again."
    if plan["larger"]:
        clients = plan["larger"][0]["clients"]
        yield (
            f"A run of {plan['clients']:,} clients stands for {clients:,} with privacy.population={clients}: it adds "
            f"{plan['larger'][0]['scale']:g} times the noise, and its epsilon is theirs, extrapolated."
        )
    yield _asked_of(plan)
    yield f"Run it: fedra run PRESET {_settings(plan)}"


def _asked_of(plan: Plan) -> str:
    """Return what the preset of the run must have."""
    of = f" of {plan['examples']:,} examples each" if plan["examples"] else ""
    own = " and the server-examples that inputs are scaled by" if plan["examples"] else ""
    return (
        f"PRESET is one whose data have {plural(plan['clients'], 'client')}{of}{own}; with partition.kind=iid any data "
        "are dealt evenly."
    )


def _settings(plan: Plan) -> str:
    return " ".join(f"{k}={v if isinstance(v, str) else format(v, '.12g')}" for k, v in plan["settings"].items())


def _length(clipping_norms: float) -> str:
    return rate(clipping_norms) if clipping_norms >= 1 else f"{clipping_norms:.2g}"


def _headline(plan: Plan) -> Html:
    tiles = [
        tile(
            f"Epsilon {rate(row['epsilon'])}",
            f"z = {rate(row['noise_multiplier'])}",
            f"noise on the model: {_length(row['length'])} clipping norms",
            f"usable from {plural(row['clients'], 'client')}",
        )
        for row in plan["rows"]
    ]
    return element("div", *tiles, class_="tiles main")


def _costs(plan: Plan) -> Section:
    classes = ["changed" if row["asked"] else "" for row in plan["rows"]]
    # How to run it has a section of its own.
    words = [paragraph(sentence, quiet=True) for sentence in list(explained(plan))[:-2]]
    table = markup.table(*columns(plan), classes=classes)
    return Section("costs", "What a budget costs", join([table, *words]))


def _lines(plan: Plan) -> list[tuple[str, str, str]]:
    return [("line", color, name) for color, name in zip(look.PALETTE, names(plan), strict=False)]


def _rounds(plan: Plan) -> Section:
    legend = key([*_lines(plan), ("dot", look.GREY, "planned")])
    return Section("rounds", "Epsilon over rounds", figure(over_rounds(plan), "Epsilon by number of rounds", legend))


def over_rounds(plan: Plan) -> go.Figure:
    """Return epsilon against rounds, a line for each noise multiplier."""
    lines = [
        look.line(plan["rounds_drawn"], own, name, color, hovertemplate="round %{x}: epsilon %{y:.3g}", mode="lines")
        for own, name, color in zip(plan["epsilons"], names(plan), look.PALETTE, strict=False)
    ]
    most = max(value for own in plan["epsilons"] for value in own)
    now = look.line([plan["rounds"]] * 2, [0, most], "planned", look.GREY, dash="dot", width=1.5, hoverinfo="skip")
    x = look.round_axis(plan["rounds_drawn"][-1])
    return look.figure([*lines, now], x, {"title": {"text": "epsilon"}, "rangemode": "tozero"}, height=320)


def _clients(plan: Plan) -> Section:
    words = (
        "The same share of them in a round, and the same noise multiplier: the more clients, the less of it is left."
    )
    legend = key([*_lines(plan), ("dash", look.GREY, "usable below"), ("dot", look.GREY, "planned")])
    chart = figure(over_clients(plan), "Length of the noise on the model by number of clients", legend)
    return Section("clients", "Noise over clients", join([paragraph(words, quiet=True), chart]))


def over_clients(plan: Plan) -> go.Figure:
    """Return the length of the noise against the number of clients, a line for each noise multiplier."""
    known = [plan["clients"], *(row["clients"] for row in plan["rows"])]
    first, last = math.log10(max(1.0, FEWEST * min(known))), math.log10(MOST * max(known))
    clients = [10 ** (first + (last - first) * i / (POINTS - 1)) for i in range(POINTS)]
    drawn = [
        [row["length"] * (plan["clients"] / many) ** plan["falls_with"] for many in clients] for row in plan["rows"]
    ]

    def line(x: list[float], y: list[float], name: str, color: str, **more: Any) -> dict[str, Any]:
        return {"type": "scatter", "mode": "lines", "x": x, "y": y, "name": name, "line": {"color": color, **more}}

    lines = [
        {**line(clients, own, name, color, width=2.2), "hovertemplate": "%{x:,.0f} clients: %{y:.2g} clipping norms"}
        for own, name, color in zip(drawn, names(plan), look.PALETTE, strict=False)
    ]
    usable = line([clients[0], clients[-1]], [plan["usable"]] * 2, "usable", look.GREY, dash="dash", width=1.5)
    ends = [min(map(min, drawn)), max(map(max, drawn))]
    now = line([plan["clients"]] * 2, ends, "planned", look.GREY, dash="dot", width=1.5)
    # Ticks at powers of ten.
    x = {"title": {"text": "clients"}, "type": "log", "dtick": 1, "tickformat": ","}
    y = {"title": {"text": "clipping norms"}, "type": "log", "dtick": 1}
    return look.figure([*lines, usable, now], x, y, height=320)


def _larger(plan: Plan) -> Section | None:
    """Return how a run of these clients stands for more of them."""
    if not plan["larger"]:
        return None
    words = (
        f"A run of {plan['clients']:,} clients can stand for a deployment with more of them, of whom the same share "
        "takes part: with privacy.population it adds the noise that the mean of the larger round would have. Epsilon "
        "is then the deployment's, extrapolated, and the clients of the run have none. A mean of fewer updates varies "
        "more than the deployment's would."
    )
    table = markup.table(*lengths(plan), text=0)
    return Section("larger", "A larger population, simulated", join([paragraph(words), table]))


def _run(plan: Plan) -> Section:
    command = element("pre", element("code", f"fedra run PRESET {_settings(plan)}"))
    words = f"{_asked_of(plan)} A run with a budget ends before it exceeds it; its ledger has what each round has cost."
    return Section("run", "Run it", join([command, paragraph(words, quiet=True)]))
