"""The section on what attacks found in a run."""

from __future__ import annotations

from typing import Any

from reports import audit_words as words
from reports import look, markup, protection
from reports.audit_words import Found
from reports.load import RunData
from reports.markup import NO_HTML, Html, Section, cell, element, figure, join, key, paragraph, tile
from reports.words import NOTHING, finite, number, percent, plural, rate

CLEAR = {
    "images": "Recovered: 20 dB or more.",
    "table": "Recovered: within a tenth of its length.",
    "words": "Recovered: words, in no order.",
}
PICTURE = "width: 48px; image-rendering: pixelated; display: block; margin-bottom: 3px"
ROW = "display: flex; gap: 6px"
GRID = "display: grid; gap: 4px 24px; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr))"
# Left end of the drawn curves.
LEAST = 1e-3
HEIGHT = 280
LEVELS = {"client": "the server's noisy sums", "example": "the noisy sums of clients' steps"}


def section(run: RunData) -> Section | None:
    """Return what `fedra audit` found in the run; None where it was not audited and carries no canaries."""
    carried = run.config.get("audit.canaries") or 0
    parts = [_warning(int(carried))] if carried else []
    parts += [PARTS[name](run.audit[name]) for name in PARTS if name in run.audit]
    return Section("audit", "Audit", join(parts)) if parts else None


def _warning(canaries: int) -> Html:
    said = f"This run carries {plural(canaries, 'canary', 'canaries')}: its model is for auditing, not for use."
    return element("p", said, class_="banner failed")


def _canaries(found: Found) -> Html:
    title = element("h3", "Canaries")
    if "skipped" in found:
        return join([title, paragraph(f"None: {found['skipped']}.", quiet=True)])
    best = found["observers"]["known"]["bound"]
    failed = found["verdict"] in ("violated", "too little noise")
    said = f"{found['verdict'].capitalize()}: the run does not keep the privacy that it claims."
    alarm = element("p", said, class_="banner failed") if failed else NO_HTML
    noise = found["noise"] or [None] * 3
    tiles = [
        tile("Verdict", found["verdict"]),
        tile("Claimed", f"ε = {rate(found['epsilon'])}", *_claimed(found)),
        tile("Proven", f"ε ≥ {number(best, 2)}", f"{percent(found['confidence'])} confidence"),
        tile(
            "Noise",
            f"{percent(noise[0])}",
            f"of what the ledger counts; {percent(noise[1], 1)} to {percent(noise[2], 1)}",
        ),
    ]
    rows = [
        (
            f"Who {words.OBSERVERS[name]}", f"{one['right']:,} of {one['guesses']:,}", number(one["bound"], 2),
            words.short(one["estimate"]), _probability(one["p_value"]),
        )
        for name, one in found["observers"].items()
    ]  # fmt: skip
    headings = ["Observer", "Guesses right", "ε at least", "ε, estimated", "So good if the claim holds"]
    note = (
        f"Canaries hide in {LEVELS[found['level']]} as everybody does, each with probability 1/2, and an observer "
        "guesses who is in. The lower bound (Steinke, Nasr and Jagielski, 2023) holds whatever the observer does; far "
        "below the claim it proves nothing wrong, and nothing right. The estimate (after Andrew et al., 2023) is no "
        f"bound. {_sentence(words.reach(found))}. {_sentence(words.effect(found))}."
    )
    parts = [title, alarm, element("div", *tiles, class_="tiles"), markup.table(headings, rows, even=True)]
    return join([*parts, paragraph(note, quiet=True)])


def _claimed(found: Found) -> list[str]:
    said = [f"{found['level']} level, δ = {found['delta']:g}"]
    return [*said, protection.SIMULATED] if found["simulated"] else said


