"""What a run's differential privacy is worth: the words of the terminal and the page, and the page's section."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from reports import look, markup
from reports.load import RunData
from reports.markup import NO_HTML, Html, Section, cell, element, figure, join, key, paragraph, tile
from reports.words import NOTHING, finite, number, plural, rate

if TYPE_CHECKING:
    import plotly.graph_objects as go

SIMULATED = "simulated noise: not a guarantee"
# Whoever sees the first may not become much surer of the second.
WHOM = {
    "example": ("the models of a client", "any one of its examples was there"),
    "client": ("the models", "any one client took part at all"),
    "local": ("a client's updates, the server too,", "its data were these and not others (who took part shows)"),
    "distributed": ("the sums, the server too,", "a client's data were there (who took part shows)"),
}
# Beyond these epsilons a bound is weak, or none that anybody would notice.
WEAK, NOBODY = 10.0, 50.0
OPERATOR = (
    "For the operator: this page also shows what no noise covers, each client's numbers of examples and labels, losses "
    "and metrics. Do not publish it with the model."
)
OF_SUMS = (
    "For the operator: this page also shows what no noise covers, sums of examples and labels, and each client's "
    "metrics. Do not publish it with the model."
)
WHO = {
    "central": "the server adds noise to the sum of clipped updates; it sees the updates themselves",
    "local": "every client adds noise to its own update before it leaves",
    "distributed": "every client adds a share of it under its masks; nobody sees the sum without noise",
}
SUMS = "the server adds noise to the secure sum of clipped updates; it sees the sum, and no update"
# By whether updates are masked.
BARE = {False: "updates leave clients in clear", True: "the server sees sums alone, to which no noise is added"}
HEIGHT = 240


def extrapolated(privacy: Mapping[str, Any]) -> str:
    """Return of whom epsilon is, where it is not of the run's own clients; empty where it is."""
    population = privacy.get("population")
    return f"of a population of {population:,}, extrapolated" if population else ""


def bound(privacy: Mapping[str, Any]) -> str:
    """Return epsilon with its delta and level, and whether it is a guarantee."""
    said = f"epsilon {rate(privacy['epsilon'])} at delta {privacy['delta']:g}, {privacy['level']} level"
    said = ", ".join(filter(None, (said, extrapolated(privacy))))
    return f"{said} ({SIMULATED})" if privacy.get("simulated") else said


def strength(privacy: Mapping[str, Any]) -> str:
    """Return how little an epsilon protects, where it is large; empty where it is not."""
    epsilon = finite(privacy.get("epsilon"))
    if epsilon is not None and epsilon <= WEAK:
        return ""
    if epsilon is None or epsilon > NOBODY:
        return "An epsilon above 50 protects nobody"
    return "An epsilon above 10 is weak protection"


def promise(privacy: Mapping[str, Any]) -> str:
    """Return what epsilon says in words: how much higher anybody may find the odds; delta stands in `bound`."""
    whom = str(privacy["noise"] if privacy.get("noise") in ("local", "distributed") else privacy["level"])
    sees, of = WHOM[whom]
    epsilon = finite(privacy.get("epsilon"))
    if population := privacy.get("population"):
        sees = f"In a deployment of {population:,} clients, whoever sees {sees}"
    else:
        sees = f"Whoever sees {sees}"
    if epsilon is None or epsilon > NOBODY:
        return f"{sees} may become as sure as can be whether {of}"
    return f"{sees} may find the odds that {of} e^epsilon = {rate(math.exp(epsilon))} times as high as before, at most"


def lines(privacy: Mapping[str, Any], masked: Mapping[str, Any] | None = None) -> Iterator[str]:
    """Yield what the terminal says at the end of a run; `masked` is the summary of secure aggregation, if any."""
    if privacy["level"] == "none":
        yield f"Privacy: none; {BARE[bool(masked)]}."
        return
    worst = ", the worst of all clients" if "clients" in privacy else ""
    weak = f" {weak}." if (weak := strength(privacy)) else ""
    yield f"Privacy: {bound(privacy)}{worst}, by {privacy['accountant']}.{weak}"
    if canaries := privacy.get("canaries"):
        yield (
            f"Canaries: {canaries['number']:,} in this run, {canaries['included']:,} of them in: its model is for "
            "auditing, not for use."
        )
    if privacy["not_covered"]:
        yield f"Not covered: {'; '.join(privacy['not_covered'])}."


