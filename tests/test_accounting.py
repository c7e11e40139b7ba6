"""The ledger's arithmetic: against closed forms, other accountants, and what must hold for any events."""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from flwr.app import RecordDict
from flwr.supercore.privacy_accounting import (
    GaussianPrivacyEvent,
    NeighboringRelation,
    PrivacyConfig,
    SamplingMethod,
)
from flwr.supercore.privacy_accounting.rdp_accountant import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as some
from opacus.accountants import PRVAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from core.errors import InputError
from privacy.accounting import (
    EVERYBODY,
    PLD_MOST,
    Event,
    Ledger,
    accountant,
    by_moments,
    calibrate,
    epsilon,
    keep_spent,
    spent_by,
)
from privacy.losses import epsilon_of, losses

# 1000 clients, 50 a round on average, noise multiplier 1, 200 rounds.
KNOWN = Event(0.05, 1.0)
ROUNDS, DELTA = 200, 1e-4

quick = settings(deadline=None, max_examples=12, derandomize=True)
rates = some.floats(math.log(0.002), 0.0).map(math.exp)
noises = some.floats(math.log(0.5), math.log(8.0)).map(math.exp)
counts = some.integers(1, 500)
deltas = some.floats(-8.0, -3.0).map(lambda exponent: 10.0**exponent)


def test_the_known_federation_costs_4_where_flower_says_158() -> None:
    mine = epsilon({KNOWN: ROUNDS}, DELTA)
    assert mine == pytest.approx(3.9994, abs=1e-4)
    theirs = PLDAccountant(value_discretization_interval=1e-4)
    theirs.compose(PoissonSampledDpEvent(0.05, GaussianDpEvent(1.0)), ROUNDS)
    assert mine == pytest.approx(theirs.get_epsilon(DELTA), rel=1e-4)
    # Flower's fixed clipping counts every client in every round, and by moments; the truth of that would be 152.
    config = PrivacyConfig(DELTA, 1000, NeighboringRelation.ADD_OR_REMOVE_ONE, SamplingMethod.NO_AMPLIFICATION)
    flowers = RdpAccountant(config)
    flowers.compose(GaussianPrivacyEvent(1.0, 50, 1000), ROUNDS)
    assert flowers.get_epsilon(DELTA) == pytest.approx(158.36, abs=0.01)
    assert _gaussian(1 / math.sqrt(ROUNDS), DELTA) == pytest.approx(152.0, abs=0.5)


def test_it_is_not_the_central_limit_theorem() -> None:
    # Bu et al.: mu = q sqrt(T (e^(1 / z^2) - 1)), which promises 3.48 where the truth is 4.00.
    mu = 0.05 * math.sqrt(ROUNDS * math.expm1(1.0))
    assert _gaussian(1 / mu, DELTA) == pytest.approx(3.48, abs=0.01)
    assert epsilon({KNOWN: ROUNDS}, DELTA) > 3.99


def _gaussian(deviation: float, delta: float) -> float:
    """Return the epsilon of one Gaussian: Balle and Wang, ICML 2018, equation 6."""

    def over(e: float) -> float:
        a, b = 1 / (2 * deviation), e * deviation
        return float(norm.cdf(a - b) - math.exp(e + norm.logcdf(-a - b)) - delta)

    return float(brentq(over, 0, 1000)) if over(0) > 0 else 0.0


