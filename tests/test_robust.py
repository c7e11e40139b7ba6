"""Robust rules on updates small enough to check by hand, and against the attacks they are for."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.supercore.task_identity import TaskIdentity

from core.config import RunConfig
from core.errors import InputError
from core.records import CLIENTS, to_arrays, to_numpy
from server.build import build_strategy
from simulations.run import simulate
from strategies.clipping import geometric_median_weights
from strategies.median import median

Smoke = Callable[..., RunConfig]


def _rule(
    name: str, updates: np.ndarray, current: np.ndarray | float = 0.0, examples: Sequence[int] = (), **options: Any
) -> tuple[Any, np.ndarray]:
    """Return the strategy and the model it makes of `current` and clients with updates (n, d), of ten examples each."""
    flat = {f"strategy-options.{key.replace('_', '-')}": value for key, value in options.items()}
    rule: Any = build_strategy(RunConfig.of({"strategy": name, "clients": len(updates), **flat}))
    origin = np.broadcast_to(np.float32(current), updates.shape[1:]).astype(np.float32)
    rule.current = {"w": origin}
    own = examples or [10] * len(updates)
    arrays, _ = rule.aggregate_train(1, [_reply(k, origin + u, own[k]) for k, u in enumerate(updates)])
    return rule, to_numpy(arrays["w"])


def _reply(client: int, weights: np.ndarray, examples: int = 10) -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    content = RecordDict(
        {
            "arrays": to_arrays({"w": weights.astype(np.float32)}),
            "metrics": MetricRecord({"num-examples": examples, "train-loss": 0.5}),
            CLIENTS: ConfigRecord({"client": [client], "num-examples": [examples]}),
        }
    )
    return Message(content, reply_to=Message(RecordDict(), client + 2, "train"))


HONEST = np.array([[1.0, 0.0], [1.2, 0.1], [0.8, -0.1], [1.1, 0.0], [0.9, 0.05]])
HOSTILE = np.array([[-50.0, 80.0]])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fedmedian", {}), ("fedtrimmedavg", {}), ("krum", {"num_malicious_nodes": 1}),
        ("multikrum", {"num_malicious_nodes": 1}), ("rfa", {}), ("centredclipping", {}), ("normclipping", {}),
    ],
)  # fmt: skip
def test_one_hostile_update_among_six_moves_a_robust_rule_little(name: str, options: dict[str, Any]) -> None:
    _, found = _rule(name, np.concatenate([HONEST, HOSTILE]), **options)
    assert np.linalg.norm(found - HONEST.mean(0)) < 0.8


def test_a_mean_is_moved_far() -> None:
    assert np.linalg.norm(np.concatenate([HONEST, HOSTILE]).mean(0) - HONEST.mean(0)) > 15


@pytest.mark.parametrize("n", range(1, 26))
def test_the_sorting_network_gives_numpys_median_bit_for_bit(n: int) -> None:
    values = np.random.default_rng(n).normal(size=(n, 20_000)).astype(np.float32)
    values[:, :3] = [[0.0], [-0.0], [7.0]][0]
    assert median(values).tobytes() == np.median(values, axis=0).astype(np.float32).tobytes()


def test_the_median_is_flowers() -> None:
    updates = np.random.default_rng(0).normal(size=(7, 50))
    _, ours = _rule("fedmedian", updates)
    theirs, _ = flower.FedMedian().aggregate_train(1, [_reply(k, u) for k, u in enumerate(updates)])
    assert isinstance(theirs, ArrayRecord)
    assert ours.tobytes() == theirs["w"].numpy().tobytes()


def test_krum_sees_updates_where_flowers_sees_models() -> None:
    # Six honest clients agree to within 1e-4, two hostile ones are 0.2 away, and the model itself is large: squared
    # distances between models in float32 are rounding.
    rng = np.random.default_rng(3)
    honest = 0.01 + 1e-4 * rng.normal(size=(6, 2000))
    updates = np.concatenate([-0.2 + 0.05 * rng.normal(size=(2, 2000)), honest])
    current = 300 * rng.normal(size=2000)
    rule, found = _rule("krum", updates, current, num_malicious_nodes=2)
    assert [client for client, share in rule.influence.items() if share] != []
    assert all(client >= 2 for client, share in rule.influence.items() if share)
    assert np.abs(found - current - 0.01).max() < 1e-3


def test_krum_leaves_out_of_its_sums_as_many_as_may_be_malicious() -> None:
    updates = np.array([[0.0], [1.0], [2.2], [4.0], [4.5], [20.0], [20.0]])
    # Three nearest of seven with f = 2: 1.44 + 3.24 + 4.84 is the least sum.
    assert _rule("krum", updates, num_malicious_nodes=2)[1] == pytest.approx([2.2])
    # Five with f = 0, one of them at 20: whoever is nearest to it wins, 0.25 + 5.29 + 12.25 + 20.25 + 240.25.
    assert _rule("krum", updates)[1] == pytest.approx([4.5])


def test_multi_krum_and_bulyan_say_whom_they_selected() -> None:
    hostile = np.concatenate([HONEST, HONEST + 0.01, HOSTILE])
    rule, _ = _rule("multikrum", hostile, num_malicious_nodes=1)
    assert rule.influence == pytest.approx({**dict.fromkeys(range(10), 0.1), 10: 0.0})
    rule, _ = _rule("bulyan", hostile, num_malicious_nodes=1)
    assert rule.influence[10] == 0
    assert sum(share > 0 for share in rule.influence.values()) == 9


def test_the_geometric_median_of_a_line_is_its_middle_point_and_of_a_triangle_fermats() -> None:
    line = np.array([[0.0], [1.0], [10.0]])
    weights = geometric_median_weights(line, np.full(3, 1 / 3), 200, 1e-9)
    assert weights @ line == pytest.approx([1.0], abs=1e-3)
    corner = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    # All sides are seen at 120 degrees from (x, x) with x = (3 - sqrt(3)) / 6.
    weights = geometric_median_weights(corner, np.full(3, 1 / 3), 200, 1e-9)
    assert weights @ corner == pytest.approx([(3 - 3**0.5) / 6] * 2, abs=1e-6)


def test_the_geometric_median_is_where_more_than_half_of_all_examples_are() -> None:
    """Weiszfeld's weights are alpha_i / |u_i - z|: a point that outweighs all others together is the median."""
    points = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    weights = geometric_median_weights(points, np.array([0.6, 0.2, 0.2]), 200, 1e-9)
    assert weights @ points == pytest.approx([0, 0], abs=1e-6)
    # A mean follows half of all clients as far as they go, the geometric median less than half not at all.
    for far in (10.0, 1000.0):
        _, found = _rule("rfa", np.array([[0.0], [0.0], [0.0], [far], [far]]), iterations=50)
        assert found == pytest.approx([0], abs=0.01)


