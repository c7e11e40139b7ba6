"""What guesses about canaries prove: Steinke, Nasr and Jagielski, Privacy Auditing with One (1) Training Run,
NeurIPS 2023; and what they suggest: Andrew et al., One-shot Empirical Privacy Estimation for Federated Learning, 2023.

Every one of m canaries takes part with probability 1/2, all independently, and an observer of what was released guesses
r of them; about the others it says nothing. If what was released is (epsilon, delta)-differentially private with
respect to one canary, then (their result for approximate differential privacy)

    P[v or more guesses are right] <= beta + 2 m delta alpha,
    beta = P[W >= v],  alpha = max_i P[v > W >= v - i] / i,  W ~ Binomial(r, e^epsilon / (1 + e^epsilon)).

Where that is small, epsilon is larger than claimed: a bound that holds whatever the observer did. r must not depend on
what was released, so a choice among several is paid for (Bonferroni).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from dp_accounting import gaussian_mechanism
from scipy import optimize, stats

CONFIDENCE = 0.95
# Guesses over canaries: all where there is next to no noise, few where only the clearest cases can be told.
SHARES = (1.0, 1 / 2, 1 / 5, 1 / 20)
# No run claims more, and no guess of a thousand canaries proves it.
MOST_EPSILON = 50.0


@dataclass(frozen=True)
class Finding:
    """What the guesses say."""

    bound: float
    """Epsilon is at least this at the confidence; 0 where the guesses say nothing."""
    p_value: float
    """How probable guesses as good as these are at most if the claimed epsilon is true."""
    guesses: int
    """r of the choice that gave the bound."""
    right: int
    """v."""
    estimate: float
    """Epsilon after Andrew et al.: no bound."""


def audit(scores: np.ndarray, included: np.ndarray, claimed: float, delta: float) -> Finding:
    """Return what an observer's scores (m,), logarithms of likelihood ratios, say of canaries `included` (m,) bool.

    A positive score is a guess that the canary is in; the r scores farthest from 0 count. The bound and the p-value
    hold for all choices of r together.
    """
    m, risk = len(scores), (1 - CONFIDENCE) / len(SHARES)
    surest = np.argsort(-np.abs(scores), kind="stable")
    correct = ((scores > 0) == included)[surest]
    best, p = (0.0, 0, 0), 1.0
    for share in SHARES:
        r = _guesses(m, share)
        right = int(correct[:r].sum())
        best = max(best, (lower_bound(m, r, right, delta, risk), r, right))
        p = min(p, p_value(m, r, right, claimed, delta) * len(SHARES))
    bound, guesses, right = best
    return Finding(bound, min(p, 1.0), guesses, right, estimate(scores[included], scores[~included], delta))


def reach(m: int, delta: float) -> float:
    """Return the bound if all guesses are right: about a larger epsilon m canaries say nothing."""
    risk = (1 - CONFIDENCE) / len(SHARES)
    return max(lower_bound(m, r, r, delta, risk) for r in map(_guesses, [m] * len(SHARES), SHARES))


def p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Return how probable v right ones of r guesses about m canaries are at most under (epsilon, delta)."""
    right = 1 / (1 + math.exp(-epsilon))
    beta = float(stats.binom.sf(v - 1, r, right))
    if not (delta and v):
        return min(beta, 1.0)
    below = stats.binom.pmf(np.arange(v - 1, -1, -1), r, right)
    alpha = float((np.cumsum(below) / np.arange(1, v + 1)).max())
    return min(beta + 2 * m * delta * alpha, 1.0)


def lower_bound(m: int, r: int, v: int, delta: float, risk: float) -> float:
    """Return the epsilon below which v right ones of r guesses are less probable than `risk`; 0 where none is."""

    def over(epsilon: float) -> float:
        return p_value(m, r, v, epsilon, delta) - risk

    if over(0.0) >= 0:
        return 0.0
    # With large delta even infinite epsilon would not make the guesses probable; then any bound would be void.
    if over(MOST_EPSILON) < 0:
        return MOST_EPSILON
    return float(optimize.brentq(over, 0.0, MOST_EPSILON, xtol=1e-6))


def _guesses(m: int, share: float) -> int:
    return max(1, int(m * share))


def estimate(inside: np.ndarray, outside: np.ndarray, delta: float) -> float:
    """Return the epsilon at delta of the Gaussian mechanism that separates scores of canaries in and out as far.

    Their means are mu pooled standard deviations apart. The observer's scores of a Gaussian mechanism are normal with
    equal variances; of one on a sample of clients nearly so after many rounds. nan for less than two on a side.
    """
    if len(inside) < 2 or len(outside) < 2:
        return math.nan
    variance = np.average([inside.var(ddof=1), outside.var(ddof=1)], weights=[len(inside) - 1, len(outside) - 1])
    mu = float(inside.mean() - outside.mean()) / max(math.sqrt(variance), 1e-12)
    return float(gaussian_mechanism.get_epsilon_gaussian(1 / mu, delta)) if mu > 0 else 0.0
