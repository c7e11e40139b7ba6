"""Flower's own runtime runs the same apps: `flwr run .` equals the local engine to printed precision."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from simulations.run import preset, simulate

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
NODES = "num-supernodes=10 client-resources-num-cpus=1 init-args-num-cpus=2"


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def flwr_run(changes: Mapping[str, Any], environment: dict[str, str], folder: Path) -> tuple[Path, Path]:
    """Run the medical preset under `flwr run` and in the local engine, and return both run folders.

    `flwr run` exits 0 even when the run died: what the server wrote is what counts.
    """
    settings = {**changes, "baselines": False, "out": str(folder / "runs")}
    file = folder / "settings.toml"
    file.write_text(preset("medical", settings).with_(preset="flower").toml())
    subprocess.run(
        ["flwr", "run", str(ROOT), "--run-config", str(file), "--federation-config", NODES, "--stream"],
        env=environment, check=True, timeout=300, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    [theirs] = (folder / "runs").glob("*-flower-*")
    assert json.loads((theirs / "summary.json").read_text())["status"] == "completed"
    return theirs, simulate(preset("medical", {**settings, "engine.workers": 0})).path


@pytest.fixture
def flower_home(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Provide an environment with a Flower home of its own, and end the SuperLink that `flwr run` leaves behind."""
    home = tmp_path / "flwr"
    home.mkdir()
    yield {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(_free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(_free_port()),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    for pid in _processes_naming(str(home)):
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 20
    while _processes_naming(str(home)):
        assert time.monotonic() < deadline, "the SuperLink did not end"
        time.sleep(0.2)


def _processes_naming(text: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in command and "flower-superlink" in command:
            found.append(int(entry.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "own",
    [
        {},
        # Controls beside the model, state on the clients, encoded updates, lost answers.
        {"strategy": "scaffold", "compression.kind": "int8", "devices.kind": "lognormal", "faults.dropout": 0.2},
        # Models that never leave, and a hostile answer that the server must refuse.
        {"strategy": "ditto", "attack.kind": "non-finite", "attack.fraction": 0.1},
        # Noise of the server on the sum of those that its secret draw chose.
        {
            "strategy": "scaffold",
            "sampled": 5,
            "privacy.level": "client",
            "privacy.epsilon": 20.0,
            "privacy.delta": 1e-3,
            "privacy.noise-seed": 1,
            "privacy.clipping": "adaptive",
        },
        # Private steps, and budgets that the clients keep themselves.
        {
            "strategy": "fedprox",
            "privacy.level": "example",
            "privacy.epsilon": 8.0,
            "privacy.noise-seed": 1,
            "server-examples": 50,
        },
    ],
    ids=["fedavg", "scaffold", "ditto", "client-level", "example-level"],
)
def test_flwr_run_completes_and_its_rounds_equal_the_local_engines(
    own: dict[str, Any], flower_home: dict[str, str], tmp_path: Path
) -> None:
    theirs_at, ours_at = flwr_run({**own, "rounds": 2}, flower_home, tmp_path)
    flower = [json.loads(line) for line in (theirs_at / "rounds.jsonl").open()]
    local = [json.loads(line) for line in (ours_at / "rounds.jsonl").open()]
    for ours, theirs in zip(local, flower, strict=True):
        assert f"{ours['train_loss']:.4f}" == f"{theirs['train_loss']:.4f}"
        for kind in ("central", "validation"):
            assert _printed(ours[kind]) == _printed(theirs[kind])
        for key in ("uplink_bytes", "lost", "rejected"):
            assert ours[key] == theirs[key]
        assert ours.get("privacy", {}).get("epsilon") == theirs.get("privacy", {}).get("epsilon")
        assert ours.get("virtual_seconds") == pytest.approx(theirs.get("virtual_seconds"))
        assert _printed(ours["clients"]["accuracy"]) == _printed(theirs["clients"]["accuracy"])


def _printed(metrics: dict[str, float]) -> dict[str, str]:
    return {name: f"{value:.4f}" for name, value in metrics.items()}
