"""simulate(config) -> Run, as a program uses it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from shelf import with_needs

from core.config import RunConfig
from core.errors import InputError
from core.metrics import score
from server.build import check
from simulations.cohort_size import Measured, measure
from simulations.run import Run, decide, preset, simulate
from strategies import STRATEGIES


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_every_strategy_learns(strategy: str, smoke: Callable[..., RunConfig]) -> None:
    # Adaptive servers and a step an answer take more rounds; FedBN has nothing to normalise in the default model.
    slow = strategy in ("fedadam", "fedyogi", "fedadagrad", "mimelite", "fedasync")
    task = {"task": "foreign_plugins:NormalisedMedical", "engine__cohort_size": 1} if strategy == "fedbn" else {}
    run = simulate(with_needs(smoke(strategy=strategy, rounds=10 if slow else 5, **task)))
    own = run.summary["clients_metrics"]["auroc"]["mean"]
    # What personal layers leave of a global model is no classifier: their clients' own models are.
    assert (own if run.summary["personal"] else run.metrics["auroc"]) > 0.95


def test_a_saved_run_predicts_raw_inputs_as_well_as_its_summary_says(smoke: Callable[..., RunConfig]) -> None:
    config = smoke()
    run = Run.open(simulate(config).path)
    central = check(config).central
    assert score(run.predict(central.x), central.y, ("auroc", "loss")) == pytest.approx(
        {name: run.metrics[name] for name in ("auroc", "loss")}
    )


def test_equal_runs_are_equal_and_other_seeds_are_not(smoke: Callable[..., RunConfig]) -> None:
    first, again, other = (simulate(smoke(rounds=1, seed=seed)).model().state_dict() for seed in (0, 0, 1))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["0.weight"], other["0.weight"])


def test_fedprox_with_a_strong_penalty_hardly_moves(smoke: Callable[..., RunConfig]) -> None:
    """The proximal term pulls each client back: with lr 0.01 and mu 90 a step multiplies the distance by 0.1."""

    def moved(**changes: object) -> float:
        model = simulate(smoke(rounds=1, learning_rate=0.01, **changes)).model()
        start = build(smoke())
        return sum(float((p - start[n]).detach().pow(2).sum()) for n, p in model.named_parameters()) ** 0.5

    def build(config: RunConfig) -> dict:
        from tasks import load
        from tasks.base import build_model

        return dict(build_model(load(config), config.seed).named_parameters())

    plain = moved()
    assert moved(strategy="fedprox", strategy_options__proximal_mu=0.0) == pytest.approx(plain)
    assert moved(strategy="fedprox", strategy_options__proximal_mu=90.0) < 0.25 * plain


def test_fedadam_takes_the_published_step_without_bias_correction(smoke: Callable[..., RunConfig]) -> None:
    """After one round m / sqrt(v) = (1 - b1) d / (sqrt(1 - b2) |d|): a weight moves by eta (1 - b1) / sqrt(1 - b2)."""
    options = {"eta": 0.01, "beta_1": 0.9, "beta_2": 0.99, "tau": 1e-12}
    changes = {f"strategy_options__{key}": value for key, value in options.items()}
    run = simulate(smoke(rounds=1, strategy="fedadam", **changes))
    from tasks import load
    from tasks.base import build_model

    config = smoke()
    start = dict(build_model(load(config), config.seed).named_parameters())
    steps = np.concatenate([(p - start[n]).abs().detach().numpy().ravel() for n, p in run.model().named_parameters()])
    assert np.median(steps) == pytest.approx(0.01 * 0.1 / 0.1, rel=1e-3)


def test_early_stopping_ends_the_run_and_says_why(smoke: Callable[..., RunConfig]) -> None:
    rows: list[dict] = []
    patience = {"early_stopping__metric": "loss", "early_stopping__patience": 2}
    run = simulate(smoke(rounds=50, learning_rate=3.0, **patience), on_round=rows.append)
    losses = [row["validation"]["loss"] for row in rows]
    best = int(np.argmin(losses))
    # The first time that two evaluations in a row were no better than the best before them.
    assert len(losses) == best + 1 + 2 < 50
    assert all(min(losses[i + 1 : i + 3]) < min(losses[: i + 1]) for i in range(best))
    assert run.summary["stopped_by"] == "no better loss for 2 evaluations"
    assert run.summary["status"] == "completed"


def test_keep_best_saves_the_model_of_the_best_validation_loss(smoke: Callable[..., RunConfig]) -> None:
    rows: list[dict] = []
    run = simulate(smoke(rounds=6, learning_rate=3.0, keep="best"), on_round=rows.append)
    best = min(rows, key=lambda row: row["validation"]["loss"])
    assert best["round"] < 6
    assert run.summary["best"]["round"] == best["round"]
    assert run.metrics == best["central"]
    until_then = simulate(smoke(rounds=best["round"], learning_rate=3.0)).model().state_dict()
    assert all(np.array_equal(tensor, until_then[name]) for name, tensor in run.model().state_dict().items())


def test_evaluate_every_skips_rounds_but_never_the_last(smoke: Callable[..., RunConfig]) -> None:
    rows: list[dict] = []
    simulate(smoke(rounds=5, evaluate_every=2), on_round=rows.append)
    assert ["central" in row for row in rows] == [False, True, False, True, True]


def test_sampling_takes_that_many_clients_and_changes_from_round_to_round(smoke: Callable[..., RunConfig]) -> None:
    run = simulate(smoke(clients=12, sampled=3, rounds=4))
    rows = pd.read_parquet(run.path / "clients.parquet").dropna(subset=["train_loss"])
    sampled = rows.groupby("round")["client"].apply(set)
    assert [len(clients) for clients in sampled] == [3] * 4
    assert len(set().union(*sampled)) > 3


def test_an_unmeasured_cohort_size_is_measured_and_recorded(smoke: Callable[..., RunConfig]) -> None:
    run = simulate(smoke(engine__cohort_size="auto", rounds=1))
    assert isinstance(preset(str(run.path / "config.toml")).engine.cohort_size, int)


def test_a_measured_cohort_size_is_remembered_for_the_same_model_and_settings(
    smoke: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDRA_CACHE", str(tmp_path))
    auto = smoke(engine__cohort_size="auto", clients=12)
    measured = measure(auto, check(auto), 1, 0.0)
    [remembered] = (tmp_path / "cohort-size").iterdir()
    assert json.loads(remembered.read_text()) == vars(measured)
    remembered.write_text('{"cohort_size": 5, "seconds": 2.0}')
    assert measure(auto, check(auto), 1, 0.0) == Measured(5, 2.0)
    assert measure(smoke(engine__cohort_size="auto", clients=12, batch_size=4), check(auto), 1, 0.0).seconds < 2
    assert len(list((tmp_path / "cohort-size").iterdir())) == 2
    remembered.write_text("half a")
    assert measure(auto, check(auto), 1, 0.0).cohort_size > 0


def test_workers_are_started_where_they_save_more_than_they_cost(
    smoke: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = smoke(engine__workers="auto", engine__cohort_size=2, clients=12)
    monkeypatch.setattr("simulations.run.os.cpu_count", lambda: 2)
    for seconds, workers in ((0.001, 0), (10.0, 2)):
        monkeypatch.setattr("simulations.run.measure", lambda *_, seconds=seconds: Measured(2, seconds))
        assert decide(config, check(config))[1] == workers
    for given in (0, 1, 2):
        assert decide(config.with_(engine__workers=given), check(config))[1] == given


def test_a_gpu_that_is_not_there_is_refused_and_the_device_is_recorded(smoke: Callable[..., RunConfig]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(InputError, match=r"no CUDA device here; set engine.device=cpu"):
        simulate(smoke(engine__device="cuda"))
    run = simulate(smoke(rounds=1))
    assert preset(str(run.path / "config.toml")).engine.device == "cpu"


@pytest.mark.slow
def test_a_compiled_run_learns_what_the_plain_one_learns(smoke: Callable[..., RunConfig]) -> None:
    plain = simulate(smoke(engine__cohort_size=4)).metrics["loss"]
    compiled = simulate(smoke(engine__cohort_size=4, engine__compile=True)).metrics["loss"]
    assert compiled == pytest.approx(plain, abs=1e-4)


def test_images_standardised_like_a_table_are_refused(smoke: Callable[..., RunConfig]) -> None:
    with pytest.raises(InputError, match=r"inputs of shape \(\d+, 1, 6, 5\) .* set standardise = 'none'"):
        simulate(smoke(task="foreign_plugins:Images"))


def test_bf16_reaches_the_clients(smoke: Callable[..., RunConfig]) -> None:
    plain = simulate(smoke()).metrics["loss"]
    halved = simulate(smoke(engine__precision="bf16")).metrics["loss"]
    assert halved == pytest.approx(plain, abs=0.02)
    assert abs(halved - plain) > 1e-7


def test_of_very_many_clients_only_some_describe_themselves_and_evaluate(
    smoke: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.evaluate.DESCRIBED", 5)
    run = simulate(smoke(clients=12, rounds=2))
    described = json.loads((run.path / "heterogeneity.json").read_text())
    assert len(described["clients"]) == len(described["names"]) == len(described["sizes"]["train"]) == 5
    assert described["names"] == [f"client {client}" for client in described["clients"]]
    rows = pd.read_parquet(run.path / "clients.parquet")
    assert set(rows.dropna(subset="test_loss")["client"]) == set(described["clients"])
    assert len(rows[rows["round"] == 1].dropna(subset="train_loss")) == 12
    assert "Of 12 clients these were drawn" in (run.path / "report.html").read_text()
    again = simulate(smoke(clients=12, rounds=2))
    assert again.metrics == run.metrics


@pytest.mark.parametrize("cohort_size", [1, 4])
def test_a_model_may_have_a_scalar_parameter(cohort_size: int, smoke: Callable[..., RunConfig]) -> None:
    run = simulate(smoke(task="foreign_plugins:ScaledMedical", engine__cohort_size=cohort_size))
    assert run.metrics["auroc"] > 0.95
    assert run.model().get_parameter("scale").item() != 1.0


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a finished run"):
        Run.open(tmp_path)


def test_a_sentence_from_on_round_ends_the_run_there(smoke: Callable[..., RunConfig]) -> None:
    run = simulate(smoke(rounds=5), on_round=lambda row: "enough" if row["round"] == 2 else None)
    summary = run.summary
    assert (summary["status"], summary["rounds"], summary["stopped_by"]) == ("completed", 2, "enough")
    assert run.metrics == simulate(smoke(rounds=2)).metrics
