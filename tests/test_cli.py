"""The command line: exit codes, one sentence for wrong input, and that nothing heavy is imported for --help."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from core.config import RunConfig
from core.errors import InputError

FEDRA = str(Path(sys.executable).parent / "fedra")


def _fedra(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([FEDRA, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120)


def test_a_run_leaves_the_contracted_folder(tmp_path: Path) -> None:
    done = _fedra("run", "smoke", "rounds=2", "baselines=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    [folder] = (tmp_path / "runs").iterdir()
    assert folder.name.endswith("-smoke-fedavg-s0")
    assert str(folder / "report.html") in done.stdout
    files = {file.name for file in folder.iterdir()}
    assert {
        "config.toml", "rounds.jsonl", "clients.parquet", "model.safetensors", "summary.json", "report.html",
        "heterogeneity.json", "checkpoint",
    } <= files  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    expected = {
        "task": "medical", "strategy": "fedavg", "seed": 0, "rounds": 2, "clients": 4, "status": "completed",
        "secure_aggregation": None,
    }  # fmt: skip
    assert expected.items() <= summary.items()
    assert {"accuracy", "auroc"} <= summary["metrics"].keys()
    assert set(summary["clients_metrics"]["accuracy"]) == {"mean", "worst", "std", "clients"}
    assert {"central", "local"} <= summary["baselines"].keys()
    assert summary["privacy"] == {"level": "none", "epsilon": None, "delta": None, "accountant": None}
    assert summary["traffic"]["uplink_bytes"] == 2 * 4 * _float32_bytes(folder)
    assert summary["seconds"] > 0
    assert summary["clients_per_second"] > 0


def _float32_bytes(folder: Path) -> int:
    """Return the bytes of one client's reply: Flower frames each array as .npy with a header of 128 bytes."""
    return sum(array.nbytes + 128 for array in load_file(folder / "model.safetensors").values())


