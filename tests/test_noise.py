"""Noise: what is drawn is normal as far out as it matters, and nothing is drawn twice."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from scipy import stats

from core.errors import InputError
from privacy.noise import Secret, Simulated, Source, noised

SOURCES = [Secret(), Simulated(0, "test")]
SIZE = 1_000_000


class Given(Source):
    """The words that it was given, over and over."""

    guaranteed = False

    def __init__(self, *words: int) -> None:
        self.words = torch.tensor(words)

    def at(self, *path: int | str) -> Source:
        return self

    def _words(self, count: int) -> torch.Tensor:
        return self.words.repeat(count)[:count]


@pytest.mark.parametrize("source", SOURCES)
def test_a_million_draws_are_normal(source: Source) -> None:
    z = source.normal(SIZE, dtype=torch.float64).numpy()
    # Kolmogorov: beyond 3.3 / sqrt(n) once in a billion.
    assert stats.kstest(z, "norm").statistic < 3.3 / SIZE**0.5
    for limit in (2, 3, 4, 4.5):
        expected = SIZE * stats.norm.sf(limit)
        for count in ((z > limit).sum(), (z < -limit).sum()):
            assert abs(count - expected) < 6 * expected**0.5 + 3
    # Moments 1 to 4 are 0, 1, 0, 3, their variances 1, 2, 15, 96 over n.
    for moment, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**moment).mean() - mean) < 6 * (variance / SIZE) ** 0.5


@pytest.mark.parametrize("source", SOURCES)
def test_neighbours_and_the_two_halves_of_a_pair_are_independent(source: Source) -> None:
    z = source.normal(1 << 20)
    half = 1 << 14
    pairs = z.view(-1, 2, half)
    for a, b in ((z[:-1], z[1:]), (pairs[:, 0].flatten(), pairs[:, 1].flatten())):
        for f in (lambda x: x, torch.square):
            assert abs(float(torch.corrcoef(torch.stack([f(a), f(b)]))[0, 1])) < 6 / len(a) ** 0.5


def test_the_largest_normal_is_beyond_nine() -> None:
    # u = 2^-63, angle 0: sqrt(2 * 63 * ln 2) = 9.345; u = 1 is radius 0; -2^63 is the angle -pi.
    largest = math.sqrt(2 * 63 * math.log(2))
    assert Given(0).normal(2, dtype=torch.float64).tolist() == pytest.approx([largest, 0])
    assert Given(-1).normal(2).tolist() == pytest.approx([0, 0])
    assert Given(0, -(2**63)).normal(2).tolist() == pytest.approx([-largest, 0], abs=1e-6)
    # 32-bit uniforms end where one vector of 10^6 normals in 37,000 does not.
    assert 1 / 37_500 < 2e6 * stats.norm.sf(math.sqrt(2 * 32 * math.log(2))) < 1 / 36_500


def test_uniforms_have_53_bits_and_stay_below_1() -> None:
    assert Given(-1).uniform(1).tolist() == [1 - 2.0**-53]
    assert Given(0).uniform(1).tolist() == [0]
    assert Given(1 << 11, 1 << 62).uniform(2).tolist() == [2.0**-53, 0.25]
    u = Secret().uniform(SIZE)
    assert stats.kstest(u.numpy(), "uniform").statistic < 3.3 / SIZE**0.5
    # The last of 53 bits is set in one half of them.
    assert abs(float((u * 2.0**53 % 2).mean()) - 0.5) < 6 * 0.5 / SIZE**0.5


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("shape", [(0,), (1,), (3,), (2, 3), (5, 100_001)])
def test_any_shape(source: Source, shape: tuple[int, ...]) -> None:
    for drawn, dtype in ((source.normal(*shape), torch.float32), (source.uniform(*shape), torch.float64)):
        assert drawn.shape == shape
        assert drawn.dtype == dtype
        assert len(drawn.unique()) >= 0.98 * drawn.numel()


def test_no_secret_number_is_drawn_twice() -> None:
    one, other = Secret(), Secret()
    words = torch.cat([source._words(count) for source in (one, other, one) for count in (1, 7, 1 << 15, 3)])
    # 10^5 words of 64 bits coincide once in 10^9 times.
    assert len(words.unique()) == len(words)
    assert one.at("noise", 1, 2) is one


def test_a_secret_cannot_be_copied() -> None:
    for copied in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="its numbers would be drawn twice"):
            copied(Secret())


def test_a_child_process_draws_its_own_numbers() -> None:
    source = Secret()
    source.normal(3)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writing, json.dumps(source.normal(4).tolist()).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    its = json.loads(os.read(reading, 1000))
    os.close(reading)
    os.close(writing)
    assert len(its) == 4
    assert not set(its) & set(source.normal(4).tolist())


def test_a_seed_and_a_path_give_the_same_numbers() -> None:
    root = Simulated(7)
    client = root.at("noise", 3, 5)
    first, second = client.normal(4), client.normal(4)
    again = Simulated(7, "noise").at(3, 5)
    assert torch.equal(again.normal(4), first)
    assert torch.equal(again.normal(4), second)
    others = [first, second, *(root.at("noise", *path).normal(4) for path in ((3, 6), (4, 5), (5, 3)))]
    others += [Simulated(8, "noise", 3, 5).normal(4), root.at("sampling", 3, 5).normal(4)]
    assert len(torch.stack(others).unique()) == 4 * len(others)


def test_what_a_client_draws_does_not_depend_on_its_cohort() -> None:
    def drawn(cohort: list[int]) -> dict[int, list[float]]:
        return {client: Simulated(1).at("noise", 1, client).normal(3).tolist() for client in cohort}

    assert drawn([4, 2]) == {client: drawn([client])[client] for client in (2, 4)}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("rate", [0.001, 0.05, 0.5])
def test_poisson_sampling_has_the_moments_of_independent_coins(source: Source, rate: float) -> None:
    times, clients = 2000, 500
    takes = torch.stack([source.sampled(rate, clients) for _ in range(times)]).double()
    # Counts of a round are binomial: mean n p, variance n p (1 - p), whose own error is sqrt(2 / times) and some.
    counts, variance = takes.sum(1), clients * rate * (1 - rate)
    assert abs(float(counts.mean()) - clients * rate) < 6 * (variance / times) ** 0.5
    assert abs(float(counts.var()) / variance - 1) < 6 * ((2 + 1 / variance) / times) ** 0.5
    # And so are the rounds of each client.
    rounds = takes.sum(0)
    assert abs(float(rounds.var()) / (times * rate * (1 - rate)) - 1) < 6 * ((2 + 1 / (times * rate)) / clients) ** 0.5


def test_sampling_rates() -> None:
    assert not Secret().sampled(0, 1000).any()
    assert Secret().sampled(1, 1000).all()
    assert Given(-1).sampled(1, 3).all()
    for rate in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match=rf"a sampling rate of {rate} is not a probability"):
            Secret().sampled(rate, 1)


def test_noised_values_lie_on_one_grid_whatever_they_were() -> None:
    source = Simulated(2, "noised")
    float32 = {}
    for value in (0.0, 1.0):
        values = torch.full((100_000,), value)
        # Added in float32, bits finer than the steps of the larger term tell what the value was.
        steps = (values + source.normal(100_000)).double() * 2.0**25
        float32[value] = float((steps != steps.round()).double().mean())
        released = noised(values, source.normal(100_000, dtype=torch.float64), 3.0).double()
        assert torch.equal(released * 2.0**19, (released * 2.0**19).round())
        assert stats.kstest((released.numpy() - value) / 3, "norm").statistic < 3.3 / 100_000**0.5
    assert float32[0.0] > 0.1
    assert float32[1.0] == 0


def test_noise_of_no_deviation() -> None:
    values = torch.tensor([1.0, 1e-12])
    noise = Secret().normal(2, dtype=torch.float64)
    assert noised(values, noise, 0.0).tolist() == values.tolist()
    with pytest.raises(TypeError, match=r"noise must be float64, not torch.float32"):
        noised(values, noise.float(), 1.0)
    for deviation in (-1.0, math.inf, math.nan):
        with pytest.raises(InputError, match="noise of standard deviation"):
            noised(values, noise, deviation)


def test_threads_that_share_a_source_do_not_share_numbers() -> None:
    for source in (Secret(), Simulated(3, "threads")):
        with ThreadPoolExecutor(4) as pool:
            words = torch.cat(list(pool.map(source._words, [1 << 14] * 64)))
        assert len(words.unique()) == 64 << 14
