"""Metrics with numbers one can check by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from core.metrics import SCORE_EDGES, best_threshold, score, score_counts, spread

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
    rows = [{"loss": 1.0, "auroc": 0.9}, {"loss": 3.0, "auroc": 0.7}, {"loss": 2.0, "auroc": float("nan")}]
    table = spread(rows, ("loss", "auroc"))
    assert table["loss"] == {"mean": 2.0, "worst": 3.0, "std": pytest.approx(0.8164966)}
    assert table["auroc"]["worst"] == 0.7
    assert table["auroc"]["mean"] == pytest.approx(0.8)