def test_config_toml_is_a_preset_that_repeats_the_run(tmp_path: Path) -> None:
    assert _fedra("run", "smoke", "rounds=1", cwd=tmp_path).returncode == 0
    [first] = (tmp_path / "runs").iterdir()
    assert _fedra("run", str(first / "config.toml"), cwd=tmp_path).returncode == 0
    [second] = [folder for folder in (tmp_path / "runs").iterdir() if folder != first]
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "smok"], ["unknown preset 'smok'", "did you mean 'smoke'"]),
        (["run", "none.toml"], ["none.toml", "No such file"]),
        (["run", "smoke", "rondes=3"], ["unknown key 'rondes'", "rounds"]),
        (["run", "smoke", "strategy-options=3"], ["strategy-options=3", "write strategy-options.KEY=..."]),
        (["run", "smoke", "rounds"], ["'rounds' is not key=value"]),
        (["run", "smoke", "rounds=-1"], ["rounds=-1"]),
        (["run", "smoke", "rounds=ten"], ["rounds='ten' is not valid: must be a whole number from 1. "]),
        (["run", "smoke", "momentum=x"], ["momentum='x' is not valid: must be a number from 0 and below 1. "]),
        (["run", "smoke", "partition.kind=x"], ["partition.kind='x' is not valid: must be 'natural', 'iid'"]),
        (["run", "smoke", "sampled=1e9"], ["sampled=1e+09 is more than the 4 clients"]),
        (["run", "smoke", "attack.strength=1e9"], ["attack.strength=1e+09 does nothing"]),
        (["run", "smoke", "strategy=fedporx"], ["unknown strategy 'fedporx'", "did you mean 'fedprox'"]),
        (["run", "smoke", "strategy=os:path"], ["not a subclass"]),
        (
            ["run", "smoke", "strategy=nowhere:Thing"],
            ["cannot be loaded", "No module named 'nowhere'", "in the folder where nowhere.py lies"],
        ),
        (
            ["run", "smoke", "strategy=foreign_plugins:Unsaied"],
            ["unknown strategy of foreign_plugins 'Unsaied'; did you mean 'Unsaid'? Choices: Ahead, Bare"],
        ),
        (["run", "lasso.py"], ["lasso.py is a Python file", "strategy=lasso:CLASS"]),
        (["run", "heart", "data-dir=."], ["processed.cleveland.data, which is not in the folder /", "https://archive"]),
        (["run", "smoke", "strategy-options.mu=1"], ["unknown fedavg option"]),
        (["run", "smoke", "strategy=krum", "strategy-options.num-malicious-nodes=2"], ["needs 7 clients", "not 4"]),
        (["run", "smoke", "strategy=fedprox", "strategy-options.proximal-mu=x"], ["proximal-mu='x'", "default is 0.1"]),
        (["compare", "smoke", "seed=abc"], ["seed='abc'"]),
        (["run", "smoke", "partition.kind=natural"], ["natural groups", "iid"]),
        (["run", "smoke", "partition.kind=dirichlet", "partition.alpha=0.001"], ["partition.alpha"]),
        (["run", "smoke", "clients=100"], ["455 examples cannot give 100 clients"]),
        (["run", "smoke", "optimizer=lion"], ["unknown optimizer 'lion'"]),
        (["run", "digits", "positive-weight=3"], ["positive-weight=3", "task digits has 10"]),
        (["run", "smoke", "model=resnet"], ["unknown model of task medical"]),
        (["run", "smoke", "task=vision"], ["unknown task 'vision'"]),
        (["run", "smoke", "early-stopping.metric=auc"], ["early-stopping.metric 'auc'", "did you mean 'auroc'"]),
        (["run", "smoke", "early-stopping.metric=AUROC"], ["did you mean 'auroc'"]),
        (["run", "smoke", "strategy=FedProx"], ["did you mean 'fedprox'"]),
        (["run", "smoke", "data-dir=/tmp"], ["data-dir has no effect"]),
        (["run", "heart", "data-dir=/nowhere"], ["data-dir=/nowhere is not a folder"]),
        (["run", "smoke", "engine.workers=5"], ["engine.workers=5 is more than 4 (4 clients a round"]),
        (["run", "smoke", "strategy=nomod:X:"], ["nomod:X:"]),
        (["run", "smoke", "--out", "/dev/null/x"], ["out=/dev/null/x", "not a folder to write in"]),
        (["run", "smoke", "alpha=0.1"], ["did you mean 'partition.alpha'"]),
        (["run", "smoke", "--rounds", "5"], ["No such option --rounds; settings are written KEY=VALUE"]),
        (["run"], ["name a preset"]),
        (["run", "smoke", "--resume", "x"], ["--resume continues a run"]),
        (["run", "--resume", "x"], ["not a run folder"]),
        (["report", "x"], ["x is not a folder"]),
        (["audit", "a", "b", "c"], ["give one run folder, you gave 3"]),
        (["report", "a", "b"], ["give one run folder, you gave 2"]),
        (["audit", "x"], ["x is not a finished run"]),
        (["audit", "x", "--only", "canary"], ["unknown part of an audit 'canary'", "did you mean 'canaries'"]),
        (["audit", "x", "--shadows", "1"], ["--shadows 1"]),
        (["audit", "x", "--canaries", "0"], ["canaries", "0 is not in the range"]),
        (["run", "smoke", "audit.canaries=10"], ["audit.canaries=10", "privacy.level=none"]),
        (["compare", "smoke", "seeds=0"], ["seeds=0"]),
        (["compare", "smoke", "strategy=fedavg,nope"], ["unknown strategy 'nope'"]),
        (["fly"], ["No such command 'fly'"]),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from simulations import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fedra", *arguments])
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2, error
    assert len(error.strip().splitlines()) == 1
    assert "Traceback" not in error
    for word in words:
        assert word in error
    assert not (tmp_path / "runs").exists()


def test_a_mistyped_one_of_many_choices_is_told_the_nearest_alone() -> None:
    with pytest.raises(InputError) as raised:
        RunConfig.of({"straategy": "fedavg"})
    assert str(raised.value) == "unknown key 'straategy'; did you mean 'strategy'? `fedra list` shows all."
    with pytest.raises(InputError, match=r"Choices: .*rounds, sampled"):
        RunConfig.of({"xyzzy": 1})


