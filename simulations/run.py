"""simulate(config) -> Run: a whole federation on this machine, in one call."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from core.config import RunConfig, dotted, read_toml
from core.data import Federation
from core.device import decide_device, device_of
from core.errors import InputError, unknown
from core.idle import put_out_of_action
from core.records import load_into
from privacy import rules
from reports.words import plural
from server.app import train
from server.build import check
from server.recorder import RunFolder, latest_runs
from server.session import OnRound
from simulations.baselines import train_baselines
from simulations.cohort_size import Measured, measure
from simulations.grid import RayGrid
from simulations.pool import LocalPool, Pool, RayPool
from simulations.worker import Worker
from strategies import needs
from tasks import load, standardise
from tasks.base import build_model, predict

PRESETS = Path(__file__).parent / "presets"
CLIENT_APP = "client.app:app"
WORKERS_PER_CORE = 4
# Measured on two cores: what a cohort costs beside its training (records, batches, its mean), what it costs to hand it
# to a worker and take the answer, and to start Ray and its workers.
COHORT_SECONDS = 0.0015
JOB_SECONDS = 0.002
RAY_SECONDS = 5.0


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and what `summary.json` says."""

    path: Path
    summary: dict[str, Any]

    @property
    def metrics(self) -> dict[str, float]:
        """Return the global model's metrics on the central test set."""
        metrics: dict[str, float] = self.summary["metrics"]
        return metrics

    @classmethod
    def open(cls, path: Path | str) -> Run:
        """Return the run in a folder."""
        path = Path(path)
        if not (path / "summary.json").is_file():
            raise InputError(f"{path} is not a finished run: it has no summary.json. {latest_runs()}".strip())
        return cls(path, json.loads((path / "summary.json").read_text(encoding="utf-8")))

    def model(self) -> nn.Module:
        """Return the global model that the run kept, in evaluation mode; it takes standardised inputs."""
        config = RunFolder.open(self.path).config
        weights = load_file(self.path / "model.safetensors")
        return load_into(build_model(load(config), config.seed), weights).eval()

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Return probabilities for raw inputs x (n, ...) as the task's data has them: (n,) or (n, classes)."""
        constants = self.path / "constants.json"
        if constants.is_file():
            x = standardise.apply(x, json.loads(constants.read_text(encoding="utf-8")))
        return predict(self.model(), torch.from_numpy(x))


def preset(name: str, overrides: Mapping[str, Any] | None = None, **changes: Any) -> RunConfig:
    """Return a preset (a name, or a TOML file) with settings changed.

    `overrides` has dotted keys; keywords write them with underscores: preset("smoke", rounds=3, engine__workers=0). A
    file `<preset>.strategies.toml` beside the preset may hold settings of its own for each strategy. A setting of the
    preset's that the changes put out of action returns to its default.
    """
    path = Path(name) if name.endswith(".toml") else PRESETS / f"{name}.toml"
    if name.endswith(".py"):
        module = Path(name).stem
        raise InputError(
            f"{name} is a Python file and no preset; name a strategy of it beside a preset, in the folder where it "
            f"lies: fedra run smoke strategy={module}:CLASS"
        )
    if name.endswith(".toml") and not path.is_file():
        raise InputError(
            f"cannot read preset {name}: No such file. {latest_runs('config.toml')}Give another file, or one of the "
            f"presets {', '.join(preset_names())}."
        )
    if not name.endswith(".toml") and not path.is_file():
        raise unknown("preset", name, preset_names())
    wanted = {**(overrides or {}), **{dotted(key): value for key, value in changes.items()}}
    flat = {"preset": path.stem, **read_toml(path)}
    strategy = str(wanted.get("strategy", flat.get("strategy", RunConfig().strategy)))
    own = path.with_suffix(".strategies.toml")
    if own.is_file():
        prefix = f"{strategy}."
        flat |= {k.removeprefix(prefix): v for k, v in read_toml(own).items() if k.startswith(prefix)}
    defaults = {**needs(strategy), **rules.needs({**flat, **wanted})}
    return put_out_of_action(RunConfig.of({**defaults, **flat, **wanted}), wanted)


def preset_names() -> list[str]:
    """Return the names of the presets that come with Fedra."""
    return sorted(file.stem for file in PRESETS.glob("*.toml") if not file.stem.endswith(".strategies"))


OnStart = Callable[[Path, RunConfig, int], None]
OnBaseline = Callable[[int], None]


def simulate(
    config: RunConfig,
    *,
    on_start: OnStart | None = None,
    on_round: OnRound | None = None,
    on_baseline: OnBaseline | None = None,
) -> Run:
    """Run the federation and return it.

    `on_start` hears of the folder, the final configuration and the rounds done before; `on_round` of every line of
    rounds.jsonl, and where it returns a sentence, the run ends there, completed and `stopped_by` that;
    `on_baseline` how many clients have trained alone. Raises
    `InputError` before any process starts when the configuration or the data cannot be used.
    """
    return _run(config, None, on_start, on_round, on_baseline)


def resume(
    path: Path | str,
    *,
    on_start: OnStart | None = None,
    on_round: OnRound | None = None,
    on_baseline: OnBaseline | None = None,
) -> Run:
    """Continue the run in a folder after its last finished round and return it; the rest is as in `simulate`."""
    folder = RunFolder.resumable(Path(path))
    config, most = folder.config, most_workers(folder.config)
    if config.engine.workers != "auto" and config.engine.workers > most:
        # This machine is smaller than the one it was started on; how many workers there are changes no result.
        config = config.with_(engine__workers=most)
    return _run(config, folder, on_start, on_round, on_baseline)


