"""Who trains in a round: every kind of selection does what its paper says, for any strategy, the same on every run."""

from __future__ import annotations

import json
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from flwr.app import ArrayRecord, Message
from flwr.serverapp.strategy import strategy_utils
from safetensors.numpy import load_file
from test_resume import _assert_same, _stopped_after

from core.config import RunConfig
from core.metrics import score
from core.sections import Sampling
from server.app import train
from server.build import check
from server.observe import ObservedGrid
from server.recorder import RunFolder
from server.selection import KINDS, Selection, among_best, drawn, highest, utility
from simulations.grid import RayGrid
from simulations.run import engine, resume, simulate
from tasks import load, standardise
from tasks.base import build_model, predict

Smoke = Callable[..., RunConfig]
NOBODY = ArrayRecord()


def _trained(run: Path) -> list[set[int]]:
    """Return the clients that trained in each round that had any."""
    rows = pd.read_parquet(run / "clients.parquet").dropna(subset=["train_loss"])
    return [set(group) for _, group in rows.groupby("round")["client"]]


def _rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "rounds.jsonl").open()]


def test_every_kind_has_a_sentence() -> None:
    assert set(KINDS) == set(typing.get_args(Sampling.model_fields["kind"].annotation))


def test_draws_without_replacement_follow_the_weights() -> None:
    """By hand: of weights 1, 2, 7 the last comes first in 0.7 and is among two in 0.7 + 0.1 7/9 + 0.2 7/8 = 0.953."""
    random = np.random.default_rng(0)
    pairs = np.array([drawn(np.array([1.0, 2.0, 7.0]), 2, random.random(3)) for _ in range(20_000)])
    assert np.bincount(pairs[:, 0]) / 20_000 == pytest.approx([0.1, 0.2, 0.7], abs=0.01)
    assert (pairs == 2).any(axis=1).mean() == pytest.approx(0.7 + 0.1 * 7 / 9 + 0.2 * 7 / 8, abs=0.01)
    assert set(drawn(np.array([1.0, 0.0, 1.0]), 2, np.array([0.9, 0.0001, 0.9]))) == {0, 2}


def test_poisson_rounds_have_the_binomial_mean_and_variance_and_may_be_empty() -> None:
    """Of ten clients with probability 0.2: 2 a round, variance 1.6, none in 0.8^10 = 0.107 of the rounds."""
    config = RunConfig.of({"clients": 10, "sampled": 2, "sampling.kind": "poisson"})
    chosen = [Selection(config).choose(number, np.arange(10), range(10), NOBODY) for number in range(1, 4001)]
    counts = np.array([len(clients) for clients in chosen])
    assert counts.mean() == pytest.approx(2, abs=0.06)
    assert counts.var() == pytest.approx(1.6, abs=0.1)
    assert (counts == 0).mean() == pytest.approx(0.8**10, abs=0.015)
    assert np.bincount(np.concatenate(chosen)) / 4000 == pytest.approx([0.2] * 10, abs=0.025)
    # A client's draw is its own: it does not depend on who else is connected.
    few = np.array([1, 4, 7])
    for number in range(1, 20):
        alone = few[Selection(config).choose(number, few, range(3), NOBODY)]
        assert set(alone) == set(chosen[number - 1]) & set(few.tolist())


@pytest.mark.parametrize("strategy", ["fedadam", "krum", "scaffold", "foreign_plugins:Deaf"])
def test_an_empty_poisson_round_changes_nothing_and_the_run_goes_on(strategy: str, smoke: Smoke) -> None:
    sampled = 3 if strategy == "krum" else 1
    run = simulate(
        smoke(clients=6, sampled=sampled, rounds=8, seed=3, strategy=strategy, sampling__kind="poisson")
    ).path
    rows = _rows(run)
    empty = [i for i, row in enumerate(rows) if row["sampled"] == 0]
    assert len(rows) == 8
    assert 0 < len(empty) < 8
    for i in empty:
        assert not rows[i]["aggregated"]
        assert rows[i]["train_loss"] is None
        if i:
            assert rows[i]["central"] == rows[i - 1]["central"]
    # Whoever trains, all evaluate.
    rounds = pd.read_parquet(run / "clients.parquet").dropna(subset=["test_loss"]).groupby("round")["client"]
    assert [len(clients) for _, clients in rounds] == [6] * 8
    assert (run / "report.html").is_file()


def test_a_strategy_that_waits_for_more_clients_than_there_are_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategy_utils, "sleep", lambda _: None)
    grid = ObservedGrid(typing.cast(typing.Any, SimpleNamespace(get_node_ids=lambda: [7, 8, 9])))
    with grid.offering([8]):
        assert strategy_utils.sample_nodes(grid, 0, 1) == ([8], [8])
    with grid.offering([]), pytest.raises(RuntimeError, match="waits for more clients than the 0 that"):
        strategy_utils.sample_nodes(grid, 1, 1)
    assert list(grid.get_node_ids()) == [7, 8, 9]