def test_norm_clipping_by_hand() -> None:
    updates = np.array([[3.0, 4.0], [0.6, 0.8], [0.0, -1.0]])
    _, found = _rule("normclipping", updates, radius=2.0)
    assert found == pytest.approx([(1.2 + 0.6) / 3, (1.6 + 0.8 - 1.0) / 3], abs=1e-6)
    # Without a radius it is the median length, 1.
    _, found = _rule("normclipping", updates)
    assert found == pytest.approx([(0.6 + 0.6) / 3, (0.8 + 0.8 - 1.0) / 3], abs=1e-6)
    # Examples weigh: 30 of 50 are the first one's.
    _, found = _rule("normclipping", updates, examples=[30, 10, 10], radius=2.0)
    assert found == pytest.approx([(3 * 1.2 + 0.6) / 5, (3 * 1.6 + 0.8 - 1.0) / 5], abs=1e-6)


def test_centred_clipping_by_hand() -> None:
    # One iteration from 0 with radius 1: (3, 4) counts as (0.6, 0.8).
    rule, found = _rule("centredclipping", np.array([[3.0, 4.0], [0.6, 0.0]]), radius=1.0, iterations=1)
    assert found == pytest.approx([0.6, 0.4], abs=1e-6)
    assert rule.last == pytest.approx([0.6, 0.4], abs=1e-6)
    # The next round's begins there: (3.6, 4.4) is (3, 4) away and counts as (0.6, 0.8), (0.6, 0.4) is not away at all.
    rule.current = {"w": np.zeros(2, np.float32)}
    arrays, _ = rule.aggregate_train(2, [_reply(k, np.array(u)) for k, u in enumerate([(3.6, 4.4), (0.6, 0.4)])])
    assert to_numpy(arrays["w"]) == pytest.approx([0.6 + 0.3, 0.4 + 0.4], abs=1e-6)