def _run(
    config: RunConfig,
    folder: RunFolder | None,
    on_start: OnStart | None,
    on_round: OnRound | None,
    on_baseline: OnBaseline | None,
) -> Run:
    quiet()
    if config.devices.trace:
        # Workers and a resumed run may stand in another folder.
        config = config.with_(devices__trace=str(Path(config.devices.trace).absolute()))
    federation = check_run(config)
    with one_thread():
        config, workers = decide(config, federation)
    told = {"on_client": on_baseline} if on_baseline is not None else {}
    baselines = partial(train_baselines, config, federation, **told) if config.baselines else None
    running = config.with_(engine__workers=workers)
    with one_thread(), engine(running, federation) as grid:
        # Only now: a start that fails or is interrupted leaves no folder behind. How many workers is for this machine
        # and changes no result: it is not written down.
        folder = folder.with_config(config) if folder else RunFolder.create(config)
        if on_start is not None:
            on_start(folder.path, running, folder.rounds_done())
        return Run(folder.path, train(grid, config, folder, baselines=baselines, on_round=on_round))


def decide(config: RunConfig, federation: Federation) -> tuple[RunConfig, int]:
    """Return the config with device and cohort size decided, and how many workers to start.

    `engine.workers=auto` starts workers only where they save more than they cost: a federation whose rounds are shorter
    than the way to a worker and back is faster in this process.
    """
    config = decide_device(config)
    most = worker_count(config)
    given = config.engine.workers
    if config.engine.cohort_size != "auto" and given != "auto":
        return config, most
    if given == "auto" and not config.engine.address:
        here = measure(config, federation, 1, COHORT_SECONDS)
        # One process feeds one GPU best; a round on the CPU is divided among the workers.
        pays = most > 1 if config.engine.device == "cuda" else _saves(config, here, most) > RAY_SECONDS
        if not pays:
            return config.with_(engine__cohort_size=here.cohort_size), 0
    measured = measure(config, federation, most, COHORT_SECONDS + (JOB_SECONDS if most else 0.0))
    return config.with_(engine__cohort_size=measured.cohort_size), most


def _saves(config: RunConfig, here: Measured, workers: int) -> float:
    """Return the seconds that `workers` save over the run, their start apart."""
    sampled = config.count(config.sampled)
    jobs = sampled / together(config.with_(engine__cohort_size=here.cohort_size))
    return config.rounds * (here.seconds * sampled * (1 - 1 / workers) - JOB_SECONDS * jobs / workers)


@contextmanager
def engine(config: RunConfig, federation: Federation) -> Iterator[RayGrid]:
    """Provide the local grid for the configuration; its processes end with the block."""
    if config.engine.cohort_size == "auto":
        raise InputError("engine.cohort-size must be measured before the engine starts.")
    arguments = (CLIENT_APP, config.flat(), config.clients, federation)
    workers, gpus = worker_count(config), config.engine.gpus_per_worker if device_of(config).type == "cuda" else 0.0
    pool: Pool
    if workers:
        pool = RayPool(workers, config.engine.address, arguments, gpus, federation.nbytes)
    else:
        pool = LocalPool(partial(Worker, *arguments))
    try:
        yield RayGrid(pool, config.clients, together(config), federation.train.sizes)
    finally:
        pool.close()


def together(config: RunConfig) -> int:
    """Return how many clients go to a worker at once: a cohort, or several small ones, for less shipping.

    It does not depend on how many workers there are, and so the sums of partial means do not.
    """
    size = config.engine.cohort_size
    assert isinstance(size, int)
    several = min(16, math.ceil(config.count(config.sampled) / 16))
    return size * max(1, several // size)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread in this process: sums must not depend on how many cores there are.

    Small models are also faster so; parallelism is over cohorts.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_run(config: RunConfig) -> Federation:
    """Return the federation's data after refusing, with `InputError`, what would fail later here."""
    worker_count(config)
    RunFolder.check_place(config)
    if config.secure_aggregation.roster:
        raise InputError(
            f"secure-aggregation.roster={config.secure_aggregation.roster} is for `flwr run`, where each client is "
            "started with a key of its own; drop it here, and keys are simulated."
        )
    return check(config)


def worker_count(config: RunConfig) -> int:
    """Return how many workers there may be: under `auto` one a core or GPU, but no more than clients a round."""
    most = most_workers(config)
    units: float | None = os.cpu_count()
    if config.engine.device == "cuda":
        share = config.engine.gpus_per_worker
        units = torch.cuda.device_count() / (1.0 if share == "auto" else share)
    workers = min(int(units or 1), most) if config.engine.workers == "auto" else config.engine.workers
    if workers > most:
        sampled = plural(config.count(config.sampled), "client")
        raise InputError(
            f"engine.workers={workers} is more than {most} ({sampled} a round, {plural(os.cpu_count() or 1, 'core')}); "
            f"set {most} or fewer, or auto."
        )
    return workers


def most_workers(config: RunConfig) -> int:
    """Return how many workers make sense: one a client, and here not more than a few a core.

    Every worker is a process with torch in it: hundreds of megabytes, and seconds to start.
    """
    sampled = config.count(config.sampled)
    return sampled if config.engine.address else min(sampled, WORKERS_PER_CORE * (os.cpu_count() or 1))


def quiet() -> None:
    """Keep Flower's and Ray's own logging and telemetry out of the way; failures still reach us as exceptions."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    logging.getLogger("flwr").setLevel(logging.ERROR)
