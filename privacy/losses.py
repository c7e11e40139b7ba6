"""Distributions of privacy losses: discretised by dp-accounting, composed here by one Fourier transform.

The loss of an outcome is the logarithm of how much likelier it is with one client (or example) more. What takes place n
times adds up n independent losses, so their distributions convolve (Koskela, Jalko and Honkela, AISTATS 2020), and

    delta(epsilon) = P(infinite) + sum over losses l > epsilon of P(l) (1 - exp(epsilon - l)).

dp-accounting composes as well, but looks anew each time how far its sums reach and walks over losses in Python: ten
times as slow, and a run asks in every round. Whatever is cut off counts as an infinite loss, as there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Of Chernoff's bound, per unit of loss: for sums that deviate by 0.03 up to 70 the best order is near one of them.
ORDERS = np.geomspace(0.1, 200, 16)
# What is cut off a sum, as a share of delta.
CUT = 1e-6


@dataclass(frozen=True)
class Losses:
    """What one mechanism may reveal, in one direction: an example more, or an example less."""

    grid: float
    first: int
    """The smallest loss, in steps of the grid."""
    probabilities: np.ndarray
    """Of the losses from the first one on, (n,) float64."""
    infinite: float
    """Probability of an infinite loss."""
    log_moments: np.ndarray
    """log E exp(order loss) for the orders and for their negatives, (2, len(ORDERS)) float64."""


@functools.lru_cache(maxsize=256)
def losses(rate: float, noise_multiplier: float, grid: float) -> tuple[Losses, ...]:
    """Return the losses of a Gaussian mechanism on a Poisson sample: one less, one more (alike where rate is 1)."""
    return tuple(_losses(rate, noise_multiplier, less, grid) for less in ([True, False] if rate < 1 else [True]))


def _losses(rate: float, noise_multiplier: float, less: bool, grid: float) -> Losses:
    """Return losses on a grid: they connect the dots of delta over epsilon (Doroshenko et al., PoPETs 2022)."""
    # Only who has privacy needs it and scipy's transforms, and they take a second to import.
    from dp_accounting.pld.pld_pmf import create_pmf_pessimistic_connect_dots_fixed_gap
    from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss

    way = AdjacencyType.REMOVE if less else AdjacencyType.ADD
    event = GaussianPrivacyLoss(noise_multiplier, sampling_prob=rate, adjacency_type=way)
    bounds = event.connect_dots_bounds()
    first, last = math.floor(bounds.epsilon_lower / grid), math.ceil(bounds.epsilon_upper / grid)
    values = np.arange(first, last + 1) * grid
    # event.get_delta_for_epsilon does the same for one epsilon at a time, which takes most of a calibration.
    ratios = 1 + np.expm1(values if less else -values) / rate
    inside = ratios > 0
    # Where the loss is the value: without sampling it would be log(ratio).
    x = (-0.5 if less else 0.5) + (-1 if less else 1) * noise_multiplier**2 * np.log(ratios[inside])
    deltas = -np.expm1(values) if less else np.zeros(len(values))
    deltas[inside] = event.mu_upper_cdf(x) - np.exp(values[inside] + event.mu_lower_log_cdf(x))
    dots = create_pmf_pessimistic_connect_dots_fixed_gap(grid, first, last, deltas.clip(0, 1)).to_dense_pmf()
    # Private, but there is no other way to them.
    probabilities, infinite = np.asarray(dots._probs), float(dots._infinity_mass)
    moments = np.stack([_log_moments(orders, values, probabilities) for orders in (ORDERS, -ORDERS)])
    return Losses(grid, first, probabilities, infinite, moments)


def _log_moments(orders: np.ndarray, values: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return log E exp(order value) for each order."""
    # As scipy's logsumexp, which takes three times as long.
    with np.errstate(divide="ignore"):
        terms = np.outer(orders, values) + np.log(probabilities)
    most = terms.max(axis=1)
    moments: np.ndarray = np.log(np.exp(terms - most[:, None]).sum(axis=1)) + most
    return moments


def epsilon_of(events: Sequence[tuple[Sequence[Losses], int]], delta: float) -> float:
    """Return the epsilon at `delta` of mechanisms that each took place so often; infinite where there is none."""
    ways = max(len(own) for own, _ in events)
    return max(_one_way([(own[min(way, len(own) - 1)], count) for own, count in events], delta) for way in range(ways))


def _one_way(events: Sequence[tuple[Losses, int]], delta: float) -> float:
    from scipy.signal import lfilter

    first, probabilities, infinite = _sum(events, CUT * delta)
    grid = events[0][0].grid
    # Losses below 0 have no part in a delta of an epsilon from 0 on.
    probabilities, first = probabilities[max(0, -first) :], max(0, first)
    # At epsilon = l_k: delta_k = infinite + above_k - discounted_k, sums over l_j >= l_k of p_j and p_j exp(l_k - l_j).
    above = infinite + np.cumsum(probabilities[::-1])[::-1]
    discounted = lfilter([1.0], [1.0, -math.exp(-grid)], probabilities[::-1])[::-1]
    beyond = np.flatnonzero(above - discounted > delta)
    k = int(beyond[-1]) + 1 if len(beyond) else 0
    if k == len(probabilities):
        return math.inf
    if above[k] <= delta:
        return 0.0
    return max(0.0, (first + k) * grid + math.log((above[k] - delta) / discounted[k]))


def _sum(events: Sequence[tuple[Losses, int]], cut: float) -> tuple[int, np.ndarray, float]:
    """Return the first loss, the probabilities and the infinite mass of a sum of losses, all but `cut` of it."""
    from scipy.fft import irfft, next_fast_len, rfft

    grid = events[0][0].grid
    start = sum(count * own.first for own, count in events)
    longest = sum(count * (len(own.probabilities) - 1) for own, count in events)
    # Chernoff: P(sum >= b) <= E exp(order sum) exp(-order b), half of the cut at either end.
    up, down = np.sum([count * own.log_moments for own, count in events], axis=0) + math.log(2 / cut)
    high = min(longest, math.ceil(float(np.min(up / ORDERS)) / grid) - start)
    low = max(0, math.floor(-float(np.min(down / ORDERS)) / grid) - start)
    # A transform is a circle: what lies outside comes to lie on top, which only makes delta larger.
    size = next_fast_len(max(high - low + 1, *(len(own.probabilities) for own, _ in events)), real=True)
    spectrum = functools.reduce(np.multiply, (rfft(own.probabilities, size) ** count for own, count in events))
    probabilities = np.roll(irfft(spectrum, size), -low)[: high - low + 1]
    infinite = -math.expm1(sum(count * math.log1p(-own.infinite) for own, count in events)) + cut
    # Rounding leaves some a little below 0.
    return start + low, np.maximum(probabilities, 0.0), infinite
