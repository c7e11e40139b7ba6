"""More than one machine: a run over two Ray nodes goes on, with the same bits, when one of them is killed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from simulations.run import preset, simulate

BIN = Path(sys.executable).parent
STORE = str(100 * 2**20)
SETTINGS = {"rounds": 30, "local-epochs": 20, "baselines": False, "engine.cohort-size": 2, "engine.workers": 2}


def _ray(folder: str, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a Ray node with a CPU of its own, its files in `folder`: elsewhere others would find and join it."""
    common = ("--block", "--num-cpus=1", f"--object-store-memory={STORE}", "--node-ip-address=127.0.0.1")
    return subprocess.Popen(
        [BIN / "ray", "start", *arguments, *common, "--disable-usage-stats"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        env={**os.environ, "RAY_TMPDIR": folder},
    )  # fmt: skip


def _descendants(process: int) -> list[int]:
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(entry.parent.name)] = int(fields[1])
    found = [process]
    for parent in found:
        found += [child for child, of in parents.items() if of == parent]
    return found


def _workers(process: int) -> list[int]:
    """Return the processes below a node that hold a Worker."""
    found = []
    for child in _descendants(process):
        try:
            command = Path(f"/proc/{child}/cmdline").read_bytes()
        except OSError:
            continue
        if b"ray::RayWorker" in command:
            found.append(child)
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    for child in _descendants(process.pid):
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


@pytest.fixture
def cluster() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Provide the address of a cluster of two nodes, and the second one's process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    # Short: Ray makes sockets in it, and their paths may have 107 characters.
    folder = tempfile.mkdtemp(prefix="ray")
    head = _ray(folder, "--head", f"--port={port}", "--include-dashboard=false")
    second = None
    try:
        _wait_for_port(port)
        second = _ray(folder, f"--address={address}")
        yield address, second
    finally:
        for node in (second, head):
            if node is not None:
                _end(node)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_port(port: int) -> None:
    for _ in range(300):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("the head did not start")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_node_that_is_killed_mid_round_changes_no_bit(
    cluster: tuple[str, subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    address, second = cluster
    settings = [f"{key}={str(value).lower()}" for key, value in SETTINGS.items()]
    run = subprocess.Popen(
        [BIN / "fedra", "run", "medical", *settings, f"engine.address={address}", "--out", str(tmp_path / "both")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        rounds = _wait_for_rounds(tmp_path / "both", 3, run)
        assert len(_workers(second.pid)) == 1, "the second node has no worker"
        _end(second)
        output, _ = run.communicate(timeout=180)
    finally:
        run.kill()
    assert run.returncode == 0, output
    assert rounds < 30
    assert " clients failed" not in output
    alone = simulate(preset("medical", {**SETTINGS, "engine.workers": 0, "out": str(tmp_path / "alone")})).path
    [both] = (tmp_path / "both").iterdir()
    models = [load_file(path / "model.safetensors") for path in (alone, both)]
    assert all(np.array_equal(models[0][name], models[1][name]) for name in models[0])


def _wait_for_rounds(folder: Path, rounds: int, process: subprocess.Popen[str]) -> int:
    for _ in range(1200):
        for file in folder.glob("*/rounds.jsonl"):
            if (done := len(file.read_text().splitlines())) >= rounds:
                return done
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError("no round was finished in a minute")
