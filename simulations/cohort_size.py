"""How many clients to train together: measured on the real model and data at the start, then recorded."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import platform
import time
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from core.batches import plan
from core.config import RunConfig
from core.data import Federation
from core.device import device_of
from core.optimizers import make_optimizer
from core.training import assemble, can_vectorise, local_sgd
from tasks import load
from tasks.base import Task, build_model
from tasks.download import cache_folder

CANDIDATES = (2, 4, 8, 16, 32, 64, 128)
GPU_CANDIDATES = (*CANDIDATES, 256, 512, 1024)
BUDGET_SECONDS = 1.5
REPEATS = 3
# Each further candidate costs more; one this much slower than the best will not be overtaken by the next.
HOPELESS = 1.5


@dataclass(frozen=True)
class Measured:
    """How many clients to train together, and the seconds that training one of them takes in a round."""

    cohort_size: int
    seconds: float


def measure(config: RunConfig, federation: Federation, shares: int, cohort_seconds: float) -> Measured:
    """Return the cohort size of the config; under `auto` the fastest of one by one and 2, 4, 8, ... 128 together.

    `shares` is among how many workers a round is divided, `cohort_seconds` what a cohort costs beside its training.
    The clock decides, so two measurements may differ: equal bits need an equal cohort size, and the choice stands in
    the run's config.toml like any other setting. It is also remembered for the next run with the same model, data
    shape and settings on this kind of processor.
    """
    task = load(config)
    model = build_model(task, config.seed).to(device_of(config))
    # No larger than leaves every worker something to do.
    largest = math.ceil(config.count(config.sampled) / max(shares, 1))
    given = config.engine.cohort_size
    if given != "auto":
        sizes = [min(given, 128)]
    elif largest == 1 or not can_vectorise(model):
        sizes = [1]
    else:
        candidates = CANDIDATES if device_of(config).type == "cpu" else GPU_CANDIDATES
        sizes = [1, *(size for size in candidates if size < largest), min(largest, candidates[-1])]
    remembered = cache_folder("cohort-size") / f"{_fingerprint(config, model, federation, sizes, cohort_seconds)}.json"
    try:
        found = Measured(**json.loads(remembered.read_text()))
    except (OSError, ValueError, TypeError):
        found, whole = _fastest(config, federation, task, model, sizes, cohort_seconds)
        if whole:
            with contextlib.suppress(OSError):  # A read-only home is no reason to fail.
                remembered.parent.mkdir(parents=True, exist_ok=True)
                remembered.write_text(json.dumps(asdict(found)) + "\n")
        if device_of(config).type == "cuda":
            # What the largest candidate took is the workers' to use.
            torch.cuda.empty_cache()
    return found if given == "auto" else replace(found, cohort_size=given)


def _fingerprint(
    config: RunConfig, model: torch.nn.Module, federation: Federation, sizes: list[int], cohort_seconds: float
) -> str:
    """Return a name for everything that the measurement depends on."""
    keys = (
        "task", "batch-size", "local-epochs", "local-steps", "optimizer", "momentum", "weight-decay", "gradient-clip",
        "engine.device", "engine.precision", "engine.compile",
    )  # fmt: skip
    flat = config.flat()
    processor = torch.cuda.get_device_name() if device_of(config).type == "cuda" else platform.machine()
    parts = [
        {key: flat[key] for key in keys}, str(model), [list(p.shape) for p in model.parameters()],
        list(federation.train[0].x.shape), float(federation.train.sizes.mean()), sizes, cohort_seconds,
        torch.__version__, processor, torch.backends.cpu.get_cpu_capability(), os.cpu_count(),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _fastest(
    config: RunConfig,
    federation: Federation,
    task: Task,
    model: torch.nn.Module,
    sizes: list[int],
    cohort_seconds: float,
) -> tuple[Measured, bool]:
    """Return the fastest of the sizes, and whether all that were tried could be."""
    # Where nothing can be measured nothing is known of the time either: it is taken to be long.
    best, least, began = Measured(1, math.inf), math.inf, 0.0
    for size in dict.fromkeys(sizes):
        try:
            seconds = _seconds_per_client(config, federation, task, model, size)
        except Exception as error:
            # Data-dependent control flow, or no memory for so many: fewer, or one by one, is what works.
            logging.getLogger("fedra").warning("%d clients cannot train together (%s)", size, error)
            return best, False
        # The clock starts after the first: what a process does once (imports, allocations) is not the model's time.
        began = began or time.perf_counter()
        taken = seconds + cohort_seconds / size
        if taken < least:
            best, least = Measured(size, seconds), taken
        if taken > HOPELESS * least or time.perf_counter() - began > BUDGET_SECONDS:
            break
    return best, True


def _seconds_per_client(
    config: RunConfig, federation: Federation, task: Task, model: torch.nn.Module, size: int
) -> float:
    """Return what a client's round takes in a cohort of `size`, from at most four batches; the first call is apart."""
    clients = [federation.train[i % len(federation)] for i in range(size)]
    few = 4 * config.batch_size
    sizes = [min(len(split), few) for split in clients]
    cohort = assemble(
        config.with_(engine__cohort_size=size), model, task.loss,
        np.concatenate([split.x[:few] for split in clients]),
        np.concatenate([split.y[:few] for split in clients]),
        plan(sizes, config.batch_size, _in_order),
        make_optimizer(config, config.learning_rate),
    )  # fmt: skip
    first_step = replace(cohort, batches=plan([1] * size, 1, _in_order).to(cohort.x.device))
    # What is compiled is compiled for a shape of batch.
    local_sgd(cohort if cohort.compiled else first_step)
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        # A GPU is done when its numbers are here.
        local_sgd(cohort).loss.cpu()
        times.append(time.perf_counter() - began)
        if sum(times) > BUDGET_SECONDS / 10:
            break
    steps = float(cohort.batches.steps.float().mean())
    every = config.local_steps or config.local_epochs * float(
        np.ceil(federation.train.sizes / config.batch_size).mean()
    )
    # The least of a few: what disturbs a measurement only ever adds to it.
    return min(times) / size * every / steps


def _in_order(at: np.ndarray, size: int) -> np.ndarray:
    return np.broadcast_to(np.arange(size), (len(at), 1, size))
