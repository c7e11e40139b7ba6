"""The sections on answers that are missing or did not count, and on what malicious clients achieved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from core.adversary import KINDS
from reports import look, markup
from reports.load import RunData, series
from reports.markup import Html, Section, cell, element, figure, join, key, paragraph, tile
from reports.words import finite, percent, plural

if TYPE_CHECKING:
    import plotly.graph_objects as go

# How the reason of an answer begins that came and was refused.
REJECTED = "rejected: "
REASONS = 5
HOVER: dict[str, Any] = {"hovertemplate": "%{y:.1%}"}
Row = dict[str, Any]


def failures(run: RunData) -> Section | None:
    """Return the rounds in which clients failed, with their reasons; None when none did.

    Answers that were lost as configured, and those that were rejected, have a section of their own.
    """
    failed = [(row, _faults(row)) for row in run.rounds if _faults(row) > 0]
    if not failed:
        return None
    rows = [
        (row["round"], cell("; ".join(_reasons(row)[:REASONS]), "text wide"), row.get("sampled"), count)
        for row, count in failed
    ]
    replies = plural(sum(count for _, count in failed), "reply", "replies")
    said = paragraph(f"{replies} missing in {plural(len(failed), 'round')}, which went on without them.")
    table = markup.table(["Round", "Reasons", "Sampled", "Failed"], rows, text=2)
    return Section("failures", "Failed clients", join([said, table]))


def uncounted(run: RunData) -> Section | None:
    """Return how many answers were lost and rejected in each round, and who was rejected why; None without any."""
    lost, rejected = (sum(row.get(kind) or 0 for row in run.rounds) for kind in ("lost", "rejected"))
    if not lost + rejected:
        return None
    asked = plural(sum(row.get("sampled") or 0 for row in run.rounds), "answer")
    said = [
        f"{lost:,} of {asked} did not come (lost): their clients were out of reach, dropped out or came too late."
        if lost
        else "",
        f"{rejected:,} of {asked} came and were rejected: they would have spoiled the model." if rejected else "",
        "The rounds went on with the other answers.",
    ]
    marks = [("square", look.GREY, "lost"), ("square", look.VERMILLION, "rejected")]
    chart = figure(_bars(run), "Answers that did not count, by round", key(marks))
    parts = [paragraph(" ".join(filter(None, said))), chart, _by_round(run), *_rejected(run, rejected)]
    return Section("uncounted", "Answers that did not count", join(parts))


def malicious(run: RunData) -> Section | None:
    """Return what the malicious clients did, how often they were let in and what came of it; None without an attack."""
    attack = run.summary.get("attack")
    if not attack:
        return None
    kind, many = str(attack.get("kind")), attack.get("malicious") or 0
    answered = sum(row.get("malicious") or 0 for row in run.rounds)
    tiles = [
        tile("Attack", kind),
        tile(
            "Malicious clients",
            f"{many:,} of {run.summary.get('clients') or 0:,}",
            f"{answered:,} of their answers counted",
        ),
    ]
    if finite(attack.get("selected")) is not None:
        tiles.append(tile("Let in", percent(attack["selected"]), "of their answers that came, by the strategy"))
        tiles.append(tile("Weight", percent(attack["weight"]), "of theirs in a new model, mean over rounds"))
    if finite(attack.get("backdoor_success")) is not None:
        tiles.append(tile("Backdoor success", percent(attack["backdoor_success"]), "of triggered test examples"))
    parts = [element("div", *tiles, class_="tiles"), paragraph(*_attack(run, kind, answered), quiet=True)]
    panels = []
    if (chart := _let_in(run)) is not None:
        marks = [
            ("line", look.ORANGE, "of their answers, let in"),
            ("line", look.VERMILLION, "of the new model, their weight"),
            ("dash", look.GREY, "of all answers, theirs"),
        ]
        panels.append(figure(chart, "Malicious clients by round", key(marks)))
    if (chart := _backdoor(run)) is not None:
        panels.append(figure(chart, "Backdoor success by round"))
    return Section("malicious", "Malicious clients", join([*parts, element("div", *panels, class_="halves")]))


def _attack(run: RunData, kind: str, answered: int) -> Iterator[str]:
    """Yield sentences on the attack."""
    if kind in KINDS:
        yield f"{kind}: {KINDS[kind]}. "
    if not answered:
        yield "No answer of theirs counted: all were lost or rejected. "
    elif finite((run.summary.get("attack") or {}).get("selected")) is None:
        yield f"{run.summary.get('strategy')} does not choose among answers, or does not say which it took. "
    if kind == "backdoor":
        yield (
            f"Backdoor success: the share of the central test set's examples with another label than "
            f"{run.config.get('attack.target', 0)} that get this label once they carry the trigger. "
            "A model without a backdoor has some too."
        )


def _let_in(run: RunData) -> go.Figure | None:
    """Return, by round, the share of malicious answers let in, their weight, and their share of all answers."""
    rows = [row for row in run.rounds if finite(row.get("malicious_weight")) is not None]
    if not rows:
        return None
    rounds = [row["round"] for row in rows]
    shares: list[tuple[str, str, str, list[float | None]]] = [
        ("let in", look.ORANGE, "solid", [_share(row.get("malicious_selected"), row.get("malicious")) for row in rows]),
        ("weight", look.VERMILLION, "solid", [row["malicious_weight"] for row in rows]),
        ("of all answers", look.GREY, "dash", [
            _share(row.get("malicious"), (row.get("sampled") or 0) - (row.get("failed") or 0)) for row in rows]),
    ]  # fmt: skip
    traces = [look.line(rounds, y, name, color, dash=dash, **HOVER) for name, color, dash, y in shares]
    return look.figure(traces, look.round_axis(len(run.rounds)), _shares("share"), hovermode="x unified")


def _backdoor(run: RunData) -> go.Figure | None:
    """Return the backdoor's success by round; None where there is no backdoor."""
    rounds, values = series(run.rounds, "attack_success")
    if all(finite(value) is None for value in values):
        return None
    trace = look.line(rounds, values, "backdoor success", look.VERMILLION, **HOVER)
    return look.figure([trace], look.round_axis(len(run.rounds)), _shares("share of triggered examples"))