def _membership(found: Found) -> Html:
    headings = ["Attack", "AUC", "Balanced accuracy"]
    headings += [f"Found at {percent(at['fpr'], 1)} false positives" for at in _first(found)["rates"]]
    rows = [
        (
            _sentence(words.ATTACKS[name]), number(one["auc"]), number(one["balanced_accuracy"]),
            *map(words.found_share, one["rates"]),
        )
        for name, one in found["attacks"].items()
    ]  # fmt: skip
    shadows = (
        "The shadow models are federations of the same making on random halves of these examples, averaged whatever "
        "the run's strategy. "
    )
    note = (
        f"{words.pool(found)}. An attacker who guesses finds as many members as there are false positives, and has "
        f"AUC 0.5. In brackets: {percent(found['confidence'])} Clopper-Pearson limits. {_sentence(words.few(found))}. "
        f"{shadows if found['shadows'] else ''}An attack that fails is no proof of privacy: a better one may not."
    )
    parts = [element("h3", "Membership inference"), markup.table(headings, rows, even=True)]
    return join([*parts, _curves(found), paragraph(note, quiet=True)])


def _first(found: Found) -> Found:
    first: Found = next(iter(found["attacks"].values()))
    return first


def _curves(found: Found) -> Html:
    """Return true against false positives of each attack, both on log scales: the left end is what counts."""
    colors = dict(zip(words.ATTACKS, look.PALETTE, strict=False))
    hover: dict[str, Any] = {"hovertemplate": "%{y:.2%} of members at %{x:.2%} false positives"}
    traces = []
    for name, one in found["attacks"].items():
        rates, hits = zip(*one["curve"], strict=True)
        traces.append(look.line(rates, hits, words.ATTACKS[name], colors[name], **hover))
    ends = [LEAST, 1.0]
    traces.append(look.line(ends, ends, "a guess", look.GREY, dash="dash", width=1.6, **hover))
    axis = {"type": "log", "range": [-3, 0], "tickformat": ".1~%", "dtick": 1}
    names = [("line", colors[name], words.ATTACKS[name]) for name in found["attacks"]]
    chart = look.figure(
        traces,
        {**axis, "title": {"text": "false positives (log scale)"}},
        {**axis, "title": {"text": "members found (log scale)"}},
        height=HEIGHT,
    )
    legend = key([*names, ("dash", look.GREY, "a guess")])
    return figure(chart, "Members found against false positives", legend)


def _inversion(found: Found) -> Html:
    rows = [
        (_sentence(case["amount"]), cell(case["protection"], "text"), cell(words.shown(found["kind"], case), "text"))
        for case in found["cases"]
    ]
    note = (
        f"What an update of {found['client']} in round 1 shows to whoever gets it, by {words.BY[found['by']]}; "
        f"{words.guess(found)}. {CLEAR[found['kind']]} The attacker knows the labels, and what is found is matched "
        "with the examples as well as it can be: this is a worst case, of these attacks; a better one may find more."
    )
    table = markup.table(["Update of", "Seen", "Shows"], rows, text=3)
    pictures = [_pictures(case) for case in found["cases"] if case.get("pictures")]
    if pictures:
        note += " Pictures: the true ones above, those found below."
    return join([
        element("h3", "Gradient inversion"), table, element("div", *pictures, style=GRID),
        paragraph(note, quiet=True),
    ])  # fmt: skip


def _pictures(case: Found) -> Html:
    """Return a case's pictures, the true ones above those that were found."""
    pairs = [
        element("span", *(Html(f'<img src="{address}" alt="" style="{PICTURE}">') for address in pair))
        for pair in case["pictures"]
    ]
    said = f"{_sentence(case['amount'])}, {case['protection']}"
    return element("figure", element("figcaption", said), element("div", *pairs, style=ROW))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _probability(value: object) -> str:
    known = finite(value)
    return NOTHING if known is None else "at most 1" if known >= 1 else f"at most {known:.2g}"


PARTS = {"canaries": _canaries, "membership": _membership, "inversion": _inversion}
