"""Malicious clients do what they say, and what no server should take never reaches a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from test_personalisation import _line, _round
from torch import nn

from client.attacks import Attack
from core.adversary import malicious, poisoned, triggered
from core.config import RunConfig
from core.data import Split
from core.errors import InputError
from core.training import LocalRound, LocalUpdate
from server.malice import backdoor_success, warnings
from simulations.progress import Progress
from simulations.run import Run, simulate

Smoke = Callable[..., RunConfig]
BAD = {"attack.fraction": 0.5}


def _config(kind: str, clients: int = 4, **more: Any) -> RunConfig:
    return RunConfig.of({"clients": clients, "attack.kind": kind, **BAD, **more})


def _attacked(kind: str, honest: np.ndarray, **more: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the updates (4,) that clients send whose honest ones are `honest` (4,), and who is malicious."""
    config = _config(kind, **{f"attack.{key}": value for key, value in more.items()})
    attack = Attack.of(config)
    assert attack is not None
    r = _round(_line(), sizes=(1, 1, 1, 1), batch_size=1, rate=0.1)

    def update(clients: list[int]) -> LocalUpdate:
        own = torch.tensor(honest[clients], dtype=torch.float32)
        params = {n: g + own.view(-1, *[1] * g.ndim).expand(-1, *g.shape) for n, g in r.global_params.items()}
        return LocalUpdate(params, torch.zeros(len(clients)))

    sent = attack(update([0, 1, 2, 3]), r, [0, 1, 2, 3], update)
    moved = (sent.params["0.bias"] - r.global_params["0.bias"]).flatten().numpy()
    return moved, attack.bad


HONEST = np.array([1.0, 2.0, 3.0, 5.0])


@pytest.mark.parametrize(
    ("kind", "options", "wanted"),
    [
        ("sign-flip", {}, lambda own, bad: -own),
        ("sign-flip", {"strength": 4.0}, lambda own, bad: -4 * own),
        ("scaling", {}, lambda own, bad: 10 * own),
        ("zero", {}, lambda own, bad: 0 * own),
        ("ipm", {}, lambda own, bad: np.full_like(own, -0.5 * bad.mean())),
        ("alie", {"strength": 1.5}, lambda own, bad: np.full_like(own, bad.mean() - 1.5 * bad.std())),
        # Two updates are as far from mean - g std as they are from each other at g = 1.
        ("min-max", {}, lambda own, bad: np.full_like(own, bad.mean() - 1.0 * bad.std())),
    ],
)
def test_what_malicious_clients_send_by_hand(kind: str, options: dict[str, Any], wanted: Any) -> None:
    sent, bad = _attacked(kind, HONEST, **options)
    assert bad.sum() == 2
    assert sent[~bad] == pytest.approx(HONEST[~bad])
    assert sent[bad] == pytest.approx(wanted(HONEST[bad], HONEST[bad]), abs=1e-5)


def test_colluders_train_once_for_a_round_and_a_global_model() -> None:
    attack = Attack.of(_config("ipm"))
    assert attack is not None
    first = replace(_round(_line(), sizes=(1, 1, 1, 1), batch_size=1, rate=0.1), config={"server-round": 1})
    trained: list[list[int]] = []

    def honest(clients: list[int]) -> LocalUpdate:
        trained.append(clients)
        params = {n: g.expand(len(clients), *g.shape) + len(trained) for n, g in first.global_params.items()}
        return LocalUpdate(params, torch.zeros(len(clients)))

    def sent(r: LocalRound) -> float:
        update = LocalUpdate({n: g.expand(4, *g.shape) for n, g in r.global_params.items()}, torch.zeros(4))
        bad = attack(update, r, [0, 1, 2, 3], honest).params["0.bias"][attack.bad.tolist()]
        return round(float(bad.mean() - r.global_params["0.bias"]), 6)

    # -0.5 times a mean of 1: for the second cohort of the round nobody trains.
    assert [sent(first), sent(first), len(trained)] == [-0.5, -0.5, 1]
    # Each of these rounds differs from the one before in a single thing.
    moved = {name: p + 1 for name, p in first.global_params.items()}
    assert sent(second := replace(first, global_params=moved)) == -0.5 * (2 - 1)
    assert sent(third := replace(second, sent={"control": moved})) == -0.5 * (3 - 1)
    assert sent(replace(third, config={"server-round": 2})) == -0.5 * (4 - 1)
    assert trained == [attack.colluders()] * 4


