"""Who masks with whom, and what a threshold buys: known figures, bounds above what happens, and what is refused."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from core.errors import InputError
from core.seeding import rng
from privacy.secagg.graph import (
    MALICIOUS,
    SEMI_HONEST,
    graph,
    malicious_threshold,
    plan,
    safety,
)


def _seed(number: int) -> bytes:
    return number.to_bytes(32)


@settings(max_examples=80, deadline=None)
@given(st.integers(3, 60), st.integers(0, 20), st.integers(0, 10**6))
def test_everybody_has_k_neighbours_and_is_theirs(clients: int, half: int, seed: int) -> None:
    found = graph(clients, 2 * half, _seed(seed))
    degree = 2 * half if 0 < 2 * half < clients - 1 else clients - 1
    assert found.all.shape == (clients, degree)
    pairs = {(i, j) for i, row in enumerate(found.all.tolist()) for j in row}
    assert len(pairs) == clients * degree
    assert all(i != j and (j, i) in pairs for i, j in pairs)
    for client in range(clients):
        assert found.of(client).tolist() == found.all[client].tolist() == sorted(found.all[client])
    rows, columns = np.array(sorted(pairs)).T
    assert connected_components(csr_array((np.ones(len(rows)), (rows, columns))))[0] == 1


def test_the_graph_belongs_to_its_seed() -> None:
    graphs = [graph(40, 6, _seed(seed)).all.tolist() for seed in range(50)]
    assert graph(40, 6, _seed(7)).all.tolist() == graphs[7]
    assert len({str(found) for found in graphs}) == 50
    # Each pair of 40 is linked with probability 6 / 39: 7.7 times of 50 on average.
    links = sum(np.isin(np.arange(40), found[0]).astype(int) for found in map(np.array, graphs))
    assert 0 < links[1:].min() < 7.7 < links[1:].max() < 22
    with pytest.raises(InputError, match="7 neighbours cannot stand on two sides of a circle; choose an even number"):
        graph(40, 7, _seed(0))


@settings(max_examples=150, deadline=None)
@given(st.integers(6, 30), st.integers(1, 4), st.integers(0, 10**6))
def test_who_is_left_falls_apart_exactly_where_the_circle_has_two_gaps(clients: int, half: int, seed: int) -> None:
    if 2 * half >= clients - 1:
        return
    found, generator = graph(clients, 2 * half, _seed(seed)), rng(seed, "left")
    left = np.sort(generator.choice(clients, int(generator.integers(2, clients)), replace=False))
    near = np.zeros((clients, clients))
    near[np.repeat(np.arange(clients), 2 * half), found.all.ravel()] = 1
    parts = connected_components(csr_array(near[np.ix_(left, left)]))[0]
    places = np.sort(np.flatnonzero(np.isin(found._circle, left)))
    gaps = np.diff([*places, places[0] + clients]) - 1
    assert (parts > 1) == (np.count_nonzero(gaps >= half) >= 2)


def test_the_calculator_gives_the_known_figures() -> None:
    # 40 bits of privacy and 20 of correctness, at 10 % corrupt and 10 % dropouts.
    small, large = (plan(clients, 0.1, 0.1, SEMI_HONEST) for clients in (100, 1000))
    assert (small.neighbours, small.threshold) == (22, 11)
    assert (large.neighbours, large.threshold) == (46, 26)
    # Ten corrupt clients cannot be eleven neighbours, nor can twenty who are not there leave two gaps of eleven.
    assert small.privacy_bits == small.correctness_bits == math.inf
    assert large.privacy_bits == pytest.approx(41.06, abs=0.01)
    assert large.correctness_bits == pytest.approx(22.98, abs=0.01)
    # By hand: k = 20 and t = 11 would fail if ten drop out who are all of somebody's twenty neighbours.
    by_hand = -math.log2(100 * math.comb(20, 10) / math.comb(99, 10))
    assert safety(100, 20, 11, 10, 10).correctness_bits == pytest.approx(by_hand)


def test_the_profile_malicious_is_of_everybody_and_of_more_than_two_thirds() -> None:
    assert [malicious_threshold(n) for n in (3, 4, 5, 6, 9, 10, 100)] == [3, 3, 4, 5, 7, 7, 67]
    found = plan(100, 0.1, 0.1)
    assert (found.profile, found.neighbours, found.threshold) == (MALICIOUS, 0, 0)
    assert found.privacy_bits == found.correctness_bits == math.inf
    assert plan(128, 0.1, 0.1).profile == MALICIOUS
    assert plan(129, 0.1, 0.1).profile == SEMI_HONEST
    # Two lists of survivors need 2t signatures, and only those who are corrupt sign both.
    for clients in range(3, 200):
        corrupt = (clients - 1) // 3
        assert 2 * malicious_threshold(clients) > clients + corrupt


def test_bounds_are_above_what_happens() -> None:
    clients, neighbours, threshold, corrupt, dropouts, times = 20, 6, 3, 4, 4, 3000
    opened = failed = 0
    generator = rng(0, "bounds")
    for seed in range(times):
        near = graph(clients, neighbours, _seed(seed)).all
        chosen = generator.permutation(clients)
        bad, lost = chosen[:corrupt], chosen[corrupt : corrupt + dropouts]
        honest = np.setdiff1d(np.arange(clients), bad)
        left = np.setdiff1d(honest, lost)
        linked = np.zeros((clients, clients))
        linked[np.repeat(np.arange(clients), neighbours), near.ravel()] = 1
        apart = connected_components(csr_array(linked[np.ix_(left, left)]))[0] > 1
        opened += bool((np.isin(near, bad).sum(1)[honest] >= threshold).any() or apart)
        failed += bool((np.isin(near, lost).sum(1) > neighbours - threshold).any())
    found = safety(clients, neighbours, threshold, corrupt, dropouts)
    for count, bits in ((opened, found.privacy_bits), (failed, found.correctness_bits)):
        assert 0.2 * min(1.0, 2**-bits) < count / times < min(1.0, 2**-bits) + 0.02


@pytest.mark.parametrize(
    ("clients", "corrupt", "dropout", "profile", "sentence"),
    [
        (2, 0.0, 0.0, "", "2 clients a round hide nobody; choose 3 or more"),
        (10, 1.0, 0.0, "", "a corrupt fraction of 1.0 cannot be used"),
        (10, 0.0, -0.1, "", "a dropout fraction of -0.1 cannot be used"),
        (10, 0.1, 0.1, "honest", "unknown profile 'honest'"),
        (9, 0.34, 0.0, "", "3 corrupt clients of 9 are a third or more"),
        (10, 0.1, 0.4, "", "4 dropouts of 10 leave fewer than the 7 that profile=malicious needs; set profile="),
        (10, 0.5, 0.5, SEMI_HONEST, "5 corrupt clients and 5 dropouts of 10 leave no threshold between them"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    clients: int, corrupt: float, dropout: float, profile: str, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence.replace(".", r"\.")):
        plan(clients, corrupt, dropout, profile)


def test_a_plan_is_the_smallest_that_is_safe_enough() -> None:
    for clients, corrupt, dropout in itertools.product((60, 300), (0.0, 0.05, 0.2), (0.05, 0.2)):
        found = plan(clients, corrupt, dropout, SEMI_HONEST)
        degree = found.neighbours or clients - 1
        assert found.privacy_bits >= 40
        assert found.correctness_bits >= 20
        assert degree / 2 <= found.threshold <= degree
        for threshold in range(2, degree - 1):
            fewer = safety(clients, degree - 2, threshold, found.corrupt, found.dropouts)
            assert threshold < (degree - 2) / 2 or fewer.privacy_bits < 40 or fewer.correctness_bits < 20
