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
from dataclasses import replace

import numpy as np
import torch

from core.batches import plan
from core.config import RunConfig
from core.data import Federation
from core.training import assemble, can_vectorise, local_sgd, make_optimizer
from tasks import load
from tasks.base import build_model
from tasks.download import cache_folder

CANDIDATES = (2, 4, 8, 16, 32, 64, 128)
BUDGET_SECONDS = 1.5
REPEATS = 3


def measure(config: RunConfig, federation: Federation, workers: int) -> RunConfig:
    """Return the config with `engine.cohort-size` decided: the fastest of one by one and 2, 4, 8, ... 128 together.

    The clock decides, so two measurements may differ: equal bits need an equal cohort size, and the choice stands in
    the run's config.toml like any other setting. It is also remembered for the
    next run with the same model, data shape and settings on this kind of processor.
    """
    if config.engine.cohort_size != "auto":
        return config
    task = load(config)
    model = build_model(task, config.seed)
    # No larger than leaves every worker something to do.
    largest = math.ceil(config.count(config.sampled) / max(workers, 1))
    if largest == 1 or not can_vectorise(model):
        return config.with_(engine__cohort_size=1)
    remembered = cache_folder("cohort-size") / f"{_fingerprint(config, model, federation, largest)}.txt"
    try:
        return config.with_(engine__cohort_size=int(remembered.read_text()))
    except (OSError, ValueError):
        size = _fastest(config, federation, model, largest)
    with contextlib.suppress(OSError):  # A read-only home is no reason to fail.
        remembered.parent.mkdir(parents=True, exist_ok=True)
        remembered.write_text(f"{size}\n")
    return config.with_(engine__cohort_size=size)


def _fingerprint(config: RunConfig, model: torch.nn.Module, federation: Federation, largest: int) -> str:
    """Return a name for everything that the measurement depends on."""
    keys = ("task", "batch-size", "local-epochs", "local-steps", "optimizer", "gradient-clip")
    flat = config.flat()
    parts = [
        {key: flat[key] for key in keys}, str(model), [list(p.shape) for p in model.parameters()],
        list(federation.train[0].x.shape), float(federation.train.sizes.mean()), largest, torch.__version__,
        platform.machine(), torch.backends.cpu.get_cpu_capability(), os.cpu_count(),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _fastest(config: RunConfig, federation: Federation, model: torch.nn.Module, largest: int) -> int:
    sizes = [1, *(size for size in CANDIDATES if size < largest), min(largest, CANDIDATES[-1])]
    best, seconds, began = 1, float("inf"), 0.0
    for size in dict.fromkeys(sizes):
        try:
            taken = _seconds_per_client(config, federation, model, size)
        except Exception as error:
            # Data-dependent control flow and the like cannot be mapped: one by one is what always works.
            logging.getLogger("fedra").warning("clients train one by one: the model cannot be mapped (%s)", error)
            break
        # The clock starts after the first: what a process does once (imports, allocations) is not the model's time.
        began = began or time.perf_counter()
        if taken < seconds:
            best, seconds = size, taken
        if time.perf_counter() - began > BUDGET_SECONDS:
            break
    return best


def _seconds_per_client(config: RunConfig, federation: Federation, model: torch.nn.Module, size: int) -> float:
    """Return the time a client takes in a cohort of `size` on at most four batches, the first call's cost apart."""
    clients = [federation.train[i % len(federation)] for i in range(size)]
    few = 4 * config.batch_size
    sizes = [min(len(split), few) for split in clients]
    cohort = assemble(
        config, model, load(config).loss,
        np.concatenate([split.x[:few] for split in clients]),
        np.concatenate([split.y[:few] for split in clients]),
        plan(sizes, config.batch_size, _in_order),
        make_optimizer(config, config.learning_rate),
        vectorised=size > 1,
    )  # fmt: skip
    first_step = replace(cohort, batches=plan([1] * size, 1, _in_order))
    local_sgd(first_step)
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        local_sgd(cohort)
        times.append(time.perf_counter() - began)
        if sum(times) > BUDGET_SECONDS / 10:
            break
    # The least of a few: what disturbs a measurement only ever adds to it.
    return min(times) / size


def _in_order(at: np.ndarray, size: int) -> np.ndarray:
    return np.broadcast_to(np.arange(size), (len(at), 1, size))
