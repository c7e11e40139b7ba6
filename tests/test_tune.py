"""fedra tune: what is searched, what a trial is, and that a search can stop anywhere and goes on as if it had not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from test_reports import Reader

from core.errors import InputError
from reports.load import nested
from server.recorder import RunFolder
from simulations.run import Run, preset, simulate
from simulations.search_space import Choices, Range, Space
from simulations.tune import resume_tune, tune
from simulations.tune_progress import TuneProgress

RATES = "0.0001..2.0"


def _tune(place: Path, trials: int, **settings: Any) -> dict[str, Any]:
    """Search the smoke preset and return what tune.json holds, with the folder."""
    flat = {key.replace("__", ".").replace("_", "-"): value for key, value in settings.items()}
    return _results(tune("smoke", {"out": str(place), **flat}, trials=trials))


def _results(folder: Path) -> dict[str, Any]:
    return {**json.loads((folder / "tune.json").read_text()), "folder": folder}


def _outcome(results: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [(trial["params"], trial["value"], trial["state"], trial["rounds"]) for trial in results["trials"]]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return a search of 14 trials: ten at random, four that learn from them."""
    return _tune(tmp_path_factory.mktemp("searched"), 14, learning_rate=RATES, local_epochs="1..3", rounds=4)


def test_the_best_trial_has_the_best_validation_value_and_others_are_far_worse(searched: dict[str, Any]) -> None:
    values = [trial["value"] for trial in searched["trials"] if trial["state"] == "completed"]
    best = searched["best"]
    assert (searched["status"], searched["metric"], len(searched["trials"])) == ("completed", "loss", 14)
    assert best["value"] == min(values) < 0.15 < 0.5 < max(values)
    assert best["params"]["learning-rate"] > 0.1
    validation = [json.loads(line) for line in (searched["folder"] / best["run"] / "rounds.jsonl").open()]
    assert validation[-1]["validation"]["loss"] == best["value"]


def test_best_toml_is_a_preset_that_repeats_the_best_trial(searched: dict[str, Any], tmp_path: Path) -> None:
    repeated = simulate(preset(str(searched["folder"] / "best.toml"), {"out": str(tmp_path)}))
    assert repeated.summary["validation_metrics"]["loss"] == searched["best"]["value"]
    assert repeated.metrics == searched["best"]["test_metrics"]


def test_test_metrics_are_shown_of_the_best_trial_alone(searched: dict[str, Any]) -> None:
    folder = searched["folder"]
    assert [trial["trial"] for trial in searched["trials"] if "test_metrics" in trial] == []
    assert [page.parent for page in folder.glob("runs/*/report.html")] == [folder / searched["best"]["run"]]


def test_a_trial_behind_the_median_is_stopped_and_recorded_as_pruned(searched: dict[str, Any]) -> None:
    pruned = [trial for trial in searched["trials"] if trial["state"] == "pruned"]
    assert pruned
    # Five completed trials make a median.
    assert [trial["state"] for trial in searched["trials"][:5]] == ["completed"] * 5
    for trial in pruned:
        summary = Run.open(searched["folder"] / trial["run"]).summary
        assert 2 <= trial["rounds"] == summary["rounds"] < 4
        assert summary["stopped_by"].startswith("pruned: validation loss")
        assert trial["value"] > searched["best"]["value"]


def test_an_interrupted_search_goes_on_as_if_it_had_not_stopped(
    searched: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = []

    def interrupt(*_: Any) -> None:
        rounds.append(1)
        if len(rounds) == 4 * 4 + 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TuneProgress, "round", interrupt)
        with pytest.raises(KeyboardInterrupt):
            _tune(tmp_path, 14, learning_rate=RATES, local_epochs="1..3", rounds=4)
    [folder] = tmp_path.iterdir()
    stopped = _results(folder)
    assert (stopped["status"], len(stopped["trials"])) == ("interrupted", 4)
    assert "test_metrics" not in stopped["best"]
    assert list(folder.glob("runs/*/report.html")) == []
    # A killed search leaves a trial that is still running.
    study = optuna.load_study(study_name="tune", storage=f"sqlite:///{folder / 'study.db'}")
    assert study.trials[-1].state == optuna.trial.TrialState.FAIL
    study.ask()
    # Wherever it goes on, and whatever became of the preset.
    moved = folder.rename(tmp_path / "moved")
    assert _outcome(_results(resume_tune(moved))) == _outcome(searched)
    assert len(RunFolder.open(moved / _results(moved)["best"]["run"]).config.flat()) > 40
    with pytest.raises(InputError, match=r"has 14 trials already.*--trials 24"):
        resume_tune(moved)
    more = _results(resume_tune(moved, trials=15))
    assert _outcome(more)[:14] == _outcome(searched)
    assert len(more["trials"]) == 15


