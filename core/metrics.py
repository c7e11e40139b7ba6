"""Metrics of a classifier from its probabilities, for many clients at once, named as in `summary.json`.

Definitions are scikit-learn's (calibration error apart, which it lacks) and tests hold the numbers equal to its; but
its functions take one client at a time and milliseconds for each, so that a thousand clients' tiny splits would take
longer than their training. Here a metric is a few sums over all rows, for all clients together.

A metric that a split cannot define (AUROC with one class, anything with no example) is nan, never a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# Bin edges for scores on the logit scale: clients report counts per bin, so a threshold needs no row to leave.
SCORE_EDGES = 1 / (1 + np.exp(-np.linspace(-12, 12, 481)))
CALIBRATION_BINS = 15
HIGHER_IS_BETTER = {
    "accuracy": True, "auroc": True, "pr_auc": True, "recall_at_1pct_fpr": True, "f1": True, "macro_f1": True,
    "loss": False, "ece": False,
}  # fmt: skip


@dataclass(frozen=True)
class _Rows:
    """Rows of C clients, one client after the other, and sums over each client's rows."""

    y: np.ndarray
    client: np.ndarray
    """(n,) int64: whose row it is."""
    clients: int

    def total(self, values: np.ndarray) -> np.ndarray:
        """Return each client's sum of `values` (n,), (C,)."""
        return np.bincount(self.client, weights=values, minlength=self.clients)

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Return each client's mean of `values` (n,), (C,)."""
        return _ratio(self.total(values), self.total(np.ones(len(self.client))))


def _ratio(a: np.ndarray, b: np.ndarray, otherwise: float = np.nan) -> np.ndarray:
    return np.divide(a, b, out=np.full(len(b), otherwise, dtype=np.float64), where=b > 0)


@dataclass(frozen=True)
class _Curve:
    """Each client's distinct scores from the highest down, T in all, and the counts at or above each."""

    client: np.ndarray
    true: np.ndarray
    false: np.ndarray
    positives: np.ndarray
    negatives: np.ndarray
    """The last two: (C,), the other three (T,)."""

    @classmethod
    def of(cls, p: np.ndarray, positive: np.ndarray, rows: _Rows) -> _Curve:
        order = np.lexsort((-p, rows.client))
        client, p, hit = rows.client[order], p[order], positive[order].astype(np.float64)
        # A threshold lies after the last row of a score; equal scores cannot be told apart.
        last = np.append((client[1:] != client[:-1]) | (p[1:] != p[:-1]), True)
        positives, negatives = rows.total(positive), rows.total(~positive)
        before = np.cumsum(positives) - positives, np.cumsum(negatives) - negatives
        true = (np.cumsum(hit) - before[0][client])[last]
        false = (np.cumsum(1 - hit) - before[1][client])[last]
        return cls(client[last], true, false, positives, negatives)

    def _gained(self, counts: np.ndarray) -> np.ndarray:
        """Return what each threshold adds to the client's previous one, (T,)."""
        first = np.append(True, self.client[1:] != self.client[:-1])
        return counts - np.where(first, 0, np.append(0, counts[:-1]))

    def _defined(self, values: np.ndarray) -> np.ndarray:
        return np.where((self.positives > 0) & (self.negatives > 0), values, np.nan)

    def _sum(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self.client, weights=values, minlength=len(self.positives))

    def auroc(self) -> np.ndarray:
        """Return the area under each client's ROC curve by trapezoids, (C,)."""
        true = self._gained(self.true)
        area = self._sum(self._gained(self.false) * (self.true - true / 2))
        return self._defined(_ratio(area, self.positives * self.negatives))

    def pr_auc(self) -> np.ndarray:
        """Return each client's average precision, the sum of precision times gained recall, (C,)."""
        precision = self.true / np.maximum(self.true + self.false, 1)
        return self._defined(_ratio(self._sum(self._gained(self.true) * precision), self.positives))

    def recall_at_fpr(self, limit: float) -> np.ndarray:
        """Return the largest recall among each client's thresholds whose false-positive rate is at most `limit`."""
        allowed = self.false <= limit * self.negatives[self.client]
        most = np.zeros(len(self.positives))
        np.maximum.at(most, self.client[allowed], self.true[allowed])
        return self._defined(_ratio(most, self.positives))


def _f1(rows: _Rows, predicted: np.ndarray, actual: np.ndarray) -> np.ndarray:
    both, either = rows.total(predicted & actual), rows.total(predicted) + rows.total(actual)
    return _ratio(2 * both, either, otherwise=0.0)


