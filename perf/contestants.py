"""One contestant on one workload, in a process of its own: prints the seconds of every round as JSON.

python perf/contestants.py fedra|bare|flower|pfl WORKLOAD ROUNDS [WORKERS]
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
PFL_PYTHON = os.environ.get("PFL_PYTHON", str(ROOT / "perf" / ".venv-pfl" / "bin" / "python"))
QUICKSTART = ROOT / "perf" / "quickstart"
APP_NODES = 1000
Timed = dict[str, Any]


def fedra(name: str, rounds: int, workers: int = 0) -> Timed:
    """Run Fedra's engine; round times are from the end of a round to the end of the next, everything included."""
    from perf.workloads import config
    from simulations.run import simulate

    if name == "app":
        return _fedra_flower(rounds, workers)
    ends: list[float] = []
    sizes: list[Any] = []
    with tempfile.TemporaryDirectory() as out:
        settings = config(name, rounds, engine__workers=workers, out=out)
        run = simulate(
            settings,
            on_start=lambda _path, measured, _done: sizes.append(measured.engine.cohort_size),
            on_round=lambda _row: ends.append(time.perf_counter()),
        )
    seconds = [b - a for a, b in itertools.pairwise(ends)]
    loss = run.metrics["loss"]
    return {"seconds": seconds[:-1], "clients": settings.count(settings.sampled), "loss": loss, "cohort": sizes[0]}


def _fedra_flower(rounds: int, workers: int) -> Timed:
    """Run the quickstart app, unmodified, on Fedra's engine."""
    from simulations.flower import run_app
    from simulations.flower_app import FlowerApp

    with tempfile.TemporaryDirectory() as folder:
        app = FlowerApp.read(QUICKSTART, [f'num-server-rounds={rounds} seconds-file="{folder}/seconds"'])
        run_app(app, APP_NODES, workers)
        return {"seconds": json.loads(Path(folder, "seconds").read_text()), "clients": APP_NODES // 10}


def bare(name: str, rounds: int) -> Timed:
    """Run the plain torch loop: one model, one optimiser a client, a running mean; no federation at all."""
    import numpy as np
    import torch

    from core.optimizers import make_optimizer
    from perf.workloads import config
    from tasks import load
    from tasks.base import build_model

    torch.set_num_threads(1)
    settings = config(name, rounds)
    task = load(settings)
    data, model = task.federation().train, build_model(task, settings.seed)
    weights = {key: p.detach().clone() for key, p in model.named_parameters()}
    draws = np.random.default_rng(settings.seed)
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        sampled = draws.choice(settings.clients, settings.count(settings.sampled), replace=False)
        total = {key: torch.zeros_like(w) for key, w in weights.items()}
        for client in sampled:
            with torch.no_grad():
                for key, p in model.named_parameters():
                    p.copy_(weights[key])
            split = data[int(client)]
            x, y = torch.from_numpy(split.x), torch.from_numpy(split.y)
            optimizer = make_optimizer(settings, settings.learning_rate)(list(model.parameters()))
            for rows in torch.from_numpy(draws.permutation(len(y))).split(settings.batch_size):
                optimizer.zero_grad()
                task.loss(model(x[rows]), y[rows]).mean().backward()
                optimizer.step()
            with torch.no_grad():
                for key, p in model.named_parameters():
                    total[key] += p / len(sampled)
        weights = total
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds, "clients": len(sampled)}


def flower(name: str, rounds: int) -> Timed:
    """Run Flower's own simulation (`flwr run`, two CPUs) on the very same ServerApp and ClientApp."""
    from perf.workloads import config

    with tempfile.TemporaryDirectory() as folder:
        if name == "app":
            # Flower's launcher sends a copy of the app: what is written must have an absolute place.
            _flwr_run(folder, QUICKSTART, APP_NODES, f'num-server-rounds={rounds} seconds-file="{folder}/seconds"')
            return {"seconds": json.loads(Path(folder, "seconds").read_text()), "clients": APP_NODES // 10}
        settings = config(name, rounds, out=f"{folder}/runs", engine__cohort_size=1)
        (Path(folder) / "settings.toml").write_text(settings.toml())
        _flwr_run(folder, ROOT, settings.clients, f"{folder}/settings.toml")
        [file] = Path(folder).glob("runs/*/rounds.jsonl")
        rows = [json.loads(line) for line in file.open()]
    return {"seconds": [row["seconds"] for row in rows[1:]], "clients": settings.count(settings.sampled)}


def _flwr_run(home: str, app: Path, nodes: int, run_config: str) -> None:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "FLWR_HOME": home,
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(_free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(_free_port()),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    federation = f"num-supernodes={nodes} client-resources-num-cpus=1 init-args-num-cpus=2"
    command = ["flwr", "run", str(app), "--run-config", run_config, "--federation-config", federation, "--stream"]
    try:
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    finally:
        _end_superlinks(home)


def pfl(name: str, rounds: int) -> Timed:
    """Run pfl-research, in its own environment, on the same rows."""
    import numpy as np

    from perf.workloads import config
    from tasks import load

    settings = config(name, rounds)
    train = load(settings).federation().train
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/x.npy", train.x)
        np.save(f"{folder}/y.npy", train.y)
        np.save(f"{folder}/starts.npy", [train.start(i) for i in range(settings.clients)])
        np.save(f"{folder}/sizes.npy", train.sizes)
        said = {
            "workload": name, "clients": settings.clients, "sampled": settings.count(settings.sampled),
            "rounds": rounds, "batch_size": settings.batch_size, "learning_rate": settings.learning_rate,
            "local_epochs": settings.local_epochs, "seed": settings.seed,
        }  # fmt: skip
        Path(folder, "settings.json").write_text(json.dumps(said))
        command = [PFL_PYTHON, str(ROOT / "perf" / "peer_pfl.py"), folder]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    found: Timed = json.loads(done.stdout.strip().splitlines()[-1])
    return {**found, "seconds": found["seconds"][1:]}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _end_superlinks(folder: str) -> None:
    """End the SuperLink that `flwr run` leaves behind: the one whose command names this folder."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if folder in command and "flower-superlink" in command:
            os.kill(int(entry.parent.name), signal.SIGTERM)


if __name__ == "__main__":
    contestant, workload, count, *more = sys.argv[1:]
    timed = {"fedra": fedra, "bare": bare, "flower": flower, "pfl": pfl}[contestant]
    print(json.dumps(timed(workload, int(count), *map(int, more))))
