"""fedra privacy, and runs that stand for a larger population: the numbers are those of a run, by hand and by others."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, gaussian_mechanism
from dp_accounting.pld import PLDAccountant
from flwr.supercore.privacy_accounting import GaussianPrivacyEvent, NeighboringRelation, PrivacyConfig, SamplingMethod
from flwr.supercore.privacy_accounting.rdp_accountant import RdpAccountant
from rich.console import Console
from safetensors.numpy import load_file
from test_reports import Reader

from core.config import RunConfig, parse_override
from core.errors import InputError
from privacy.accounting import Event, epsilon
from privacy.client_level import ClientLevel
from privacy.example_level import ExampleLevel
from reports.page import write_report
from reports.protection import bound
from server.build import check
from simulations.privacy_plan import plan
from simulations.run import preset, simulate

KNOWN = {"clients": 1000, "sampled": 50, "rounds": 200, "privacy.level": "client", "privacy.delta": 1e-4}


def _fedra(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str]:
    """Run the command line in this process; return its exit code and what it printed."""
    from simulations import cli

    monkeypatch.setattr(sys, "argv", ["fedra", *arguments])
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    monkeypatch.setattr(cli, "console", Console(width=120))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out + printed.err


def _plan(parameters: int = 10_000, examples: int = 0, **settings: Any) -> dict[str, Any]:
    flat = {name.replace("__", ".").replace("_", "-"): value for name, value in settings.items()}
    return plan(RunConfig.of({**KNOWN, **flat}), parameters=parameters, examples=examples)


def test_the_known_federation_by_hand() -> None:
    found = _plan(privacy__noise_multiplier=1.0)
    [row] = [row for row in found["rows"] if row["asked"]]
    assert (row["noise_multiplier"], row["epsilon"]) == (1.0, pytest.approx(3.9994, abs=1e-4))
    # z S / (q N) = 1 / 50; over 10,000 numbers sqrt(10,000) / 50 = 2 clipping norms; 1 with twice the clients.
    assert (row["each"], row["length"], row["clients"]) == (1 / 50, 2.0, 2000)
    assert [row["noise_multiplier"] for row in found["rows"]] == [0.5, 1.0, 2.0]
    theirs = PLDAccountant(value_discretization_interval=1e-4)
    theirs.compose(PoissonSampledDpEvent(0.05, GaussianDpEvent(1.0)), 200)
    assert row["epsilon"] == pytest.approx(theirs.get_epsilon(1e-4), rel=1e-4)
    # Flower answers the same question without what sampling brings.
    config = PrivacyConfig(1e-4, 1000, NeighboringRelation.ADD_OR_REMOVE_ONE, SamplingMethod.NO_AMPLIFICATION)
    flowers = RdpAccountant(config)
    flowers.compose(GaussianPrivacyEvent(1.0, 50, 1000), 200)
    assert flowers.get_epsilon(1e-4) == pytest.approx(158.36, abs=0.01)


def test_budgets_and_rounds_are_those_of_a_run() -> None:
    found = _plan()
    for row, budget in zip(found["rows"], (1, 2, 4, 8), strict=True):
        z = row["noise_multiplier"]
        assert budget * 0.999 < row["epsilon"] <= budget
        config = RunConfig.of({**KNOWN, "privacy.epsilon": budget})
        assert z == ClientLevel.of(config).noise_multiplier
        assert row["clients"] == math.ceil(1000 * z * 100 / 50)
    drawn = found["rounds_drawn"]
    assert (drawn[0], drawn[-1], found["rounds_shown"]) == (1, 400, [50, 100, 200, 400])
    for own, row in zip(found["epsilons"], found["rows"], strict=True):
        assert own == sorted(own)
        assert own[drawn.index(200)] == row["epsilon"]
        assert own[drawn.index(50)] == epsilon({Event(0.05, row["noise_multiplier"]): 50}, 1e-4)
    asked = _plan(privacy__epsilon=4.0)
    assert [row["noise_multiplier"] for row in asked["rows"]] == [r["noise_multiplier"] for r in found["rows"][1:]]
    assert [row["asked"] for row in asked["rows"]] == [False, True, False]


def test_local_noise_by_hand() -> None:
    found = _plan(privacy__noise="local", privacy__noise_multiplier=20.0)
    [row] = [row for row in found["rows"] if row["asked"]]
    # A client is drawn in 10 of 200 rounds, and seldom in more than 10 + 2 sqrt(200 0.05 0.95) = 16.2.
    assert found["participations"] == 17
    # Two of its updates are 2 S apart: one Gaussian of 20 / (2 sqrt(17)).
    assert row["epsilon"] == pytest.approx(gaussian_mechanism.get_epsilon_gaussian(10 / math.sqrt(17), 1e-4))
    # z / sqrt(50); four times the clients make half of it.
    assert row["each"] == pytest.approx(20 / math.sqrt(50))
    assert row["clients"] == math.ceil(1000 * row["length"] ** 2)
    assert found["larger"] == []


def test_examples_by_hand() -> None:
    found = _plan(
        examples=600, privacy__level="example", local_epochs=2, privacy__noise_multiplier=1.0, privacy__delta=1e-5
    )
    [row] = [row for row in found["rows"] if row["asked"]]
    # 600 / 32 is 18.75: 19 steps an epoch.
    assert (found["steps"], found["batch_size"], found["participations"]) == (38, 32, 17)
    assert row["epsilon"] == epsilon({Event(32 / 600, 1.0): 38 * 17}, 1e-5)
    assert row["each"] == pytest.approx(1 / (32 * math.sqrt(50)))


def test_the_command_prints_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    question = ["--clients", "1000", "--sampled", "50", "--rounds", "200", "--delta", "1e-4", "--noise-multiplier", "1"]
    code, printed = _fedra(["privacy", *question, "--out", str(tmp_path / "plan")], capsys, monkeypatch)
    assert code == 0
    assert "1,000 clients, each in a round with probability 0.05 (50 on average), 200 rounds." in printed
    rows = [" ".join(line.split()) for line in printed.splitlines()]
    assert "4.00 1.0000 0.02 2.00 2,000" in rows
    assert "200 21.2 4.00 1.30" in rows
    assert "5,000 250 0.2 0.4 0.8 x 0.2" in rows
    assert "privacy.noise-multiplier=1" in printed
    found = json.loads((tmp_path / "plan" / "privacy-plan.json").read_text())
    assert [row["asked"] for row in found["rows"]] == [False, True, False]
    page = Reader((tmp_path / "plan" / "privacy-plan.html").read_text(encoding="utf-8"))
    assert page.outside == []
    for text in ("Privacy plan: 1,000 clients, 200 rounds", "z = 1.00", "usable from 2,000 clients", "x 0.2"):
        assert text in page.text
    over_rounds, over_clients = page.figures
    assert [trace["name"] for trace in over_rounds["data"]] == ["z = 0.50", "z = 1.00", "z = 2.00", "planned"]
    line = over_rounds["data"][1]
    assert line["y"][line["x"].index(200)] == pytest.approx(4.0, abs=1e-3)
    # Noise times clients stays: 2 x 1000.
    line = over_clients["data"][1]
    np.testing.assert_allclose(np.multiply(line["x"], line["y"]), 2000)
    if chromium := shutil.which("chromium"):
        flags = [
            "headless",
            "no-sandbox",
            "disable-gpu",
            "disable-dev-shm-usage",
            "virtual-time-budget=8000",
            "dump-dom",
        ]
        command = [chromium, *(f"--{flag}" for flag in flags), f"--user-data-dir={tmp_path / 'chromium'}"]
        address = (tmp_path / "plan" / "privacy-plan.html").as_uri()
        drawn = subprocess.run([*command, address], capture_output=True, text=True, timeout=120).stdout
        assert Reader(drawn).tags.count("svg.main-svg") >= 2


@pytest.mark.parametrize("local", [[], ["--local-epochs", "3"], ["--local-steps", "7"]])
def test_the_run_that_a_plan_of_examples_names_is_the_planned_one(
    local: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    question = ["--clients", "20", "--rounds", "30", "--level", "example", "--examples", "600", "--epsilon", "4"]
    code, printed = _fedra(["privacy", *question, *local], capsys, monkeypatch)
    assert code == 0
    line = printed.splitlines()[-1]
    assert line.startswith("Run it: fedra run PRESET clients=20 rounds=30 sampled=0 ")
    # These presets have other batches, epochs or steps of their own, and inputs that are scaled.
    for name in ("medical", "fraud"):
        config = preset(name, dict(map(parse_override, [*line.split("PRESET ")[1].split(), "partition.kind=iid"])))
        assert check(config).train.sizes.size == 20
        steps = ExampleLevel(config).steps(600)
        assert steps == (7 if "7" in local else 57 if local else 19)


PLAN = ["privacy", "--clients", "100", "--rounds", "10"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["privacy", "--rounds", "10"], ["Missing option '--clients'"]),
        ([*PLAN, "--sampled", "500"], ["500 is more than the 100 clients"]),
        ([*PLAN, "--delta", "0.5"], ["privacy.delta=0.5", "100 clients", "less than 0.01"]),
        ([*PLAN, "--delta", "2"], ["privacy.delta=2"]),
        ([*PLAN, "--epsilon", "4", "--noise-multiplier", "1"], ["--epsilon 4", "give one"]),
        ([*PLAN, "--epsilon", "0"], ["--epsilon 0", "more than 0"]),
        ([*PLAN, "--epsilon", "-1"], ["privacy.epsilon=-1"]),
        ([*PLAN, "--epsilon", "inf"], ["privacy.epsilon=inf"]),
        ([*PLAN, "--noise-multiplier", "0"], ["--noise-multiplier 0"]),
        ([*PLAN, "--level", "none"], ["--level none protects nobody", "client or example"]),
        ([*PLAN, "--level", "user"], ["privacy.level='user'", "'example' or 'client'"]),
        ([*PLAN, "--level", "example"], ["--examples"]),
        ([*PLAN, "--level", "example", "--examples", "0"], ["0 is not in the range"]),
        (
            [*PLAN, "--level", "example", "--examples", "50", "--noise", "local"],
            ["--noise local is for --level client"],
        ),
        ([*PLAN, "--level", "example", "--examples", "50", "--delta", "0.1"], ["50 examples of a client"]),
        ([*PLAN, "--examples", "50"], ["--examples 50 changes nothing at --level client"]),
        ([*PLAN, "--local-steps", "5"], ["--local-steps 5 changes nothing"]),
        ([*PLAN, "--noise", "nowhere"], ["privacy.noise='nowhere'"]),
        ([*PLAN, "--out", "/dev/null/x"], ["--out /dev/null/x", "not a folder to write in"]),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, printed = _fedra(arguments, capsys, monkeypatch)
    assert code == 2, printed
    assert "Traceback" not in printed
    for word in words:
        assert word in printed


def test_the_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, simulations.cli as cli\n"
        "sys.argv = ['fedra', 'privacy', '--help']\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'flwr', 'scipy', 'dp_accounting', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_a_larger_population_has_the_noise_of_its_own_run() -> None:
    def level(clients: int, sampled: int, population: int, clipping: str) -> ClientLevel:
        settings = {"clients": clients, "sampled": sampled, "privacy.population": population}
        return ClientLevel.of(RunConfig.of({**KNOWN, **settings, "privacy.epsilon": 4.0, "privacy.clipping": clipping}))

    for clipping in ("fixed", "adaptive"):
        here, there = level(100, 5, 9000, clipping), level(9000, 450, 0, clipping)
        assert (here.rate, here.noise_multiplier) == (there.rate, there.noise_multiplier)
        assert (here.expected, there.expected) == (5, 450)
        # The mean is as noisy, and so is the share of updates within the clipping norm.
        assert here.sum_multiplier / here.expected == pytest.approx(there.sum_multiplier / there.expected)
        assert here.count_noise / here.expected == pytest.approx(there.count_noise / there.expected)


def test_a_run_for_a_population_adds_its_noise_and_says_so(smoke: Callable[..., RunConfig]) -> None:
    private = {
        "rounds": 1, "sampled": 2, "standardise": "local", "sampling.kind": "poisson", "privacy.level": "client",
        "privacy.noise-multiplier": 2.0, "privacy.clipping-norm": 0.5, "privacy.delta": 1e-4, "privacy.noise-seed": 3,
    }  # fmt: skip
    models, runs = {}, {}
    for population in (0, 40, 400):
        run = simulate(RunConfig.of({**smoke().flat(), **private, "privacy.population": population}))
        models[population] = np.concatenate([v.ravel() for v in load_file(run.path / "model.safetensors").values()])
        runs[population] = run
    # The same clients and the same draws: models differ by noise alone, a tenth of it and a hundredth.
    noise = (models[0] - models[400]).astype(np.float64) / 0.99
    np.testing.assert_allclose(models[0] - models[40], 0.9 * noise, atol=1e-5)
    # z S / (q N) = 2 x 0.5 / 2.
    assert noise.std() == pytest.approx(0.5, rel=0.1)
    summary = runs[400].summary["privacy"]
    assert summary["epsilon"] == runs[0].summary["privacy"]["epsilon"]
    assert (summary["population"], "population" in runs[0].summary["privacy"]) == (400, False)
    assert summary["not_covered"][0] == "the 4 clients of this run, whose noise is that of 400"
    [row] = [json.loads(line) for line in (runs[400].path / "rounds.jsonl").read_text().splitlines()]
    assert row["privacy"]["population"] == 400
    said = "of a population of 400, extrapolated"
    assert said in Reader(write_report(runs[400].path).read_text(encoding="utf-8")).text
    assert said not in Reader(write_report(runs[0].path).read_text(encoding="utf-8")).text
    assert bound(summary).startswith(f"epsilon {summary['epsilon']:.2f} at delta 0.0001, client level, {said}")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"privacy.level": "none", "privacy.epsilon": 0.0}, "does nothing with privacy.level=none"),
        ({"privacy.level": "example", "standardise": "none"}, "does nothing with privacy.level=example"),
        ({"privacy.noise": "local", "sampling.kind": "uniform"}, "is about the server's noise"),
        ({"privacy.population": 4}, "no more than the 4 clients"),
        ({"privacy.delta": 0.01}, "0.01 with 400 clients"),
        ({"privacy.mechanism": "banded", "sampling.kind": "cyclic"}, "privacy.mechanism=gaussian"),
    ],
)
def test_a_population_is_refused_where_it_says_nothing(
    settings: dict[str, Any], words: str, smoke: Callable[..., RunConfig]
) -> None:
    private = {
        "sampled": 2, "standardise": "local", "sampling.kind": "poisson", "privacy.level": "client",
        "privacy.epsilon": 4.0, "privacy.delta": 1e-4, "privacy.population": 400,
    }  # fmt: skip
    with pytest.raises(InputError, match=words):
        simulate(RunConfig.of({**smoke().flat(), **private, **settings}))
