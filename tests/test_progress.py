"""What the terminal shows while a command works."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path

from rich.console import Console

from core.config import RunConfig
from simulations.compare import compare
from simulations.progress import Progress
from simulations.run import simulate


def test_baselines_say_how_many_clients_have_trained_alone(smoke: Callable[..., RunConfig]) -> None:
    heard: list[int] = []
    simulate(smoke(rounds=1, baselines=True), on_baseline=heard.append)
    assert heard == [0, 1, 2, 3, 4]


def test_baselines_of_many_clients_are_a_line_each_tenth(smoke: Callable[..., RunConfig]) -> None:
    console = Console(file=StringIO(), width=120)
    for clients in (4, 60):
        progress = Progress(smoke(clients=clients), console)
        for done in range(13):
            progress.baseline(done)
    assert isinstance(console.file, StringIO)
    assert console.file.getvalue().splitlines() == [
        "training baselines: pooled data, then 60 clients alone; baselines=false leaves them out",
        "training baselines: client 6/60",
        "training baselines: client 12/60",
    ]


def _interrupted(arguments: list[str], at: str, cwd: Path) -> tuple[int, str]:
    """Run a command until it has printed `at`, then press Ctrl-C; return its exit code and what it printed."""
    command = [str(Path(sys.executable).parent / "fedra"), *arguments]
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    printed = ""
    try:
        for line in process.stdout:
            printed += line
            if at in line:
                process.send_signal(signal.SIGINT)
        return process.wait(timeout=60), printed
    finally:
        process.kill()


def test_an_interrupted_comparison_says_where_its_runs_are(tmp_path: Path) -> None:
    code, printed = _interrupted(["compare", "smoke", "seeds=40"], "[3/40]", tmp_path)
    [folder] = (tmp_path / "runs").iterdir()
    assert code == 130
    assert f"2 of 40 runs done; their folders, each with its report, are in {folder}" in printed
    assert len(list(folder.glob("*/summary.json"))) >= 2


def test_an_interrupted_audit_keeps_finished_parts_and_says_how_to_go_on(smoke: Callable[..., RunConfig]) -> None:
    run = simulate(smoke(rounds=2)).path
    order = ["audit", str(run), "--only", "inversion,membership", "--shadows", "200"]
    code, printed = _interrupted(order, "[2/2] membership", run)
    assert code == 130
    assert f"Saved: inversion. Go on with: fedra audit {run} --only membership" in printed
    assert "Gradient inversion" in (run / "report.html").read_text()


def test_a_comparison_shows_the_round_on_a_terminal(tmp_path: Path) -> None:
    console = Console(file=StringIO(), width=120, force_terminal=True)
    compare("smoke", {"rounds": 2, "seeds": 1, "out": str(tmp_path)}, console)
    assert isinstance(console.file, StringIO)
    assert "2/2" in console.file.getvalue()