def _ece(rows: _Rows, confidence: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Return the weighted gap between confidence and accuracy over equal bins (Guo et al., ICML 2017, eq. 3), (C,)."""
    index = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    cells = rows.client * CALIBRATION_BINS + index
    gap = np.bincount(cells, weights=confidence - correct, minlength=rows.clients * CALIBRATION_BINS)
    examples = np.bincount(rows.client, minlength=rows.clients)
    return _ratio(np.abs(gap).reshape(rows.clients, -1).sum(axis=1), examples)


def _binary(p: np.ndarray, rows: _Rows, threshold: float) -> dict[str, Callable[[], np.ndarray]]:
    predicted, positive = p > threshold, rows.y == 1
    curve = _Curve.of(p, positive, rows)
    clipped = np.clip(p, 1e-7, 1 - 1e-7)
    return {
        "loss": lambda: rows.mean(-np.log(np.where(positive, clipped, 1 - clipped))),
        "accuracy": lambda: rows.mean(predicted == positive),
        "ece": lambda: _ece(rows, p, positive),
        "auroc": curve.auroc,
        "pr_auc": curve.pr_auc,
        "recall_at_1pct_fpr": lambda: curve.recall_at_fpr(0.01),
        "f1": lambda: curve._defined(_f1(rows, predicted, positive)),
    }


def _multiclass(p: np.ndarray, rows: _Rows) -> dict[str, Callable[[], np.ndarray]]:
    predicted, classes = p.argmax(axis=1), range(p.shape[1])
    right = predicted == rows.y

    def macro_f1() -> np.ndarray:
        each = np.stack([_f1(rows, predicted == k, rows.y == k) for k in classes])
        present = np.stack([rows.total(rows.y == k) > 0 for k in classes])
        return _ratio((each * present).sum(axis=0), present.sum(axis=0))

    def auroc() -> np.ndarray:
        # One against the rest, and the mean over classes: nan where a class is missing.
        return np.mean([_Curve.of(p[:, k], rows.y == k, rows).auroc() for k in classes], axis=0)

    return {
        "loss": lambda: rows.mean(-np.log(np.clip(p[np.arange(len(p)), rows.y], 1e-7, 1))),
        "accuracy": lambda: rows.mean(right),
        "macro_f1": macro_f1,
        "auroc": auroc,
        "ece": lambda: _ece(rows, p.max(axis=1), right),
    }


def score_each(
    p: np.ndarray, y: np.ndarray, sizes: Sequence[int], names: Sequence[str], threshold: float = 0.5
) -> dict[str, np.ndarray]:
    """Return the named metrics of each of C clients, (C,) float64, whose `sizes` rows lie one after the other.

    p is (n,) for two classes or (n, classes), y (n,) int64. `threshold` is where a binary prediction turns positive: it
    decides accuracy and F1 and nothing else.
    """
    if len(y) == 0:
        return {name: np.full(len(sizes), np.nan) for name in names}
    rows = _Rows(y, np.repeat(np.arange(len(sizes)), sizes), len(sizes))
    p = np.asarray(p, dtype=np.float64)
    # A model may be finite and its outputs not: such a client has no metrics.
    broken = rows.total(~np.isfinite(p).reshape(len(p), -1).all(axis=1)) > 0
    p = np.nan_to_num(p, posinf=1.0, neginf=0.0)
    table = _binary(p, rows, threshold) if p.ndim == 1 else _multiclass(p, rows)
    return {name: np.where(broken, np.nan, table[name]()) for name in names}


def score(p: np.ndarray, y: np.ndarray, names: Sequence[str], threshold: float = 0.5) -> dict[str, float]:
    """Return the named metrics of one set of rows; arguments as in `score_each`."""
    return {name: float(values[0]) for name, values in score_each(p, y, [len(y)], names, threshold).items()}


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


def spread(each: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Return mean, worst and std over clients of each metric (C,), and how many clients have it: nan does not count."""
    out: dict[str, dict[str, float]] = {}
    for name, values in each.items():
        values = values[np.isfinite(values)]
        if not len(values):
            out[name] = {"mean": float("nan"), "worst": float("nan"), "std": float("nan"), "clients": 0}
            continue
        worst = values.min() if HIGHER_IS_BETTER.get(name, True) else values.max()
        out[name] = {
            "mean": float(values.mean()), "worst": float(worst), "std": float(values.std()), "clients": len(values),
        }  # fmt: skip
    return out


def weighted_means(each: Mapping[str, np.ndarray], num_examples: Sequence[int]) -> dict[str, float]:
    """Return each metric's mean over clients (C,) weighted by examples; clients where it is nan do not count."""
    weights = np.asarray(num_examples, dtype=np.float64)
    out = {}
    for name, values in each.items():
        counted = np.isfinite(values) & (weights > 0)
        out[name] = float(np.average(values[counted], weights=weights[counted])) if counted.any() else float("nan")
    return out
