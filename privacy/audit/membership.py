"""Membership inference: was an example in somebody's training data? Scores of attacks, higher for members.

- threshold: a small loss (Yeom, Giacomelli, Fredrikson and Jha, CSF 2018).
- calibrated: a loss smaller than that of models which never saw the example (Watson et al., ICLR 2022).
- LiRA: how likely the model's confidence in the true label is among shadow models that were trained with the example,
  against those trained without it (Carlini et al., IEEE S&P 2022); offline by the latter alone. Of few shadow models
  the spread is taken over all examples, as they do.

An attack that is right on average may be sure of nobody, and the other way round: what counts is the true-positive rate
where false positives are rare, as they say.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

RATES = (0.001, 0.01)
CONFIDENCE = 0.95
# Points of a drawn curve, and the smallest rate on it.
POINTS, LEAST = 60, 1e-3
SMALLEST = 1e-6


def log_odds(logits: Tensor, y: Tensor) -> np.ndarray:
    """Return log(p / (1 - p)), p the probability of the true label y (n,) int64, as (n,) float64.

    `logits` are (n,) for two classes or (n, classes).
    """
    logits = logits.double()
    if logits.ndim == 1:
        return (logits * (2 * y - 1)).numpy()
    own = torch.nn.functional.one_hot(y, logits.shape[1]).bool()
    return (logits[own] - logits.masked_fill(own, -torch.inf).logsumexp(1)).numpy()


def attacks(odds: np.ndarray, shadows: np.ndarray | None, inside: np.ndarray | None) -> dict[str, np.ndarray]:
    """Return each attack's scores (n,) from the log-odds of the true labels: of the model (n,) and of K shadow models
    (K, n), example i in the training data of shadow k where inside[k, i]. Without shadows there is one attack."""
    loss = np.logaddexp(0, -odds)
    found = {"threshold": -loss}
    if shadows is None or inside is None:
        return found
    without, spread_without = _normal(shadows, ~inside)
    within, spread_within = _normal(shadows, inside)
    never_saw = _mean(np.logaddexp(0, -shadows), ~inside)
    odds_in, odds_out = (stats.norm.logpdf(odds, m, s) for m, s in ((within, spread_within), (without, spread_without)))
    return {
        **found,
        "calibrated": never_saw - loss,
        "lira offline": (odds - without) / spread_without,
        "lira": odds_in - odds_out,
    }


def balanced_halves(count: int, shadows: int, generator: np.random.Generator) -> np.ndarray:
    """Return which examples each shadow model trains on, (shadows, count) bool: half of the models have an example."""
    places = generator.random((shadows, count)).argsort(axis=0)
    return np.asarray(places < shadows // 2)


def measure(scores: np.ndarray, member: np.ndarray) -> dict[str, Any]:
    """Return what an attack achieves by its scores (n,) on members (n,) bool and the others.

    True-positive rates come with Clopper-Pearson limits, at a threshold above which no more of the others lie than the
    false-positive rate allows: of few that is none.
    """
    inside, outside = scores[member], np.sort(scores[~member])[::-1]
    ranks = stats.rankdata(scores)[member].sum() - len(inside) * (len(inside) + 1) / 2
    return {
        "auc": float(ranks / (len(inside) * len(outside))),
        "balanced_accuracy": _balanced_accuracy(inside, scores[~member]),
        "rates": [_at(rate, inside, outside) for rate in RATES],
        "curve": [[rate, _hits(rate, inside, outside)[1] / len(inside)] for rate in np.geomspace(LEAST, 1, POINTS)],
    }


def _at(rate: float, inside: np.ndarray, outside: np.ndarray) -> dict[str, Any]:
    allowed, hits = _hits(rate, inside, outside)
    limits = stats.binomtest(hits, len(inside)).proportion_ci(CONFIDENCE, "exact")
    tpr = hits / len(inside)
    return {"fpr": rate, "allowed": allowed, "tpr": tpr, "low": float(limits.low), "high": float(limits.high)}


def _hits(rate: float, inside: np.ndarray, outside: np.ndarray) -> tuple[int, int]:
    """Return how many false positives this rate allows and the true ones at it; `outside` is sorted downwards."""
    allowed = int(rate * len(outside) + SMALLEST)
    return allowed, int((inside > outside[allowed]).sum()) if allowed < len(outside) else len(inside)


def _balanced_accuracy(inside: np.ndarray, outside: np.ndarray) -> float:
    """Return the mean of both rates of right answers, each half judged at the threshold that is best on the other."""
    halves = [(inside[i::2], outside[i::2]) for i in (0, 1)]
    found = []
    for (known_in, known_out), (new_in, new_out) in (halves, halves[::-1]):
        cuts = np.concatenate([known_in, known_out])
        hits = 1 - np.searchsorted(np.sort(known_in), cuts) / max(len(known_in), 1)
        rejected = np.searchsorted(np.sort(known_out), cuts) / max(len(known_out), 1)
        cut = cuts[int((hits + rejected).argmax())]
        found.append(((new_in >= cut).mean() + (new_out < cut).mean()) / 2)
    return float(np.mean(found))


def _mean(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return each example's mean over the chosen models, (n,)."""
    total: np.ndarray = np.where(chosen, values, 0).sum(0) / np.maximum(chosen.sum(0), 1)
    return total


def _normal(values: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, float]:
    """Return each example's mean over the chosen models (n,), and the spread around it over all examples."""
    mean = _mean(values, chosen)
    # Each mean has taken one degree of freedom.
    freedom = max(int(chosen.sum() - (chosen.sum(0) > 0).sum()), 1)
    spread = np.sqrt((np.where(chosen, values - mean, 0) ** 2).sum() / freedom)
    return mean, max(float(spread), SMALLEST)
