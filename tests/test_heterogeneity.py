"""Strategies against unlike clients, on two parabolas where every number can be checked by hand.

Clients A and B have losses a/2 w^2 and b/2 (w - 2)^2. K local steps of rate r from w lead A to w (1 - r a)^K and B to
2 + (w - 2) (1 - r b)^K.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from lines import OPTIMUM, run_lines, shared
from test_personalisation import _half, _round
from torch import nn

from core.config import RunConfig
from core.training import local_sgd
from simulations.run import Run
from strategies.agnostic import project
from strategies.moon import _features

Lines = Callable[..., float]
Smoke = Callable[..., RunConfig]
# Curvature and optimum of each client.
CLIENTS = [(1.0, 0.0), (4.0, 2.0)]


@pytest.fixture
def lines(smoke: Smoke) -> Lines:
    """Return a function from a strategy and settings to the w that the run ends with."""
    return lambda strategy, *given, **changes: shared(
        run_lines(smoke, strategy, *given, **{"rounds": 60, "local_epochs": 10, **changes})
    )


def test_fedavg_ends_where_the_drift_of_its_clients_cancels_and_not_at_the_optimum(lines: Lines) -> None:
    rho_a, rho_b = 0.9**10, 0.6**10
    assert (1 - rho_b) / (1 - (rho_a + rho_b) / 2) == pytest.approx(1.2083, abs=1e-4)
    assert lines("fedavg", rounds=20) == pytest.approx(1.2083, abs=1e-4)


@pytest.mark.parametrize("strategy", ["scaffold", "feddyn"])
def test_scaffold_and_feddyn_reach_the_optimum_however_unlike_the_clients(strategy: str, lines: Lines) -> None:
    options = {"strategy-options.alpha": 1.0} if strategy == "feddyn" else {}
    assert lines(strategy, rounds=100, **options) == pytest.approx(OPTIMUM, abs=2e-3)


@pytest.mark.parametrize("strategy", ["scaffold", "feddyn"])
def test_they_do_so_when_only_one_of_the_clients_takes_part_in_a_round(strategy: str, lines: Lines) -> None:
    options = {"strategy-options.alpha": 1.0} if strategy == "feddyn" else {}
    assert lines(strategy, sampled=1, rounds=250, **options) == pytest.approx(OPTIMUM, abs=0.05)


def _who(run: Run) -> list[list[int]]:
    """Return the clients that trained, round by round."""
    rows = pd.read_parquet(run.path / "clients.parquet").dropna(subset="num_examples")
    return [sorted(own["client"]) for _, own in rows.groupby("round")]


@pytest.mark.parametrize(("sampled", "eta"), [(2, 1.0), (1, 1.0), (1, 0.5)])
def test_four_rounds_of_scaffold_by_hand(sampled: int, eta: float, smoke: Smoke) -> None:
    def local(w: float, a: float, at: float, drift: float) -> float:
        for _ in range(2):
            w -= 0.1 * (a * (w - at) + drift)
        return w

    options = {"strategy-options.server-learning-rate": eta}
    run = run_lines(smoke, "scaffold", rounds=4, local_epochs=2, sampled=sampled, **options)
    w, c, own = 0.0, 0.0, [0.0, 0.0]
    for chosen in _who(run):
        assert len(chosen) == sampled
        ends = {k: local(w, *CLIENTS[k], c - own[k]) for k in chosen}
        new = {k: own[k] - c + (w - ends[k]) / (2 * 0.1) for k in chosen}
        c += sum(new[k] - own[k] for k in chosen) / 2
        w += eta * (sum(ends.values()) / sampled - w)
        own = [new.get(k, own[k]) for k in range(2)]
    assert shared(run) == pytest.approx(w, abs=1e-6)


@pytest.mark.parametrize("sampled", [2, 1])
def test_four_rounds_of_feddyn_by_hand(sampled: int, smoke: Smoke) -> None:
    def local(w: float, a: float, at: float, g: float) -> float:
        origin = w
        for _ in range(2):
            w -= 0.1 * (a * (w - at) - g + 0.5 * (w - origin))
        return w

    options = {"strategy-options.alpha": 0.5}
    run = run_lines(smoke, "feddyn", rounds=4, local_epochs=2, sampled=sampled, **options)
    w, h, g = 0.0, 0.0, [0.0, 0.0]
    for chosen in _who(run):
        ends = {k: local(w, *CLIENTS[k], g[k]) for k in chosen}
        g = [g[k] - 0.5 * (ends[k] - w) if k in chosen else g[k] for k in range(2)]
        h -= 0.5 * sum(end - w for end in ends.values()) / 2
        w = sum(ends.values()) / sampled - h / 0.5
    assert shared(run) == pytest.approx(w, abs=1e-6)


@pytest.mark.parametrize(
    ("strategy", "wanted"),
    [
        # One step each: A stays at 0, B comes to 0.2 and has three of four examples.
        ("fedavg", 0.15),
        ("scaffold", 0.1),
        # h is -0.5 * 0.2 / 2.
        ("feddyn", 0.1 + 0.05 / 0.5),
        # A tenth of a step.
        ("mimelite", 0.01),
    ],
)
def test_where_clients_count_the_same_examples_do_not_weigh(strategy: str, wanted: float, lines: Lines) -> None:
    options = {"strategy-options.alpha": 0.5} if strategy == "feddyn" else {}
    found = lines(strategy, "1,0,1;1,2,3", batch_size=3, local_epochs=1, rounds=1, **options)
    assert found == pytest.approx(wanted, abs=1e-6)


def test_fednova_takes_the_pull_of_unequal_numbers_of_steps_out(lines: Lines) -> None:
    # Both have curvature 1; A has 2 examples and takes 2 steps, B 8 and 8: the optimum is 0.2 * 0 + 0.8 * 2.
    unequal, settings = "1,0,2;1,2,8", {"local_epochs": 1, "learning_rate": 0.01, "rounds": 120}
    a, b = (1 - 0.99**2), (1 - 0.99**8)
    assert lines("fedavg", unequal, **settings) == pytest.approx(1.6 * b / (0.2 * a + 0.8 * b), abs=1e-3)  # 1.879
    nova = lines("fednova", unequal, **settings)
    assert nova == pytest.approx(1.6 * (b / 8) / (0.2 * a / 2 + 0.8 * b / 8), abs=1e-3)
    assert nova == pytest.approx(1.6, abs=0.011)


def test_fednova_divides_by_what_steps_with_momentum_add_up_to(lines: Lines) -> None:
    # Two steps each: FedNova is FedAvg. B: velocity -8, w = 0.8; gradient -4.8, velocity -8.8, w = 1.68. A stays at 0.
    assert lines("fednova", momentum=0.5, local_epochs=2, rounds=1) == pytest.approx(1.68 / 2, abs=1e-6)
    # A takes one step, ||a|| = 1, and B two, a = (1 + 0.5, 1): velocity -2, w = 0.2; velocity -2.8, w = 0.48.
    # d = 0.48 / 2.5, and tau_eff = 1/3 * 1 + 2/3 * 2.5 = 2.
    found = lines("fednova", "1,0,1;1,2,2", momentum=0.5, local_epochs=1, rounds=1)
    assert found == pytest.approx(2 * 2 / 3 * 0.48 / 2.5, abs=1e-6)


def test_fedprox_stays_nearer_to_the_global_model(lines: Lines) -> None:
    # With mu = 1 the step of A is w -= 0.1 (w + (w - w0)): one round from w0 = 0 leaves A at 0; B by hand.
    w = 0.0
    for _ in range(3):
        w -= 0.1 * (4 * (w - 2) + w)
    found = lines("fedprox", rounds=1, local_epochs=3, **{"strategy-options.proximal-mu": 1.0})
    assert found == pytest.approx(w / 2, abs=1e-6)


def _fixed_point(end: Callable[[float, float, float], float]) -> float:
    """Return the w at which the mean of both clients' ends is w; an end is linear in w. Arguments: a, w*, w."""
    at_0, at_1 = (sum(end(a, best, w) for a, best in CLIENTS) / 2 for w in (0.0, 1.0))
    return at_0 / (1 - (at_1 - at_0))