@pytest.mark.parametrize("noise_multiplier", [0.7, 1.0, 4.0, 50.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
def test_one_gaussian_is_balle_and_wangs(noise_multiplier: float, delta: float) -> None:
    assert epsilon({Event(1.0, noise_multiplier): 1}, delta) == pytest.approx(_gaussian(noise_multiplier, delta))


def test_full_participation_is_one_gaussian_of_z_over_root_t() -> None:
    assert epsilon({Event(1.0, 20.0): 100}, 1e-5) == pytest.approx(_gaussian(2.0, 1e-5))
    # 1 / 2^2 + 9 / 6^2 = 1 / 2.
    assert epsilon({Event(1.0, 2.0): 1, Event(1.0, 6.0): 9}, 1e-5) == pytest.approx(_gaussian(math.sqrt(2), 1e-5))
    # And so is the distribution of its losses, from above.
    exact = _gaussian(2.0, 1e-5)
    assert exact <= epsilon_of([(losses(1.0, 20.0, 1e-3), 100)], 1e-5) <= exact * 1.001


@quick
@given(rates.filter(lambda rate: rate < 0.95), noises, deltas)
def test_one_sample_is_the_mixture_of_two_gaussians(rate: float, noise_multiplier: float, delta: float) -> None:
    # With a client: (1 - q) N(0, z^2) + q N(1, z^2), without: N(0, z^2); its loss grows with the outcome.
    def over(e: float) -> float:
        x = noise_multiplier**2 * math.log1p(math.expm1(e) / rate) + 0.5
        without, there = norm.sf(x / noise_multiplier), norm.sf((x - 1) / noise_multiplier)
        return float((1 - rate) * without + rate * there - math.exp(e) * without - delta)

    exact = brentq(over, 0, 60) if over(0) > 0 else 0.0
    assert exact - 1e-9 <= epsilon({Event(rate, noise_multiplier): 1}, delta) <= exact * 1.003 + 1e-3


@pytest.mark.parametrize(
    ("rate", "noise_multiplier", "count"),
    [(0.05, 1.0, 200), (0.01, 0.8, 1000), (0.2, 2.0, 100), (0.001, 0.7, 5000), (0.004, 3.2, 5806), (1.0, 8.0, 50)],
)
def test_opacus_agrees_to_one_percent(rate: float, noise_multiplier: float, count: int) -> None:
    theirs = PRVAccountant()
    theirs.history = [(noise_multiplier, rate, count)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = theirs.get_epsilon(1e-5, eps_error=0.002)
    assert epsilon({Event(rate, noise_multiplier): count}, 1e-5) == pytest.approx(found, rel=0.01)


@quick
@given(rates.filter(lambda rate: rate < 1), noises, counts, deltas)
def test_losses_compose_as_in_dp_accounting_and_never_to_less(
    rate: float, noise_multiplier: float, count: int, delta: float
) -> None:
    grid = 4e-3
    reference = from_gaussian_mechanism(noise_multiplier, value_discretization_interval=grid, sampling_prob=rate)
    theirs = reference.self_compose(count).get_epsilon_for_delta(delta)
    mine = epsilon_of([(losses(rate, noise_multiplier, grid), count)], delta)
    assert theirs * (1 - 1e-6) <= mine <= theirs * (1 + 1e-3) + 1e-6


def test_kinds_of_events_compose_as_in_dp_accounting() -> None:
    parts = [(0.05, 1.0, 30), (0.3, 2.5, 12), (1.0, 9.0, 4)]
    whole = None
    for rate, noise_multiplier, count in parts:
        own = from_gaussian_mechanism(noise_multiplier, value_discretization_interval=1e-3, sampling_prob=rate)
        own = own.self_compose(count)
        whole = own if whole is None else whole.compose(own)
    assert whole is not None
    mine = epsilon({Event(rate, noise_multiplier): count for rate, noise_multiplier, count in parts}, 1e-5)
    assert mine == pytest.approx(whole.get_epsilon_for_delta(1e-5), rel=1e-4)


def test_discretised_losses_are_dp_accountings() -> None:
    for rate, noise_multiplier, grid in [(0.05, 1.0, 1e-3), (0.5, 0.4, 8e-3), (0.9, 5.0, 1e-3)]:
        theirs = from_gaussian_mechanism(noise_multiplier, value_discretization_interval=grid, sampling_prob=rate)
        mine = losses(rate, noise_multiplier, grid)
        for own, reference in zip(mine, (theirs._pmf_remove, theirs._pmf_add), strict=True):
            reference = reference.to_dense_pmf()
            assert (own.first, own.infinite) == (reference._lower_loss, reference._infinity_mass)
            # Of differences of deltas, divided by the grid.
            np.testing.assert_allclose(own.probabilities, reference._probs, atol=1e-15 / grid)


@quick
@given(rates, noises, counts, deltas)
def test_moments_are_never_below(rate: float, noise_multiplier: float, count: int, delta: float) -> None:
    spent = {Event(rate, noise_multiplier): count}
    assert epsilon(spent, delta) <= by_moments(spent, delta) * 1.003 + 1e-3


@quick
@given(rates, noises, counts, deltas, some.floats(1.01, 2.0))
def test_more_of_anything_costs_more(
    rate: float, noise_multiplier: float, count: int, delta: float, factor: float
) -> None:
    least = epsilon({Event(rate, noise_multiplier): count}, delta)
    more = [
        ({Event(rate, noise_multiplier): count + 1}, delta),
        ({Event(min(1.0, rate * factor), noise_multiplier): count}, delta),
        ({Event(rate, noise_multiplier / factor): count}, delta),
        ({Event(rate, noise_multiplier): count}, delta / factor),
        ({Event(rate, noise_multiplier): count, Event(0.01, 2.0): 5}, delta),
    ]
    for spent, at in more:
        # Grids differ, each within its share of the truth.
        assert epsilon(spent, at) >= least * 0.997 - 1e-6


@quick
@given(rates, noises, counts, deltas)
def test_two_halves_cost_less_than_their_sum(rate: float, noise_multiplier: float, count: int, delta: float) -> None:
    mine, others = {Event(rate, noise_multiplier): count}, {Event(0.1, 1.5): 20}
    together = epsilon({**mine, **others}, delta)
    assert together <= (epsilon(mine, delta / 2) + epsilon(others, delta / 2)) * 1.003 + 1e-3


def test_nothing_costs_nothing_and_no_noise_costs_everything() -> None:
    assert epsilon({}, 1e-5) == 0
    assert epsilon({KNOWN: 0, Event(0.0, 1.0): 9}, 1e-5) == 0
    assert epsilon({Event(0.05, 0.0): 1}, 1e-5) == math.inf
    assert epsilon({KNOWN: 3, Event(0.05, 0.0): 1}, 1e-5) == math.inf
    assert Ledger(1e-5).worst() == 0


def test_large_epsilons_are_answered_by_moments() -> None:
    spent = {Event(0.5, 0.3): 300}
    assert epsilon(spent, 1e-5) == by_moments(spent, 1e-5) > PLD_MOST
    assert accountant(epsilon(spent, 1e-5)) == "RDP"
    assert accountant(epsilon({KNOWN: ROUNDS}, DELTA)) == "PLD"


@pytest.mark.parametrize(
    ("rate", "count", "target", "delta"),
    [
        (0.05, 200, 4.0, 1e-4),
        (0.05, 200, 0.5, 1e-6),
        (0.01, 3000, 1.0, 1e-6),
        (0.5, 100, 8.0, 1e-5),
        (0.3, 5, 60.0, 1e-5),
        (0.3, 50, 400.0, 1e-5),
        (1.0, 100, 2.0, 1e-5),
        (1.0, 1, 50.0, 1e-5),
        (0.001, 10_000, 0.1, 1e-7),
    ],
)
def test_calibration_is_the_smallest_noise_within_the_budget(
    rate: float, count: int, target: float, delta: float
) -> None:
    found = calibrate(rate, count, target, delta)
    assert found == round(found, 4)
    assert epsilon({Event(rate, found): count}, delta) <= target
    assert epsilon({Event(rate, found - 1e-3): count}, delta) > target


def test_calibration_of_one_gaussian_is_known() -> None:
    # Balle and Wang's own example: epsilon 1 at delta 1e-5 takes 3.7306 (the classical bound sqrt(2 ln(1.25e5)): 4.84).
    assert calibrate(1.0, 1, 1.0, 1e-5) == pytest.approx(3.7306, abs=2e-4)
    assert calibrate(1.0, 100, 1.0, 1e-5) == pytest.approx(37.306, abs=2e-3)


def test_a_ledgers_file_survives(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    ledger = Ledger(1e-4, file)
    for number in (1, 2, 3):
        ledger.spend(number, [(EVERYBODY, KNOWN, 1)])
    assert [json.loads(line)["round"] for line in file.read_text().splitlines()] == [1, 2, 3]
    again = Ledger(1e-4, file)
    assert again.spent == ledger.spent == {EVERYBODY: Counter({KNOWN: 3})}
    # A killed run repeats its last round with new noise: both have cost.
    again.spend(3, [(EVERYBODY, KNOWN, 1)])
    assert Ledger(1e-4, file).spent == {EVERYBODY: Counter({KNOWN: 4})}
    assert again.worst() == epsilon({KNOWN: 4}, 1e-4) > ledger.worst()


def test_a_line_cut_in_two_was_not_spent(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    Ledger(1e-4, file).spend(1, [(0, KNOWN, 2), (1, Event(0.1, 0.3), 1)])
    with file.open("a") as stream:
        stream.write('{"round": 2, "events": [[0, 0.05')
    ledger = Ledger(1e-4, file)
    assert ledger.spent == {0: Counter({KNOWN: 2}), 1: Counter({Event(0.1, 0.3): 1})}
    ledger.spend(2, [(0, KNOWN, 5)])
    assert Ledger(1e-4, file).spent[0] == Counter({KNOWN: 7})


@pytest.mark.parametrize("line", ["{}", "not json", '{"round": 2, "events": [[0, "often", 1.0, 1]]}'])
def test_a_ledger_that_cannot_be_read_is_not_guessed(line: str, tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    Ledger(1e-4, file).spend(1, [(EVERYBODY, KNOWN, 1)])
    file.write_text(f"{file.read_text()}{line}\n")
    with pytest.raises(InputError, match=r"ledger.jsonl line 2 cannot be read.*start a new run"):
        Ledger(1e-4, file)


OWNERS: list[dict[int, dict[Event, int]]] = [
    {0: {KNOWN: 3}, 1: {KNOWN: 9}, 2: {KNOWN: 5}},
    {0: {KNOWN: 9}, 1: {Event(0.2, 2.0): 4}, 2: {Event(0.9, 7.0): 2}},
    {0: {KNOWN: 9, Event(0.2, 2.0): 4}, 1: {Event(0.2, 2.0): 12}, 2: {KNOWN: 2, Event(1.0, 5.0): 1}, 3: {KNOWN: 30}},
    {0: {KNOWN: 2}, 1: {Event(0.05, 0.0): 1}},
]


@pytest.mark.parametrize("owners", OWNERS)
@pytest.mark.parametrize("more", [{}, {KNOWN: 4}, {Event(0.4, 3.0): 6}])
def test_the_worst_owner_is_found(owners: Mapping[int, Mapping[Event, int]], more: Mapping[Event, int]) -> None:
    ledger = Ledger(1e-5)
    ledger.spend(1, [(owner, event, n) for owner, own in owners.items() for event, n in own.items()])
    every = [epsilon(Counter(own) + Counter(more), 1e-5) for own in owners.values()]
    assert ledger.worst(more) == max(every)
    assert [ledger.of(owner) for owner in owners] == [epsilon(own, 1e-5) for own in owners.values()]
    assert ledger.of(99) == 0


def test_a_client_keeps_what_it_has_spent() -> None:
    state = RecordDict()
    assert spent_by(state) == Counter()
    spent = Counter({KNOWN: 3, Event(0.013, 1.0944): 20})
    keep_spent(state, spent)
    assert spent_by(state) == spent
    keep_spent(state, spent_by(state) + Counter({KNOWN: 1}))
    assert spent_by(state)[KNOWN] == 4