def test_a_run_that_is_not_there_is_told_the_latest(tmp_path: Path) -> None:
    for name in ("20260101T000000Z-a", "20260102T000000Z-b", "20260103T000000Z-c", "20260104T000000Z-d"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.toml").touch()
    latest = [f"runs/{name}" for name in ("20260104T000000Z-d", "20260103T000000Z-c", "20260102T000000Z-b")]
    for arguments in (["run", "--resume", "nope"], ["audit", "nope"]):
        assert f"The latest in runs/: {', '.join(latest)}." in _fedra(*arguments, cwd=tmp_path).stderr
    files = ", ".join(f"{run}/config.toml" for run in latest)
    assert f"The latest in runs/: {files}. " in _fedra("run", "nope.toml", cwd=tmp_path).stderr


def test_help_imports_neither_torch_nor_ray_nor_flower() -> None:
    code = (
        "import sys, simulations.cli as cli\n"
        "sys.argv = ['fedra', '--help']\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'ray', 'flwr', 'pandas', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_list_names_everything(tmp_path: Path) -> None:
    listed = _fedra("list", cwd=tmp_path).stdout
    for name in ("medical", "fraud", "nlp", "heart", "smoke", "fedprox", "bulyan", "dirichlet", "partition.alpha"):
        assert name in listed
    for name in ("poisson", "power-of-choice", "oort", "label-flip", "min-max", "int4", "top-k"):
        assert f"\n{name} " in listed


def test_a_failed_run_exits_1_keeps_its_folder_and_says_why(tmp_path: Path) -> None:
    failed = _fedra("run", "smoke", "learning-rate=1e30", cwd=tmp_path)
    assert failed.returncode == 1
    assert failed.stderr.startswith("Failed: all 4 clients of round 1 failed; the first: client 0: ")
    assert "not finite" in failed.stderr
    [folder] = (tmp_path / "runs").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert "not finite" in summary["error"]
    assert (folder / "report.html").exists()


def test_a_run_that_no_answer_reached_is_a_failed_one(tmp_path: Path) -> None:
    failed = _fedra("run", "smoke", "rounds=2", "faults.dropout=0.999", cwd=tmp_path)
    assert failed.returncode == 1
    said = "no answer of any client reached the model in 2 rounds: 8 were lost and 0 rejected"
    assert said in failed.stderr
    [folder] = (tmp_path / "runs").iterdir()
    assert str(folder) in failed.stdout
    assert "--resume" not in failed.stdout
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["rounds"]) == ("failed", 2)
    assert said in summary["error"]
    page = (folder / "report.html").read_text()
    assert said in page
    assert "fedra run --resume" not in page
    # Nor does it become a completed one by going on with it.
    assert _fedra("run", "--resume", str(folder), cwd=tmp_path).returncode == 1
    assert json.loads((folder / "summary.json").read_text())["status"] == "failed"


def test_compare_makes_one_table_and_one_page(tmp_path: Path) -> None:
    done = _fedra("compare", "smoke", "strategy=fedavg,fedprox", "seeds=2", "rounds=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "fedavg" in done.stdout
    assert "95 % confidence interval" in done.stdout
    [folder] = (tmp_path / "runs").iterdir()
    assert (folder / "report.html").stat().st_size > 10_000
    assert len([run for run in folder.iterdir() if run.is_dir()]) == 4


def test_audit_prints_what_it_finds_and_rebuilds_the_page(tmp_path: Path) -> None:
    private = ["privacy.level=client", "privacy.noise-multiplier=4", "privacy.preprocessing=uncovered"]
    assert _fedra("run", "smoke", "rounds=1", *private, cwd=tmp_path).returncode == 0
    [folder] = (tmp_path / "runs").iterdir()
    model = (folder / "model.safetensors").read_bytes()
    done = _fedra("audit", str(folder), "--canaries", "200", "--shadows", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in (
        "Canaries: epsilon",
        "consistent",
        "200 canaries",
        "Membership: 318 training",
        "LiRA",
        "Inversion: one",
    ):
        assert words in done.stdout
    found = json.loads((folder / "audit.json").read_text())
    assert found.keys() == {"canaries", "membership", "inversion"}
    page = (folder / "report.html").read_text()
    for words in (">Audit<", "Membership inference", "Gradient inversion", "not for use"):
        assert words in page
    assert (folder / "model.safetensors").read_bytes() == model
    # What is not asked for keeps what it said.
    done = _fedra("audit", str(folder), "--only", "membership", "--shadows", "0", cwd=tmp_path)
    again = json.loads((folder / "audit.json").read_text())
    assert again["canaries"] == found["canaries"]
    assert list(again["membership"]["attacks"]) == ["threshold"]


def test_report_rebuilds_the_page(tmp_path: Path) -> None:
    assert _fedra("run", "smoke", "rounds=1", cwd=tmp_path).returncode == 0
    [folder] = (tmp_path / "runs").iterdir()
    (folder / "report.html").unlink()
    assert _fedra("report", str(folder), cwd=tmp_path).returncode == 0
    assert (folder / "report.html").exists()
