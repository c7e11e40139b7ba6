"""Example-level privacy: Poisson batches, private steps, a ledger for each client."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg
from safetensors.numpy import load_file

from core.config import RunConfig, read_toml
from privacy.accounting import Event, epsilon
from privacy.example_level import ExampleLevel, poisson_batches
from privacy.noise import Simulated
from server.answers import NothingLearntError
from simulations.run import preset, resume, simulate
from tasks.source import federation_of


@pytest.fixture
def private(tmp_path: Path) -> Callable[..., RunConfig]:
    """Return a function from changed settings to a small run that hides examples."""

    def config(**changes: Any) -> RunConfig:
        settings = {"out": str(tmp_path / "runs"), "privacy__level": "example", "server_examples": 60, **changes}
        return preset("smoke", **settings)

    return config


def _lines(private: Callable[..., RunConfig], dataset: str, **changes: Any) -> float:
    settings = {"task": "lines:Lines", "dataset": dataset, "clients": len(dataset.split(";")), "batch_size": 8,
                "local_steps": 1, "rounds": 1, "evaluate_every": 1000, "privacy__noise_multiplier": 1e-6,
                "server_examples": 0, "learning_rate": 1.0, "privacy__noise_seed": 0}  # fmt: skip
    run = simulate(private(**{**settings, **changes}))
    return float(run.model().get_submodule("0").weight.detach())


def _model(path: Path) -> np.ndarray:
    return np.concatenate([tensor.ravel() for tensor in load_file(path / "model.safetensors").values()])


def test_a_step_is_the_clipped_sum_over_the_expected_batch(private: Callable[..., RunConfig]) -> None:
    # At w = 0 the gradient of (w x - y)^2 / 2 is -x y: -6 of five examples, each clipped to -2. All are in the batch.
    assert _lines(private, "2,3,5", privacy__clipping_norm=2.0) == pytest.approx(2.0, abs=1e-4)
    # Gradients within the norm stay: two steps of rate 1/10 from 0 towards 3.
    found = _lines(private, "1,3,5", privacy__clipping_norm=5.0, local_steps=2, learning_rate=0.1)
    assert found == pytest.approx(3 * (1 - 0.9**2), abs=1e-4)


def test_the_divisor_is_the_expected_batch_and_not_the_drawn_one(private: Callable[..., RunConfig]) -> None:
    # Of 8 examples 4 are expected; the gradient of each is -1.
    moved = {_lines(private, "1,1,8", batch_size=4, privacy__noise_seed=seed, learning_rate=1.0) for seed in range(6)}
    counts = {round(4 * w) for w in moved}
    assert all(abs(4 * w - round(4 * w)) < 1e-3 for w in moved)
    assert len(counts) > 2


def test_the_noise_of_a_step_has_its_standard_deviation(private: Callable[..., RunConfig]) -> None:
    settings = {"rounds": 1, "clients": 2, "local_steps": 4, "learning_rate": 1.0, "privacy__clipping_norm": 1e-3}
    still = _model(simulate(private(**settings, privacy__noise_multiplier=1e-6, privacy__noise_seed=0)).path)
    found = _model(simulate(private(**settings, privacy__noise_multiplier=50.0)).path)
    # Four steps at each of two clients, whose mean is taken: z S / B sqrt(4 / 2) over an expected batch of 16.
    assert np.std(found - still) == pytest.approx(50 * 1e-3 / 16 * 2**0.5, rel=0.1)


def test_batches_are_poisson_samples_of_each_client_and_may_be_empty() -> None:
    level = ExampleLevel(RunConfig.of({"batch-size": 5, "local-steps": 400}))
    batches = poisson_batches(level, [50, 3, 20], [Simulated(0, i) for i in range(3)])
    assert batches.steps.tolist() == [400, 400, 400]
    counts = batches.weights.sum(2)
    # Rates 1/10, 1 and 1/4: five examples on average, all three, five.
    assert counts.mean(0).tolist() == pytest.approx([5, 3, 5], abs=0.3)
    assert counts[:, 0].var().item() == pytest.approx(50 * 0.1 * 0.9, rel=0.25)
    assert (counts[:, 1] == 3).all()
    for client, (first, size) in enumerate([(0, 50), (50, 3), (53, 20)]):
        for s in range(400):
            rows = batches.rows[s, client][batches.weights[s, client] > 0]
            assert len(set(rows.tolist())) == len(rows)
            assert all(first <= row < first + size for row in rows.tolist())
    rare = ExampleLevel(RunConfig.of({"batch-size": 1, "local-steps": 50}))
    assert (poisson_batches(rare, [100], [Simulated(1)]).weights.sum(2) == 0).any()


def test_every_client_has_a_ledger_and_the_run_is_as_private_as_the_worst(private: Callable[..., RunConfig]) -> None:
    config = private(partition__kind="quantity", clients=3, privacy__noise_multiplier=2.0)
    run = simulate(config)
    said = run.summary["privacy"]
    sizes = json.loads((run.path / "heterogeneity.json").read_text())["sizes"]["train"]
    for client, n in enumerate(sizes):
        steps = 3 * 2 * -(-n // 16)
        assert said["clients"][str(client)] == pytest.approx(epsilon({Event(min(1.0, 16 / n), 2.0): steps}, 1e-5))
    assert said["epsilon"] == max(said["clients"].values())


def test_of_a_budget_every_client_makes_noise_of_its_own(private: Callable[..., RunConfig]) -> None:
    run = simulate(private(partition__kind="quantity", clients=3, privacy__epsilon=5.0))
    assert all(4.98 < spent <= 5.0 for spent in run.summary["privacy"]["clients"].values())
    # The budget is planned for all rounds: none is lost.
    assert (run.summary["rounds"], run.summary["stopped_by"]) == (3, None)


def test_a_cohort_trains_as_its_clients_alone(private: Callable[..., RunConfig]) -> None:
    settings = {"privacy__epsilon": 8.0, "privacy__noise_seed": 1, "partition__kind": "quantity", "momentum": 0.5}
    together = _model(simulate(private(**settings, engine__cohort_size=4)).path)
    alone = _model(simulate(private(**settings, engine__cohort_size=1)).path)
    np.testing.assert_allclose(together, alone, atol=2e-5)


@pytest.mark.parametrize(
    "strategy", ["fedprox", "scaffold", "feddyn", "fednova", "moon", "ditto", "apfl", "fedrep", "krum", "fedyogi"]
)
def test_strategies_whose_clients_only_step_are_private(strategy: str, private: Callable[..., RunConfig]) -> None:
    run = simulate(private(strategy=strategy, clients=5, privacy__epsilon=20.0, learning_rate=0.1))
    assert run.metrics["auroc"] > 0.75
    # FedRep's rounds are two trainings, of as many steps together.
    assert run.summary["privacy"]["epsilon"] <= 20.0


def test_apfls_gradients_of_an_example_are_clipped_as_one(private: Callable[..., RunConfig]) -> None:
    # Four times (1, 2), from w = v = 0 and alpha = 1/2: the gradients are -2 for w, -1 for v and 0 for alpha.
    settings = {"dataset": "1,2,4", "batch_size": 4, "privacy__delta": 0.1}
    assert _lines(private, **settings) == pytest.approx(1, abs=1e-4)
    assert _lines(private, **settings, strategy="apfl") == pytest.approx(2 / 5**0.5, abs=1e-4)


def test_what_stays_with_the_client_needs_no_noise(private: Callable[..., RunConfig]) -> None:
    settings = {"strategy": "ditto", "privacy__noise_multiplier": 1e3, "strategy_options__proximity": 0.0}
    settings |= {"rounds": 6, "privacy__noise_seed": 1}
    run = simulate(private(**settings))
    # The global model is noise; the personal ones are as good as alone.
    assert run.summary["clients_metrics"]["accuracy"]["mean"] > 0.85
    assert run.metrics["accuracy"] < 0.85


def test_a_client_stops_when_its_budget_is_spent(private: Callable[..., RunConfig]) -> None:
    plan = {"clients": 3, "rounds": 9, "privacy__noise_multiplier": 1.0, "privacy__delta": 1e-4}
    each = simulate(private(**{**plan, "rounds": 2}))
    run = simulate(private(**plan, privacy__epsilon=each.summary["privacy"]["epsilon"] + 0.01))
    assert run.summary["stopped_by"] == "privacy budget"
    assert 2 <= run.summary["rounds"] < 9
    assert run.summary["privacy"]["epsilon"] == pytest.approx(each.summary["privacy"]["epsilon"])


def test_inputs_are_scaled_by_the_servers_own_examples(private: Callable[..., RunConfig]) -> None:
    run = simulate(private(privacy__epsilon=8.0, server_examples=60))
    constants = json.loads((run.path / "constants.json").read_text())
    own = federation_of(private(privacy__epsilon=8.0, server_examples=60)).server
    assert own is not None
    np.testing.assert_allclose(constants["mean"], own.x.mean(0, dtype=np.float64), rtol=1e-6)
    # Clients' examples have no part in that, and the server's have no protection.
    [said] = [phrase for phrase in run.summary["privacy"]["not_covered"] if "scale" in phrase]
    assert said == "the 60 examples that the server holds, whose means scale all inputs"


def test_uncovered_preprocessing_is_said_wherever_epsilon_is(private: Callable[..., RunConfig]) -> None:
    run = simulate(private(privacy__epsilon=8.0, server_examples=0, privacy__preprocessing="uncovered"))
    assert "the means and deviations that scale the inputs" in run.summary["privacy"]["not_covered"]


def test_one_seed_repeats_batches_and_noise_and_none_repeats_nothing(private: Callable[..., RunConfig]) -> None:
    seeded = private(privacy__epsilon=8.0, privacy__noise_seed=0)
    assert np.array_equal(_model(simulate(seeded).path), _model(simulate(seeded).path))
    secret = private(privacy__epsilon=8.0)
    assert not np.isclose(_model(simulate(secret).path), _model(simulate(secret).path)).any()


def test_a_gradient_that_is_not_finite_adds_nothing_and_is_counted(private: Callable[..., RunConfig]) -> None:
    # The square of a gradient of -1e30 is beyond float32; the other client's step goes to the clipped 1 of 1.
    settings = {"task": "lines:Lines", "dataset": "1e30,1,3;1,1,1", "clients": 2, "batch_size": 8, "local_steps": 1,
                "rounds": 1, "server_examples": 0, "learning_rate": 1.0, "evaluate_every": 1000}  # fmt: skip
    run = simulate(private(**settings, privacy__noise_seed=0, privacy__noise_multiplier=1e-6))
    [row] = [json.loads(line) for line in (run.path / "rounds.jsonl").open()]
    assert row["privacy"]["dropped_examples"] == 3
    # Weighted by examples: three of none and one of 1.
    assert float(run.model().get_submodule("0").weight.detach()) == pytest.approx(1 / 4, abs=1e-4)
    said = "3 of about 4 examples' gradients were not finite and added nothing"
    assert said in run.summary["warnings"][0]
    assert said in (run.path / "report.html").read_text().replace("&#x27;", "'").replace("&#39;", "'")


def test_a_run_of_noise_alone_is_a_failed_one(private: Callable[..., RunConfig]) -> None:
    with pytest.raises(NothingLearntError, match="3 of about 3 examples' gradients were not finite"):
        _lines(private, "1e30,1,3")


def test_an_example_whose_loss_is_endless_is_clipped_and_silences_nobody(private: Callable[..., RunConfig]) -> None:
    # Gradients of -1 and, clipped from -2, of -1.
    found = _lines(private, "1,1,1;1,2,1", task="lines:Endless", privacy__clipping_norm=1.0)
    assert found == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(("strategy", "steps"), [("Bare", 0), ("Over", 20)])
def test_a_client_half_that_does_not_keep_its_word_is_every_clients_error(
    strategy: str, steps: int, private: Callable[..., RunConfig]
) -> None:
    # Ten batches of 16 in two passes over 69 examples.
    with pytest.raises(RuntimeError, match=f"{steps} private steps on 10 batches: each batch is for one step"):
        simulate(private(strategy=f"foreign_plugins:{strategy}", privacy__epsilon=8.0))


def test_what_was_answered_costs_although_nothing_became_of_it(
    private: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[int] = []
    aggregate = FedAvg.aggregate_train

    def stop(self: FedAvg, server_round: int, replies: Any) -> Any:
        rounds.append(server_round)
        if rounds == [1, 2]:
            raise KeyboardInterrupt
        return aggregate(self, server_round, replies)

    monkeypatch.setattr(FedAvg, "aggregate_train", stop)
    paths: list[Path] = []
    with pytest.raises(KeyboardInterrupt):
        simulate(private(privacy__epsilon=8.0), on_start=lambda path, *_: paths.append(path))
    run = resume(paths[0])
    # Three rounds were planned; the second was paid for and lost, so that the budget is spent after two.
    assert (run.summary["rounds"], run.summary["stopped_by"]) == (2, "privacy budget")
    assert 7.9 < run.summary["privacy"]["epsilon"] <= 8.0


def test_the_ledger_goes_by_what_a_client_says_it_has_and_not_by_the_mean(
    private: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of very many clients only some describe themselves at the start.
    monkeypatch.setattr("server.evaluate.DESCRIBED", 2)
    run = simulate(private(partition__kind="quantity", clients=4, privacy__noise_multiplier=2.0))
    sizes = federation_of(RunConfig.of(read_toml(run.path / "config.toml"))).train.sizes
    assert len(set(sizes.tolist())) > 1
    for client, n in enumerate(sizes.tolist()):
        steps = 3 * 2 * -(-n // 16)
        assert run.summary["privacy"]["clients"][str(client)] == pytest.approx(
            epsilon({Event(min(1.0, 16 / n), 2.0): steps}, 1e-5)
        )