def _losses(config: RunConfig, run: Path) -> np.ndarray:
    """Return each client's mean loss under the first global model, computed from its data without any federation."""
    task, federation = load(config), check(config)
    model = build_model(task, config.seed)
    constants = json.loads((run / "constants.json").read_text())
    found = []
    for client in range(config.clients):
        split = federation.train[client]
        p = predict(model, torch.from_numpy(standardise.apply(split.x, constants)))
        found.append(score(p, split.y, ("loss",))["loss"])
    return np.array(found)


@pytest.mark.parametrize("strategy", ["fedavg", "ditto"])
def test_power_of_choice_trains_the_candidates_with_the_highest_global_loss(strategy: str, smoke: Smoke) -> None:
    """With as many candidates as clients the first round trains the two highest losses, personal models or not."""
    config = smoke(clients=6, sampled=2, rounds=1, strategy=strategy, sampling__kind="power-of-choice",
                   sampling__candidates=3.0, partition__kind="dirichlet")  # fmt: skip
    run = simulate(config).path
    losses = _losses(config, run)
    assert _trained(run) == [set(np.argsort(-losses)[:2].tolist())]
    # Six candidates received the model as well as the two that trained; nobody sent one for a loss.
    [row] = _rows(run)
    uniform = _rows(simulate(config.with_(sampling__kind="uniform", sampling__candidates=2.0)).path)[0]
    per_model = (row["downlink_bytes"] - uniform["downlink_bytes"]) / 6
    assert row["uplink_bytes"] == uniform["uplink_bytes"] == 2 * per_model


def test_power_of_choice_asks_candidates_by_their_examples_and_takes_the_worst() -> None:
    config = RunConfig.of({"clients": 4, "sampled": 1, "sampling.kind": "power-of-choice", "sampling.candidates": 2.0})
    asked: list[int] = []

    def losses(number: int, arrays: ArrayRecord, nodes: list[int], timeout: float) -> dict:
        asked.extend(nodes)
        # The candidate that does not answer is left out, whatever its loss would be.
        return {"client": [node - 100 for node in nodes if node != 103], "loss": [n for n in nodes if n != 103]}

    selection = Selection(config)
    vars(selection).update(
        _server=SimpleNamespace(sizes=np.array([10, 10, 20, 160])), _evaluate=SimpleNamespace(losses=losses)
    )
    chosen = [selection.choose(number, np.arange(4), range(100, 104), NOBODY) for number in range(1, 1001)]
    pairs = np.array(asked).reshape(-1, 2) - 100
    assert (pairs[:, 0] == 3).mean() == pytest.approx(0.8, abs=0.03)
    for pair, [one] in zip(pairs, chosen, strict=True):
        assert one == max(set(pair.tolist()) - {3})


def test_oorts_utility_is_clipped_and_grows_with_the_time_since() -> None:
    """R = 10: sqrt(0.1 ln 10 / L) is 0.4799 for L = 1 and 0.1517 for L = 10; of U = 1 and 4, 95 % is 3.85."""
    assert utility(np.array([1.0, 4.0]), np.array([10, 1]), 10) == pytest.approx([1 / 3.85 + 0.1517, 1 + 0.4799], 1e-3)
    assert highest(np.array([1.0, np.nan, 3.0, 3.0]), 3).tolist() == [2, 3, 0]
    # The second highest of four is 0.99: all from 0.9405 on are drawn from, 0.94 and 0.5 never.
    random = np.random.default_rng(0)
    pairs = [among_best(np.array([0.94, 1.0, 0.5, 0.99, 0.95]), 2, random.random(5)) for _ in range(200)]
    assert set(np.concatenate(pairs).tolist()) == {1, 3, 4}


def test_oort_explores_then_prefers_what_it_learnt(smoke: Smoke) -> None:
    config = smoke(clients=6, sampled=2, rounds=5, sampling__kind="oort", sampling__exploration=1.0,
                   partition__kind="quantity")  # fmt: skip
    run = simulate(config).path
    trained = _trained(run)
    assert set.union(*trained[:3]) == set(range(6))
    rows = pd.read_parquet(run / "clients.parquet").dropna(subset=["train_loss"])
    seen = rows[rows["round"] <= 3].set_index("client").sort_index()
    own = (seen["num_examples"] * seen["train_loss"]).to_numpy()
    util = np.minimum(own / np.percentile(own, 95), 1) + np.sqrt(0.1 * np.log(4) / seen["round"].to_numpy())
    assert trained[3] <= set(np.flatnonzero(util >= 0.95 * np.sort(util)[-2]).tolist())


def test_oort_keeps_the_share_of_places_for_clients_never_seen(smoke: Smoke) -> None:
    """Half of two places: after the first round one new client in each, until all six were seen."""
    run = simulate(smoke(clients=6, sampled=2, rounds=5, sampling__kind="oort", sampling__exploration=0.5)).path
    seen: set[int] = set()
    new = []
    for clients in _trained(run):
        new.append(len(clients - seen))
        seen |= clients
    assert new == [2, 1, 1, 1, 1]


