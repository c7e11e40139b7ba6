"""Partitions: nothing is lost or shared, every kind does what it says, the same seed deals the same hands."""

from __future__ import annotations

import numpy as np
import pytest

from core.config import RunConfig
from core.data import SPLITS, Federation
from core.errors import InputError
from tasks import standardise
from tasks.base import Table
from tasks.partition import KINDS, federate, split_rows

N = 1207  # 7 rows more than any partition divides
_rng = np.random.default_rng(0)
TABLE = Table(
    x=np.column_stack([np.arange(N), _rng.normal(size=(N, 3))]).astype(np.float32),
    y=_rng.integers(0, 3, N),
    natural=np.arange(N) % 4,
    names=("north", "east", "south", "west"),
)


def _federation(kind: str, clients: int = 4, **changes: object) -> Federation:
    return federate(TABLE, RunConfig.of({"clients": clients, "partition.kind": kind, **changes}))


def _rows(federation: Federation) -> list[np.ndarray]:
    """Return each client's rows of the table: the first feature is the row's number."""
    parts = [[getattr(federation, split)[i].x[:, 0] for split in SPLITS] for i in range(len(federation))]
    return [np.concatenate(part).astype(int) for part in parts]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_row_belongs_to_one_client_and_split_or_to_the_central_test_set(kind: str) -> None:
    federation = _federation(kind)
    rows = np.concatenate([*_rows(federation), federation.central.x[:, 0].astype(int)])
    assert np.array_equal(np.sort(rows), np.arange(N))
    assert len(federation.central) == 242
    assert all(getattr(federation, split).sizes.min() > 0 for split in SPLITS)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_same_seed_deals_the_same_partition_and_another_does_not(kind: str) -> None:
    first, again, other = _federation(kind), _federation(kind), _federation(kind, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(_rows(first), _rows(again), strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(_rows(first), _rows(other), strict=True))


def _label_shares(federation: Federation) -> np.ndarray:
    counts = [np.bincount(federation.train[i].y, minlength=3) for i in range(len(federation))]
    return np.array([c / c.sum() for c in counts])


def test_label_skew_grows_as_alpha_falls() -> None:
    spread = [_label_shares(_federation("dirichlet", **{"partition.alpha": a})).std(0).mean() for a in (100, 1, 0.2)]
    assert spread[0] < spread[1] < spread[2]
    assert _label_shares(_federation("iid")).std(0).mean() < 0.06


def test_shards_give_a_client_about_two_labels() -> None:
    shares = _label_shares(_federation("shards", **{"partition.shards": 1}))
    assert (np.sort(shares, axis=1)[:, -1] > 0.6).all()


def test_quantity_skew_changes_sizes_and_not_labels() -> None:
    federation = _federation("quantity", **{"partition.alpha": 0.3})
    assert federation.train.sizes.max() > 3 * federation.train.sizes.min()
    shares = _label_shares(federation)
    # Of n rows drawn iid a share strays by about sqrt(p (1 - p) / n) <= 0.5 / sqrt(n): four times that is a skew.
    stray = np.abs(shares - np.bincount(TABLE.y) / N).max(axis=1)
    assert (stray < 2 / np.sqrt(federation.train.sizes)).all()


def test_feature_shift_sorts_clients_by_strictness() -> None:
    # The first feature is by far the widest only before scaling: give the column to sort by.
    table = Table(TABLE.x, TABLE.y, feature=TABLE.x[:, 1].astype(float))

    def means(strictness: float) -> np.ndarray:
        config = RunConfig.of({"clients": 4, "partition.kind": "feature", "partition.strictness": strictness})
        federation = federate(table, config)
        return np.array([federation.train[i].x[:, 1].mean() for i in range(4)])

    assert np.ptp(means(1.0)) > 2
    assert np.ptp(means(0.0)) < 0.6


def test_natural_groups_keep_their_names_and_fewer_clients_share_them() -> None:
    assert _federation("natural").names == ("north", "east", "south", "west")
    two = _federation("natural", clients=2)
    assert {tuple(np.unique(rows % 4)) for rows in _rows(two)} == {(0, 2), (1, 3)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "natural", "clients": 9}, ["clients=9", "4 natural groups"]),
        ({"kind": "iid", "clients": 200}, ["965 examples", "200 clients"]),
        ({"kind": "shards", "clients": 90, "partition.shards": 20}, ["partition.kind=shards", "lower"]),
    ],
)
def test_what_cannot_be_dealt_is_refused_with_the_remedy(changes: dict, words: list[str]) -> None:
    with pytest.raises(InputError) as raised:
        _federation(**changes)
    for word in words:
        assert word in str(raised.value)


def test_more_groups_and_labels_than_test_rows_are_still_split() -> None:
    """Eighty rows in twenty groups of two labels: sixteen test rows cannot hold forty strata."""
    table = Table(
        TABLE.x[:80], np.tile([0, 1], 40), natural=np.repeat(np.arange(20), 4), names=tuple("abcdefghijklmnopqrst")
    )
    federation = federate(table, RunConfig.of({"clients": 20, "partition.min-examples": 1}))
    assert len(federation) == 20
    assert len(federation.central) == 16
    assert federation.central.y.sum() == 8


def test_one_label_is_refused() -> None:
    with pytest.raises(InputError, match="same label"):
        federate(Table(TABLE.x, np.zeros(N, dtype=np.int64)), RunConfig.of({"partition.kind": "iid"}))


def test_splits_hold_each_label_in_proportion() -> None:
    y = np.repeat([0, 1], [900, 100])
    splits = split_rows(y, np.random.default_rng(3))
    for name, share in {"train": 0.7, "validation": 0.15, "test": 0.15}.items():
        assert np.bincount(y[splits[name]]) == pytest.approx([900 * share, 100 * share], abs=3)


def test_constants_from_sums_equal_those_from_all_rows() -> None:
    parts = np.array_split(TABLE.x[:, 1:], [100, 700])
    constants = standardise.combine([standardise.statistics(part) for part in parts])
    np.testing.assert_allclose(constants["mean"], TABLE.x[:, 1:].mean(0), atol=1e-6)
    np.testing.assert_allclose(constants["std"], TABLE.x[:, 1:].std(0, ddof=1), atol=1e-6)
    scaled = standardise.apply(TABLE.x[:, 1:], constants)
    np.testing.assert_allclose(scaled.std(0, ddof=1), 1, atol=1e-5)


def test_a_constant_feature_becomes_zero() -> None:
    x = np.full((5, 1), 7, dtype=np.float32)
    assert standardise.apply(x, standardise.combine([standardise.statistics(x)])).tolist() == [[0.0]] * 5
