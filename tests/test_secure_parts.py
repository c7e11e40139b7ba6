"""The vector of a round: exact sums before training, weights and numbers in it, noise in it, and who is exposed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core import records
from core.config import RunConfig
from core.errors import InputError
from core.seeding import rng
from privacy.accounting import Event, by_moments, epsilon
from privacy.client_level import ClientLevel
from privacy.noise import Simulated
from privacy.secagg import exact
from privacy.secagg.distributed import NoisyPayload, covering, gaussian_of
from privacy.secagg.exposure import Exposure
from privacy.secagg.payload import Payload
from privacy.secagg.rounds import honest_of, payload_of, survivors_of

NUMBERS = {records.TRAIN_LOSS: 0.5}


def _added(vectors: list[np.ndarray], bits: int = 32) -> np.ndarray:
    return (sum(v.astype(np.int64) for v in vectors) % (1 << bits)).astype(np.uint32)


def _config(**changes: Any) -> RunConfig:
    return RunConfig().with_(secure_aggregation__profile="malicious", **changes)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(-1e15, 1e15), min_size=3, max_size=3), min_size=1, max_size=9), st.booleans())
def test_sums_of_numbers_of_any_size_are_exact(rows: list[list[float]], small: bool) -> None:
    rows = [[value * 1e-12 for value in row] for row in rows] if small else rows
    total = _added([exact.encode(row) for row in rows])
    assert len(total) == exact.length(3)
    units = [sum(round(row[i] * 2.0**40) for row in rows) for i in range(3)]
    assert exact.decode(total, len(rows)) == [unit / 2**40 for unit in units]


def test_what_cannot_be_added_exactly_is_refused() -> None:
    for value in (math.nan, math.inf, 1e300):
        with pytest.raises(ValueError, match="cannot be added up exactly") as refused:
            exact.encode([value])
        # It is the client's, and the sentence goes to the server.
        assert str(value) not in str(refused.value)
    # 32 bits hold 65,537 limbs of 16.
    assert exact.most_clients(32) == 65537


@pytest.mark.parametrize("explicit", [False, True])
def test_weights_are_examples_or_what_a_strategy_gives_them(explicit: bool) -> None:
    payload = Payload(_config(), 3, 2, largest_weight=100, numbers={"tau": 8.0})
    updates = np.array([[1, 0, -2], [3, 4, 0]], np.float32)
    weights = [1.0, 0.25] if explicit else [None, None]
    vectors = [
        payload.encode(update, examples, weight, {records.TRAIN_LOSS: loss, "tau": tau}, Simulated(0, client))
        for client, (update, examples, weight, loss, tau) in enumerate(
            zip(updates, [30, 10], weights, [0.5, 1.5], [2, 6], strict=True)
        )
    ]
    found = payload.decode(_added(vectors), 2)
    share = np.array([0.8, 0.2]) if explicit else np.array([0.75, 0.25])
    assert np.abs(found.update - share @ updates).max() < found.worst_error + 1e-6
    assert found.examples == 40
    assert found.weight == (pytest.approx(1.25, abs=1e-4) if explicit else None)
    assert found.metrics[records.TRAIN_LOSS] == pytest.approx(share @ [0.5, 1.5], abs=1e-3)
    assert found.metrics["tau"] == pytest.approx(share @ [2, 6], abs=1e-3)


def test_a_sum_of_unlike_weights_is_refused() -> None:
    payload = Payload(_config(), 1, 2, largest_weight=100)
    one = np.ones(1, np.float32)
    vectors = [payload.encode(one, 5, weight, NUMBERS, Simulated(0)) for weight in (None, 1.0)]
    with pytest.raises(ValueError, match="1 of 2 clients have weights of their own"):
        payload.decode(_added(vectors), 2)


def test_a_client_with_more_examples_than_agreed_counts_as_so_many() -> None:
    payload = Payload(_config(), 1, 2, largest_weight=31)
    vectors = [payload.encode(np.full(1, v, np.float32), n, None, NUMBERS, Simulated(0)) for v, n in ((1, 90), (0, 31))]
    found = payload.decode(_added(vectors), 2)
    assert (found.examples, round(float(found.update[0]), 4)) == (62, 0.5)


def test_roundings_leave_no_client_more_than_the_clipping_norm() -> None:
    config = _config(privacy__level="client", privacy__noise_multiplier=1.0, secure_aggregation__bits=20)
    payload = Payload(config, 400, 10, largest_weight=1, clipping_norm=2.0)
    update = rng(0, "update").standard_normal(400).astype(np.float32) * 10
    lengths = []
    for seed in range(50):
        vector = payload.encode(update, 1, 1.0, NUMBERS, Simulated(seed))
        lengths.append(np.linalg.norm(payload.decode(vector, 1).update))
    assert max(lengths) <= 2.0
    assert min(lengths) > 1.99


def test_a_ring_that_is_too_small_for_weights_or_roundings_is_refused() -> None:
    with pytest.raises(InputError, match=r"100 clients of up to 100000 examples .*bits=20 holds"):
        Payload(_config(secure_aggregation__bits=20), 1, 100, largest_weight=100_000)
    private = _config(privacy__level="client", privacy__noise_multiplier=1.0, secure_aggregation__bits=12)
    with pytest.raises(InputError, match="bits=12 the rounding of 1000000 numbers is longer than the clipping norm"):
        Payload(private, 1_000_000, 10, largest_weight=1, clipping_norm=1.0)


def test_moments_of_the_noise_in_a_sum_are_those_of_the_gaussian_that_the_ledger_counts() -> None:
    for bits, most in ((20, 1.002), (24, 1.00001), (32, 1.0000001)):
        mechanism = covering(0.8, 1.0, 10_000, 100, 80, bits)
        assert gaussian_of(mechanism) >= 0.8
        assert 1 <= mechanism.noise_multiplier / 0.8 < most
    with pytest.raises(InputError, match="bits=14 are too few"):
        covering(0.8, 1.0, 1_000_000, 1000, 800, 14)


def test_epsilon_of_noise_in_the_sum_is_that_of_central_noise_of_everybody() -> None:
    # At 24 bits, 50 rounds, all clients in each: by the same accountant they are one number.
    shared = {"clients": 100, "rounds": 50, "secure_aggregation__bits": 24, "privacy__level": "client"}
    config = _config(**shared, privacy__noise="distributed", privacy__noise_multiplier=4.0)
    event = ClientLevel.of(config).own_event
    assert event == Event(1.0, 4.0, moments=True)
    central = by_moments({Event(1.0, 4.0): 50}, 1e-5)
    assert epsilon({event: 50}, 1e-5) == central
    mechanism = covering(4.0, 1.0, 10_000, 100, 90, 24)
    used = Event(1.0, mechanism.noise_multiplier, moments=True)
    assert epsilon({used: 50}, 1e-5) == pytest.approx(central, rel=0.01)
    # The exact account of Gaussian noise is smaller still: moments are an upper bound.
    assert epsilon({Event(1.0, 4.0): 50}, 1e-5) < central


def test_noise_in_the_sum_is_as_large_as_it_says_and_the_mean_is_right() -> None:
    config = _config(
        clients=20, privacy__level="client", privacy__noise="distributed", privacy__noise_multiplier=0.5,
        secure_aggregation__corrupt=0.1,
    )  # fmt: skip
    told = {records.COHORT: 20, records.LARGEST_WEIGHT: 1, records.SERVER_ROUND: 3, records.CLIPPING_NORM: 2.0}
    payload = payload_of(config, 4000, told, lambda config, examples: {})
    assert isinstance(payload, NoisyPayload)
    assert (survivors_of(config, 20), honest_of(config, 20)) == (18, 16)
    update = rng(0, "update").standard_normal(4000).astype(np.float32)
    vectors = [payload.encode(update, 9, 1.0, NUMBERS, Simulated(1, client)) for client in range(20)]
    clipped = update * (2.0 / np.linalg.norm(update))
    for count in (18, 20):
        away = payload.decode(_added(vectors[:count]), count).update - clipped * count / 20
        # Each adds variance (z S)^2 / 16, and the sum is divided by the 20 expected.
        assert np.std(away) == pytest.approx(0.5 * 2.0 * math.sqrt(count / 16) / 20, rel=0.05)
        assert abs(np.mean(away)) < 4 * 0.5 * 2.0 * math.sqrt(count / 16) / 20 / math.sqrt(4000)
    with pytest.raises(ValueError, match="17 clients are left, and 18 are needed for noise enough"):
        payload.decode(_added(vectors[:17]), 17)


def test_three_sums_of_two_show_everybody_and_fixed_groups_show_nobody() -> None:
    watch = Exposure(4)
    watch.observe(1, [(0, 1)])
    watch.observe(2, [(1, 2)])
    assert watch.solvable == {}
    watch.observe(3, [(0, 2)])
    # x0 = ((x0 + x1) + (x0 + x2) - (x1 + x2)) / 2; the fourth has been in no sum.
    assert watch.solvable == {0: 3, 1: 3, 2: 3}
    assert watch.smallest == 2
    fixed = Exposure(4)
    for server_round in range(1, 9):
        fixed.observe(server_round, [(0, 1) if server_round % 2 else (2, 3)])
    assert fixed.solvable == {}


def test_one_more_sum_shows_who_joined() -> None:
    watch = Exposure(6)
    watch.observe(1, [(0, 1, 2, 3)])
    watch.observe(2, [(0, 1, 2, 3, 4)])
    assert watch.solvable == {4: 2}
    again = Exposure(6)
    again.restore(watch.state())
    assert (again.solvable, again.smallest, again.state()) == ({4: 2}, 4, watch.state())
    again.observe(3, [(0, 1, 2, 4)])
    assert again.solvable == {4: 2, 3: 3}