def test_fedprox_ends_nearer_to_the_optimum_than_fedavg(lines: Lines) -> None:
    def end(a: float, best: float, w: float) -> float:
        pulled_to = (a * best + 4 * w) / (a + 4)
        return pulled_to + (w - pulled_to) * (1 - 0.1 * (a + 4)) ** 10

    wanted = _fixed_point(end)
    assert wanted == pytest.approx(1.4286, abs=1e-3)
    assert lines("fedprox", **{"strategy-options.proximal-mu": 4.0}) == pytest.approx(wanted, abs=1e-4)
    # FedAvg ends at 1.2083 with the same steps.
    assert abs(wanted - OPTIMUM) < 0.45 * abs(1.2083 - OPTIMUM)


def test_mime_lites_momentum_holds_its_clients_together(lines: Lines) -> None:
    def end(a: float, best: float, w: float) -> float:
        m = (w + 4 * (w - 2)) / 2
        pulled_to = best - 0.9 * m / (0.1 * a)
        return pulled_to + (w - pulled_to) * (1 - 0.1 * 0.1 * a) ** 10

    wanted = _fixed_point(end)
    assert lines("mimelite", rounds=200) == pytest.approx(wanted, abs=5e-4)
    assert abs(wanted - OPTIMUM) < 0.1 * abs(1.2083 - OPTIMUM)


