"""Updates as integers: sums mean what was clipped and weighted, within the bound, and never leave the ring."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import InputError
from core.seeding import rng
from privacy.secagg.masking import CHUNK
from privacy.secagg.quantise import Layout, Quantiser


def _added(vectors: list[np.ndarray], bits: int = 32) -> np.ndarray:
    """Return the sum as the ring has it."""
    return (sum(v.astype(np.int64) for v in vectors) % (1 << bits)).astype(np.uint32)


def _seeds(count: int, seed: int = 0) -> list[bytes]:
    return [rng(seed, "rounding", client).bytes(32) for client in range(count)]


def _clipped(update: np.ndarray, norm: float) -> np.ndarray:
    wide = update.astype(np.float64)
    return wide * min(1.0, norm / max(float(np.linalg.norm(wide)), 1e-300))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 40), st.sampled_from([12, 16, 20, 31, 32]), st.booleans(), st.integers(0, 10**6)
)  # fmt: skip
def test_the_decoded_sum_is_the_weighted_mean_of_clipped_updates_within_the_bound(
    clients: int, size: int, ring_bits: int, wide: bool, seed: int
) -> None:
    generator = rng(seed, "updates")
    quantiser = Quantiser(size, clients, 2.0, 64.0, bounds=(5.0,), counts=(100, 3), ring_bits=ring_bits)
    updates = generator.standard_normal((clients, size)).astype(np.float64 if wide else np.float32)
    weights, losses = generator.integers(1, 65, clients), generator.uniform(-6, 6, clients)
    counts = np.stack([generator.integers(0, 101, clients), generator.integers(0, 4, clients)], axis=1)
    vectors = [
        quantiser.encode(u, float(w), s, [loss], c.tolist())
        for u, w, s, loss, c in zip(updates, weights, _seeds(clients, seed), losses, counts, strict=True)
    ]
    assert all(v.shape == (quantiser.length,) and v.dtype == np.uint32 for v in vectors)
    found = quantiser.decode(_added(vectors, ring_bits), clients)
    clipped = np.array([_clipped(u, 2.0) for u in updates])
    assert found.worst_error == pytest.approx(clients * quantiser.step / (weights.sum() / 64))
    assert np.abs(found.update - weights @ clipped / weights.sum()).max() < found.worst_error * (1 + 1e-9) + 1e-12
    assert found.weight == weights.sum()
    assert found.counts == tuple(counts.sum(0))
    assert found.clipped == pytest.approx(np.mean([np.linalg.norm(u.astype(np.float64)) > 2 for u in updates]))
    assert abs(found.metrics[0] - weights @ np.clip(losses, -5, 5) / weights.sum()) < found.worst_error * 2.6


def test_the_mean_of_many_roundings_is_right_and_their_spread_as_stated() -> None:
    quantiser, times = Quantiser(50, 4, 1.0, bits=6), 4000
    update = rng(0, "update").standard_normal(50) / 10
    clipped = _clipped(update, 1.0)
    means = np.array([
        quantiser.decode(_added([quantiser.encode(update, 1.0, s) for s in _seeds(4, turn)]), 4).update - clipped
        for turn in range(times)
    ])  # fmt: skip
    found = quantiser.decode(_added([quantiser.encode(update, 1.0, s) for s in _seeds(4)]), 4)
    # Two steps of 2/63 in four clients' sum; a mean of four has half the deviation of one.
    assert found.deviation == pytest.approx(2 / 63 / 2 / 2)
    assert found.worst_error == pytest.approx(2 / 63)
    assert np.abs(means.mean(0)).max() < 5 * found.deviation / math.sqrt(times)
    assert means.std(0).max() < found.deviation * 1.05
    assert means.std(0).max() > found.deviation * 0.9


@pytest.mark.parametrize("bits", [2, 3, 10, 0])
def test_numbers_that_are_zero_everywhere_are_exactly_zero(bits: int) -> None:
    quantiser = Quantiser(4, 3, 1.0, 10.0, bits=bits)
    updates = np.array([[0, 0.3, 0, 0.9], [0, 0, 0, -4], [0, 0, 0, 1e-30]])
    vectors = [quantiser.encode(u, w, s) for u, w, s in zip(updates, (10, 3, 0), _seeds(3), strict=True)]
    assert quantiser.decode(_added(vectors), 3).update[[0, 2]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("ring_bits", [8, 12, 24, 31, 32])
@pytest.mark.parametrize("clients", [1, 2, 3, 10, 63])
def test_the_largest_sums_do_not_wrap(clients: int, ring_bits: int) -> None:
    # All of an update's norm in one number, the same for all clients, up or down.
    quantiser = Quantiser(2, clients, 1.0, ring_bits=ring_bits)
    b = quantiser.code_bits
    assert clients * (2**b - 1) < 2**ring_bits
    assert b == 30 or clients * (2 ** (b + 1) - 1) >= 2**ring_bits
    for update in ([7.0, 0.0], [-7.0, 0.0]):
        vectors = [quantiser.encode(np.array(update), 1.0, s) for s in _seeds(clients)]
        assert max(int(v[:2].max()) for v in vectors) < 2**b
        assert sum(int(v[0]) for v in vectors) < 2**ring_bits
        found = quantiser.decode(_added(vectors, ring_bits), clients)
        assert abs(found.update[0] - np.sign(update[0])) <= quantiser.step
        assert found.clipped == 1


def test_clients_whose_weight_is_a_thousandth_are_not_lost() -> None:
    clients, size = 10, 10_000
    quantiser = Quantiser(size, clients, 1.0, 1000.0)
    assert quantiser.code_bits == 28
    updates = rng(3, "updates").standard_normal((clients, size)).astype(np.float32) / 200
    vectors = [quantiser.encode(u, 1.0, s) for u, s in zip(updates, _seeds(clients), strict=True)]
    found = quantiser.decode(_added(vectors), clients)
    error = np.abs(found.update - updates.mean(0, dtype=np.float64)).max()
    assert error < 1e-5
    # 10 steps of 2^-27 over 10 thousandths.
    assert error < found.worst_error == pytest.approx(1000 * 2 / (2**28 - 1))


def test_long_updates_are_rounded_like_short_ones() -> None:
    size = 2 * CHUNK + 3
    quantiser = Quantiser(size, 1, 300.0)
    update = rng(4, "update").standard_normal(size).astype(np.float32)
    found = quantiser.decode(quantiser.encode(update, 1.0, bytes(32)), 1)
    assert np.abs(found.update - _clipped(update, 300.0)).max() < found.worst_error
    # No chunk repeats the roundings of another.
    errors = (found.update - update) / quantiser.step
    assert abs(np.corrcoef(errors[:CHUNK], errors[CHUNK : 2 * CHUNK])[0, 1]) < 0.03


def test_weights_of_any_unit_add_up() -> None:
    quantiser = Quantiser(1, 3, 1.0, 2.5, weight_unit=0.25)
    clients = zip((0.5, 0.1, 0.0), (2.5, 0.3, 0.0), _seeds(3), strict=True)
    vectors = [quantiser.encode(np.array([value]), weight, seed) for value, weight, seed in clients]
    found = quantiser.decode(_added(vectors), 3)
    # 0.3 is rounded to 0.25, in the weight and in what it weighs.
    assert found.weight == 2.75
    assert found.update[0] == pytest.approx((2.5 * 0.5 + 0.25 * 0.1) / 2.75, abs=found.worst_error)
    with pytest.raises(ValueError, match="the weights of 1 clients add up to nothing"):
        quantiser.decode(vectors[2], 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    quantiser = Quantiser(3, 2, 1.0, bounds=(1.0,))
    for update, metric in (([0, bad, 0], 0.0), ([0, 0, 0], bad)):
        for dtype in (np.float32, np.float64):
            with pytest.raises(ValueError, match="is not finite and cannot be added up"):
                quantiser.encode(np.array(update, dtype=dtype), 1.0, bytes(32), [metric])


def test_what_was_not_agreed_on_is_refused() -> None:
    quantiser, update = Quantiser(3, 2, 1.0, 5.0, counts=(7,)), np.zeros(3)
    for weight in (5.1, -0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="a weight is not from 0 to the 5 agreed on"):
            quantiser.encode(update, weight, bytes(32), counts=[0])
    for counts in ([8], [-1], [], [1, 1]):
        with pytest.raises(ValueError, match="counts are not from 0 to"):
            quantiser.encode(update, 1.0, bytes(32), counts=counts)
    with pytest.raises(ValueError, match=r"\(4,\) numbers and 0 metrics"):
        quantiser.encode(np.zeros(4), 1.0, bytes(32), counts=[0])
    with pytest.raises(ValueError, match="1 metrics"):
        quantiser.encode(update, 1.0, bytes(32), [1.0], [0])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"clipping_norm": 0.0}, "clipping_norm=0.0 cannot be used"),
        ({"largest_weight": math.inf}, "largest_weight=inf cannot be used"),
        ({"weight_unit": -1.0}, "weight_unit=-1.0 cannot be used"),
        ({"bounds": (1.0, 0.0)}, "bounds (1.0, 0.0) of metrics cannot be used"),
        (
            {"bits": 29},
            "the sum of 10 clients' numbers of 29 bits can leave a ring of 32 bits; choose 28 bits or fewer",
        ),
        ({"ring_bits": 4}, "the sum of 10 clients' numbers of 1 bits can leave a ring of 4 bits"),
        ({"ring_bits": 33}, "a ring of 33 bits cannot be added up"),
        ({"bits": 32}, "numbers of 32 bits"),
        ({"largest_weight": 5e8}, "weights of up to 500000000 of 10 clients add up to more than a ring of 32 bits"),
        ({"counts": (2**30,)}, "cap them at 429496729"),
    ],
)
def test_a_round_whose_sums_could_leave_the_ring_is_refused_before(changes: dict, sentence: str) -> None:
    with pytest.raises(InputError, match=re.escape(sentence)):
        Quantiser(**{"size": 5, "clients": 10, "clipping_norm": 1.0, **changes})


def test_arrays_of_all_kinds_come_back_in_their_types() -> None:
    arrays = {
        "half": np.array([[1.5, -2.25]], dtype=np.float16), "single": np.array(0.1, dtype=np.float32),
        "double": np.array([1e-9, 1.0]), "buffer": np.array([3, -4], dtype=np.int64),
        "small": np.array([250, 2], dtype=np.uint8), "empty": np.zeros((0, 3), dtype=np.float32),
    }  # fmt: skip
    layout = Layout.of(arrays)
    flat = layout.flatten(arrays)
    assert (layout.size, flat.dtype, flat.shape) == (9, np.float64, (9,))
    back = layout.restore(flat)
    assert {name: (a.dtype, a.shape, a.tolist()) for name, a in back.items()} == {
        name: (a.dtype, a.shape, a.tolist()) for name, a in arrays.items()
    }
    # Integers are rounded and stay within their type.
    moved = layout.restore(flat + np.array([0] * 5 + [0.4, -0.6, 9.0, -9.0]))
    assert (moved["buffer"].tolist(), moved["small"].tolist()) == ([3, -5], [255, 0])
    # All through the ring: norm below 260.
    quantiser = Quantiser(9, 2, 300.0)
    total = _added([quantiser.encode(flat, 1.0, s) for s in _seeds(2)])
    again = layout.restore(quantiser.decode(total, 2).update)
    assert again["small"].tolist() == [250, 2]
    assert again["half"].tolist() == [[1.5, -2.25]]
    assert again["single"] == pytest.approx(0.1, abs=1e-6)


def test_single_precision_alone_stays_single_and_other_types_are_refused() -> None:
    arrays = {"a": np.ones(2, dtype=np.float32), "b": np.ones(1, dtype=np.float16)}
    layout = Layout.of(arrays)
    assert layout.flatten(arrays).dtype == np.float32
    for other in ({"a": arrays["a"]}, {"a": np.ones(3), "b": arrays["b"]}):
        with pytest.raises(ValueError, match="other names or shapes"):
            layout.flatten(other)
    with pytest.raises(ValueError, match="'a' of type complex128 cannot be added up"):
        Layout.of({"a": np.ones(2, dtype=complex)})
