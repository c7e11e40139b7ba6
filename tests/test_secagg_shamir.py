"""Secret sharing: t shares are enough, t - 1 are nothing, and wrong ones are found out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from core.seeding import rng
from privacy.secagg.errors import ForgedError, TooFewError
from privacy.secagg.shamir import MOST_HOLDERS, P, combine, split

SECRET = bytes(range(32))


def _at(x: int, points: list[int], values: list[int]) -> int:
    """Return the value at x of the polynomial through the points, in Python's integers."""
    total = 0
    for i, (xi, yi) in enumerate(zip(points, values, strict=True)):
        top = bottom = 1
        for j, xj in enumerate(points):
            if j != i:
                top, bottom = top * (x - xj) % P, bottom * (xi - xj) % P
        total += yi * top * pow(bottom, -1, P)
    return total % P


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 40))
def test_any_t_shares_are_enough_and_t_minus_1_are_too_few(data: st.DataObject, holders: int) -> None:
    threshold = data.draw(st.integers(1, holders))
    secret = data.draw(st.binary(min_size=2, max_size=64).filter(lambda b: len(b) % 2 == 0))
    shares = split(secret, holders, threshold)
    assert shares.shape == (holders, len(secret) // 2)
    some = data.draw(st.permutations(range(1, holders + 1)))
    for count in {threshold, holders}:
        points = some[:count]
        assert combine(points, shares[np.array(points) - 1], threshold) == secret
    points = some[: threshold - 1]
    with pytest.raises(TooFewError, match=f"{threshold - 1} shares of a secret are there, and {threshold} are needed"):
        combine(points, shares[np.array(points, dtype=int) - 1], threshold)


@pytest.mark.parametrize(("holders", "threshold"), [(3, 3), (10, 7), (100, 67), (1000, 667)])
def test_shares_lie_on_polynomials_whose_constants_are_the_secret(holders: int, threshold: int) -> None:
    shares = split(SECRET, holders, threshold)
    points = list(range(1, threshold + 1))
    for limb in (0, 15):
        values = shares[:threshold, limb].tolist()
        assert _at(0, points, values) == int.from_bytes(SECRET[2 * limb : 2 * limb + 2], "little")
        if holders > threshold:
            assert _at(holders, points, values) == shares[-1, limb]
    # A degree of t - 1 and no less: t - 1 shares give something else.
    assert _at(0, points[:-1], shares[: threshold - 1, 0].tolist()) != int.from_bytes(SECRET[:2], "little")


def test_the_largest_numbers_are_exact() -> None:
    # 2^31 - 2, the largest element of the field, is -1.
    largest = np.full((MOST_HOLDERS, 1), P - 1, dtype=np.uint32)
    with pytest.raises(ForgedError, match="make none"):
        combine(range(1, MOST_HOLDERS + 1), largest, MOST_HOLDERS)
    shares = split(b"\xff" * 32, MOST_HOLDERS, MOST_HOLDERS - 1)
    assert combine(range(1, MOST_HOLDERS + 1), shares, MOST_HOLDERS - 1) == b"\xff" * 32


def test_t_minus_1_shares_fit_every_secret() -> None:
    threshold = 4
    shares = split(SECRET, 9, threshold)
    for other in (bytes(32), b"\xff" * 32):
        # The share of a fourth holder that would make it this secret instead.
        points, words = [0, 1, 2, 3], np.frombuffer(other, "<u2")
        forged = [_at(4, points, [int(words[limb]), *shares[:3, limb].tolist()]) for limb in range(16)]
        assert combine([1, 2, 3, 4], np.array([*shares[:3].tolist(), forged], dtype=np.uint32), threshold) == other


def test_a_share_looks_the_same_whatever_the_secret_is() -> None:
    for secret in (bytes(20_000), b"\xff" * 20_000):
        shares = split(secret, 3, 2)
        for row in shares:
            assert stats.kstest(row / P, "uniform").pvalue > 1e-4


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(2, 30), st.integers(0, 10**6))
def test_a_corrupted_share_is_found_out_where_there_are_more_than_t(
    data: st.DataObject, holders: int, seed: int
) -> None:
    threshold = data.draw(st.integers(1, holders - 1))
    count = data.draw(st.integers(threshold + 1, holders))
    shares = split(SECRET, holders, threshold)[:count]
    generator = rng(seed, "corrupt")
    # Every number of wrong shares that leaves them inconsistent: t right ones decide, one more contradicts.
    wrong = generator.choice(count, data.draw(st.integers(1, count - threshold)), replace=False)
    for row in wrong:
        limb = generator.integers(16)
        shares[row, limb] = (int(shares[row, limb]) + int(generator.integers(1, P))) % P
    with pytest.raises(ForgedError, match=r"contradict each other|make none"):
        combine(range(1, count + 1), shares, threshold)


def test_a_share_of_noise_is_found_out_even_among_t() -> None:
    # Sixteen limbs of 31 bits that should have 16: chance lets it pass once in 2^240.
    shares = split(SECRET, 5, 3)[:3]
    shares[1] = rng(0, "noise").integers(0, P, 16)
    with pytest.raises(ForgedError, match="make none"):
        combine([1, 2, 3], shares, 3)


def test_two_shares_of_one_holder_and_numbers_outside_the_field_are_refused() -> None:
    shares = split(SECRET, 5, 3)
    with pytest.raises(ForgedError, match="two of one holder"):
        combine([1, 2, 2], shares[[0, 1, 1]], 3)
    shares[0, 0] = P
    with pytest.raises(ForgedError, match="outside the field"):
        combine([1, 2, 3], shares[:3], 3)


@pytest.mark.parametrize(("size", "holders", "threshold"), [(32, 3, 4), (32, 3, 0), (31, 3, 2), (32, 2049, 2)])
def test_what_cannot_be_shared_is_refused(size: int, holders: int, threshold: int) -> None:
    with pytest.raises(ValueError, match=f"{size} bytes cannot be shared among {holders}"):
        split(bytes(size), holders, threshold)