def test_a_bucket_weighs_as_much_as_all_its_clients() -> None:
    # Whoever is alone in the last bucket: nothing is clipped, so that this is the mean of all three.
    for seed in range(3):
        random.seed(seed)
        _, found = _rule("normclipping", np.array([[1.0], [2.0], [6.0]]), bucket_size=2, radius=100.0)
        assert found == pytest.approx([3.0])


def test_buckets_average_before_the_rule_sees_them() -> None:
    random.seed(0)
    updates = np.array([[1.0], [2.0], [3.0], [4.0]])
    rule, found = _rule("fedmedian", updates, bucket_size=4)
    assert found == pytest.approx([2.5])
    updates = np.array([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]])
    rule, found = _rule("multikrum", updates, bucket_size=2, num_nodes_to_select=9)
    assert found == pytest.approx([3.5])
    assert rule.influence == pytest.approx(dict.fromkeys(range(6), 1 / 6))
    with pytest.raises(InputError, match="needs 9 clients a round in buckets of 2, not 6"):
        _rule("multikrum", updates, bucket_size=2, num_malicious_nodes=1)
    with pytest.raises(InputError, match="bucket-size must be at least 1"):
        _rule("rfa", updates, bucket_size=0)


def test_buckets_let_a_median_hear_those_who_are_unlike() -> None:
    """Four clients say 0 and two say 6: the mean is 2, the median 0, since it hears the majority alone.

    Of three random pairs one is (6, 6) one time in five, and the median of (0, 0, 6) is 0; else that of (3, 3, 0) is 3:
    2.4 on average.
    """
    updates = np.array([[0.0]] * 4 + [[6.0]] * 2)
    assert _rule("fedmedian", updates)[1] == pytest.approx([0])
    found = []
    for seed in range(200):
        random.seed(seed)
        found.append(float(_rule("fedmedian", updates, bucket_size=2)[1][0]))
    assert set(found) == {0.0, 3.0}
    assert np.mean(found) == pytest.approx(2.4, abs=0.25)


def test_a_rule_moves_the_global_model_by_what_it_made_of_the_updates() -> None:
    for name in ("fedmedian", "fedtrimmedavg", "krum", "rfa", "normclipping", "centredclipping"):
        _, from_zero = _rule(name, HONEST)
        _, from_there = _rule(name, HONEST, 5.0)
        assert from_there - 5 == pytest.approx(from_zero, abs=1e-5), name


def test_bulyan_counts_refused_answers_among_the_malicious(smoke: Smoke) -> None:
    # Four of twenty send nan. The sixteen others are too few for four malicious ones among them; there are none.
    settings = {"clients": 20, "rounds": 3, "strategy": "bulyan", "strategy-options.num-malicious-nodes": 4}
    attacked = {"attack.kind": "non-finite", "attack.fraction": 0.2}
    run = simulate(RunConfig.of({**smoke(engine__cohort_size=20).flat(), **settings, **attacked}))
    assert run.summary["answers"]["rejected"] == 4 * 3
    assert run.metrics["accuracy"] > 0.85
