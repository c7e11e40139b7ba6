"""Client-level privacy: what leaves a client, what reaches the strategy, and what it costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from foreign_plugins import Curious
from safetensors.numpy import load_file
from test_training import _round
from torch import nn

from core import records
from core.config import RunConfig
from core.errors import InputError
from core.training import LocalUpdate
from privacy.accounting import Event, Ledger, epsilon, keep_spent, spent_by
from privacy.client_level import ClientLevel, Clipping, with_noise
from privacy.noise import Secret
from server.observe import ObservedGrid
from server.privacy import Privacy
from simulations.run import engine, preset, resume, simulate
from simulations.worker import node_of
from tasks import load
from tasks.medical import Medical
from tasks.source import federation_of

# Noise that no number shows; its epsilon is enormous.
QUIET = {"privacy__noise_multiplier": 1e-6}
SILENT = {**QUIET, "privacy__noise_seed": 0}


@pytest.fixture
def private(tmp_path: Path) -> Callable[..., RunConfig]:
    """Return a function from changed settings to a small private run."""

    def config(**changes: Any) -> RunConfig:
        settings = {
            "out": str(tmp_path / "runs"), "privacy__level": "client", "privacy__delta": 1e-3,
            "partition__min_examples": 5, **changes,
        }  # fmt: skip
        return preset("smoke", **settings)

    return config


def _lines(private: Callable[..., RunConfig], dataset: str, **changes: Any) -> RunConfig:
    settings = {"task": "lines:Lines", "dataset": dataset, "clients": len(dataset.split(";")), "batch_size": 1,
                "local_epochs": 1, "learning_rate": 1.0, "rounds": 1, "evaluate_every": 1000}  # fmt: skip
    return private(**{**settings, **changes})


def _weight(config: RunConfig) -> float:
    return float(simulate(config).model().get_submodule("0").weight.detach())


def _model(path: Path) -> np.ndarray:
    return np.concatenate([tensor.ravel() for tensor in load_file(path / "model.safetensors").values()])


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "rounds.jsonl").open()]


def test_an_update_is_clipped_as_one_vector_with_what_travels_beside_it() -> None:
    r = replace(
        _round("mlp"), sizes=(1, 1), global_params={"w": torch.tensor([1.0, 1.0])}, config={records.CLIPPING_NORM: 2.0}
    )
    update = LocalUpdate(
        params={"w": torch.tensor([[4.0, 1.0], [1.5, 1.0]])}, loss=torch.zeros(2),
        beside={"control": {"w": torch.tensor([[0.0, 4.0], [0.5, 0.0]])}},
    )  # fmt: skip
    level = ClientLevel.of(RunConfig.of({"privacy.level": "client", "privacy.noise-multiplier": 1.0, "clients": 2}))
    clipped = Clipping(level)(update, r)
    # (3, 0, 0, 4) has norm 5 and becomes 2/5 of it; (0.5, 0, 0.5, 0) stays, to the bit.
    torch.testing.assert_close(clipped.params["w"][0], torch.tensor([1 + 3 * 0.4, 1.0]))
    torch.testing.assert_close(clipped.beside["control"]["w"][0], torch.tensor([0.0, 1.6]))
    assert clipped.params["w"][1].equal(update.params["w"][1])
    assert clipped.weight is not None
    assert clipped.weight.tolist() == [1.0, 1.0]


def test_an_update_that_is_not_finite_is_not_clipped_to_zero() -> None:
    r = replace(_round("mlp"), sizes=(1, 1), global_params={"w": torch.zeros(2)}, config={records.CLIPPING_NORM: 1.0})
    level = ClientLevel.of(RunConfig.of({"privacy.level": "client", "privacy.noise-multiplier": 1.0, "clients": 2}))
    update = LocalUpdate({"w": torch.tensor([[float("nan"), 0.0], [float("inf"), 0.0]])}, torch.zeros(2))
    assert not Clipping(level)(update, r).params["w"].sum(1).isfinite().any()


def test_the_mean_is_the_clipped_sum_over_the_expected_number(private: Callable[..., RunConfig]) -> None:
    # One step of rate 1 on (w - y)^2 / 2 ends at y: updates of 3 and 1 are clipped to 1.
    assert _weight(_lines(private, "1,3,1;1,1,1", **SILENT)) == pytest.approx((1 + 1) / 2, abs=1e-4)
    found = _lines(private, "1,3,1;1,1,1;1,0,1", privacy__clipping_norm=2.0, **SILENT)
    assert _weight(found) == pytest.approx((2 + 1 + 0) / 3, abs=1e-4)


def test_weights_are_examples_up_to_a_cap_and_the_divisor_stays(private: Callable[..., RunConfig]) -> None:
    found = _lines(private, "1,1,4;1,1,1", privacy__weight_cap=2, privacy__clipping_norm=5.0, **SILENT)
    # Weights 1 and 1/2, divided by two clients and not by 1.5.
    assert _weight(found) == pytest.approx((1 + 0.5) / 2, abs=1e-4)


def test_a_client_that_answers_nothing_is_missing_from_the_sum_and_not_from_the_divisor(
    private: Callable[..., RunConfig],
) -> None:
    found = _lines(private, "1,1,1;1,1,1", attack__kind="non-finite", attack__fraction=0.5, **SILENT)
    assert _weight(found) == pytest.approx(1 / 2, abs=1e-4)


@pytest.mark.parametrize("cohort", [1, 3])
def test_a_client_whose_loss_is_endless_takes_nobody_with_it(cohort: int, private: Callable[..., RunConfig]) -> None:
    run = simulate(_lines(private, "1,1,1;1,1,1;1,2,1", task="lines:Endless", engine__cohort_size=cohort, **SILENT))
    # Two of three are left, as if the third had not been drawn.
    assert float(run.model().get_submodule("0").weight.detach()) == pytest.approx(2 / 3, abs=1e-4)
    assert [failure["client"] for failure in _rows(run.path)[0]["failures"]] == [2]


def test_a_hostile_client_adds_no_more_than_the_clipping_norm(private: Callable[..., RunConfig]) -> None:
    found = _lines(
        private, "1,1,1;1,1,1", attack__kind="scaling", attack__fraction=0.5, attack__strength=1000.0, **SILENT
    )
    assert _weight(found) == pytest.approx(1.0, abs=1e-4)


def test_noise_has_its_standard_deviation_even_where_nobody_takes_part(private: Callable[..., RunConfig]) -> None:
    found = private(
        rounds=1, sampled=1, clients=8, learning_rate=1e-9, privacy__noise_multiplier=2.0, privacy__clipping_norm=0.5
    )
    start = _model(simulate(private(rounds=1, clients=8, learning_rate=1e-9, **SILENT)).path)
    empty = 0
    for seed in range(6):
        run = simulate(found.with_(privacy__noise_seed=seed))
        # z S / (q N) = 2 x 0.5 / 1 on each of 1025 numbers.
        assert np.std(_model(run.path) - start) == pytest.approx(1.0, rel=0.1)
        empty += _rows(run.path)[0]["sampled"] == 0
    assert 0 < empty < 6


def test_one_worker_or_several_and_interrupted_or_not_a_simulated_run_repeats(
    private: Callable[..., RunConfig], ray_session: None
) -> None:
    settings = {"clients": 12, "sampled": 6, "rounds": 4, "privacy__epsilon": 8.0, "privacy__noise_seed": 3,
                "engine__cohort_size": 2, "privacy__clipping": "adaptive"}  # fmt: skip
    whole = simulate(private(**settings, engine__workers=0)).path
    assert np.array_equal(_model(whole), _model(simulate(private(**settings, engine__workers=2)).path))
    stopped: list[Path] = []

    def stop(row: dict[str, Any]) -> None:
        if row["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(private(**settings), on_start=lambda path, *_: stopped.append(path), on_round=stop)
    run = resume(stopped[0])
    assert np.array_equal(_model(whole), _model(run.path))
    assert [row["privacy"] for row in _rows(whole)] == [row["privacy"] for row in _rows(run.path)]


def test_without_a_seed_two_runs_share_nothing_and_draw_other_clients(private: Callable[..., RunConfig]) -> None:
    config = private(clients=40, sampled=20, rounds=2, privacy__noise_multiplier=1.0)
    one, other = simulate(config), simulate(config)
    assert not np.isclose(_model(one.path), _model(other.path)).any()
    assert _rows(one.path)[0]["sampled"] != _rows(other.path)[0]["sampled"] or len(
        set(_drawn(one.path) ^ _drawn(other.path))
    )
    assert not one.summary["privacy"]["simulated"]


def _drawn(path: Path) -> set[tuple[int, int]]:
    import pandas as pd

    table = pd.read_parquet(path / "clients.parquet").dropna(subset=["train_loss"])
    return set(zip(table["round"], table["client"], strict=True))


class Dropping(Medical):
    """The medical task with dropout."""

    def model(self) -> nn.Module:
        """Return a network that drops half of its hidden units."""
        return nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 1), nn.Flatten(0))


def test_what_a_model_drops_is_as_secret_as_the_noise(private: Callable[..., RunConfig]) -> None:
    # Masks of a cohort are drawn one after the other: known ones would let a client change what others send.
    settings = {"task": "test_client_privacy:Dropping", "rounds": 1, "learning_rate": 1.0}
    secret, seeded = private(**settings, **QUIET), private(**settings, **SILENT)
    apart = np.abs(_model(simulate(secret).path) - _model(simulate(secret).path)).max()
    # Noise of 10^-6 alone would move nothing so far.
    assert apart > 1e-3
    assert np.array_equal(_model(simulate(seeded).path), _model(simulate(seeded).path))


def test_a_budget_calibrates_the_noise_and_the_ledger_adds_up_to_it(private: Callable[..., RunConfig]) -> None:
    run = simulate(private(clients=20, sampled=5, rounds=6, privacy__epsilon=4.0))
    said = run.summary["privacy"]
    z, q = said["noise_multiplier"], said["sampling_rate"]
    assert q == 0.25
    spent = [row["privacy"]["epsilon"] for row in _rows(run.path)]
    assert spent == [pytest.approx(epsilon({Event(q, z): t}, 1e-3)) for t in range(1, 7)]
    assert said["epsilon"] == spent[-1]
    assert spent[-1] <= 4.0 < epsilon({Event(q, z - 0.01): 6}, 1e-3)


def test_a_run_stops_before_it_would_exceed_its_budget(private: Callable[..., RunConfig]) -> None:
    run = simulate(private(rounds=50, privacy__epsilon=6.0, privacy__noise_multiplier=2.0))
    done, spent = run.summary["rounds"], run.summary["privacy"]["epsilon"]
    assert (run.summary["status"], run.summary["stopped_by"]) == ("completed", "privacy budget")
    assert spent == pytest.approx(epsilon({Event(1.0, 2.0): done}, 1e-3))
    assert spent <= 6.0 < epsilon({Event(1.0, 2.0): done + 1}, 1e-3)


def test_a_round_that_is_repeated_costs_again_and_the_budget_knows(private: Callable[..., RunConfig]) -> None:
    config = private(rounds=6, privacy__epsilon=6.0)
    stopped: list[Path] = []

    def stop(row: dict[str, Any]) -> None:
        if row["round"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(config, on_start=lambda path, *_: stopped.append(path), on_round=stop)
    # As if the process had been killed in round 4, after its noise was used and before its checkpoint.
    ledger = stopped[0] / "ledger.jsonl"
    lines = ledger.read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2, 3]
    ledger.write_text("\n".join([*lines, lines[-1].replace('"round": 3', '"round": 4')]) + "\n")
    run = resume(stopped[0])
    # Six rounds were planned and one was lost: the budget is spent after five.
    assert (run.summary["rounds"], run.summary["stopped_by"]) == (5, "privacy budget")
    assert not any(row["privacy"]["simulated"] for row in _rows(run.path))
    assert sum(Ledger(1e-3, ledger).spent[-1].values()) == 6
    assert run.summary["privacy"]["epsilon"] <= 6.0


def test_a_run_whose_ledger_is_not_whole_is_not_resumed(private: Callable[..., RunConfig]) -> None:
    paths: list[Path] = []

    def stop(row: dict[str, Any]) -> None:
        if row["round"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(private(rounds=6, privacy__epsilon=6.0), on_start=lambda path, *_: paths.append(path), on_round=stop)
    ledger = paths[0] / "ledger.jsonl"
    first, _, third = ledger.read_text().splitlines()
    ledger.write_text(f"{first}\n{third}\n")
    with pytest.raises(InputError, match="does not say what round 2 has spent, of 3 that are done"):
        resume(paths[0])
    ledger.unlink()
    with pytest.raises(InputError, match="does not say what round 1 has spent"):
        resume(paths[0])


def test_a_client_remembers_the_most_of_what_it_and_the_ledger_know(
    private: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = private(privacy__noise="local", privacy__noise_multiplier=4.0)
    event = Event(1.0, 2.0)
    privacy = Privacy(config, load(config), tmp_path)
    privacy.ledger.spend(1, [(0, event, 2), (1, event, 3)])
    with engine(config, federation_of(config)) as inner:
        grid = ObservedGrid(inner)
        # An answer of client 0 never arrived.
        keep_spent(grid.client_states.setdefault(node_of(0), RecordDict()), {event: 5})
        privacy.remind(grid)
        known = [spent_by(grid.client_states.get(node_of(client), RecordDict())) for client in range(3)]
    assert known == [{event: 5}, {event: 3}, {}]


def test_local_noise_leaves_with_every_update_and_each_client_pays_for_itself(
    private: Callable[..., RunConfig],
) -> None:
    r = replace(
        _round("mlp"), sizes=(1, 1), global_params={"w": torch.zeros(20_000)}, config={records.CLIPPING_NORM: 0.5}
    )
    update = LocalUpdate({"w": torch.zeros(2, 20_000)}, torch.zeros(2))
    found = with_noise(update, r, 3.0, [Secret(), Secret()]).params["w"]
    assert found.std().item() == pytest.approx(3.0 * 0.5, rel=0.02)
    assert abs(torch.corrcoef(found)[0, 1]) < 0.03
    run = simulate(private(clients=6, sampled=3, rounds=4, privacy__noise="local", privacy__noise_multiplier=4.0))
    said, took = run.summary["privacy"], _drawn(run.path)
    for client in range(6):
        times = sum(who == client for _, who in took)
        # Two updates are 2 S apart, so that a multiplier of 4 protects like 2; nothing is gained by sampling.
        assert said["clients"].get(str(client), 0.0) == pytest.approx(epsilon({Event(1.0, 2.0): times}, 1e-3))
    assert said["epsilon"] == max(said["clients"].values())
    page = (run.path / "report.html").read_text()
    assert "who took part shows" in page
    assert "took part at all" not in page


def test_a_client_that_adds_noise_itself_is_not_asked_twice_for_the_price_of_once(
    private: Callable[..., RunConfig],
) -> None:
    settings = {"strategy": "foreign_plugins:Twice", "privacy__noise": "local", "privacy__noise_multiplier": 4.0}
    with pytest.raises(RuntimeError, match="asks a client twice at once"):
        simulate(private(**settings))


def test_a_client_whose_budget_is_spent_stays_away_and_the_run_ends_with_the_last(
    private: Callable[..., RunConfig],
) -> None:
    two = epsilon({Event(1.0, 2.0): 2}, 1e-3)
    settings = {"privacy__noise": "local", "privacy__noise_multiplier": 4.0, "privacy__epsilon": two + 0.01}
    run = simulate(private(clients=4, rounds=9, **settings))
    assert (run.summary["rounds"], run.summary["stopped_by"]) == (2, "privacy budget")
    run = simulate(private(clients=4, sampled=2, rounds=9, **settings))
    reasons = [f["reason"] for row in _rows(run.path) for f in row["failures"]]
    assert reasons
    assert all("its privacy budget is spent" in reason for reason in reasons)
    assert max(np.bincount([client for _, client in _drawn(run.path)])) == 2


@pytest.mark.parametrize("start", [0.1, 10.0])
def test_adaptive_clipping_finds_its_quantile_from_ten_times_too_small_or_too_large(start: float) -> None:
    config = RunConfig.of({
        "clients": 1000, "sampled": 100, "privacy.level": "client", "privacy.noise-multiplier": 1.0,
        "privacy.clipping": "adaptive", "privacy.clipping-norm": start,
    })  # fmt: skip
    level, rng, norm, seen = ClientLevel.of(config), np.random.default_rng(0), start, []
    for _ in range(150):
        norms = rng.lognormal(0.0, 0.5, rng.binomial(1000, 0.1))
        noisy = np.sum((norms <= norm) - 0.5) + level.count_noise * rng.standard_normal()
        norm = level.next_norm(norm, noisy / level.expected + 0.5)
        seen.append(norm)
    # The median of a log-normal of mean 0 is 1.
    assert np.mean(seen[-50:]) == pytest.approx(1.0, rel=0.1)


def test_the_count_of_adaptive_clipping_has_its_part_in_the_budget() -> None:
    config = RunConfig.of({"clients": 1000, "sampled": 200, "privacy.level": "client", "privacy.noise-multiplier": 1.0})
    level = ClientLevel.of(config.with_(privacy__clipping="adaptive"))
    # Two Gaussian mechanisms on one sample, of sensitivity S and 1/2: 1 / z^2 = 1 / z_sum^2 + 1 / (2 sigma_b)^2.
    assert level.count_noise == 10.0
    assert level.sum_multiplier**-2 + (2 * level.count_noise) ** -2 == pytest.approx(1.0)
    assert ClientLevel.of(config).sum_multiplier == 1.0


def test_the_norm_moves_as_andrew_et_al_say(private: Callable[..., RunConfig]) -> None:
    settings = {"rounds": 2, "privacy__clipping": "adaptive", **SILENT}
    for norm, within in ((2.0, 0.5), (4.0, 1.0), (0.5, 0.0)):
        # Updates of 3 and 1. The count of two clients has noise of 0.1.
        config = _lines(private, "1,3,1;1,1,1", privacy__clipping_norm=norm, **settings)
        first, second = (row["privacy"] for row in _rows(simulate(config).path))
        assert first["within_clipping_norm"] == pytest.approx(within, abs=0.2)
        moved = norm * np.exp(-0.2 * (first["within_clipping_norm"] - 0.5))
        assert (first["clipping_norm"], second["clipping_norm"]) == (norm, pytest.approx(moved))


def test_banded_noise_costs_an_event_a_cycle_and_takes_noise_away_again(private: Callable[..., RunConfig]) -> None:
    settings = {"clients": 32, "sampled": 4, "rounds": 16, "privacy__epsilon": 8.0, "learning_rate": 1e-9,
                "privacy__noise_seed": 0, "partition__min_examples": 4}  # fmt: skip
    banded = simulate(private(**settings, privacy__mechanism="banded"))
    rows = _rows(banded.path)
    # Two cycles of eight rounds in which every client has its turn.
    assert [row["privacy"]["epsilon"] for row in rows] == sorted(row["privacy"]["epsilon"] for row in rows)
    assert len({row["privacy"]["epsilon"] for row in rows}) == 2
    assert rows[-1]["privacy"]["epsilon"] <= 8.0
    assert all(row["privacy"]["simulated"] for row in rows)
    drawn = _drawn(banded.path)
    assert all(len({client for number, client in drawn if number in range(first, first + 8)}) == 32 for first in (1, 9))
    # Noise of one round, times the root of 16, is what independent noise would have grown to.
    start = _model(simulate(private(**{**settings, "rounds": 1, "privacy__epsilon": 0.0}, **QUIET)).path)
    one = simulate(private(**{**settings, "rounds": 1}, privacy__mechanism="banded"))
    each = np.std(_model(one.path) - start) / one.summary["privacy"]["noise_multiplier"]
    grown = np.std(_model(banded.path) - start) / banded.summary["privacy"]["noise_multiplier"]
    assert grown < 0.6 * 4 * each


@pytest.mark.parametrize(
    "strategy", ["fedprox", "scaffold", "feddyn", "fednova", "fedadam", "moon", "ditto", "mimelite"]
)
def test_any_strategy_of_weighted_means_takes_part(strategy: str, private: Callable[..., RunConfig]) -> None:
    settings = {"strategy": strategy, "clients": 8, "local_steps": 3, "learning_rate": 0.05, "privacy__noise_seed": 3}
    run = simulate(private(**settings, sampled=4, rounds=6, privacy__noise_multiplier=0.05))
    assert run.metrics["auroc"] > 0.7
    # The first round may be empty: it is noise on all that this strategy's clients send.
    rare = simulate(private(**settings, sampled=1, rounds=4, privacy__noise_multiplier=0.05))
    assert [row["aggregated"] for row in _rows(rare.path)] == [True] * 4
    assert [row["sampled"] for row in _rows(rare.path)] == [0, 0, 2, 1]


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ("Twice", "asks a client twice at once"),
        ("Half", r"asks \d clients where \d were drawn"),
        ("Ahead", "sends clients another model than its `outgoing` says"),
        ("OwnNorm", "sends clients another clipping norm"),
        ("OwnLoop", "made the model of round 1 without its own aggregate_train"),
    ],
)
def test_a_strategy_that_goes_round_the_noisy_sum_is_stopped(
    strategy: str, said: str, private: Callable[..., RunConfig]
) -> None:
    settings = {"clients": 12, "sampled": 8, "rounds": 2, "privacy__noise_seed": 0, "privacy__noise_multiplier": 1.0}
    paths: list[Path] = []
    with pytest.raises(RuntimeError, match=said):
        simulate(
            private(**settings, strategy=f"foreign_plugins:{strategy}"), on_start=lambda path, *_: paths.append(path)
        )
    # Nothing of it is kept: the model is the one that the run began with.
    start = simulate(private(**{**settings, "rounds": 1}, learning_rate=1e-9, privacy__clipping_norm=1e-9)).path
    np.testing.assert_allclose(_model(paths[0]), _model(start), atol=1e-6)


@pytest.mark.parametrize(
    ("noise", "told"),
    [("central", {"num-examples", "weight"}),
     ("local", {"num-examples", "weight", "client", "private-steps", "train-seconds"})],
)  # fmt: skip
def test_a_strategy_is_told_no_loss(noise: str, told: set[str], private: Callable[..., RunConfig]) -> None:
    settings = {"strategy": "foreign_plugins:Curious", "rounds": 1, "privacy__noise_multiplier": 1.0}
    Curious.told.clear()
    run = simulate(private(**settings, privacy__noise=noise))
    assert Curious.told == told
    # The operator sees it.
    assert _rows(run.path)[0]["train_loss"] > 0


@pytest.mark.parametrize("kind", ["int8", "top-k"])
def test_what_compression_adds_is_clipped_by_the_server(kind: str, private: Callable[..., RunConfig]) -> None:
    settings = {"rounds": 3, "compression__kind": kind, "privacy__clipping_norm": 0.01, "learning_rate": 5.0}
    start = _model(simulate(private(rounds=1, learning_rate=1e-9, **SILENT)).path)
    run = simulate(private(**settings, **SILENT))
    # Three rounds of four clients, none of whom moves the mean by more than a quarter of the norm.
    assert np.linalg.norm(_model(run.path) - start) <= 3 * 0.01 * (1 + 1e-3)
    assert run.summary["answers"]["rejected"] == 0
