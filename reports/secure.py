"""What secure aggregation hid in a run, how well and at what loss: the terminal's words and the page's section."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from reports import look, markup
from reports.load import RunData
from reports.markup import NO_HTML, Html, Section, cell, element, figure, join, key, paragraph, tile
from reports.words import NOTHING, finite, number, percent, plural

if TYPE_CHECKING:
    import plotly.graph_objects as go

Masked = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]
SIMULATED = "Keys are simulated: this hides nothing from whoever runs this machine."
PROFILES = {
    "malicious": "against a server that may lie",
    "semi-honest": "against a server that keeps to the protocol and is curious",
}
# In the words of the protocol's stages.
STAGES = {
    "advertise": "before they gave keys",
    "share": "before they shared their secrets",
    "mask": "instead of sending their update",
    "confirm": "after their update, before they confirmed the others",
    "unmask": "before the masks were removed",
}
SOLVABLE = "the sums together, with others, give its update away, as far as it sends nearly the same in every round"
HEIGHT = 220
SHOWN = 8
# An empty key: the figure beside one that has a key starts at the same height.
LEVEL = key([("faint", "transparent", " ")])


def lines(masked: Masked | None, rounds: Rows, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the terminal says at the end of a run with secure aggregation; nothing without."""
    if not masked:
        return
    share = clipped(rounds, config)
    uncut = f"; no update was cut (secure-aggregation.clip={masked['clip']:g})" if share == 0 else ""
    yield f"Secure aggregation: {graph(masked)}. {saw(masked)}{uncut}."
    if masked["identities"] == "simulated":
        yield SIMULATED
    if masked["dropped"]:
        yield f"Dropouts: {dropouts(masked)}."
    if masked["failed"]:
        yield f"Failed: {failed(masked, rounds)}."
    if share:
        yield f"Clipped: {_cut(masked, share)}."
    if masked["solvable"]:
        yield f"Exposed: {exposed(masked)}. Remedy: {remedy(masked, config)}."
    yield f"Not hidden: {'; '.join(open_to_all(masked))}."


def graph(masked: Masked) -> str:
    """Return who masks with whom."""
    groups = f" in each of {masked['groups']} groups" if masked["groups"] > 1 else ""
    return (
        f"{masked['profile']} profile, each of {masked['clients']:,} clients{groups} masks with "
        f"{plural(masked['neighbours'], 'other')}, {masked['threshold']:,} shares open a mask"
    )


def saw(masked: Masked) -> str:
    """Return what the server saw of updates."""
    if not masked["sums"]:
        return "The server saw no sum"
    smallest = f"the smallest of {plural(masked['smallest_sum'], 'client')}"
    return f"The server saw {plural(masked['sums'], 'sum')} of updates and none alone, {smallest}"


def dropouts(masked: Masked) -> str:
    """Return how many dropped out, and of how many the sum could do without them."""
    after = f"{masked['recovered']:,} of them after they had shared their secrets, from sums that came all the same"
    return f"{plural(masked['dropped'], 'client')} left a round, {after}"


def failed(masked: Masked, rounds: Rows) -> str:
    """Return how many sums did not come, and the first one's reason."""
    reasons = [(row["round"], reason) for row in rounds for reason in _of(row).get("failed") or ()]
    why = f" (round {reasons[0][0]}: {reasons[0][1].rstrip('.')})" if reasons else ""
    return f"{plural(masked['failed'], 'sum')} did not come, whose clients' answers are all lost{why}"


def clipped(rounds: Rows, config: Mapping[str, Any]) -> float | None:
    """Return the share of updates that were cut to secure-aggregation.clip, over all sums.

    None where nobody has counted, and where differential privacy clips them.
    """
    many = [(sum(_of(row).get("sums") or ()), finite(_of(row).get("clipped"))) for row in rounds]
    known = [(clients, share) for clients, share in many if share is not None]
    if not known or config.get("privacy.level") == "client":
        return None
    return sum(clients * share for clients, share in known) / sum(clients for clients, _ in known)


def exposed(masked: Masked) -> str:
    """Return who can be solved for, and since when."""
    found = sorted(masked["solvable"], key=lambda one: (one["round"], one["client"]))
    first = found[0]
    others = f", {len(found):,} clients by round {found[-1]['round']:,}" if len(found) > 1 else ""
    return f"client {first['client']} is solvable since round {first['round']:,}{others}: {SOLVABLE}"