@pytest.mark.parametrize(("clients", "share", "z"), [(20, 0.2, 0.1573), (50, 0.48, 1.4261), (10, 0.5, 0.8416)])
def test_alies_z_leaves_as_many_honest_clients_on_its_side_as_a_majority_lacks(
    clients: int, share: float, z: float
) -> None:
    # Of 20 clients 4 are malicious, and 7 more make a majority of 11: 9 of the 16 honest ones are further up.
    attack = Attack.of(_config("alie", clients, **{"attack.fraction": share}))
    assert attack is not None
    assert attack._z() == pytest.approx(z, abs=1e-4)


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_gaussian_noise_is_each_clients_own_and_as_strong_as_it_says(strength: float) -> None:
    sent, bad = _attacked("gaussian", HONEST, strength=strength)
    assert len(set(sent[bad])) == 2
    attack = Attack.of(_config("gaussian", 4, **{"attack.strength": strength}))
    assert attack is not None
    r = _round(_line(), sizes=(1, 1, 1, 1), batch_size=1, rate=0.1)
    noise = attack._alone(torch.zeros(4, 10_000), r, "w")
    assert float(noise.std()) == pytest.approx(strength or 0.1, rel=0.02)


def test_the_malicious_are_a_share_of_all_and_drawn_by_the_seed() -> None:
    found = malicious(_config("zero", 100, **{"attack.fraction": 0.3}))
    assert found.sum() == 30
    assert (found == malicious(_config("alie", 100, **{"attack.fraction": 0.3}))).all()
    assert (found != malicious(_config("zero", 100, seed=1, **{"attack.fraction": 0.3}))).any()
    assert malicious(RunConfig.of({"clients": 100})).sum() == 0


def test_attacks_on_data_touch_malicious_clients_rows_only() -> None:
    x, y = np.zeros((8, 5), np.float32), np.arange(8) % 2
    for kind in ("label-flip", "backdoor"):
        config = _config(kind, **{"attack.target": 1})
        bad = malicious(config)
        x_, y_ = poisoned(config, x, y, [2, 2, 2, 2], [0, 1, 2, 3], 2)
        rows = np.repeat(bad, 2)
        assert (x_[~rows] == x[~rows]).all()
        assert (y_[~rows] == y[~rows]).all()
        if kind == "label-flip":
            assert (y_[rows] == 1 - y[rows]).all()
        else:
            carrying = (x_ == 3).any(1)
            assert (y_[carrying] == 1).all()
            assert (x_[carrying][:, :2] == 0).all()
    assert x.sum() == 0


def test_triggers_by_kind_of_input() -> None:
    assert triggered(np.zeros((1, 1, 4, 4), np.float32))[0, 0].tolist() == [[0] * 4] * 2 + [[0, 0, 1, 1]] * 2
    assert triggered(np.full((1, 3), 9))[0].tolist() == [1, 9, 9]


def _run(smoke: Smoke, kind: str, strategy: str = "fedavg", **changes: Any) -> Run:
    options = {key: changes.pop(key) for key in list(changes) if "." in key}
    config = smoke(strategy=strategy, **{"clients": 10, "rounds": 4, "engine__cohort_size": 5, **changes})
    return simulate(RunConfig.of({**config.flat(), "attack.kind": kind, "attack.fraction": 0.3, **options}))


@pytest.mark.parametrize("strategy", ["fedavg", "fedmedian", "scaffold"])
@pytest.mark.parametrize("kind", ["non-finite", "wrong-shape"])
def test_answers_that_would_poison_the_model_are_refused_counted_and_named(
    kind: str, strategy: str, smoke: Smoke
) -> None:
    run = _run(smoke, kind, strategy)
    assert run.summary["answers"]["rejected"] == 3 * 4
    assert all(torch.isfinite(t).all() for t in run.model().state_dict().values())
    assert run.metrics["accuracy"] > 0.9
    row = json.loads((run.path / "rounds.jsonl").read_text().splitlines()[0])
    assert {failure["client"] for failure in row["failures"]} == set(np.flatnonzero(malicious(_of(run))).tolist())
    reason = "numbers that are not finite" if kind == "non-finite" else "of shape"
    assert all("rejected: it sent" in f["reason"] and reason in f["reason"] for f in row["failures"])


def _of(run: Run) -> RunConfig:
    from server.recorder import RunFolder

    return RunFolder.open(run.path).config