def test_two_processes_do_not_search_one_folder(searched: dict[str, Any]) -> None:
    folder, code = (
        searched["folder"],
        (
            "import sys, filelock\n"
            "with filelock.FileLock(sys.argv[1], timeout=0):\n"
            "    print('locked', flush=True)\n"
            "    sys.stdin.read()\n"
        ),
    )
    command = [sys.executable, "-c", code, str(folder / "study.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(InputError, match=r"is being searched by another process; wait until it ends, or end it\.$"):
            resume_tune(folder, trials=15)
        other.kill()
    # A process that is killed keeps nobody out: what is refused now is a search that is complete.
    with pytest.raises(InputError, match="has 14 trials already"):
        resume_tune(folder)


def test_failing_trials_are_recorded_and_what_was_tried_is_not_trained_again(tmp_path: Path) -> None:
    results = _tune(tmp_path / "a?b#c %41", 8, learning_rate="0.2,1e30", rounds=1)
    failed = [trial for trial in results["trials"] if trial["state"] == "failed"]
    assert failed
    assert all("lower learning-rate or set gradient-clip" in trial["error"] for trial in failed)
    assert all(trial["params"]["learning-rate"] == 1e30 for trial in failed)
    assert results["best"]["params"] == {"learning-rate": 0.2}
    assert len(list((results["folder"] / "runs").iterdir())) == 2
    assert (results["folder"] / "study.db").is_file()
    first = {trial["params"]["learning-rate"]: trial["trial"] for trial in reversed(results["trials"])}
    for trial in results["trials"]:
        number = first[trial["params"]["learning-rate"]]
        assert trial.get("same_as", trial["trial"]) == number


def test_a_search_in_which_nothing_works_fails_and_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"no trial was completed; the first: .* not finite"):
        _tune(tmp_path, 2, learning_rate="1e30,1e31", rounds=1)
    [folder] = tmp_path.iterdir()
    assert [trial["state"] for trial in _results(folder)["trials"]] == ["failed", "failed"]
    assert "Failed trials" in (folder / "tune.html").read_text()


def test_options_are_tried_with_the_strategies_that_have_them(tmp_path: Path) -> None:
    options = {"strategy_options__proximal_mu": "0.01..1.0", "strategy_options__server_momentum": 0.5}
    results = _tune(tmp_path, 8, strategy="fedavg,fedprox,fedavgm", rounds=1, **options)
    seen = set()
    for trial in results["trials"]:
        strategy = trial["params"]["strategy"]
        seen.add(strategy)
        assert ("strategy-options.proximal-mu" in trial["params"]) == (strategy == "fedprox")
        config = RunFolder.open(results["folder"] / trial["run"]).config
        assert ("server-momentum" in config.strategy_options) == (strategy == "fedavgm")
    assert seen == {"fedavg", "fedprox", "fedavgm"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.001..0.1", Range(0.001, 0.1, whole=False, log=True)),
        ("1e-3..1", Range(0.001, 1, whole=False, log=True)),
        ("0.1..0.9", Range(0.1, 0.9, whole=False, log=False)),
        ("0.0..0.9", Range(0.0, 0.9, whole=False, log=False)),
        ("1..100", Range(1, 100, whole=True, log=False)),
        ("16,32", Choices((16, 32))),
        ("a, b,a", Choices(("a", "b"))),
        ("0.1,1e-2", Choices((0.1, 0.01))),
        ("true,false", Choices((True, False))),
    ],
)
def test_what_is_searched_is_as_it_is_written(text: str, expected: Range | Choices) -> None:
    fixed = {"strategy": "fedavg", "data-dir": "../a,b", "dataset": "1,1", "processors": "a:b,c:d"}
    space = Space.of({"x": text, **fixed})
    assert space.searched == {"x": expected}
    assert space.fixed == fixed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["smoke"], ["nothing to search", "learning-rate=0.001..0.1"]),
        ([], ["name a preset"]),
        (["smok", "learning-rate=0.1..1.0"], ["unknown preset 'smok'", "did you mean 'smoke'"]),
        (["smoke", "learning-rate=0.1..0.01"], ["learning-rate=0.1..0.01 is not a range", "smaller one first"]),
        (["smoke", "learning-rate=a..0.1"], ["learning-rate=a..0.1 is not a range"]),
        (["smoke", "learning-rate=0.1..inf"], ["learning-rate=0.1..inf is not a range"]),
        (["smoke", "strategy=fedavg,"], ["strategy=fedavg, has an empty choice"]),
        (["smoke", "strategy=fedavg,fedx"], ["unknown strategy 'fedx'"]),
        (["smoke", "local-epochs=0..3"], ["local-epochs=0 is not valid"]),
        (["smoke", "local-epochs=1.0..3.0"], ["local-epochs=1.764", "whole number"]),
        (["smoke", "momentum=0.5..1.0"], ["momentum=1.0", "below 1"]),
        (
            ["smoke", "strategy=fedavg,scaffold", "momentum=0.5..0.9", "rounds=1..2"],
            ["momentum=0.5: scaffold's", "comes of searching strategy=fedavg,scaffold momentum=0.5..0.9; narrow that."],
        ),
        (["smoke", "learning-rate=0.1..1.0", "--metric", "AUROC"], ["unknown metric 'AUROC'", "did you mean 'auroc'"]),
        (["smoke", "learning-rat=0.1..1.0"], ["did you mean 'learning-rate'"]),
        (["smoke", "strategy-options.proximal-mu=0.1..1.0"], ["unknown fedavg option"]),
        (["smoke", "strategy=fedavg,krum", "strategy-options.proximal-mu=0.1..1.0"], ["option of none of strategy="]),
        (["smoke", "seed=0..3"], ["seed=0..3 cannot be searched"]),
        (["smoke", "learning-rate=0.1..1.0", "--metric", "auc"], ["unknown metric 'auc'", "did you mean 'auroc'"]),
        (["smoke", "learning-rate=0.1..1.0", "--trials", "0"], ["--trials", "0 is not in the range"]),
        (["smoke", "learning-rate=0.1..1.0", "--out", "/dev/null/x"], ["not a folder to write in"]),
        (["smoke", "--resume", "x"], ["only --trials is taken"]),
        (["--resume", "x"], ["not the folder of a search", "no study.db"]),
    ],
)
def test_wrong_input_is_refused_before_the_first_trial(
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from simulations import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fedra", "tune", *arguments])
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2, error
    assert len(error.strip().splitlines()) == 1
    for word in words:
        assert word in error
    assert list(tmp_path.iterdir()) == []


def test_the_page_shows_every_trial_and_loads_nothing(searched: dict[str, Any], tmp_path: Path) -> None:
    page = searched["folder"] / "tune.html"
    html = page.read_text(encoding="utf-8")
    assert searched["best"]["test_metrics"].keys() >= {"loss", "auroc"}
    for words in ("History", "Combinations", "PED-ANOVA", f"trial {searched['best']['trial']} only", "pruned"):
        assert words in html
    read = Reader(html)
    # History, learning-rate, local-epochs, importances, combinations.
    assert len(read.figures) == 5
    assert read.outside == [f"{searched['best']['run']}/report.html"]


@pytest.mark.slow
def test_chromium_draws_the_page(searched: dict[str, Any], tmp_path: Path) -> None:
    page = searched["folder"] / "tune.html"
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    flags = "no-sandbox disable-gpu no-first-run disable-background-networking headless enable-logging=stderr v=0"
    flags += f" virtual-time-budget=8000 dump-dom user-data-dir={tmp_path / 'profile'}"
    command = [chromium, *(f"--{flag}" for flag in flags.split()), page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    assert Reader(done.stdout).tags.count("svg.main-svg") >= 2 * 5


def test_the_value_is_the_kept_models_and_another_metric_may_be_tuned(tmp_path: Path) -> None:
    folder = tune("smoke", {"out": str(tmp_path), "learning-rate": "0.5,3.0", "keep": "best"}, trials=3, metric="auroc")
    results = _results(folder)
    assert results["higher_is_better"]
    for trial in results["trials"]:
        summary = Run.open(folder / trial["run"]).summary
        assert trial["value"] == nested(summary, "validation_metrics", "auroc")
    assert results["best"]["value"] == max(trial["value"] for trial in results["trials"])