def test_oort_explores_a_slow_client_last_and_then_leaves_it_out(smoke: Smoke, tmp_path: Path) -> None:
    """Client 3 takes 1000 times the seconds: (T / t)^2 is a millionth."""
    trace = tmp_path / "devices.csv"
    trace.write_text("seconds_per_example\n" + "\n".join("1.0" if c == 3 else "0.001" for c in range(8)))
    run = simulate(smoke(clients=8, sampled=2, rounds=8, sampling__kind="oort", sampling__exploration=1.0,
                         devices__kind="trace", devices__trace=str(trace))).path  # fmt: skip
    assert [3 in clients for clients in _trained(run)] == [False] * 3 + [True] + [False] * 4


def test_oort_passes_over_a_slow_client_however_much_there_is_to_learn_from_it() -> None:
    """T is 1 + 0.2 * 999; client 4's Util of 1 + sqrt(0.1 ln 2) times (T / 1000)^2 is 0.05, that of others 0.28."""
    selection = Selection(
        RunConfig.of({"clients": 5, "sampled": 1, "sampling.kind": "oort", "sampling.exploration": 0.0})
    )
    selection.observe(1, {"client": range(5), "num_examples": [1] * 5, "train_loss": [1, 1, 1, 1, 100]})
    seconds, uniform = np.array([1.0, 1, 1, 1, 1000]), np.full(5, 0.5)
    assert selection._oort(2, np.arange(5), 1, uniform, np.ones(5)).tolist() == [4]
    assert selection._oort(2, np.arange(5), 1, uniform, seconds).tolist() != [4]


@pytest.mark.parametrize("kind", ["power-of-choice", "oort"])
def test_over_selection_asks_more_and_takes_the_first(kind: str, smoke: Smoke) -> None:
    run = simulate(smoke(clients=8, sampled=2, rounds=3, sampling__kind=kind, sampling__over_selection=2.0,
                         devices__kind="lognormal")).path  # fmt: skip
    assert [(row["sampled"], row["lost"]) for row in _rows(run)] == [(4, 2)] * 3


@pytest.mark.parametrize("kind", ["power-of-choice", "oort"])
def test_clients_that_were_never_asked_about_themselves_can_be_chosen(
    kind: str, smoke: Smoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.evaluate.DESCRIBED", 5)
    run = simulate(smoke(clients=12, sampled=3, rounds=5, sampling__kind=kind, sampling__over_selection=1.3,
                         devices__kind="lognormal")).path  # fmt: skip
    described = json.loads((run / "heterogeneity.json").read_text())["clients"]
    assert set.union(*_trained(run)) - set(described)


KIND_AND_STRATEGY = [("poisson", "fedadam"), ("power-of-choice", "scaffold"), ("oort", "krum")]


@pytest.mark.parametrize(("kind", "strategy"), KIND_AND_STRATEGY)
def test_a_resumed_run_chooses_the_same_clients(kind: str, strategy: str, smoke: Smoke) -> None:
    changes = {"clients": 6, "sampled": 3, "rounds": 5, "strategy": strategy, "sampling__kind": kind}
    whole = simulate(smoke(**changes)).path
    folder = _stopped_after(smoke(**changes), 3)
    resume(folder)
    _assert_same(whole, folder)
    assert _trained(whole) == _trained(folder)
    assert len(set.union(*_trained(whole))) > 3


class Elsewhere(RayGrid):
    """A grid like Flower's own: node ids in no order, and no word on whose they are."""

    client_of = property()  # type: ignore[assignment]

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids from the last to the first."""
        return reversed(list(super().get_node_ids()))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Return the replies as they come: in another order."""
        return reversed(list(super().send_and_receive(messages, timeout=timeout)))


@pytest.mark.parametrize("kind", ["poisson", "power-of-choice", "oort"])
def test_the_choice_does_not_depend_on_the_runtime(kind: str, smoke: Smoke) -> None:
    config = smoke(clients=6, sampled=2, rounds=4, sampling__kind=kind)
    with engine(config, check(config)) as grid:
        vars(elsewhere := Elsewhere.__new__(Elsewhere)).update(vars(grid))
        assert not ObservedGrid(elsewhere).numbered
        train(elsewhere, config, folder := RunFolder.create(config))
    assert _trained(folder.path) == _trained(simulate(config).path)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "strategy"), KIND_AND_STRATEGY)
def test_the_same_bits_with_0_and_2_workers(kind: str, strategy: str, ray_session: None, smoke: Smoke) -> None:
    changes = {"clients": 6, "sampled": 3, "rounds": 4, "strategy": strategy, "sampling__kind": kind,
               "engine__cohort_size": 2}  # fmt: skip
    runs = [simulate(smoke(engine__workers=workers, **changes)).path for workers in (0, 2)]
    models = [load_file(run / "model.safetensors") for run in runs]
    assert all(np.array_equal(models[0][name], models[1][name]) for name in models[0])
    assert _trained(runs[0]) == _trained(runs[1])
