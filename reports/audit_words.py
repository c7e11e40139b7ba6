"""What an audit found, in words: the terminal and the page say the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from reports import protection
from reports.words import duration, metric, number, ordered, percent, plural, rate

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


def _canary_lines(found: Found) -> Iterator[str]:
    yield f"{protection.bound(found)}: {found['verdict']}."
    for name, one in found["observers"].items():
        yield (
            f"who {OBSERVERS[name]}: {one['right']:,} of {one['guesses']:,} guesses right, epsilon at least "
            f"{number(one['bound'], 2)} at {percent(found['confidence'])} confidence; estimate {short(one['estimate'])}"
        )
    if found["noise"]:
        ratio, low, high = found["noise"]
        yield f"noise measured: {number(ratio)} times what the ledger counts ({number(low)} to {number(high)})"
    yield reach(found)
    yield effect(found)


def reach(found: Found) -> str:
    """Return what so many canaries could show at most."""
    return (
        f"{plural(found['canaries'], 'canary', 'canaries')}, {found['included']:,} of them in, show epsilon up to "
        f"{number(found['reach'], 2)} at most"
    )


def effect(found: Found) -> str:
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


def _membership_lines(found: Found) -> Iterator[str]:
    yield f"{pool(found)}."
    for name, one in found["attacks"].items():
        rates = ", ".join(f"{found_share(at)} of members at {percent(at['fpr'], 1)}" for at in one["rates"])
        yield f"{ATTACKS[name]}: AUC {number(one['auc'])}; finds {rates} false positives"
    yield few(found)


def found_share(at: Found) -> str:
    """Return the share of members that were found, with its limits."""
    return f"{percent(at['tpr'], 1)} ({number(100 * at['low'], 1)} to {number(100 * at['high'], 1)})"


def pool(found: Found) -> str:
    """Return which examples were told apart, with what help."""
    shadows = plural(found["shadows"], "shadow model") if found["shadows"] else "no shadow models"
    return (
        f"{plural(found['members'], 'training example')} against {found['others']:,} of test splits and the central "
        f"test set, the model of round {found['rounds']}, {shadows}"
    )


def few(found: Found) -> str:
    """Return what rare false positives mean among as many examples as there are."""
    said = [
        f"{percent(at['fpr'], 1)} of {found['others']:,} are {at['allowed'] or 'none'}"
        for at in next(iter(found["attacks"].values()))["rates"]
    ]
    return f"false positives: {', '.join(said)}"


def _inversion_lines(found: Found) -> Iterator[str]:
    yield f"one update of {found['client']} in round 1, by {BY[found['by']]}; {guess(found)}."
    for case in found["cases"]:
        yield f"{case['amount']}, {case['protection']}: {shown(found['kind'], case)}"


def guess(found: Found) -> str:
    """Return what one gets who has not seen the update."""
    return {
        "images": f"an even grey has {number(found['guess'], 1)} dB",
        "table": "a guess of zeros is 1 off",
        "words": f"of k words guessed at random k / {found['guess']:,.0f} are right",
    }[found["kind"]]


def shown(kind: str, case: Found) -> str:
    """Return what an update shows of its examples."""
    if "skipped" in case:
        return f"{case['skipped']}"
    if kind == "words":
        return f"{case['recovered']:,} of {plural(case['words'], 'word')} ({percent(case['best'])})"
    told = {"images": "{} dB at best, {} in the middle", "table": "{} off at best, {} in the middle"}[kind]
    digits = 1 if kind == "images" else 3
    values = told.format(number(case["best"], digits), number(case["median"], digits))
    return f"{case['recovered']:,} of {plural(case['examples'], 'example')} recovered ({values})"


def short(value: object) -> str:
    """Return an epsilon with the digits that count."""
    return "0" if value == 0 else rate(value)


SAID = {"canaries": _canary_lines, "membership": _membership_lines, "inversion": _inversion_lines}
