"""The distributed mechanism: sums are exact, the fewest survivors have the noise, epsilon counts rounding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from dp_accounting.rdp import compute_epsilon
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import ive

from core.errors import InputError
from privacy.noise import Secret, Simulated
from privacy.skellam import ORDERS, Skellam, draw, rounded, rounded_norm, skellam_rdp

POINTS = np.arange(-3000, 3001)


def _encoded(mechanism: Skellam, updates: torch.Tensor, seed: int = 0) -> list[np.ndarray]:
    return [mechanism.encode(update, 9, Simulated(seed, client)) for client, update in enumerate(updates)]


def _summed(mechanism: Skellam, codes: Sequence[np.ndarray]) -> np.ndarray:
    total = sum(code.astype(np.int64) for code in codes)
    return (total % (1 << mechanism.bits)).astype(np.uint32)  # type: ignore[union-attr]


def _updates(clients: int, size: int) -> torch.Tensor:
    return torch.randn(clients, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bits", [13, 20, 32])
def test_the_mean_of_many_sums_is_that_of_the_clipped_updates(bits: int) -> None:
    # Norms about 6, 3 and 1.5: the last is not clipped.
    updates = _updates(3, 36) * torch.tensor([1.0, 0.5, 0.25]).view(3, 1)
    mechanism, times = Skellam(2.0, 0.5, 36, 4, 2, bits), 600
    clipped = sum(update * min(1.0, 2.0 / float(update.norm())) for update in updates)
    sums = torch.stack([mechanism.decode(_summed(mechanism, _encoded(mechanism, updates, n)), 9) for n in range(times)])
    # Three shares of noise for two, and at most a quarter from each rounding.
    step = 2.0 / mechanism.radius
    deviation = math.sqrt((0.5 * 2.0) ** 2 * 3 / 2 + 3 / 4 * step**2)
    assert float((sums.mean(0) - clipped).abs().max()) < 5 * deviation / times**0.5


@pytest.mark.parametrize("bits", [17, 32])
def test_the_fewest_survivors_have_the_noise_and_more_have_more(bits: int) -> None:
    mechanism = Skellam(3.0, 0.7, 1 << 14, 10, 6, bits)
    codes = _encoded(mechanism, torch.zeros(10, 1 << 14))
    for survivors in (6, 8, 10):
        noise = mechanism.decode(_summed(mechanism, codes[:survivors]), 9)
        # (0.7 * 3)^2 for 6, as in the central mechanism.
        expected = (0.7 * 3) ** 2 * survivors / 6
        assert float(noise.var()) == pytest.approx(expected, rel=6 * (2 / 2**14) ** 0.5)


@settings(max_examples=60, deadline=None)
@given(st.integers(12, 32), st.integers(1, 5), st.integers(0, 10**6))
def test_the_ring_is_exact_wherever_partial_sums_go(bits: int, clients: int, seed: int) -> None:
    mechanism = Skellam(1.0, 1.0, 8, 6, 1, bits)
    generator = np.random.default_rng(seed)
    numbers = generator.integers(-(2**40), 2**40, (clients, 8))
    total = generator.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), 8)
    numbers = np.concatenate([numbers, [total - numbers.sum(0)]])
    codes = [(row % 2**bits).astype(np.uint32) for row in numbers]
    summed = _summed(mechanism, codes)
    assert summed.dtype == np.uint32
    assert summed.tolist() == (total % 2**bits).tolist()
    flat = mechanism.decode(summed, 9).double() * (mechanism.radius / mechanism.clipping_norm)
    assert float(flat.norm()) == pytest.approx(float(np.linalg.norm(total)), rel=1e-6)


def test_a_sum_that_is_as_long_as_it_can_be_stays_in_the_ring() -> None:
    # All clients send the same, so that nothing cancels; in 16 bits the bound is tight but for the noise's tails.
    for size, seed in ((1, 0), (5, 1), (3000, 2)):
        update = _updates(1, size) * 100
        mechanism = Skellam(1.0, 0.1, size, 50, 30, 16)
        codes = [mechanism.encode(update[0], seed, Simulated(seed, client)) for client in range(50)]
        expected = 50 * update[0] / update[0].norm()
        error = mechanism.decode(_summed(mechanism, codes), seed) - expected
        assert float(error.abs().max()) < 6 * math.sqrt(0.1**2 * 50 / 30 + 50 / 4 / mechanism.radius**2)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.floats(0.01, 1e6), st.integers(0, 10**6), st.booleans())
def test_no_rounding_is_longer_than_the_bound(size: int, norm: float, seed: int, halves: bool) -> None:
    # The worst to round are numbers in the middle of two integers.
    values = Simulated(seed).normal(size, dtype=torch.float64)
    values *= norm / values.norm()
    if halves:
        values = values.floor() + 0.5
    codes = rounded(values, float(values.norm()), Simulated(seed, "rounding"))
    assert float((codes - values).abs().max()) < 1
    bound = rounded_norm(float(values.norm()), size)
    assert int((codes * codes).sum()) <= bound**2
    # The other bound of the paper, which holds for any rounding, is never less.
    assert bound <= float(values.norm()) + math.sqrt(size)


def test_roundings_have_the_right_mean_and_are_within_the_bound() -> None:
    # 100^2 + 64 / 4 + 100 + 64^(1/2) / 2 = 10120.
    assert rounded_norm(100.0, 64) == pytest.approx(math.sqrt(10120))
    source, times = Simulated(3), 10_000
    values = 100 * source.normal(64, dtype=torch.float64)
    mean = sum(rounded(values, float(values.norm()), source).double() for _ in range(times)) / times
    along = values / values.norm()
    # Without the longest roundings they are shorter, by a part of a step; across they are as the values are.
    shorter = float((mean - values) @ along)
    assert -0.5 < shorter < 0
    assert float((mean - values - shorter * along).abs().max()) < 5 * 0.5 / times**0.5
    with pytest.raises(RuntimeError, match="no rounding is short enough"):
        rounded(values, 100.0, source)


@pytest.mark.parametrize("variance", [0.01, 0.8, 30.0, 5000.0])
def test_drawn_noise_is_skellam_and_sums_of_shares_are(variance: float) -> None:
    count, source = 200_000, Simulated(5, "draw")
    for drawn in (draw(variance, count, source), sum(draw(variance / 4, count, source) for _ in range(4))):
        assert isinstance(drawn, torch.Tensor)
        assert drawn.dtype == torch.int64
        # About 40 bins of equal probability, as far as integers allow.
        bins = (40 * np.cumsum(ive(np.abs(POINTS), variance))).astype(int)
        expected = np.bincount(bins, ive(np.abs(POINTS), variance)) * count
        found = np.bincount(bins, np.bincount(drawn.numpy() + 3000, minlength=len(POINTS)))
        enough = expected > 5
        assert (
            stats.chisquare(found[enough], expected[enough] * found[enough].sum() / expected[enough].sum()).pvalue
            > 1e-6
        )
        assert abs(int(found[~enough].sum()) - expected[~enough].sum()) < 6 * expected[~enough].sum() ** 0.5 + 3


def test_the_expansion_takes_over_where_it_is_the_table() -> None:
    table, expansion = (draw(2.0**20 * factor, 300_000, Simulated(6)) for factor in (1, 1 + 1e-12))
    assert int(table.abs().max()) > 4 * 2**10
    assert torch.equal(table, expansion)


def _divergence(p: np.ndarray, q: np.ndarray, order: int) -> float:
    both = (p > 1e-290) & (q > 1e-290)
    return float(np.log(np.exp(order * np.log(p[both]) + (1 - order) * np.log(q[both])).sum()) / (order - 1))


@pytest.mark.parametrize("variance", [2.0, 20.0, 300.0])
@pytest.mark.parametrize("shift", [1, 2, 5])
def test_renyi_epsilon_bounds_the_divergence(variance: float, shift: int) -> None:
    # In one dimension Delta_2 = Delta_1 = shift: of size 1.
    q, p = ive(np.abs(POINTS), variance), ive(np.abs(POINTS - shift), variance)
    bound = skellam_rdp(float(shift), 1, variance)
    for order in (2, 3, 4, 8):
        exact = _divergence(p, q, order)
        assert exact <= bound[order - 2]
        if variance > 100:
            assert bound[order - 2] < 1.1 * exact


def test_epsilon_approaches_the_gaussian_mechanisms_with_more_bits() -> None:
    gaussian, _ = compute_epsilon(ORDERS, 50 * ORDERS / (2 * 4.0**2), 1e-5)
    bits = (16, 18, 20, 24, 32)
    mechanisms = [Skellam(1.0, 4.0, 1_000_000, 100, 70, own) for own in bits]
    excess = [compute_epsilon(ORDERS, 50 * own.rdp, 1e-5)[0] / gaussian - 1 for own in mechanisms]
    assert gaussian == pytest.approx(9.3379, abs=1e-4)
    assert all(a > b >= 0 for a, b in itertools.pairwise(excess))
    assert excess == pytest.approx([0.229, 0.0178, 1.15e-3, 7.6e-6, 0], rel=0.02, abs=1e-7)


def test_a_client_sends_numbers_of_the_ring_that_belong_to_its_stream() -> None:
    mechanism, updates = Skellam(1.0, 1.0, 100, 3, 2, 14), _updates(2, 100)
    first, again = _encoded(mechanism, updates), _encoded(mechanism, updates)
    for a, b in zip(first, again, strict=True):
        assert a.dtype == np.uint32
        assert a.shape == (128,)
        assert a.max() < 2**14
        assert np.array_equal(a, b)
    assert not np.array_equal(mechanism.encode(updates[0], 9, Secret()), mechanism.encode(updates[0], 9, Secret()))
    mechanism.decode(_summed(mechanism, first), 9)
    assert np.array_equal(first[0], again[0])


def test_updates_that_cannot_be_used_are_refused() -> None:
    mechanism = Skellam(1.0, 1.0, 3, 2, 2)
    for update in (torch.tensor([1.0, math.nan, 0]), torch.tensor([1.0, math.inf, 0]), torch.zeros(4)):
        with pytest.raises(ValueError, match="is not 3 finite ones"):
            mechanism.encode(update, 0, Secret())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"clipping_norm": 0.0}, "a clipping norm of 0.0 cannot be used"),
        ({"noise_multiplier": math.inf}, "a noise multiplier of inf cannot be used"),
        ({"survivors": 0}, "of 100 clients 0 cannot survive; choose 1 to 100"),
        ({"survivors": 101}, "of 100 clients 101 cannot survive"),
        ({"bits": 33}, "a ring of 33 bits cannot be used"),
        ({"bits": 12}, "12 bits are too few for 100 clients and 1000000 numbers.*; choose 13 bits or more"),
        ({"bits": 4, "clients": 10**11}, "4 bits are too few.*; choose fewer clients"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, float], message: str) -> None:
    values = {"clipping_norm": 1.0, "noise_multiplier": 1.0, "size": 10**6, "clients": 100, "survivors": 70, "bits": 20}
    with pytest.raises(InputError, match=message):
        Skellam(**{**values, **changed})  # type: ignore[arg-type]
