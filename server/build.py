"""From a configuration to a ready strategy, with every wrong option refused before anything starts."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
from flwr.serverapp.strategy import Strategy
from torch import nn

from core import adversary, devices, records
from core.config import RunConfig
from core.data import Federation
from core.errors import InputError, unknown
from core.idle import refuse_idle
from core.optimizers import make_optimizer
from core.processors import processors_of
from privacy import rules
from privacy.secagg import rules as secure_rules
from strategies import (
    client_half,
    makes_partial_means,
    options_of,
    parameters_of,
    private_by_example,
    strategy_class,
    unsaid,
)
from tasks import load
from tasks.base import Task, build_model, refuse_not_finite
from tasks.source import federation_of

# Options that repeat the clients' learning rate take it from the run unless they are given.
_CLIENT_RATE = ("client-learning-rate", "eta-l")
# What Flower's strategies sample by.
_SAMPLING = {"fraction_train", "min_train_nodes", "min_available_nodes"}


def check(config: RunConfig) -> Federation:
    """Return the federation's data after refusing, with `InputError`, whatever would fail later in the run."""
    refuse_idle([config])
    build_strategy(config)
    for optimizer in (config.optimizer, config.baseline.optimizer):
        make_optimizer(config, config.learning_rate, optimizer)
    task = load(config)
    model = build_model(task, config.seed)
    cls = strategy_class(config.strategy)
    if hasattr(cls, "check"):
        _check_strategy(cls, config, task, model)
    metric = config.early_stopping.metric
    if metric and metric not in task.metrics:
        raise unknown("early-stopping.metric", metric, task.metrics)
    if config.positive_weight != 1 and len(task.labels) != 2:
        raise InputError(
            f"positive-weight={config.positive_weight:g} weighs the positive one of two classes, and task "
            f"{config.task} has {len(task.labels)}; set positive-weight=1."
        )
    federation = _loaded(config)
    devices.check(config)
    adversary.check(config, len(task.labels))
    linear, by_example = makes_partial_means(config), private_by_example(config)
    few = federation.train[0]
    sizes = federation.train.sizes
    silent = unsaid(config)
    subject = rules.Subject(model, task.standardise, linear, by_example, sizes, task.loss, few.x[:8], few.y[:8], silent)
    rules.check(config, subject)
    secure_rules.check(config, model, client_half(config).numbers, linear=linear, unsaid=silent)
    processors_of(config)
    if config.server_examples and federation.server is None:
        raise InputError(f"task {config.task} cannot keep server-examples={config.server_examples}; set 0.")
    if "server-examples" in getattr(cls, "settings", {}) and not config.server_examples:
        raise InputError(f"{config.strategy} trains on examples of the server's own; set server-examples=100 or so.")
    if len(federation) != config.clients:
        raise InputError(
            f"clients={config.clients}, but the data are for {len(federation)}; set clients={len(federation)}."
        )
    shape = federation.train[0].x.shape
    if task.standardise != "none" and len(shape) != 2:
        raise InputError(
            f"task {config.task} has inputs of shape {shape} and standardise = '{task.standardise}', which is for "
            "tables (examples, features); set standardise = 'none' and scale them in federation()."
        )
    if (metric or config.keep == "best") and not federation.validation.sizes.any():
        raise InputError("early stopping and keep=best need validation splits, and these partitions have none.")
    return federation


def _loaded(config: RunConfig) -> Federation:
    """Return the federation's data; `InputError` where they cannot be loaded or are no finite numbers."""
    try:
        federation = federation_of(config)
    except InputError:
        raise
    except (OSError, ValueError, LookupError) as error:
        # A task of somebody's own, which raises what its libraries do.
        raise InputError(f"task {config.task} cannot load its data: {type(error).__name__}: {error}.") from error
    splits = [federation.train.x, federation.validation.x, federation.test.x, federation.central.x]
    splits += [federation.server.x] if federation.server is not None else []
    if all(np.isfinite(x).all() for x in splits):
        return federation
    what = f"task {config.task}: its input"
    if splits[0].ndim == 2:
        for column in range(splits[0].shape[1]):
            values = np.concatenate([x[:, column] for x in splits])
            refuse_not_finite(values, f"{what} column {column + 1} (of {splits[0].shape[1]})")
    refuse_not_finite(np.concatenate(splits), what)
    return federation


