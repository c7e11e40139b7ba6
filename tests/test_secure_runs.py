"""Secure aggregation in whole runs: what strategies get is what they would get, and the server is told sums alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from core import records
from core.bundle import CLIENT_STATE
from core.config import RunConfig
from core.errors import InputError
from server.checkpoint import load
from simulations.run import Run, resume, simulate

Smoke = Callable[..., RunConfig]
SECURE = {"secure_aggregation__profile": "malicious"}
PRIVATE = {
    "privacy__level": "client", "privacy__noise_multiplier": 0.5, "privacy__delta": 1e-3, "privacy__noise_seed": 3,
    "privacy__preprocessing": "uncovered",
}  # fmt: skip
HERE: dict[str, Any] = {"engine__workers": 0, "engine__cohort_size": 2}


def _model(run: Run) -> dict[str, np.ndarray]:
    return load_file(run.path / "model.safetensors")


def _rounds(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "rounds.jsonl").read_text().splitlines()]


def _apart(one: Run, other: Run) -> float:
    """Return the largest difference of two runs' models."""
    a, b = _model(one), _model(other)
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


def _both(smoke: Smoke, **changes: Any) -> tuple[Run, Run]:
    """Return a run without and one with secure aggregation."""
    plain = {key: value for key, value in changes.items() if not key.startswith("secure_aggregation")}
    return simulate(smoke(**HERE, **plain)), simulate(smoke(**{**HERE, **SECURE, **changes}))


@pytest.mark.parametrize(
    "strategy",
    ["fedavg", "fedprox", "fedavgm", "fedyogi", "scaffold", "fednova", "feddyn", "mimelite", "moon", "ditto", "fedper"],
)
def test_a_linear_strategy_makes_the_same_model(smoke: Smoke, strategy: str) -> None:
    plain, secure = _both(smoke, strategy=strategy, rounds=2)
    # Numbers of an update are off by less than `worst_error` each; a few more times that of fednova, whose steps count.
    assert _rounds(secure)[0]["secure_aggregation"]["worst_error"] < 2e-6
    assert _apart(plain, secure) < 1e-5
    assert secure.metrics["loss"] == pytest.approx(plain.metrics["loss"], abs=1e-5)
    assert secure.summary["secure_aggregation"]["sums"] == 2


def test_after_a_round_no_number_is_further_off_than_the_bound(smoke: Smoke) -> None:
    # In a ring of 20 bits the rounding can be seen: steps are 2 * 100 / (2^17 - 1).
    plain, secure = _both(smoke, rounds=1, clients=6, secure_aggregation__bits=20)
    bound = _rounds(secure)[0]["secure_aggregation"]["worst_error"]
    assert 1e-4 < _apart(plain, secure) < bound + 1e-6


@pytest.mark.parametrize(
    "privacy",
    [{}, {"privacy__noise": "local"}, {"privacy__clipping": "adaptive"}, {"privacy__weight_cap": 40}],
    ids=["central", "local", "adaptive", "weighted"],
)
def test_client_level_privacy_stands_on_the_sum(smoke: Smoke, privacy: dict[str, Any]) -> None:
    plain, secure = _both(smoke, **PRIVATE, **privacy)
    assert _apart(plain, secure) < 1e-5
    own, other = plain.summary["privacy"], secure.summary["privacy"]
    assert {**own, "not_covered": []} == {**other, "not_covered": []}
    assert any("the sums of clients' numbers of examples" in phrase for phrase in other["not_covered"])


def test_noise_in_the_sum_is_as_good_as_the_servers_and_each_client_pays_for_it(smoke: Smoke) -> None:
    changes = {**PRIVATE, "clients": 10, "rounds": 4, "privacy__noise_multiplier": 0.3}
    central = simulate(smoke(**HERE, **changes))
    shared = {**changes, "privacy__noise": "distributed", "faults__dropout": 0.1, "faults__stage": "any"}
    # Nobody is corrupt: 9 of 10 have all the noise.
    run = simulate(smoke(**{**HERE, **SECURE, **shared, "secure_aggregation__corrupt": 0.0}))
    assert run.metrics["auroc"] == pytest.approx(central.metrics["auroc"], abs=0.03)
    about, rows = run.summary["privacy"], _rounds(run)
    assert (about["noise"], about["accountant"], about["simulated"]) == ("distributed", "RDP", True)
    took_part = [row["secure_aggregation"]["sums"] for row in rows]
    ledger = [json.loads(line) for line in (run.path / "ledger.jsonl").read_text().splitlines()]
    # Who was in a sum has paid for one Gaussian, and nobody has where there was none.
    assert [len(line["events"]) for line in ledger] == [sum(sums) for sums in took_part]
    assert all(event[1:] == [1.0, 0.3, 1, True] for line in ledger for event in line["events"])
    assert run.summary["secure_aggregation"]["dropped"] > 0


