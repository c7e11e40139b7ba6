"""Metrics with numbers one can check by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn import metrics as sk

from core.metrics import SCORE_EDGES, best_threshold, score, score_counts, score_each, spread, weighted_means

BINARY = ("loss", "accuracy", "auroc", "pr_auc", "recall_at_1pct_fpr", "f1", "ece")


def test_binary_metrics_by_hand() -> None:
    metrics = score(np.array([0.1, 0.4, 0.6, 0.9]), np.array([0, 1, 0, 1]), BINARY)
    assert metrics["accuracy"] == 0.5
    assert metrics["auroc"] == 0.75  # of the four pairs, only (0.6, 0.4) is in the wrong order
    assert metrics["f1"] == 0.5
    assert metrics["loss"] == pytest.approx(-(math.log(0.9) + math.log(0.4) + math.log(0.4) + math.log(0.9)) / 4)
    assert metrics["recall_at_1pct_fpr"] == 0.5


def test_the_threshold_decides_accuracy_and_f1_only() -> None:
    p, y = np.array([0.1, 0.2, 0.3]), np.array([0, 1, 1])
    low, high = score(p, y, BINARY, 0.15), score(p, y, BINARY, 0.5)
    assert (low["accuracy"], low["f1"], high["f1"]) == (1.0, 1.0, 0.0)
    assert low["auroc"] == high["auroc"]


def test_what_a_split_cannot_define_is_nan() -> None:
    one_class = score(np.array([0.2, 0.3]), np.array([0, 0]), BINARY)
    assert math.isnan(one_class["auroc"])
    assert one_class["accuracy"] == 1.0
    assert all(math.isnan(value) for value in score(np.array([]), np.array([]), BINARY).values())


def test_multiclass_metrics_by_hand() -> None:
    p = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.6, 0.3, 0.1]])
    metrics = score(p, np.array([0, 1, 2]), ("loss", "accuracy", "macro_f1", "ece"))
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    assert metrics["macro_f1"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert metrics["loss"] == pytest.approx(-(2 * math.log(0.8) + math.log(0.1)) / 3)


def test_multiclass_auroc_is_nan_where_a_class_is_missing() -> None:
    p = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]])
    assert math.isnan(score(p, np.array([0, 1]), ("auroc",))["auroc"])


def test_calibration_error_of_a_sure_and_half_wrong_model() -> None:
    assert score(np.array([1.0, 1.0]), np.array([0, 1]), ("ece",))["ece"] == pytest.approx(0.5)


def test_calibration_error_over_three_bins_by_hand() -> None:
    """Bins of 1/15: 0.10 and 0.12 are in the second, 0.50 in the eighth, 0.95 in the last."""
    p, y = np.array([0.10, 0.12, 0.50, 0.95]), np.array([0, 1, 0, 1])
    gap = abs(0.22 - 1) + abs(0.50 - 0) + abs(0.95 - 1)
    assert score(p, y, ("ece",))["ece"] == pytest.approx(gap / 4)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_client_whose_predictions_are_not_finite_has_no_metrics(wrong: float) -> None:
    p, y = np.array([0.2, 0.9, 0.4, wrong, 0.6]), np.array([0, 1, 1, 0, 1])
    each = score_each(p, y, [2, 3], BINARY)
    assert all(math.isnan(values[1]) for values in each.values())
    assert each["auroc"][0] == 1.0
    several = score_each(np.stack([p, 1 - p], axis=1), 1 - y, [2, 3], ("loss", "accuracy", "macro_f1", "auroc", "ece"))
    assert all(math.isnan(values[1]) for values in several.values())


def test_the_best_threshold_needs_only_counts_and_counts_add_up() -> None:
    rng = np.random.default_rng(0)
    y = (rng.random(4000) < 0.1).astype(int)
    p = 1 / (1 + np.exp(-(rng.normal(size=4000) + 2 * y - 3)))
    halves = score_counts(p[:2000], y[:2000]) + score_counts(p[2000:], y[2000:])
    assert np.array_equal(halves, score_counts(p, y))
    found = score(p, y, ("f1",), best_threshold(halves))["f1"]
    best = max(score(p, y, ("f1",), t)["f1"] for t in SCORE_EDGES)
    assert found == pytest.approx(best, abs=0.005)
    assert best_threshold(np.zeros((2, 480), dtype=int)) == 0.5


def test_spread_knows_which_end_is_worst_and_ignores_nan() -> None:
    table = spread({"loss": np.array([1.0, 3.0, 2.0]), "auroc": np.array([0.9, 0.7, np.nan])})
    assert table["loss"] == {"mean": 2.0, "worst": 3.0, "std": pytest.approx(0.8164966), "clients": 3}
    assert table["auroc"]["worst"] == 0.7
    assert table["auroc"]["clients"] == 2
    assert table["auroc"]["mean"] == pytest.approx(0.8)


def test_weighted_means_ignore_nan_and_clients_without_examples() -> None:
    each = {"loss": np.array([1.0, 2.0, np.nan, 9.0]), "auroc": np.full(4, np.nan)}
    means = weighted_means(each, [1, 3, 5, 0])
    assert means["loss"] == pytest.approx(1.75)
    assert math.isnan(means["auroc"])


def _sklearn(p: np.ndarray, y: np.ndarray, threshold: float) -> dict[str, float]:
    both = len(np.unique(y)) == 2
    fpr, recall, _ = sk.roc_curve(y, p, drop_intermediate=False) if both else ([0.0], [math.nan], None)
    return {
        "loss": sk.log_loss(y, np.clip(p, 1e-7, 1 - 1e-7), labels=[0, 1]),
        "accuracy": sk.accuracy_score(y, p > threshold),
        "auroc": sk.roc_auc_score(y, p) if both else math.nan,
        "pr_auc": sk.average_precision_score(y, p) if both else math.nan,
        "recall_at_1pct_fpr": np.asarray(recall)[np.asarray(fpr) <= 0.01].max(),
        "f1": sk.f1_score(y, p > threshold, zero_division=0.0) if both else math.nan,
    }


@pytest.mark.parametrize("decimals", [1, 9])
def test_every_clients_metrics_are_scikit_learns(decimals: int) -> None:
    """Clients of 0 to 40 rows, with many equal scores (one decimal) and none."""
    rng = np.random.default_rng(decimals)
    sizes = rng.integers(0, 40, size=60)
    y = (rng.random(sizes.sum()) < 0.3).astype(np.int64)
    p = np.round(np.clip(0.6 * rng.random(len(y)) + 0.3 * y, 0, 1), decimals)
    each = score_each(p, y, sizes, BINARY, threshold=0.4)
    for client, (scores, labels) in enumerate(_split(p, y, sizes)):
        if len(labels) == 0:
            assert all(math.isnan(values[client]) for values in each.values())
            continue
        for name, wanted in _sklearn(scores, labels, 0.4).items():
            assert each[name][client] == pytest.approx(wanted, abs=1e-12, nan_ok=True), name
        # The calibration error, which scikit-learn lacks, of one client is that of its rows alone.
        assert each["ece"][client] == pytest.approx(score(scores, labels, ("ece",))["ece"], abs=1e-12)


def test_every_clients_metrics_of_several_classes_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 30, size=40)
    y = rng.integers(0, 3, size=sizes.sum())
    p = rng.dirichlet([1.0, 1.0, 1.0], size=len(y))
    each = score_each(p, y, sizes, ("loss", "accuracy", "macro_f1", "auroc"))
    for client, (scores, labels) in enumerate(_split(p, y, sizes)):
        present, predicted = np.unique(labels), scores.argmax(axis=1)
        assert each["loss"][client] == pytest.approx(sk.log_loss(labels, scores, labels=[0, 1, 2]))
        assert each["accuracy"][client] == pytest.approx(sk.accuracy_score(labels, predicted))
        f1 = sk.f1_score(labels, predicted, average="macro", labels=present, zero_division=0.0)
        assert each["macro_f1"][client] == pytest.approx(f1)
        auroc = sk.roc_auc_score(labels, scores, multi_class="ovr", labels=[0, 1, 2]) if len(present) == 3 else math.nan
        assert each["auroc"][client] == pytest.approx(auroc, nan_ok=True)


def _split(p: np.ndarray, y: np.ndarray, sizes: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    ends = np.cumsum(sizes)[:-1]
    return list(zip(np.split(p, ends), np.split(y, ends), strict=True))