def test_a_robust_rule_survives_what_a_mean_does_not(smoke: Smoke) -> None:
    settings = {"attack.strength": 10.0}
    mean = _run(smoke, "sign-flip", **settings)
    krum = _run(smoke, "sign-flip", "multikrum", **settings, **{"strategy-options.num-malicious-nodes": 3})
    assert mean.metrics["accuracy"] < 0.7
    assert krum.metrics["accuracy"] > 0.9
    assert krum.summary["attack"] == {
        "kind": "sign-flip", "malicious": 3, "selected": 0.0, "weight": 0.0, "backdoor_success": None,
    }  # fmt: skip


def test_a_backdoor_opens_a_mean_and_its_success_is_measured(smoke: Smoke) -> None:
    clean = _run(smoke, "none", **{"attack.fraction": 0.2})
    opened = _run(smoke, "backdoor", rounds=12, **{"attack.target": 0, "attack.fraction": 0.5})
    assert clean.summary["attack"] is None
    assert opened.summary["attack"]["backdoor_success"] > 0.5
    assert opened.metrics["accuracy"] > 0.85


@pytest.mark.parametrize("kind", ["alie", "ipm", "min-max", "gaussian", "label-flip"])
def test_an_attack_does_not_depend_on_cohorts(kind: str, smoke: Smoke) -> None:
    one, other = (_run(smoke, kind, "fedmedian", engine__cohort_size=size, rounds=2) for size in (2, 10))
    for a, b in zip(one.model().parameters(), other.model().parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_backdoors_success_is_counted_on_examples_of_other_labels() -> None:
    class Line(nn.Module):
        def __init__(self, *weights: float) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.tensor(weights))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weights

    # Three of four carry the label 1 by their first feature; the trigger is in the last three of four.
    x = np.array([[1, 0, 0, 0], [2, 0, 0, 0], [3, 0, 0, 0], [-1, 0, 0, 0]], np.float32)
    central, config = Split(x, np.array([1, 1, 1, 0])), _config("backdoor", **{"attack.target": 1})
    assert backdoor_success(config, Line(1.0, 0.0, 0.0, 0.0), central, 0.5) == 0
    assert backdoor_success(config, Line(1.0, 0.0, 0.0, 1.0), central, 0.5) == 1
    assert backdoor_success(_config("zero"), Line(1.0, 0.0, 0.0, 1.0), central, 0.5) is None


def test_a_target_that_the_task_does_not_have_is_refused(smoke: Smoke) -> None:
    with pytest.raises(InputError, match=r"attack.target=5, but the task has labels 0 to 1"):
        _run(smoke, "backdoor", **{"attack.target": 5})


def test_an_attack_that_nobody_makes_is_refused(smoke: Smoke) -> None:
    with pytest.raises(InputError, match=r"attack.fraction=0.3 of 1 clients is none"):
        _run(smoke, "zero", clients=1)


@pytest.mark.parametrize(
    ("strategy", "told", "remedy"),
    [
        ("krum", {}, "num-malicious-nodes=0), but with attack.kind=sign-flip 3 of 10 clients are; set that to as many"),
        ("multikrum", {"num-malicious-nodes": 3}, ""),
        (
            "fedtrimmedavg",
            {"beta": 0.0},
            "beta=0), but with attack.kind=sign-flip 3 of 10 clients are; set that to the",
        ),
        ("fedtrimmedavg", {}, ""),
        ("fedavg", {}, ""),
    ],
)
def test_a_robust_rule_that_expects_nobody_is_warned_of(
    strategy: str, told: dict[str, Any], remedy: str, smoke: Smoke, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {f"strategy-options.{key}": value for key, value in told.items()}
    config = RunConfig.of({**smoke(strategy=strategy, clients=10, rounds=1).flat(), **options})
    assert warnings(config) == []
    config = RunConfig.of({**config.flat(), "attack.kind": "sign-flip", "attack.fraction": 0.3})
    with Progress(config, Console(width=200)) as progress:
        run = simulate(config, on_start=progress.start)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Warning: ")]
    assert run.summary["warnings"] == [line.removeprefix("Warning: ") for line in said]
    assert len(said) == bool(remedy)
    assert all(remedy in line for line in said)
    page = (run.path / "report.html").read_text()
    assert (">Warning: " in page) == bool(remedy)
    assert remedy in page
