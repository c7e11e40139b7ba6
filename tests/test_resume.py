"""Interrupted, killed and resumed runs end with the same bits as one that was never stopped."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from core.config import RunConfig
from core.errors import InputError
from server.checkpoint import load as load_checkpoint
from server.recorder import RunFolder
from simulations.run import preset, resume, simulate

METRICS = ("round", "train_loss", "central", "clients", "validation", "uplink_bytes", "downlink_bytes")


class _StopError(Exception):
    pass


def _stopped_after(config: RunConfig, rounds: int) -> Path:
    """Run until the end of a round and break off there; return the folder."""

    def stop(row: dict) -> None:
        if row["round"] == rounds:
            raise _StopError

    folders: list[Path] = []
    with pytest.raises(_StopError):
        simulate(config, on_start=lambda path, *_: folders.append(path), on_round=stop)
    return folders[0]


def _assert_same(a: Path, b: Path) -> None:
    models = [load_file(path / "model.safetensors") for path in (a, b)]
    assert all(np.array_equal(models[0][name], models[1][name]) for name in models[0])
    rounds = [[json.loads(line) for line in (path / "rounds.jsonl").open()] for path in (a, b)]
    assert [[row[key] for key in METRICS] for row in rounds[0]] == [[row[key] for key in METRICS] for row in rounds[1]]


@pytest.mark.parametrize("strategy", [
        "fedavgm", "fedadam", "fedyogi", "fedadagrad", "qfedavg", "fedmedian", "scaffold", "feddyn", "mimelite",
        "ditto",
        "apfl", "moon", "fedper", "ifca", "agnostic", "centredclipping",
    ],
)  # fmt: skip
def test_a_resumed_run_ends_with_the_same_bits(strategy: str, smoke: Callable[..., RunConfig]) -> None:
    changes = {"strategy": strategy, "rounds": 4, "sampled": 3, "keep": "best"}
    if strategy == "fedavgm":
        changes["strategy_options__server_momentum"] = 0.9
    whole = simulate(smoke(**changes)).path
    folder = _stopped_after(smoke(**changes), 2)
    resumed = resume(folder)
    assert resumed.path == folder
    _assert_same(whole, folder)
    assert load_clients(folder)["train_loss"].notna().sum() == 4 * 3


def load_clients(folder: Path):  # type: ignore[no-untyped-def]
    """Return clients.parquet."""
    import pandas as pd

    return pd.read_parquet(folder / "clients.parquet")


def test_client_state_is_resumed_too(heart_files: str, tmp_path: Path) -> None:
    changes = {
        "data-dir": heart_files, "rounds": 4, "local-steps": 7, "baselines": False, "engine.workers": 0,
        "engine.cohort-size": 4, "out": str(tmp_path),
    }  # fmt: skip
    whole = simulate(preset("heart", changes)).path
    folder = _stopped_after(preset("heart", changes), 1)
    resume(folder)
    _assert_same(whole, folder)


def test_a_strategy_with_its_own_start_keeps_it_and_counts_on(smoke: Callable[..., RunConfig]) -> None:
    own = {"strategy": "foreign_plugins:OwnStart", "rounds": 4, "sampled": 3}
    whole = simulate(smoke(**own)).path
    folder = _stopped_after(smoke(**own), 2)
    resume(folder)
    _assert_same(whole, folder)
    checkpoint = load_checkpoint(folder / "checkpoint")
    assert checkpoint is not None
    assert checkpoint.strategy["rounds"] == [1, 2, 3, 4]
    # As in a run that was never stopped.
    assert checkpoint.strategy["starts"] == 1
    assert checkpoint.strategy["starts"].dtype == np.float32


def test_a_run_that_is_interrupted_while_it_starts_leaves_no_folder(
    smoke: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("simulations.run.decide", interrupted)
    config = smoke()
    with pytest.raises(KeyboardInterrupt):
        simulate(config)
    assert not Path(config.out).exists()


def test_half_a_line_left_by_a_kill_is_dropped(smoke: Callable[..., RunConfig]) -> None:
    folder = _stopped_after(smoke(), 2)
    with (folder / "rounds.jsonl").open("a") as file:
        file.write('{"round": 3, "secon')
    resume(folder)
    assert [json.loads(line)["round"] for line in (folder / "rounds.jsonl").open()] == [1, 2, 3]


def test_a_completed_run_and_a_folder_that_is_none_are_refused(smoke: Callable[..., RunConfig], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is completed"):
        RunFolder.resumable(simulate(smoke(rounds=1)).path)
    with pytest.raises(InputError, match="not a run folder"):
        RunFolder.resumable(tmp_path)


def test_a_refused_resume_leaves_the_folder_as_it_was(smoke: Callable[..., RunConfig]) -> None:
    folder = _stopped_after(smoke(), 2)
    before = {file: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    [state] = folder.glob("checkpoint/round-*/state.json")
    state.write_text(state.read_text().replace('["unsaved", {"list": []}]', '["unsaved", {"list": ["queue"]}]'))
    with pytest.raises(InputError, match="cannot be resumed: its strategy keeps queue"):
        resume(folder)
    assert {file: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before


def test_a_run_interrupted_while_it_evaluates_describes_the_model_it_saved(
    smoke: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    from server.evaluate import Evaluator

    real = Evaluator.__call__

    def interrupted(self, server_round, arrays, timeout):  # type: ignore[no-untyped-def]
        if server_round == 3:
            raise KeyboardInterrupt
        return real(self, server_round, arrays, timeout)

    monkeypatch.setattr(Evaluator, "__call__", interrupted)
    folders: list[Path] = []
    with pytest.raises(KeyboardInterrupt):
        simulate(smoke(), on_start=lambda path, *_: folders.append(path))
    summary = json.loads((folders[0] / "summary.json").read_text())
    assert (summary["status"], summary["rounds"], summary["metrics_round"]) == ("interrupted", 2, 2)
    monkeypatch.undo()
    two = simulate(smoke(rounds=2))
    assert summary["metrics"] == pytest.approx(two.metrics)
    assert (folders[0] / "model.safetensors").read_bytes() == (two.path / "model.safetensors").read_bytes()


def test_a_damaged_checkpoint_is_one_sentence_with_the_way_out(smoke: Callable[..., RunConfig]) -> None:
    folder = _stopped_after(smoke(), 2)
    (folder / "summary.json").write_text("{")
    for damage in (lambda file: file.write_bytes(b"\0" * 9), Path.unlink):
        damage(next(folder.glob("checkpoint/round-*/state.safetensors")))
        with pytest.raises(InputError, match=r"checkpoint .* cannot be read .* fedra run .*config\.toml"):
            resume(folder)


def _fedra(*arguments: str) -> subprocess.Popen[str]:
    fedra = shutil.which("fedra", path=str(Path(sys.executable).parent))
    assert fedra
    return subprocess.Popen([fedra, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _wait_for_round(folder: Path, rounds: int, process: subprocess.Popen[str]) -> Path:
    for _ in range(6000):
        for file in folder.glob("*/rounds.jsonl"):
            if len(file.read_text().splitlines()) >= rounds:
                return file.parent
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    raise AssertionError("no round was finished in a minute")


@pytest.mark.slow
def test_ctrl_c_leaves_a_valid_folder_and_no_process(tmp_path: Path) -> None:
    process = _fedra("run", "smoke", "rounds=100000", "engine.workers=1", "--out", str(tmp_path))
    folder = _wait_for_round(tmp_path, 2, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert f"fedra run --resume {folder}" in output
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert summary["rounds"] == len((folder / "rounds.jsonl").read_text().splitlines())
    assert (folder / "report.html").stat().st_size > 1000
    assert load_file(folder / "model.safetensors")


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(tmp_path: Path) -> None:
    # Rounds enough that the fastest machine is still at work when it is killed.
    settings = ["rounds=300", "strategy=fedadam", "sampled=3", "local-epochs=4"]
    whole = _fedra("run", "smoke", *settings, "--out", str(tmp_path / "whole"))
    assert whole.wait(300) == 0
    process = _fedra("run", "smoke", *settings, "--out", str(tmp_path / "killed"))
    moments = random.Random(0)
    done = 0
    for _ in range(3):
        # It is killed in a later round each time, or it would be killed at start-up for ever.
        folder = _wait_for_round(tmp_path / "killed", done + moments.randint(1, 9), process)
        time.sleep(moments.uniform(0, 0.02))
        assert process.poll() is None, "the run was over before it could be killed"
        process.kill()
        process.wait()
        done = len((folder / "rounds.jsonl").read_text().splitlines())
        process = _fedra("run", "--resume", str(folder))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    _assert_same(next((tmp_path / "whole").iterdir()), folder)
