"""The section on what attacks found in a run, and the same in lines for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from reports import look, markup
from reports.load import RunData
from reports.markup import NO_HTML, Html, Section, cell, element, figure, join, key, paragraph, tile
from reports.words import NOTHING, duration, finite, metric, number, ordered, percent, plural, rate

Found = Mapping[str, Any]
OBSERVERS = {
    "known": "knows all but the coins and the noise",
    "released": "sees what was released",
}
ATTACKS = {
    "threshold": "small loss",
    "calibrated": "loss below other models'",
    "lira offline": "LiRA, offline",
    "lira": "LiRA",
}
BY = {
    "first layer": "the first layer, a fully connected one",
    "gradient matching": "inputs whose gradient points the same way",
    "embedding rows": "the rows of the embedding that moved",
}
CLEAR = {
    "images": "Recovered: 20 dB or more.",
    "table": "Recovered: within a tenth of its length.",
    "words": "Words are hashes here, and their order is not in the update.",
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
    failed = found["verdict"] in ("violated", "too little noise")
    said = f"{found['verdict'].capitalize()}: the run does not keep the privacy that it claims."
    alarm = element("p", said, class_="banner failed") if failed else NO_HTML
    noise = found["noise"] or [None] * 3
    tiles = [
        tile("Verdict", found["verdict"]),
        tile("Claimed", f"ε = {rate(found['epsilon'])}", f"{found['level']} level, δ = {found['delta']:g}"),
        tile("Proven", f"ε ≥ {number(best, 2)}", f"{percent(found['confidence'])} confidence"),
        tile(
            "Noise",
            f"{percent(noise[0])}",
            f"of what the ledger counts; {percent(noise[1], 1)} to {percent(noise[2], 1)}",
        ),
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
        f"bound. {_sentence(_reach(found))}. {_sentence(_effect(found))}."
    )
    parts = [title, alarm, element("div", *tiles, class_="tiles"), markup.table(headings, rows, even=True)]
    return join([*parts, paragraph(note, quiet=True)])


def _membership_lines(found: Found) -> Iterator[str]:
    yield f"{_pool(found)}."
    for name, one in found["attacks"].items():
        rates = ", ".join(f"{_found(at)} of members at {percent(at['fpr'], 1)}" for at in one["rates"])
        yield f"{ATTACKS[name]}: AUC {number(one['auc'])}; finds {rates} false positives"
    yield _few(found)


def _found(at: Found) -> str:
    """Return the share of members that were found, with its limits."""
    return f"{percent(at['tpr'], 1)} ({number(100 * at['low'], 1)} to {number(100 * at['high'], 1)})"


def _pool(found: Found) -> str:
    shadows = plural(found["shadows"], "shadow model") if found["shadows"] else "no shadow models"
    return (
        f"{plural(found['members'], 'training example')} against {found['others']:,} of test splits and the central "
        f"test set, the model of round {found['rounds']}, {shadows}"
    )


def _few(found: Found) -> str:
    """Return what rare false positives mean among as many examples as there are."""
    said = [
        f"{percent(at['fpr'], 1)} of {found['others']:,} are {at['allowed'] or 'none'}"
        for at in next(iter(found["attacks"].values()))["rates"]
    ]
    return f"false positives: {', '.join(said)}"


def _membership(found: Found) -> Html:
    headings = ["Attack", "AUC", "Balanced accuracy"]
    headings += [f"Found at {percent(at['fpr'], 1)} false positives" for at in _first(found)["rates"]]
    rows = [
        (
            _sentence(ATTACKS[name]), number(one["auc"]), number(one["balanced_accuracy"]),
            *map(_found, one["rates"]),
        )
        for name, one in found["attacks"].items()
    ]  # fmt: skip
    note = (
        f"{_pool(found)}. An attacker who guesses finds as many members as there are false positives, and has AUC 0.5. "
        f"In brackets: {percent(found['confidence'])} Clopper-Pearson limits. {_sentence(_few(found))}. The shadow "
        "models are federations of the same making on random halves of these examples, averaged whatever the run's "
        "strategy. An attack that fails is no proof of privacy: a better one may not."
    )
    parts = [element("h3", "Membership inference"), markup.table(headings, rows, even=True)]
    return join([*parts, _curves(found), paragraph(note, quiet=True)])


def _first(found: Found) -> Found:
    first: Found = next(iter(found["attacks"].values()))
    return first


def _curves(found: Found) -> Html:
    """Return true against false positives of each attack, both on log scales: the left end is what counts."""
    colors = dict(zip(ATTACKS, look.PALETTE, strict=False))
    hover: dict[str, Any] = {"hovertemplate": "%{y:.2%} of members at %{x:.2%} false positives"}
    traces = []
    for name, one in found["attacks"].items():
        rates, hits = zip(*one["curve"], strict=True)
        traces.append(look.line(rates, hits, ATTACKS[name], colors[name], **hover))
    ends = [LEAST, 1.0]
    traces.append(look.line(ends, ends, "a guess", look.GREY, dash="dash", width=1.6, **hover))
    axis = {"type": "log", "range": [-3, 0], "tickformat": ".1~%", "dtick": 1}
    names = [("line", colors[name], ATTACKS[name]) for name in found["attacks"]]
    chart = look.figure(
        traces,
        {**axis, "title": {"text": "false positives (log scale)"}},
        {**axis, "title": {"text": "members found (log scale)"}},
        height=HEIGHT,
    )
    return figure(chart, "Members found against false positives", key([*names, ("dash", look.GREY, "a guess")]))


def _inversion_lines(found: Found) -> Iterator[str]:
    yield f"one update of {found['client']} in round 1, by {BY[found['by']]}; {_guess(found)}."
    for case in found["cases"]:
        yield f"{case['amount']}, {case['protection']}: {_shown(found['kind'], case)}"


def _guess(found: Found) -> str:
    """Return what one gets who has not seen the update."""
    return {
        "images": f"an even grey has {number(found['guess'], 1)} dB",
        "table": "a guess of zeros is 1 off",
        "words": f"of k words guessed at random k / {found['guess']:,.0f} are right",
    }[found["kind"]]


def _shown(kind: str, case: Found) -> str:
    if "skipped" in case:
        return f"{case['skipped']}"
    if kind == "words":
        return f"{case['recovered']:,} of {plural(case['words'], 'word')} ({percent(case['best'])})"
    told = {"images": "{} dB at best, {} in the middle", "table": "{} off at best, {} in the middle"}[kind]
    digits = 1 if kind == "images" else 3
    values = told.format(number(case["best"], digits), number(case["median"], digits))
    return f"{case['recovered']:,} of {plural(case['examples'], 'example')} recovered ({values})"


def _inversion(found: Found) -> Html:
    rows = [
        (_sentence(case["amount"]), cell(case["protection"], "text"), cell(_shown(found["kind"], case), "text"))
        for case in found["cases"]
    ]
    note = (
        f"What an update of {found['client']} in round 1 shows to whoever receives it, by {BY[found['by']]}; "
        f"{_guess(found)}. {CLEAR[found['kind']]} The attacker knows the labels, and what is found is matched with the "
        "examples as well as it can be: this is a worst case, of these attacks; a better one may find more."
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


def _rate(value: object) -> str:
    return "0" if value == 0 else rate(value)


def _probability(value: object) -> str:
    known = finite(value)
    return NOTHING if known is None else "at most 1" if known >= 1 else f"at most {known:.2g}"


SAID = {"canaries": _canary_lines, "membership": _membership_lines, "inversion": _inversion_lines}
PARTS = {"canaries": _canaries, "membership": _membership, "inversion": _inversion}