def compared(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return what is to be said below private runs on the same clients, rows with a `summary` each; else nothing."""
    own = [privacy for row in rows if (privacy := row["summary"].get("privacy") or {}).get("level", "none") != "none"]
    if not own:
        return ""
    spent = [finite(privacy["epsilon"]) for privacy in own]
    # One without a bound has none with others either; one that has spent nothing adds nothing.
    total = rate(sum(math.inf if epsilon is None else epsilon for epsilon in spent))
    said = "Every private run spends an epsilon of its own; what is chosen among them is covered by their sum alone, "
    said += f"{total} of {plural(len(own), 'run')}"
    return f"{said} ({SIMULATED})." if any(privacy.get("simulated") for privacy in own) else f"{said}."


def headline(summary: Mapping[str, Any]) -> Html:
    """Return the privacy tile. Without protection it says so: silence would read as protection."""
    privacy, masked = summary.get("privacy") or {}, summary.get("secure_aggregation")
    level = privacy.get("level", "none")
    masks = f"updates masked, {masked.get('profile')} secure aggregation" if masked else ""
    if level == "none":
        return tile("Privacy", "none", f"{masks}; no noise" if masks else BARE[False])
    delta = finite(privacy.get("delta"))
    said = f"{level} level, δ = {NOTHING if delta is None else format(delta, 'g')}"
    if privacy.get("accountant"):
        said += f" ({privacy['accountant']})"
    simulated = SIMULATED if privacy.get("simulated") else ""
    return tile(
        "Privacy", f"ε = {rate(privacy.get('epsilon'))}", *filter(None, (said, extrapolated(privacy), simulated, masks))
    )


def section(run: RunData) -> Section | None:
    """Return what is hidden how well, what it cost round by round, and what no epsilon covers; None without privacy."""
    privacy = run.summary.get("privacy") or {}
    if privacy.get("level", "none") == "none":
        return None
    shown = OF_SUMS if run.summary.get("secure_aggregation") else OPERATOR
    parts = [element("p", shown, class_="banner interrupted"), paragraph(f"{promise(privacy)}: {bound(privacy)}.")]
    if weak := strength(privacy):
        parts.append(element("p", f"{weak}.", class_="banner interrupted"))
    if privacy.get("population"):
        said = f"The {run.summary['clients']:,} clients of this run have next to no protection: its noise is what a "
        said += "larger deployment would add to the mean."
        parts.append(element("p", said, class_="banner interrupted"))
    if privacy.get("simulated"):
        said = f"Noise and samples are those of privacy.noise-seed={run.config.get('privacy.noise-seed')}: "
        said += "whoever knows it can take the noise away again. Such a run is for experiments."
        parts.append(element("p", said, class_="banner interrupted"))
    chart = _spending(run)
    if chart is not None:
        marks = [("line", look.FEDERATED, "epsilon spent so far")]
        if run.config.get("privacy.epsilon"):
            marks.append(("dash", look.GREY, "budget"))
        parts.append(figure(chart, "Epsilon by round", key(marks)))
    parts += [_mechanism(run, privacy), _each(privacy)]
    parts.append(paragraph("Epsilon says nothing about:"))
    parts.append(element("ul", *(element("li", phrase) for phrase in privacy.get("not_covered") or ())))
    return Section("privacy", "Privacy", join(parts))


def _spending(run: RunData) -> go.Figure | None:
    rows = [(row["round"], finite((row.get("privacy") or {}).get("epsilon"))) for row in run.rounds]
    if not any(value is not None for _, value in rows):
        return None
    rounds, values = [number for number, _ in rows], [value for _, value in rows]
    traces = [look.line(rounds, values, "epsilon", look.FEDERATED, hovertemplate="round %{x}: %{y:.3f}<extra></extra>")]
    if budget := finite(run.config.get("privacy.epsilon")):
        ends = [rounds[0], rounds[-1]]
        traces.append(look.line(ends, [budget, budget], "budget", look.GREY, dash="dash", width=1.6, hoverinfo="skip"))
    y = {"title": {"text": "epsilon"}, "rangemode": "tozero"}
    return look.figure(traces, look.round_axis(len(run.rounds)), y, height=HEIGHT)


def _mechanism(run: RunData, privacy: Mapping[str, Any]) -> Html:
    norms = [row["privacy"]["clipping_norm"] for row in run.rounds if "clipping_norm" in (row.get("privacy") or {})]
    norm = number(privacy.get("clipping_norm"))
    if run.config.get("privacy.clipping") == "adaptive" and norms:
        norm = f"{number(norms[0])} to {number(norms[-1])}, following a quantile of the updates"
    z = finite(privacy.get("noise_multiplier"))
    q = finite(privacy.get("sampling_rate"))
    who = WHO.get(str(privacy.get("noise")), "every client adds noise to each of its steps")
    if run.summary.get("secure_aggregation") and privacy.get("noise") == "central":
        who = SUMS
    rows: list[tuple[str, object]] = [
        ("Noise", who),
        ("Clipping norm", norm),
        ("Noise multiplier", "each client's own, by its budget" if z is None else number(z, 4)),
        *([("Sampling rate of clients", number(q, 4))] if q is not None else []),
        ("Neighbours", f"{privacy.get('neighbours')} one {privacy['level']}"),
        ("Accountant", str(privacy.get("accountant"))),
    ]
    return markup.table(["Mechanism", ""], [(name, cell(value, "text wide")) for name, value in rows], text=2)


def _each(privacy: Mapping[str, Any]) -> Html:
    """Return every client's own epsilon, the worst first; nothing where one event protects all alike."""
    each = privacy.get("clients") or {}
    if not each:
        return NO_HTML
    worst = sorted(each.items(), key=lambda item: -(finite(item[1]) or float("inf")))
    rows = [(f"client {client}", number(value)) for client, value in worst]
    caption = paragraph(
        f"{plural(len(rows), 'client')} with a ledger of its own each; the run is as private as the worst."
    )
    return join([caption, markup.table(["Client", "Epsilon"], rows)])