def test_two_rounds_of_mime_lite_by_hand(lines: Lines) -> None:
    w, m = 0.0, 0.0
    for _ in range(2):
        ends = []
        for a, at in CLIENTS:
            y = w
            for _ in range(2):
                y -= 0.1 * (0.5 * a * (y - at) + 0.5 * m)
            ends.append(y)
        m = 0.5 * sum(a * (w - at) for a, at in CLIENTS) / 2 + 0.5 * m
        w = sum(ends) / 2
    found = lines("mimelite", rounds=2, local_epochs=2, **{"strategy-options.server-momentum": 0.5})
    assert found == pytest.approx(w, abs=1e-6)


@pytest.mark.parametrize("q", [0.0, 1.0, 5.0])
def test_qfedavg_ends_where_losses_to_the_power_of_q_balance_the_gradients(q: float, lines: Lines) -> None:
    """(w^2 / 2)^q w = (2 (2 - w)^2)^q 4 (2 - w) where w / (2 - w) = 4^((q + 1) / (2 q + 1)): 1.6, 1.432, 1.361.

    The larger q, the nearer are the clients' losses: at 4/3 they would be equal.
    """
    ratio = 4 ** ((q + 1) / (2 * q + 1))
    w = 2 * ratio / (1 + ratio)
    found = lines("qfedavg", rounds=150, local_epochs=1, **{"strategy-options.q": q})
    assert found == pytest.approx(w, abs=1e-3)
    a, b = found**2 / 2, 2 * (found - 2) ** 2
    assert a - b == pytest.approx({0.0: 0.96, 1.0: 0.379, 5.0: 0.110}[q], abs=0.005)


def test_two_rounds_of_agnostic_learning_by_hand(lines: Lines) -> None:
    # Losses at w = 0 are 0 and 8: lambda goes from (0.5, 0.5) to (0.5, 0.9) and back to the simplex, (0.3, 0.7).
    w = 0.5 * 0 + 0.5 * 0.8
    w = 0.3 * 0.9 * w + 0.7 * (w - 0.1 * 4 * (w - 2))
    options = {"strategy-options.lambda-learning-rate": 0.05}
    assert lines("agnostic", rounds=2, local_epochs=1, **options) == pytest.approx(w, abs=1e-6)


