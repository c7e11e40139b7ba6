"""Canaries: what guesses prove by hand and in the paper's figures, honest runs that pass, and noise that is missing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from core.errors import InputError
from privacy.accounting import Event, epsilon
from privacy.audit import one_run
from privacy.audit.canaries import Directions, Noise, log_likelihood, most, without_drift
from privacy.noise import Simulated, Source
from reports.audit_words import lines
from reports.load import AUDIT, load
from reports.page import write_report
from reports.protection import SIMULATED
from server.recorder import RunFolder
from simulations.audit_canaries import audit_canaries, verdict
from simulations.run import Run, check_run, resume, simulate

PRIVATE = {"privacy__level": "client", "privacy__noise_multiplier": 4.0, "privacy__preprocessing": "uncovered"}


def quiet(what: str, steps: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda count: None)


@pytest.mark.parametrize(
    ("m", "r", "v", "delta", "published"),
    [
        (100, 100, 75, 0, 0.702), (100, 100, 75, 1e-4, 0.699), (1000, 100, 75, 1e-4, 0.673),
        (100_000, 1510, 1439, 1e-5, 2.675),
    ],
)  # fmt: skip
def test_the_bound_is_the_papers(m: int, r: int, v: int, delta: float, published: float) -> None:
    # Steinke, Nasr and Jagielski, appendix D and section 7: 95 % confidence.
    assert one_run.lower_bound(m, r, v, delta, 0.05) == pytest.approx(published, abs=1e-3)


def test_the_p_value_by_hand() -> None:
    # Two guesses, both right, epsilon = ln 3: (3/4)^2. With delta: alpha = max(P[W = 1], P[W < 2] / 2) = 3/8.
    assert one_run.p_value(2, 2, 2, math.log(3), 0) == pytest.approx(9 / 16)
    assert one_run.p_value(2, 2, 2, math.log(3), 0.01) == pytest.approx(9 / 16 + 2 * 2 * 0.01 * 3 / 8)
    assert one_run.p_value(100, 100, 75, math.log(3), 0) == pytest.approx(0.5535, abs=1e-4)


def test_the_bound_by_hand() -> None:
    # All of 100 right: (e^epsilon / (1 + e^epsilon))^100 = 0.05.
    q = 0.05**0.01
    assert one_run.lower_bound(100, 100, 100, 0, 0.05) == pytest.approx(math.log(q / (1 - q)), abs=1e-5)
    assert one_run.lower_bound(100, 100, 55, 0, 0.05) == 0
    # A delta of a tenth explains anything.
    assert one_run.lower_bound(1000, 100, 100, 0.1, 0.05) == 0


def test_more_canaries_reach_further_and_choosing_among_guesses_is_paid_for() -> None:
    q = (0.05 / 4) ** (1 / 1000)
    assert one_run.reach(1000, 0) == pytest.approx(math.log(q / (1 - q)), abs=1e-4)
    assert one_run.reach(100, 1e-5) < one_run.reach(1000, 1e-5) < one_run.reach(10_000, 1e-5)


def test_the_estimate_is_the_gaussian_mechanisms_epsilon() -> None:
    grid = np.linspace(-1, 1, 101)
    for mu in (0.5, 1.0, 3.0):
        found = one_run.estimate(grid + mu * grid.std(ddof=1), grid, 1e-5)
        # Balle and Wang, ICML 2018, equation 6: its delta is the one that was asked for.
        first, second = (stats.norm.cdf(sign * mu / 2 - found / mu) for sign in (1, -1))
        assert first - math.exp(found) * second == pytest.approx(1e-5, rel=1e-3)
    assert one_run.estimate(grid - 1, grid, 1e-5) == 0
    assert one_run.estimate(grid, grid, 1e-5) == 0
    assert math.isnan(one_run.estimate(grid[:1], grid, 1e-5))


@pytest.mark.parametrize("size", [16, 31, 1000])
def test_directions_are_orthonormal_and_controls_are_apart(size: int) -> None:
    count = most(size)
    directions = Directions(count, size, seed=3)
    each = directions.together(torch.eye(count))
    assert each.shape == (count, size)
    assert torch.allclose(each @ each.T, torch.eye(count, dtype=torch.float64), atol=1e-6)
    along = directions.along(each)
    assert along.shape == (count, 2 * count)
    assert torch.allclose(along, torch.eye(2 * count, dtype=torch.float64)[:count], atol=1e-6)
    with pytest.raises(ValueError, match="room for"):
        Directions(count + 1, size, seed=3)


def test_the_likelihood_ratio_is_that_of_a_sampled_gaussian() -> None:
    for q, z, x in ((0.3, 0.7, 0.9), (1.0, 2.0, -1.0)):
        density = [math.exp(-((x - mean) ** 2) / (2 * z * z)) for mean in (0, 1)]
        expected = math.log(((1 - q) * density[0] + q * density[1]) / density[0])
        assert log_likelihood(np.array(x), q, z) == pytest.approx(expected)


def test_drift_is_taken_off_and_canaries_stay() -> None:
    g = np.random.default_rng(0)
    count, sums = 400, 30
    drift = 3 * np.linspace(1, 2, sums)[:, None] * g.normal(size=(1, 2 * count))
    included = g.random(count) < 0.5
    taking = (g.random((sums, count)) < 0.5) & included
    noise = 0.3 * g.normal(size=(sums, 2 * count))
    canaries = np.concatenate([taking, np.zeros((sums, count))], axis=1)
    clear = without_drift(drift + noise + canaries, count, 0.3)
    assert clear is not None
    for seen, low, high in (((drift + noise + canaries)[:, :count], 0.45, 0.55), (clear, 0.9, 1.0)):
        right = (log_likelihood(seen, 0.5, 0.3).sum(0) > 0) == included
        # Drift three to six times a canary hides it.
        assert low < right.mean() < high
    assert without_drift(np.zeros((30, 2 * 89)), 89, 1.0) is None


def test_noise_is_measured() -> None:
    noise = Noise()
    assert noise.ratio() is None
    noise.add(0.5 * torch.from_numpy(np.random.default_rng(0).normal(size=10_000)), 0.5)
    ratio, low, high = noise.ratio()  # type: ignore[misc]
    assert low < 1 < high
    assert high - low == pytest.approx(2 * 2.576 / math.sqrt(2 * 10_000), rel=0.05)
    assert ratio == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("rate", "z", "rounds"), [(1.0, 1.0, 1), (0.5, 2.0, 20)])
def test_honest_sums_raise_no_false_alarm(rate: float, z: float, rounds: int) -> None:
    """Twenty runs without training: canaries, the real sampler and the real noise; the bound stays below epsilon."""
    count = 500
    claimed = epsilon({Event(rate, z): rounds}, 1e-5)
    bounds = []
    for run in range(20):
        source = Simulated(run)
        directions, included = Directions(count, 2048, seed=run), source.sampled(0.5, count)
        scores = np.zeros(count)
        for _ in range(rounds):
            taking = source.sampled(rate, count) & included
            noisy = directions.together(taking[None].float()) + z * source.normal(1, 2048)
            scores += log_likelihood(directions.along(noisy)[0, :count].numpy(), rate, z)
        found = one_run.audit(scores, included.numpy(), claimed, 1e-5)
        assert found.p_value > 0.05
        bounds.append(found.bound)
    assert np.mean(bounds) > 0
    assert max(bounds) < claimed


def _claim_and_bound(run: Run) -> tuple[float, dict[str, Any]]:
    found = audit_canaries(run, RunFolder.open(run.path), None, quiet)
    return run.summary["privacy"]["epsilon"], found


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": 4},
        {"rounds": 8, "sampled": 2, "privacy__clipping": "adaptive", "strategy": "scaffold"},
        {"privacy__level": "example", "rounds": 1},
    ],
)
def test_an_honest_run_passes_and_one_with_a_tenth_of_the_noise_does_not(
    smoke: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    config = smoke(**{**PRIVATE, "privacy__noise_seed": 1, **changes, "audit__canaries": 500})
    claimed, found = _claim_and_bound(simulate(config))
    assert found["verdict"] == "consistent"
    assert found["observers"]["known"]["bound"] < claimed < found["reach"]
    assert found["noise"][1] < 1 < found["noise"][2]

    real = Source.normal
    monkeypatch.setattr(Source, "normal", lambda self, *shape, **more: real(self, *shape, **more) / 10)
    claimed_again, found = _claim_and_bound(simulate(config))
    assert claimed_again == claimed
    assert found["verdict"] == "violated"
    assert found["observers"]["known"]["bound"] > claimed
    assert found["observers"]["known"]["p_value"] < 0.05
    assert found["noise"][0] == pytest.approx(0.1, rel=0.1)


def test_missing_noise_is_measured_where_guesses_cannot_reach() -> None:
    found = {"epsilon": 12.0, "reach": 5.4, "observers": {"known": {"bound": 5.4}}, "noise": [1.0, 0.98, 1.02]}
    assert verdict(found) == "not refuted"
    assert verdict({**found, "noise": [0.1, 0.09, 0.11]}) == "too little noise"
    assert verdict({**found, "epsilon": 5.0, "noise": None}) == "violated"


@pytest.mark.parametrize("level", ["client", "example"])
def test_a_run_that_was_interrupted_has_seen_the_same_canaries(smoke: Callable[..., Any], level: str) -> None:
    config = smoke(**{**PRIVATE, "privacy__level": level, "privacy__noise_seed": 1, "audit__canaries": 100})
    whole = simulate(config)
    paths: list[Path] = []

    def stop(row: dict[str, Any]) -> str | None:
        if row["round"] == 2:
            raise KeyboardInterrupt
        return None

    with pytest.raises(KeyboardInterrupt):
        simulate(config, on_start=lambda path, *_: paths.append(path), on_round=stop)
    again = resume(paths[0])
    seen = [json.loads((run.path / "canaries.json").read_text()) for run in (whole, again)]
    assert seen[0] == seen[1]
    assert len(seen[0]["included"]) == 100
    assert again.summary["privacy"]["canaries"] == {"number": 100, "included": sum(seen[0]["included"])}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "privacy.level=none has none"),
        ({**PRIVATE, "privacy__noise": "local"}, "noise that a server adds"),
        ({**PRIVATE, "privacy__population": 100}, "that is less than epsilon needs"),
        ({**PRIVATE, "audit__canaries": 600}, "more than a model of 1,025 parameters has room for; set 512 or fewer"),
    ],
)
def test_canaries_that_cannot_be_are_refused(smoke: Callable[..., Any], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_run(smoke(**{"audit__canaries": 100, **changes}))


def test_a_run_without_canaries_is_repeated_with_them_and_stays_as_it_was(smoke: Callable[..., Any]) -> None:
    run = simulate(smoke(**PRIVATE, rounds=2))
    folder = RunFolder.open(run.path)
    before = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}

    def stop(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit_canaries(run, folder, None, lambda what, steps: nullcontext(stop))
    assert {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()} == before

    for _ in range(2):
        found = audit_canaries(run, folder, None, quiet)
    assert found["repeated"]
    assert found["canaries"] == 512
    assert {file: file.read_bytes() for file in before} == before
    [again] = (run.path / "audit").iterdir()
    assert Run.open(again).summary["privacy"]["epsilon"] == run.summary["privacy"]["epsilon"]
    with pytest.raises(InputError, match="carries 512 canaries of its own"):
        audit_canaries(Run.open(again), RunFolder.open(again), 10, quiet)
    assert "This run carries 512 canaries" in write_report(again).read_text()
    assert load(again).config["audit.canaries"] == 512


def test_what_a_preset_says_of_baselines_is_no_obstacle(smoke: Callable[..., Any]) -> None:
    run = simulate(smoke(**PRIVATE, rounds=1, baselines=True, baseline__epochs=1))
    assert audit_canaries(run, RunFolder.open(run.path), 100, quiet)["canaries"] == 100


def test_a_run_that_stands_for_more_clients_is_not_called_a_liar(smoke: Callable[..., Any]) -> None:
    run = simulate(smoke(**PRIVATE, rounds=1, privacy__population=100))
    assert "stands for 100 clients" in audit_canaries(run, RunFolder.open(run.path), None, quiet)["skipped"]


def test_an_audit_says_where_the_noise_was_simulated(smoke: Callable[..., Any]) -> None:
    for seed, marked in ((0, True), (-1, False)):
        run = simulate(smoke(**PRIVATE, privacy__noise_seed=seed, rounds=1, audit__canaries=50))
        found = {"canaries": {**audit_canaries(run, RunFolder.open(run.path), None, quiet), "seconds": 1.0}}
        assert (SIMULATED in next(lines(found))) == marked
        RunFolder.open(run.path).write_json(AUDIT, found)
        page = write_report(run.path).read_text()
        assert (SIMULATED in page[page.index(">Claimed<") : page.index(">Proven<")]) == marked


def test_a_run_without_noise_has_nothing_to_prove(smoke: Callable[..., Any]) -> None:
    run = simulate(smoke(rounds=1))
    found = audit_canaries(run, RunFolder.open(run.path), None, quiet)
    assert found == {"skipped": "the run adds no noise and claims no epsilon"}
    with pytest.raises(InputError, match="claims no epsilon; drop it"):
        audit_canaries(run, RunFolder.open(run.path), 100, quiet)