def test_a_budget_of_noise_in_the_sum_ends_the_run(smoke: Smoke) -> None:
    changes = {**PRIVATE, "privacy__noise": "distributed", "privacy__epsilon": 12.0, "privacy__noise_multiplier": 0.8}
    run = simulate(smoke(**HERE, **SECURE, **changes, clients=10, rounds=9, secure_aggregation__corrupt=0.0))
    assert run.summary["stopped_by"] == "privacy budget"
    assert 1 < run.summary["rounds"] < 9
    assert run.summary["privacy"]["epsilon"] <= 12
    planned = simulate(smoke(**HERE, **SECURE, **{**changes, "privacy__noise_multiplier": 0.0}, clients=10, rounds=5))
    assert planned.summary["rounds"] == 5
    assert 11.9 < planned.summary["privacy"]["epsilon"] <= 12


def test_a_model_with_running_statistics_and_a_state_at_clients(smoke: Smoke) -> None:
    plain, secure = _both(smoke, strategy="scaffold", task="test_secure_runs:Normalised", sampled=3, clients=5)
    assert _apart(plain, secure) < 1e-5


def test_workers_change_nothing(ray_session: None, smoke: Smoke) -> None:
    runs = [
        simulate(smoke(**SECURE, clients=6, engine__workers=workers, engine__cohort_size=2, faults__dropout=0.2,
                       faults__stage="any", secure_aggregation__dropout_tolerance=0.3))
        for workers in (0, 2)
    ]  # fmt: skip
    one, other = map(_model, runs)
    assert all((one[name] == other[name]).all() for name in one)
    assert runs[0].summary["secure_aggregation"] == runs[1].summary["secure_aggregation"]


@pytest.mark.parametrize(
    ("stage", "counted"),
    [("advertise", False), ("share", False), ("train", False), ("confirm", True), ("unmask", True)],
)
def test_who_drops_out_is_in_the_sum_if_its_vector_came(smoke: Smoke, stage: str, counted: bool) -> None:
    changes = {"clients": 10, "rounds": 1, "seed": 1}
    everybody = simulate(smoke(**HERE, **changes))
    lost = simulate(smoke(**HERE, **changes, faults__dropout=0.2))
    gone = _rounds(lost)[0]["lost"]
    assert 0 < gone <= 3
    secure = simulate(smoke(**HERE, **SECURE, **changes, faults__dropout=0.2, faults__stage=stage))
    assert _apart(secure, everybody if counted else lost) < 1e-5
    row = _rounds(secure)[0]
    assert row["secure_aggregation"]["dropped"] == {"mask" if stage == "train" else stage: gone}
    assert row["lost"] == (0 if counted else gone)
    assert secure.summary["secure_aggregation"]["recovered"] == (gone if stage in ("train", "confirm", "unmask") else 0)


def test_a_round_of_which_too_few_are_left_is_nobodys_and_the_run_goes_on(smoke: Smoke) -> None:
    changes = {"clients": 6, "rounds": 8, "faults__dropout": 0.35, "faults__stage": "any"}
    run = simulate(smoke(**HERE, **SECURE, **changes, secure_aggregation__dropout_tolerance=0.0))
    about = run.summary["secure_aggregation"]
    assert about["failed"] > 0
    assert about["sums"] + about["failed"] == 8
    rows = _rounds(run)
    assert [row["aggregated"] for row in rows] == [not row["secure_aggregation"]["failed"] for row in rows]
    [reason, *_] = next(row["secure_aggregation"]["failed"] for row in rows if row["secure_aggregation"]["failed"])
    assert reason.startswith("TooFewError: ")


def test_a_draw_of_too_few_for_noise_in_the_sum_is_a_round_without_one(smoke: Smoke) -> None:
    changes = {**PRIVATE, "privacy__noise": "distributed", "clients": 10, "partition__min_examples": 5, "rounds": 12}
    run = simulate(smoke(**HERE, **SECURE, **changes, sampled=4, sampling__kind="poisson"))
    assert (run.summary["status"], run.summary["rounds"]) == ("completed", 12)
    failed = [reason for row in _rounds(run) for reason in row["secure_aggregation"]["failed"]]
    assert failed
    assert {reason.partition(": ")[2] for reason in failed} <= {
        f"{drawn} clients were drawn, and 3 are needed" for drawn in (1, 2)
    }


