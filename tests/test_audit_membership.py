"""Membership inference: rates and limits by hand, attacks on normal scores, shadows that are the run once more."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from core.seeding import rng
from privacy.audit.membership import attacks, balanced_halves, log_odds, measure
from reports.page import write_report
from server.recorder import RunFolder
from simulations.audit_membership import audit_membership
from simulations.run import one_thread, simulate
from simulations.shadows import Examples, train_shadows
from tasks import load
from tasks.source import federation_of, provide


def quiet(what: str, steps: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda count: None)


def test_log_odds_of_the_true_label() -> None:
    y = torch.tensor([1, 0])
    assert log_odds(torch.tensor([2.0, 2.0]), y).tolist() == [2, -2]
    # Two equal classes beside the true one: log(e^1 / (e^0 + e^0)).
    found = log_odds(torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]), y)
    assert found == pytest.approx([1 - np.log(2)] * 2)


def test_rates_and_their_limits_by_hand() -> None:
    # Of 200 others the two highest lie above 7 of 10 members: at 1 % two may be wrong, at 0.1 % none.
    others = np.concatenate([[5.0, 5.0], np.zeros(198)])
    members = np.concatenate([np.full(7, 1.0), np.full(3, 6.0)])
    found = measure(np.concatenate([members, others]), np.arange(210) < 10)
    rare, one_percent = found["rates"]
    assert (rare["allowed"], rare["tpr"]) == (0, 0.3)
    assert (one_percent["allowed"], one_percent["tpr"]) == (2, 1.0)
    # Clopper and Pearson: all of 10 found leaves 0.025^(1/10) as the lower limit.
    assert one_percent["low"] == pytest.approx(0.025**0.1)
    assert one_percent["high"] == 1
    assert found["auc"] == pytest.approx((7 * 198 + 3 * 200) / 2000)
    assert found["balanced_accuracy"] == pytest.approx(1 - 1 / 200, abs=0.01)
    assert found["curve"][-1] == [1.0, 1.0]


def test_scores_that_say_nothing() -> None:
    found = measure(np.zeros(300), np.arange(300) < 100)
    assert found["auc"] == 0.5
    assert [rate["tpr"] for rate in found["rates"]] == [0, 0]
    # A threshold that is best by chance on one half is none on the other.
    guesses = [measure(rng(seed, "noise").normal(size=300), np.arange(300) < 100) for seed in range(40)]
    assert np.mean([guess["balanced_accuracy"] for guess in guesses]) == pytest.approx(0.5, abs=0.02)


def test_each_example_is_in_half_of_the_shadows() -> None:
    inside = balanced_halves(50, 8, np.random.default_rng(0))
    assert inside.shape == (8, 50)
    assert (inside.sum(0) == 4).all()
    assert inside.sum(1).min() > 10


def test_lira_sees_what_a_threshold_does_not() -> None:
    """Examples differ in difficulty by 5, members gain 1: only who knows each one's difficulty can tell."""
    g = np.random.default_rng(0)
    difficulty, inside = 5 * g.normal(size=1000), balanced_halves(1000, 16, g)
    member = np.arange(1000) < 500
    shadows = difficulty + inside + 0.3 * g.normal(size=(16, 1000))
    odds = difficulty + member + 0.3 * g.normal(size=1000)
    found = {name: measure(scores, member) for name, scores in attacks(odds, shadows, inside).items()}
    assert found["threshold"]["auc"] < 0.6
    assert found["lira"]["auc"] > 0.95
    assert found["lira offline"]["auc"] > 0.95
    assert found["lira"]["rates"][1]["tpr"] > 0.5 > 0.1 > found["threshold"]["rates"][1]["tpr"]
    assert list(attacks(odds, None, None)) == ["threshold"]


@pytest.mark.parametrize(
    "changes",
    [
        {"partition__kind": "dirichlet", "partition__alpha": 1.0},
        {"task": "digits", "local_steps": 2, "rounds": 1},
        {
            "privacy__level": "client", "privacy__noise_multiplier": 1e-6, "privacy__clipping_norm": 0.3,
            "privacy__preprocessing": "uncovered", "privacy__noise_seed": 1,
        },
        {
            "privacy__level": "example", "privacy__noise_multiplier": 1e-6, "privacy__clipping_norm": 0.3,
            "privacy__preprocessing": "uncovered", "privacy__noise_seed": 1,
        },
    ],
)  # fmt: skip
def test_a_shadow_of_all_members_is_the_run(smoke: Callable[..., Any], changes: dict[str, Any]) -> None:
    """With one batch of all examples nothing is left to chance: the shadows' federation makes the run's own model."""
    config = smoke(**{"batch_size": 4096, **changes})
    run = simulate(config)
    data, clients = federation_of(config).train, range(config.clients)
    from client.setting import inputs
    from simulations.audit_membership import constants_of, setting_of

    x, y, sizes = inputs(setting_of(config), "train", list(clients), constants_of(RunFolder.open(run.path)))
    examples = Examples(np.concatenate([x, x]), np.concatenate([y, y]), np.tile(np.repeat(clients, sizes), 2))
    inside = np.tile(np.arange(2 * len(data.y)) < len(data.y), (3, 1))
    norms = [config.privacy.clipping_norm] * config.rounds
    with one_thread():
        shadows = train_shadows(config, load(config), examples, inside, norms, lambda _: None)
    for name, weights in run.model().state_dict().items():
        assert shadows[name].shape == (3, *weights.shape)
        assert torch.allclose(shadows[name], weights.expand_as(shadows[name]), atol=2e-5)


def test_members_of_a_run_that_learnt_by_heart_are_found(smoke: Callable[..., Any]) -> None:
    """Labels drawn at random can only be learnt by heart."""
    config = smoke(rounds=5, local_epochs=20, learning_rate=0.5)
    plain = federation_of(config)
    drawn = {
        split: replace(getattr(plain, split), y=rng(0, split).integers(0, 2, len(getattr(plain, split).y)))
        for split in ("train", "validation", "test", "central")
    }
    try:
        provide(config, replace(plain, **drawn))
        run = simulate(config)
        with one_thread():
            found = audit_membership(run, RunFolder.open(run.path), 4, quiet)
    finally:
        provide(config, plain)
    assert found["members"] + found["others"] == 500
    assert found["of_central_test_set"] == 114
    for attack in found["attacks"].values():
        assert attack["auc"] > 0.6
    assert found["attacks"]["lira"]["rates"][1]["allowed"] == 1
    (run.path / "audit.json").write_text(json.dumps({"membership": found}))
    page = write_report(run.path).read_text()
    assert "Membership inference" in page
    assert "0.1\u00a0% of 182 are none" in page


def test_without_shadows_the_loss_alone_is_looked_at(smoke: Callable[..., Any]) -> None:
    run = simulate(smoke(rounds=1))
    found = audit_membership(run, RunFolder.open(run.path), 0, quiet)
    assert list(found["attacks"]) == ["threshold"]
    assert found["rounds"] == 1
