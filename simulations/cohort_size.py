"""How many clients to train together: measured on the real model and data at the start, then recorded."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import replace

import numpy as np
import torch

from core.config import RunConfig
from core.data import Federation
from core.training import assemble, can_vectorise, local_sgd, make_optimizer, plan
from tasks import load
from tasks.base import build_model

CANDIDATES = (8, 32, 128)
BUDGET_SECONDS = 1.5


def measure(config: RunConfig, federation: Federation) -> RunConfig:
    """Return the config with `engine.cohort-size` decided: the fastest of one by one, 8, 32 and 128 together.

    Candidates do not depend on the number of workers, but the clock decides between them: equal bits need an equal
    cohort size, so the choice stands in the run's config.toml like any other setting.
    """
    if config.engine.cohort_size != "auto":
        return config
    model = build_model(load(config), config.seed)
    # At least two cohorts, so that two workers have something to do.
    largest = math.ceil(config.count(config.sampled) / 2)
    if largest == 1 or not can_vectorise(model):
        return config.with_(engine__cohort_size=1)
    sizes = [1, *(size for size in CANDIDATES if size < largest), min(largest, CANDIDATES[-1])]
    began, best, seconds = time.perf_counter(), 1, float("inf")
    for size in dict.fromkeys(sizes):
        try:
            taken = _seconds_per_client(config, federation, model, size)
        except Exception as error:
            # Data-dependent control flow and the like cannot be mapped: one by one is what always works.
            logging.getLogger("fedra").warning("clients train one by one: the model cannot be mapped (%s)", error)
            break
        if taken < seconds:
            best, seconds = size, taken
        if time.perf_counter() - began > BUDGET_SECONDS:
            break
    return config.with_(engine__cohort_size=best)


def _seconds_per_client(config: RunConfig, federation: Federation, model: torch.nn.Module, size: int) -> float:
    """Return the time a client takes in a cohort of `size` on at most four batches, the first call's cost apart."""
    clients = [federation.train[i % len(federation)] for i in range(size)]
    few = 4 * config.batch_size
    sizes = [min(len(split), few) for split in clients]
    cohort = assemble(
        config, model, load(config).loss,
        np.concatenate([split.x[:few] for split in clients]),
        np.concatenate([split.y[:few] for split in clients]),
        plan(sizes, config.batch_size, [[np.arange(n)] for n in sizes]),
        make_optimizer(config, config.learning_rate),
    )  # fmt: skip
    first_step = replace(cohort, batches=plan([1] * size, 1, [[np.zeros(1, dtype=np.int64)]] * size))
    local_sgd(first_step)
    began = time.perf_counter()
    local_sgd(cohort)
    return (time.perf_counter() - began) / size
