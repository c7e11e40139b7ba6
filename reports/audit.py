"""The section on what attacks found in a run, and the same in lines for the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from reports import markup
from reports.load import RunData
from reports.markup import NO_HTML, Html, Section, element, join, paragraph, tile
from reports.words import NOTHING, duration, finite, metric, number, ordered, percent, plural, rate

Found = Mapping[str, Any]
OBSERVERS = {
    "known": "knows all but the coins and the noise",
    "released": "sees what was released",
}
LEVELS = {"client": "the server's noisy sums", "example": "the noisy sums of clients' steps"}


def section(run: RunData) -> Section | None:
    """Return what `fedra audit` found in the run; None where it was not audited and carries no canaries."""
    file = run.path / "audit.json"
    found: dict[str, Found] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    carried = run.config.get("audit.canaries") or 0
    parts = [_warning(int(carried))] if carried else []
    parts += [PARTS[name](found[name]) for name in PARTS if name in found]
    return Section("audit", "Audit", join(parts)) if parts else None


def lines(found: Mapping[str, Found]) -> Iterator[str]:
    """Yield what the terminal says of the parts that were found."""
    for name, part in found.items():
        took = f" ({duration(part['seconds'])})"
        if "skipped" in part:
            yield f"{name.capitalize()}: {part['skipped']}.{took}"
        else:
            first, *rest = SAID[name](part)
            yield f"{name.capitalize()}: {first}{took}"
            yield from (f"  {line}" for line in rest)


def _warning(canaries: int) -> Html:
    said = f"This run carries {plural(canaries, 'canary', 'canaries')}: its model is for auditing, not for use."
    return element("p", said, class_="banner failed")


def _canary_lines(found: Found) -> Iterator[str]:
    claim = f"epsilon {rate(found['epsilon'])} at delta {found['delta']:g} ({found['level']} level)"
    yield f"{claim}: {found['verdict']}."
    for name, one in found["observers"].items():
        yield (
            f"who {OBSERVERS[name]}: {one['right']:,} of {one['guesses']:,} guesses right, epsilon at least "
            f"{number(one['bound'], 2)} at {percent(found['confidence'])} confidence; estimate {_rate(one['estimate'])}"
        )
    if found["noise"]:
        ratio, low, high = found["noise"]
        yield f"noise measured: {number(ratio)} times what the ledger counts ({number(low)} to {number(high)})"
    yield _reach(found)
    yield _effect(found)


def _reach(found: Found) -> str:
    return (
        f"{plural(found['canaries'], 'canary', 'canaries')}, {found['included']:,} of them in, show epsilon up to "
        f"{number(found['reach'], 2)} at most"
    )


def _effect(found: Found) -> str:
    """Return whose canaries they are, and what became of the model."""
    on, without = found["metrics"]["with"], found["metrics"]["without"]
    name = next(iter(ordered(on)), "")
    score = f"{metric(name).title} {number(on.get(name))}" if name else ""
    if not found["repeated"]:
        return f"the canaries are the run's own; its model ({score}) is for auditing, not for use"
    return (
        f"the run carries none: it was repeated with canaries ({score}, {number(without.get(name))} without); that "
        "model is for auditing, not for use"
    )


def _canaries(found: Found) -> Html:
    title = element("h3", "Canaries")
    if "skipped" in found:
        return join([title, paragraph(f"None: {found['skipped']}.", quiet=True)])
    best = found["observers"]["known"]["bound"]
    noise = found["noise"] or [None] * 3
    tiles = [
        tile("Verdict", found["verdict"]),
        tile("Claimed", f"ε = {rate(found['epsilon'])}", f"{found['level']} level, δ = {found['delta']:g}"),
        tile("Proven", f"ε ≥ {number(best, 2)}", f"{percent(found['confidence'])} confidence"),
        tile("Noise", f"{number(noise[0])} ×", f"what the ledger counts; {number(noise[1])} to {number(noise[2])}"),
    ]
    rows = [
        (
            f"Who {OBSERVERS[name]}", f"{one['right']:,} of {one['guesses']:,}", number(one["bound"], 2),
            _rate(one["estimate"]), _probability(one["p_value"]),
        )
        for name, one in found["observers"].items()
    ]  # fmt: skip
    headings = ["Observer", "Guesses right", "ε at least", "ε, estimated", "So good if the claim holds"]
    note = (
        f"Canaries hide in {LEVELS[found['level']]} as everybody does, each with probability 1/2, and an observer "
        "guesses who is in. The lower bound (Steinke, Nasr and Jagielski, 2023) holds whatever the observer does; far "
        "below the claim it proves nothing wrong, and nothing right. The estimate (after Andrew et al., 2023) is no "
        f"bound. {_reach(found).capitalize()}. {_effect(found).capitalize()}."
    )
    return join(
        [title, element("div", *tiles, class_="tiles"), markup.table(headings, rows), paragraph(note, quiet=True)]
    )


def _rate(value: object) -> str:
    return "0" if value == 0 else rate(value)


def _probability(value: object) -> str:
    known = finite(value)
    return NOTHING if known is None else "at most 1" if known >= 1 else f"at most {known:.2g}"


SAID = {"canaries": _canary_lines}
PARTS = {"canaries": _canaries}