def test_four_rounds_of_agnostic_learning_by_hand_where_two_of_three_take_part(smoke: Smoke) -> None:
    """Lambda begins with the examples' shares; those who did not answer are stood in for by those who did."""
    best, mixture, w = np.array([0.0, 2.0, 4.0]), np.array([0.2, 0.2, 0.6]), 0.0
    options = {"strategy-options.lambda-learning-rate": 0.05}
    data = "1,0,1;1,2,1;1,4,3"
    run = run_lines(smoke, "agnostic", data, rounds=4, local_epochs=1, batch_size=3, sampled=2, **options)
    for chosen in _who(run):
        assert len(chosen) == 2
        ends = w - 0.1 * (w - best[chosen])
        losses = np.zeros(3)
        losses[chosen] = (w - best[chosen]) ** 2 / 2
        w = float(np.average(ends, weights=mixture[chosen]))
        mixture = project(mixture + 0.05 * 3 / 2 * losses)
    assert shared(run) == pytest.approx(w, abs=1e-6)


def test_agnostic_learning_finds_the_model_that_is_best_for_the_worst_mixture(lines: Lines) -> None:
    # w^2 / 2 = 2 (w - 2)^2 where w = 4/3: no mixture of the two has a greater least loss.
    found = lines("agnostic", rounds=200, local_epochs=1, **{"strategy-options.lambda-learning-rate": 0.05})
    assert found == pytest.approx(4 / 3, abs=0.02)


def test_the_simplex_projection_is_the_nearest_point() -> None:
    assert project(np.array([0.5, 0.5])).tolist() == [0.5, 0.5]
    assert project(np.array([2.0, 0.0])).tolist() == [1.0, 0.0]
    assert project(np.array([0.8, 0.6, -1.0])) == pytest.approx([0.6, 0.4, 0.0])


@pytest.mark.parametrize("strategy", ["scaffold", "mimelite", "fednova"])
def test_an_optimiser_that_a_papers_formula_does_not_hold_for_is_refused(strategy: str, lines: Lines) -> None:
    from core.errors import InputError

    with pytest.raises(InputError, match=r"optimizer=adam .* set optimizer=sgd momentum=0"):
        lines(strategy, optimizer="adam")


def test_equal_clients_make_scaffold_fednova_and_feddyns_first_round_fedavg(lines: Lines) -> None:
    same = {"dataset": "2,4,1;2,4,1", "rounds": 1, "local_epochs": 3}
    plain = lines("fedavg", **same)
    assert lines("scaffold", **same) == pytest.approx(plain)
    assert lines("fednova", **same) == pytest.approx(plain)
    assert torch.tensor(plain).isfinite()


def test_moon_keeps_features_like_the_global_models_rather_than_like_the_clients_last_ones() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0))
    r = _round(net, sizes=(64,), batch_size=2, rate=0.1)
    last = {name: 0.5 * torch.randn_like(t) for name, t in r.global_params.items()}
    ends, gaps = [], []
    for mu in (0.0, 1.0, 5.0):
        half, own = _half("moon", r, mu=mu)
        state = {"previous": {name: t.unsqueeze(0) for name, t in last.items()}}
        ends.append({name: p[0] for name, p in half.local_update(replace(own, state=state)).params.items()})
        z, now, before = (_features(net, weights, r.x)[1] for weights in (ends[-1], r.global_params, last))
        gaps.append(float((torch.cosine_similarity(z, now) - torch.cosine_similarity(z, before)).mean()))
    assert gaps[2] > gaps[1] + 0.1 > gaps[0] + 0.2
    # Without the term it is FedAvg.
    plain = local_sgd(r).params
    assert all(torch.allclose(p, plain[name][0], atol=1e-6) for name, p in ends[0].items())
