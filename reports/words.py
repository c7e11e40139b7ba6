"""What people read: names of metrics, and numbers with sensible digits. Pages and the terminal share them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

NOTHING = "\N{EN DASH}"


class Metric(NamedTuple):
    """How a metric is called in a table and on an axis."""

    title: str
    axis: str
    higher_is_better: bool = True


# In the order of importance: a rare-event metric says more than accuracy where it exists. Scores lie between 0 and 1.
SCORES = {
    "pr_auc": Metric("PR-AUC", "area under precision-recall"),
    "recall_at_1pct_fpr": Metric("Recall at 1 % FPR", "recall at 1 % false positives"),
    "auroc": Metric("AUROC", "area under ROC"),
    "accuracy": Metric("Accuracy", "share correct"),
    "macro_f1": Metric("Macro F1", "macro F1"),
    "f1": Metric("F1", "F1"),
}
METRICS = {
    **SCORES,
    "loss": Metric("Loss", "log loss (nats)", higher_is_better=False),
    "ece": Metric("Calibration error", "calibration error (ECE)", higher_is_better=False),
}


def metric(name: str) -> Metric:
    """Return the words for a metric; a third party's metric goes by its own name, higher taken as better."""
    return METRICS.get(name) or Metric(name.replace("_", " "), name.replace("_", " "))


def bounded(name: str) -> bool:
    """Return whether a metric lies between 0 and 1."""
    return name in SCORES or name == "ece"


def ordered(names: Iterable[str]) -> list[str]:
    """Return the names, the most telling metric first, each once; unknown ones stand behind the scores."""
    known = list(METRICS)
    unknown = len(SCORES) - 0.5
    return sorted(dict.fromkeys(names), key=lambda name: known.index(name) if name in known else unknown)


def finite(value: object) -> float | None:
    """Return the value as a float, or None when it is not a finite number (JSON's null stands for nan)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def number(value: object, digits: int = 3) -> str:
    """Return a number with this many decimals, a dash when there is none."""
    known = finite(value)
    return NOTHING if known is None else f"{known:,.{digits}f}"


def setting(value: object) -> str:
    """Return a setting's value as one writes it, a decimal with the four digits that count; a dash for None."""
    if isinstance(value, bool):
        return str(value).lower()
    return NOTHING if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


# Below it two decimals are too few.
SMALL = 0.1


def rate(value: object) -> str:
    """Return a positive number with about three digits that count: 4.35, 63.9, 8,912, 0.00012."""
    known = finite(value)
    if known is None:
        return NOTHING
    if 0 < known < SMALL:
        return f"{known:.2g}"
    return number(known, 0 if known >= 100 else 1 if known >= 10 else 2)


def percent(share: object, digits: int = 0) -> str:
    """Return a share as per cent, whole ones unless digits are asked for, kept on one line."""
    known = finite(share)
    return NOTHING if known is None else f"{100 * known:.{digits}f}\N{NO-BREAK SPACE}%"


def size(count_bytes: object) -> str:
    """Return bytes in MB (a million bytes), GB from a thousand of those, and few in kB."""
    known = finite(count_bytes)
    if known is None:
        return NOTHING
    if known >= 1e9:
        return f"{known / 1e9:,.2f} GB"
    return f"{rate(known / 1e6)} MB" if known >= 1e5 or not known else f"{rate(known / 1e3)} kB"


def duration(seconds: object) -> str:
    """Return seconds as people say them: 0.82 s, 18.3 s, 4 min 12 s, 2 h 05 min."""
    known = finite(seconds)
    if known is None:
        return NOTHING
    if known < 60:
        return f"{rate(known)} s"
    minutes, rest = divmod(round(known), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def plural(count: int, word: str, words: str = "") -> str:
    """Return the count with its word: 1 client, 10 clients."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {words or word + 's'}"