def remedy(masked: Masked, config: Mapping[str, Any]) -> str:
    """Return which settings leave nobody solvable."""
    if masked["groups"] > 1:
        return "groups are drawn anew in every round; set secure-aggregation.groups=1, or train fewer rounds"
    sampled, clients = masked["clients"], int(config.get("clients", 0))
    turns = -(-clients // sampled)
    whole = f"secure-aggregation.min-cohort={clients // turns}"
    said = f"set {whole}, so that a sum of which one is missing is not opened"
    if config.get("sampling.kind") != "cyclic" and turns > 1:
        said = f"set sampling.kind=cyclic and {whole}: fixed groups that take part all together or not at all"
    return said if clients % turns == 0 else f"{said}, and sampled to a number that divides {clients:,} clients"


def open_to_all(masked: Masked) -> list[str]:
    """Return what the server learns all the same; that keys are simulated is said by itself."""
    return [phrase for phrase in masked["not_covered"] if "simulated" not in phrase]


def section(run: RunData) -> Section | None:
    """Return the plan and what it withstands, every round's sums, exposure, and what is not hidden; None without."""
    masked = run.summary.get("secure_aggregation")
    if not masked:
        return None
    profile = str(masked.get("profile"))
    said = (
        f"The server learns sums of clients' updates and no update, {PROFILES.get(profile, profile)}: {graph(masked)}."
    )
    parts = [paragraph(said)]
    if masked["identities"] == "simulated":
        parts.append(element("p", SIMULATED, class_="banner interrupted"))
    parts += [element("div", *_tiles(run, masked), class_="tiles"), _exposure(run, masked), _plan(masked)]
    if share := clipped(run.rounds, run.config):
        parts.append(element("p", f"Clipped: {_cut(masked, share)}.", class_="banner interrupted"))
    panels = []
    if run.rounds:
        marks = [("circle", look.FEDERATED, "clients in a sum"), ("square", look.GREY, "dropped out")]
        panels.append(figure(_sums(run), "Clients in each sum, and who dropped out", key(marks)))
    if (chart := _errors(run)) is not None:
        panels.append(figure(chart, "No number of the mean is off by more, by rounding", LEVEL))
    parts += [element("div", *panels, class_="halves"), _by_round(run)]
    parts.append(paragraph("The server learns all the same:"))
    parts.append(element("ul", *(element("li", phrase) for phrase in open_to_all(masked))))
    return Section("secure", "Secure aggregation", join(parts))


def totals(run: RunData) -> Section | None:
    """Return what the run knows of clients' data where only sums were told; None elsewhere."""
    together = run.heterogeneity.get("together") or {}
    if not together:
        return None
    sizes = {split: counts[0] for split, counts in together["sizes"].items()}
    [labels] = together["label_counts"]
    many = plural(len(run.heterogeneity.get("clients") or ()), "client")
    said = (
        f"{many} with {plural(sizes.get('train', 0), 'training example')} in all. Secure aggregation adds up what they "
        "say of their training data. What each one's evaluation tells, metrics and how many examples they are of, "
        "reaches the server as it is: about how large it is, and how unlike the others."
    )
    rows = [
        (label, f"{count:,}", percent(count / max(1, sum(labels))))
        for label, count in zip(run.heterogeneity["labels"], labels, strict=True)
    ]
    splits = f"Examples of all: {', '.join(f'{split} {count:,}' for split, count in sizes.items())}."
    table = markup.table(["Label", "Training examples of all", "Share"], rows)
    return Section("heterogeneity", "Heterogeneity", join([paragraph(said), table, paragraph(splits, quiet=True)]))


def _of(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a round says of its sums; nothing where nobody was asked for any."""
    found: Mapping[str, Any] = (row.get("secure_aggregation") or {}) if row.get("sampled") else {}
    return found


def _cut(masked: Masked, share: float) -> str:
    return (
        f"{percent(share, 1)} of updates were longer than secure-aggregation.clip={masked['clip']:g} and were cut to "
        "it; raise it, or the mean is not what plain training makes"
    )


def _tiles(run: RunData, masked: Masked) -> Iterator[Html]:
    smallest = f"{masked['smallest_sum']:,}" if masked["sums"] else NOTHING
    yield tile("Smallest sum", smallest, "clients in it: the anonymity set")
    lost = f"{masked['failed']:,} did not come" if masked["failed"] else "all that were asked for"
    yield tile("Sums", f"{masked['sums']:,}", lost)
    yield tile("Dropped out", f"{masked['dropped']:,}", f"{masked['recovered']:,} of them recovered from")
    first = min((one["round"] for one in masked["solvable"]), default=None)
    when = "the rank test found nobody" if first is None else f"the first in round {first:,}"
    yield tile("Solvable clients", f"{len(masked['solvable']):,}", when)
    share, norm = clipped(run.rounds, run.config), f"of updates, to secure-aggregation.clip={masked['clip']:g}"
    if run.config.get("privacy.level") == "client":
        norm = f"to privacy.clipping-norm={number(run.config.get('privacy.clipping-norm'))}, which nobody counts"
    yield tile("Clipped", percent(share, 1), norm)


def _exposure(run: RunData, masked: Masked) -> Html:
    if not masked["solvable"]:
        return paragraph(
            "Exposure: no combination of the sums so far is a single client's update, whatever is known of who was in "
            "which.",
            quiet=True,
        )
    said = f"Exposed: {exposed(masked)}. Remedy: {remedy(masked, run.config)}."
    found = sorted(masked["solvable"], key=lambda one: (one["round"], one["client"]))
    rows = [(run.name(one["client"]), one["round"]) for one in found]
    folded = element("summary", f"{plural(len(rows), 'client')}, and since when")
    table = markup.table(["Client", "Solvable since round"], rows)
    return join([element("p", said, class_="banner failed"), element("details", folded, table)])


def _plan(masked: Masked) -> Html:
    malicious = masked["profile"] == "malicious"
    planned = (
        f"{plural(masked['corrupt'], 'client')} of {masked['clients']:,} corrupt, {masked['dropouts']:,} dropping out"
    )
    most = plural((masked["clients"] - 1) // 3, "client")
    holds = (
        f"a server that lies, and up to {most} on its side" if malicious else f"{planned}: the chance of less is small"
    )
    rows = [
        ("Holds against", holds),
        ("Dropouts that a sum survives", f"{masked['clients'] - masked['threshold']:,}" if malicious else planned),
        ("Privacy, bits a round", _bits(masked["privacy_bits"])),
        ("Correctness, bits a round", _bits(masked["correctness_bits"])),
        ("Ring", f"{masked['ring_bits']} bits a number"),
        ("Identities", "simulated" if masked["identities"] == "simulated" else "a roster from outside the run"),
    ]
    return markup.table(["Plan", ""], [(name, cell(value, "text wide")) for name, value in rows], text=2)


def _bits(value: object) -> str:
    """Return bits of a probability's smallness; files have null for infinitely many."""
    known = finite(value)
    return "certain" if known is None else number(known, 1)


def _sums(run: RunData) -> go.Figure:
    """Return each sum's clients by round, and how many dropped out."""
    points = [(row["round"], size) for row in run.rounds for size in _of(row).get("sums") or ()]
    traces: list[dict[str, Any]] = [
        {
            "type": "bar", "x": [row["round"] for row in run.rounds],
            "y": [sum((_of(row).get("dropped") or {}).values()) for row in run.rounds], "name": "dropped out",
            "marker": {"color": look.GREY}, "hovertemplate": "%{y:,}",
        },
        {
            "type": "scatter", "mode": "markers", "x": [x for x, _ in points], "y": [y for _, y in points],
            "name": "in a sum", "marker": {"color": look.FEDERATED, "size": 6}, "hovertemplate": "%{y:,}",
        },
    ]  # fmt: skip
    x = {**look.round_axis(len(run.rounds)), "range": [0.4, len(run.rounds) + 0.6]}
    y = {"title": {"text": "clients"}, "rangemode": "tozero", "tickformat": ",d"}
    return look.figure(traces, x, y, height=HEIGHT, hovermode="x unified")


def _errors(run: RunData) -> go.Figure | None:
    rows = [(row["round"], finite(_of(row).get("worst_error"))) for row in run.rounds]
    if all(value is None for _, value in rows):
        return None
    hover = "round %{x}: %{y:.2g}<extra></extra>"
    trace = look.line([x for x, _ in rows], [y for _, y in rows], "worst error", look.FEDERATED, hovertemplate=hover)
    y = {"title": {"text": "error"}, "rangemode": "tozero", "exponentformat": "e"}
    return look.figure([trace], look.round_axis(len(run.rounds)), y, height=HEIGHT)


def _by_round(run: RunData) -> Html:
    """Return the rounds in numbers, folded."""
    rows = [
        (
            row["round"], _counts(own.get("sums") or ()), cell(_left(own.get("dropped") or {}), "text wide"),
            own.get("recovered") or 0, percent(own.get("clipped"), 1), _small(own.get("worst_error")),
            cell("; ".join(own.get("failed") or ()), "text wide"),
        )
        for row in run.rounds
        if (own := _of(row))
    ]  # fmt: skip
    if not rows:
        return NO_HTML
    headings = ["Round", "Clients in its sums", "Dropped out", "Recovered", "Clipped", "Off by less than", "No sum"]
    folded = element("summary", f"{plural(len(rows), 'round')} in numbers")
    return element("details", folded, markup.table(headings, rows, text=3))


def _counts(sums: Sequence[int]) -> str:
    shown = ", ".join(f"{size:,}" for size in sums[:SHOWN])
    return (f"{shown} and {len(sums) - SHOWN:,} more" if len(sums) > SHOWN else shown) or NOTHING


def _left(dropped: Mapping[str, int]) -> str:
    return "; ".join(f"{count:,} {STAGES.get(stage, stage)}" for stage, count in dropped.items()) or NOTHING


def _small(value: object) -> str:
    known = finite(value)
    return NOTHING if known is None else f"{known:.1e}"