def _check_strategy(cls: Any, config: RunConfig, task: Task, model: nn.Module) -> None:
    """Let the strategy refuse the run; where it would take another model of the task's, the sentence names it."""
    try:
        cls.check(config, model)
    except InputError as refused:
        taken = []
        for name in getattr(task, "models", ()):
            other = config.with_(model=name)
            with contextlib.suppress(InputError):
                cls.check(other, build_model(load(other), config.seed))
                taken.append(f"model={name}")
        raise InputError(
            f"{refused} {config.strategy} takes {' or '.join(taken)}." if taken else str(refused)
        ) from None


def build_strategy(config: RunConfig) -> Strategy:
    """Return the configured strategy; `InputError` names an unknown option, a wrong value or too few clients."""
    cls = strategy_class(config.strategy)
    options = options_of(cls)
    for key in config.strategy_options:
        if key not in options:
            raise unknown(f"{config.strategy} option", f"strategy-options.{key}", options)
        value, default = config.strategy_options[key], options[key]
        if isinstance(default, bool) and not isinstance(value, bool):
            raise InputError(f"strategy-options.{key}={value!r} is neither true nor false; its default is {default}.")
        if isinstance(default, int) and not isinstance(default, bool) and isinstance(value, float) and value % 1:
            raise InputError(f"strategy-options.{key}={value!r} is not a whole number; its default is {default}.")
        numeric = isinstance(default, int | float) and not isinstance(default, bool)
        if numeric and (isinstance(value, str | bool) or value < 0):
            raise InputError(f"strategy-options.{key}={value!r} is not a number from 0; its default is {default}.")
    sampled = asked(config)
    chosen: dict[str, Any] = {key: config.learning_rate for key in _CLIENT_RATE if key in options}
    chosen |= config.strategy_options
    uniform = config.sampling.kind == "uniform"
    # Evaluation is the server's own step (server/evaluate.py), on its own schedule and for any strategy. So is any
    # selection that is not uniform (server/selection.py): the strategy takes all it is offered, be it nobody.
    plumbing: dict[str, Any] = {
        "fraction_train": sampled / config.clients if uniform else 1.0,
        "min_train_nodes": sampled if uniform else 0,
        "min_available_nodes": config.clients if uniform else 0,
        "fraction_evaluate": 0.0,
        "min_evaluate_nodes": 0,
    }
    if config.privacy.level == "client":
        # How many examples a client has would tell of it; clipping sends a weight of its own.
        plumbing["weighted_by_key"] = records.WEIGHT
    accepted = parameters_of(cls)
    arguments = {name: value for name, value in plumbing.items() if name in accepted}
    arguments |= {key.replace("-", "_"): value for key, value in chosen.items()}
    try:
        strategy = cls(**arguments)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"strategy '{config.strategy}' refuses its options {config.strategy_options}: {error}"
        ) from None
    if not uniform:
        # One that does not take these from outside would wait for ever for clients that it is not offered.
        vars(strategy).update({name: plumbing[name] for name in vars(strategy).keys() & _SAMPLING})
    _check_enough(strategy, config, config.count(config.sampled))
    return strategy


def asked(config: RunConfig) -> int:
    """Return how many clients a round asks: those it wants, times `sampling.over-selection`."""
    return min(config.clients, math.ceil(config.count(config.sampled) * config.sampling.over_selection))


def _check_enough(strategy: Strategy, config: RunConfig, sampled: int) -> None:
    """Refuse robust rules that cannot work with so few clients; Flower's skip the round or average silently."""
    malicious, size = getattr(strategy, "num_malicious_nodes", 0), getattr(strategy, "bucket_size", 1)
    least = {"krum": 2 * malicious + 3, "multikrum": 2 * malicious + 3, "bulyan": 4 * malicious + 3}
    buckets = math.ceil(sampled / size)
    beta = getattr(strategy, "beta", 0.0)
    if config.strategy == "fedtrimmedavg" and 0 < beta * buckets < 1:
        raise InputError(
            f"fedtrimmedavg with beta={beta:g} cuts nobody off among {buckets} answers; "
            f"raise beta to {1 / buckets:.2g} or more, or sampled."
        )
    # One malicious client spoils its bucket: the rule sees as many malicious ones among fewer.
    if buckets < (needed := least.get(config.strategy, 1)):
        grouped = f" in buckets of {size}" if size > 1 else ""
        raise InputError(
            f"{config.strategy} with num-malicious-nodes={malicious} needs {(needed - 1) * size + 1} clients a round"
            f"{grouped}, not {sampled}; raise sampled or clients, or lower strategy-options.num-malicious-nodes."
        )
