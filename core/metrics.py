"""Metrics of a classifier from its probabilities, by scikit-learn, named as in `summary.json`.

A metric that a split cannot define (AUROC with one class, anything with no example) is nan, never a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from sklearn import metrics as sk

# Bin edges for scores on the logit scale: clients report counts per bin, so a threshold needs no row to leave.
SCORE_EDGES = 1 / (1 + np.exp(-np.linspace(-12, 12, 481)))
HIGHER_IS_BETTER = {
    "accuracy": True, "auroc": True, "pr_auc": True, "recall_at_1pct_fpr": True, "f1": True, "macro_f1": True,
    "loss": False, "ece": False,
}  # fmt: skip


def _expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """Return the weighted gap between confidence and accuracy over equal bins (Guo et al., ICML 2017, eq. 3)."""
    index = np.clip((confidence * bins).astype(int), 0, bins - 1)
    gap = np.bincount(index, weights=confidence - correct, minlength=bins)
    return float(np.abs(gap).sum() / len(confidence))


def _recall_at_fpr(p: np.ndarray, y: np.ndarray, limit: float) -> float:
    """Return the largest recall among thresholds whose false-positive rate is at most `limit`."""
    fpr, tpr, _ = sk.roc_curve(y, p, drop_intermediate=False)
    return float(tpr[fpr <= limit].max())


def _binary(p: np.ndarray, y: np.ndarray, threshold: float) -> dict[str, Callable[[], float]]:
    predicted = p > threshold
    both = len(np.unique(y)) == 2
    ranked = {
        "auroc": lambda: sk.roc_auc_score(y, p),
        "pr_auc": lambda: sk.average_precision_score(y, p),
        "recall_at_1pct_fpr": lambda: _recall_at_fpr(p, y, 0.01),
        "f1": lambda: sk.f1_score(y, predicted, zero_division=0.0),
    }
    return {
        "loss": lambda: sk.log_loss(y, np.clip(p, 1e-7, 1 - 1e-7), labels=[0, 1]),
        "accuracy": lambda: np.mean(predicted == y),
        "ece": lambda: _expected_calibration_error(p, y),
        **{name: metric if both else (lambda: np.nan) for name, metric in ranked.items()},
    }


def _multiclass(p: np.ndarray, y: np.ndarray) -> dict[str, Callable[[], float]]:
    predicted = p.argmax(axis=1)
    classes = np.arange(p.shape[1])
    every_class = np.isin(classes, y).all()
    return {
        "loss": lambda: -np.mean(np.log(np.clip(p[np.arange(len(y)), y], 1e-7, 1))),
        "accuracy": lambda: np.mean(predicted == y),
        "macro_f1": lambda: sk.f1_score(y, predicted, average="macro", labels=np.unique(y), zero_division=0.0),
        "auroc": lambda: sk.roc_auc_score(y, p, multi_class="ovr", labels=classes) if every_class else np.nan,
        "ece": lambda: _expected_calibration_error(p.max(axis=1), predicted == y),
    }


def score(p: np.ndarray, y: np.ndarray, names: Sequence[str], threshold: float = 0.5) -> dict[str, float]:
    """Return the named metrics of probabilities p, (n,) for two classes or (n, classes), against labels y (n,) int64.

    `threshold` is where a binary prediction turns positive: it decides accuracy and F1 and nothing else.
    """
    if len(y) == 0:
        return dict.fromkeys(names, float("nan"))
    p = np.asarray(p, dtype=np.float64)
    table = _binary(p, y, threshold) if p.ndim == 1 else _multiclass(p, y)
    return {name: float(table[name]()) for name in names}


def score_counts(p: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return how many negatives and positives fall in each score bin, (2, len(SCORE_EDGES) - 1) int64."""
    return np.stack([np.histogram(np.clip(p[y == c], SCORE_EDGES[0], SCORE_EDGES[-1]), SCORE_EDGES)[0] for c in (0, 1)])


def best_threshold(counts: np.ndarray) -> float:
    """Return the score-bin edge that maximises F1 on the summed `score_counts` (0.5 when there is no positive)."""
    true_positives = counts[1][::-1].cumsum()[::-1]
    false_positives = counts[0][::-1].cumsum()[::-1]
    positives = counts[1].sum()
    if positives == 0:
        return 0.5
    f1 = 2 * true_positives / np.maximum(true_positives + false_positives + positives, 1)
    return float(SCORE_EDGES[int(f1.argmax())])


def spread(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return mean, worst and standard deviation over clients of each metric; clients where it is nan do not count."""
    out = {}
    for name in names:
        values = np.array([row[name] for row in rows if np.isfinite(row[name])], dtype=np.float64)
        worst = values.min if HIGHER_IS_BETTER.get(name, True) else values.max
        empty = {"mean": float("nan"), "worst": float("nan"), "std": float("nan")}
        out[name] = (
            {"mean": float(values.mean()), "worst": float(worst()), "std": float(values.std())}
            if len(values)
            else empty
        )
    return out