def test_nobody_is_told_what_one_client_has(smoke: Smoke) -> None:
    run = simulate(smoke(**HERE, **SECURE, rounds=2))
    table = pd.read_parquet(run.path / "clients.parquet")
    assert table[["num_examples", "train_loss", "train_seconds"]].isna().all().all()
    about = json.loads((run.path / "heterogeneity.json").read_text())
    assert "label_counts" not in about
    plain = json.loads((simulate(smoke(**HERE, rounds=1)).path / "heterogeneity.json").read_text())
    assert about["together"]["label_counts"] == np.sum(plain["label_counts"], axis=0, keepdims=True).tolist()
    assert about["together"]["sizes"] == {split: [sum(sizes)] for split, sizes in plain["sizes"].items()}


def test_the_constants_are_those_of_a_run_in_clear(smoke: Smoke) -> None:
    plain, secure = _both(smoke, rounds=1)
    own, other = (json.loads((run.path / "constants.json").read_text()) for run in (plain, secure))
    for name in own:
        assert other[name] == pytest.approx(own[name], rel=1e-7)


def test_a_resumed_run_ends_with_the_same_bits_and_no_secret_is_on_disk(smoke: Smoke) -> None:
    config = smoke(**HERE, **SECURE, clients=8, sampled=6, rounds=4, faults__dropout=0.2, faults__stage="any",
                   secure_aggregation__dropout_tolerance=0.3)  # fmt: skip
    whole = simulate(config)
    seen: list[Path] = []

    def stop(row: dict[str, Any]) -> None:
        if row["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(config, on_start=lambda path, *_: seen.append(path), on_round=stop)
    saved = load(seen[0] / "checkpoint")
    assert saved is not None
    assert all(records.SECURE not in state for state in saved.client_states.values())
    again = resume(seen[0])
    assert _apart(whole, again) == 0
    assert again.summary["secure_aggregation"] == whole.summary["secure_aggregation"]


def test_clients_keep_what_the_server_has_counted_and_nothing_else(smoke: Smoke) -> None:
    run = simulate(smoke(**HERE, **SECURE, strategy="scaffold", clients=6, rounds=8, faults__dropout=0.35,
                         faults__stage="any", secure_aggregation__dropout_tolerance=0.0))  # fmt: skip
    assert run.summary["secure_aggregation"]["failed"] > 0
    assert run.summary["secure_aggregation"]["sums"] > 0
    saved = load(run.path / "checkpoint")
    assert saved is not None
    # The server's control is the mean of the clients', of whom some have none yet.
    controls = [state.config_records.get(CLIENT_STATE, {}).get("control") for state in saved.client_states.values()]
    kept = [np.frombuffer(control, np.float32) for control in controls if control is not None]
    own = np.concatenate([np.ravel(value) for value in saved.strategy["control"].values()])
    assert np.abs(np.sum(kept, axis=0) / 6 - own).max() < 1e-5 * np.abs(own).max() + 1e-6


@pytest.mark.parametrize("strategy", ["fedmedian", "krum", "rfa"])
def test_a_robust_rule_works_on_the_means_of_random_groups(smoke: Smoke, strategy: str) -> None:
    changes = {"strategy": strategy, "clients": 16, "rounds": 4, "secure_aggregation__groups": 5}
    run = simulate(smoke(**HERE, **SECURE, **changes, attack__kind="sign-flip", attack__fraction=0.07))
    assert run.metrics["auroc"] > 0.95
    about = run.summary["secure_aggregation"]
    assert (about["groups"], about["smallest_sum"], about["sums"]) == (5, 3, 20)
    assert sorted(_rounds(run)[0]["secure_aggregation"]["sums"]) == [3, 3, 3, 3, 4]


def test_exposure_is_that_of_solving_for_each_client_and_fixed_groups_have_none(smoke: Smoke) -> None:
    run = simulate(smoke(**HERE, **SECURE, clients=4, sampled=3, rounds=16))
    took_part = np.zeros((16, 4))
    for line in (run.path / "checkpoint" / "clients.jsonl").read_text().splitlines():
        row = json.loads(line)
        took_part[row["round"] - 1, row["trained"]["client"]] = 1
    first: dict[int, int] = {}
    for number in range(1, 17):
        for client, unit in enumerate(np.eye(4)):
            combination, *_ = np.linalg.lstsq(took_part[:number].T, unit, rcond=None)
            if np.allclose(took_part[:number].T @ combination, unit):
                first.setdefault(client, number)
    assert first
    about = run.summary["secure_aggregation"]
    assert {entry["client"]: entry["round"] for entry in about["solvable"]} == first
    assert _rounds(run)[0]["secure_aggregation"]["solvable"] == 0
    fixed = simulate(smoke(**HERE, **SECURE, clients=8, sampled=4, rounds=6, sampling__kind="cyclic"))
    assert fixed.summary["secure_aggregation"]["solvable"] == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"strategy": "foreign_plugins:Unsaid"},
            "does not say that it needs only weighted means; if so, set partial_means = True in the class",
        ),
        ({"strategy": "krum"}, "krum needs every update.*secure-aggregation.groups=5"),
        ({"strategy": "qfedavg"}, "qfedavg goes by its clients' losses"),
        ({"strategy": "fedbuff"}, "fedbuff goes by each update as it comes"),
        ({"compression__kind": "int8"}, "compression.kind=int8 sends codes.*set none"),
        ({"sampling__kind": "oort", "sampled": 3}, "sampling.kind=oort chooses clients by their losses"),
        ({"devices__kind": "lognormal"}, "devices.kind=lognormal tells the server how long"),
        ({"sampled": 2}, "2 clients a round in secure-aggregation.groups=1 are fewer than 3"),
        ({"strategy": "krum", "secure_aggregation__groups": 2}, "4 clients a round in .*groups=2 are fewer than 3"),
        ({"secure_aggregation__min_cohort": 5}, "4 clients a round .* fewer than 5"),
        ({**PRIVATE, "attack__kind": "zero"}, "the server clips what malicious clients send"),
        (
            {**PRIVATE, "privacy__noise": "distributed", "clients": 8, "secure_aggregation__groups": 2},
            "distributed is made for one sum, and secure-aggregation.groups=2 has several",
        ),
        ({"attack__kind": "wrong-shape"}, "wrong-shape sends what is no vector"),
        ({"secure_aggregation__bits": 17, "clients": 10}, "bits=17 hold sums of 2 clients, and there are 10"),
        ({"secure_aggregation__corrupt": 0.5}, "2 corrupt clients of 4 are a third or more"),
        ({"secure_aggregation__dropout_tolerance": 0.5}, "2 dropouts of 4 leave fewer than the 3"),
        ({"secure_aggregation__roster": "nowhere.json"}, "roster=nowhere.json is for `flwr run`"),
        (
            {"privacy__level": "example", "privacy__noise_multiplier": 1.0, "privacy__preprocessing": "uncovered"},
            "privacy.level=example keeps an account of each client's steps",
        ),
    ],
)
def test_what_cannot_be_summed_is_refused_before_anything_starts(
    smoke: Smoke, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        simulate(smoke(**{**HERE, **SECURE, **changes}))


def test_a_client_that_is_not_finite_drops_out_and_is_named(smoke: Smoke) -> None:
    run = simulate(smoke(**HERE, **SECURE, clients=10, rounds=1, attack__kind="non-finite", attack__fraction=0.1))
    [row] = _rounds(run)
    assert row["secure_aggregation"]["dropped"] == {"mask": 1}
    assert "not finite" in row["failures"][0]["reason"]
    assert row["aggregated"]


def test_a_strategys_own_number_is_added_up_only_if_it_says_how_large_it_is(smoke: Smoke) -> None:
    with pytest.raises(RuntimeError, match="the number surprise is not one that this run adds up"):
        simulate(smoke(**HERE, **SECURE, strategy="test_secure_runs:Surprising"))


class Normalised:
    """The smoke task with a normalisation layer that keeps running statistics."""


def _tasks() -> None:
    from torch import nn

    from strategies.fedprox import FedProx
    from tasks.medical import Medical

    def model(self: Any) -> nn.Module:
        return nn.Sequential(nn.Linear(30, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1), nn.Flatten(0))

    globals()["Normalised"] = type("Normalised", (Medical,), {"model": model})

    def local_update(r: Any) -> Any:
        from core.training import local_sgd

        update = local_sgd(r)
        return dataclasses.replace(update, metrics={"surprise": update.loss})

    globals()["Surprising"] = type(
        "Surprising", (FedProx,), {"local_update": staticmethod(local_update), "partial_means": True}
    )


_tasks()