def _bars(run: RunData) -> go.Figure:
    """Return how many answers were lost and rejected in each round."""
    rounds = [row["round"] for row in run.rounds]
    traces = [
        {
            "type": "bar",
            "x": rounds,
            "y": [row.get(kind) or 0 for row in run.rounds],
            "name": kind,
            "marker": {"color": color},
            "hovertemplate": "%{y:,}",
        }
        for kind, color in (("lost", look.GREY), ("rejected", look.VERMILLION))
    ]
    axis = look.round_axis(len(run.rounds))
    # Bars are as wide as a round.
    x = {**axis, "range": [0.4, len(run.rounds) + 0.6]}
    y = {"title": {"text": "answers"}, "rangemode": "tozero", "tickformat": ",d"}
    return look.figure(traces, x, y, height=220, barmode="stack", hovermode="x unified")


def _share(part: object, whole: object) -> float | None:
    a, b = finite(part), finite(whole)
    return a / b if a is not None and b else None


def _shares(title: str) -> dict[str, Any]:
    return {"title": {"text": title}, "range": [-0.02, 1.02], "tickformat": ".0%"}


def _faults(row: Row) -> int:
    """Return how many of a round's clients failed by themselves."""
    count: int = (row.get("failed") or 0) - (row.get("lost") or 0) - (row.get("rejected") or 0)
    return count


def _present(row: Row) -> list[dict[str, Any]]:
    """Return a round's failures without the lost answers, which stand last."""
    found: list[dict[str, Any]] = row.get("failures") or []
    return found[: (row.get("failed") or 0) - (row.get("lost") or 0)]


def _reasons(row: Row) -> list[str]:
    reasons = [str(failure["reason"]) for failure in _present(row)]
    # Somebody else's client may use the word for an error of its own.
    return [reason for reason in reasons if not (row.get("rejected") and reason.startswith(REJECTED))]


def _by_round(run: RunData) -> Html:
    rows = [
        (row["round"], row.get("sampled"), row.get("lost") or 0, row.get("rejected") or 0)
        for row in run.rounds
        if row.get("lost") or row.get("rejected")
    ]
    folded = element("summary", f"{plural(len(rows), 'round')} in numbers")
    return element("details", folded, markup.table(["Round", "Sampled", "Lost", "Rejected"], rows))


def _rejected(run: RunData, many: int) -> list[Html]:
    """Return a table of the clients whose answers were rejected: reason, how often, and when."""
    found: dict[tuple[int, str], list[int]] = {}
    for row in run.rounds:
        for failure in _present(row):
            reason = str(failure["reason"])
            if row.get("rejected") and reason.startswith(REJECTED):
                found.setdefault((int(failure["client"]), reason.removeprefix(REJECTED)), []).append(row["round"])
    if not found:
        return []
    rows = [
        (run.name(client), cell(reason, "text wide"), len(rounds), rounds[0], rounds[-1])
        for (client, reason), rounds in sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
    ]
    headings = ["Rejected client", "Reason", "Answers", "First round", "Last round"]
    unnamed = many - sum(len(rounds) for rounds in found.values())
    more = f"{plural(unnamed, 'further answer')} of rounds with very many are counted, not named."
    return [markup.table(headings, rows, text=2), *([paragraph(more, quiet=True)] if unnamed else [])]
