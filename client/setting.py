"""What a client's process keeps of a configuration between rounds, and how a cohort's data come out of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from flwr.app import Context, MetricRecord, RecordDict
from torch import nn

from client.attacks import Attack
from client.privacy import ClientPrivacy
from client.secure import SecureClients
from core import bundle, records
from core.batches import Batches, plan, stream
from core.compression import Compressor
from core.config import RunConfig
from core.data import Federation, Ragged
from core.device import device_of, to_device
from core.devices import Devices, devices_of
from core.processors import Processor, processors_of
from core.records import Tensors
from core.seeding import permutations, rng
from core.training import LocalRound
from strategies import ClientHalf, client_half
from tasks import load, standardise
from tasks.base import Task, build_model
from tasks.source import federation_of

# Where a client keeps how far its shuffled iterator has come (only with local-steps).
STATE = "fedra"
BATCHES_DRAWN = "batches-drawn"


@dataclass(frozen=True)
class Setting:
    """A configuration's task, model and data, and what it makes clients do."""

    config: RunConfig
    task: Task
    model: nn.Module
    data: Federation
    like: Tensors
    """What travels of the model: its names and dtypes."""
    half: ClientHalf
    sends: Sequence[str]
    """Names of what a client sends back."""
    devices: Devices | None
    attack: Attack | None
    processors: Sequence[Processor]
    privacy: ClientPrivacy | None
    compressor: Compressor | None
    secure: SecureClients | None

    def with_past(self, r: LocalRound, contexts: Sequence[Context]) -> LocalRound:
        """Return the round with what its clients have kept: the strategy's state and the processors'."""
        makers: list[Callable[[LocalRound], Mapping[str, Tensors]]] = [self.half.initial_state]
        own = (getattr(p, "initial_state", None) for p in (*self.processors, self.compressor))
        makers += [make for make in own if make]
        initial = {kind: tensors for make in makers for kind, tensors in make(r).items()}
        state = bundle.read_state(contexts, initial)
        return replace(
            r, state={kind: {n: to_device(t, r.x.device) for n, t in own.items()} for kind, own in state.items()}
        )


@functools.lru_cache(maxsize=1)
def _setting(items: tuple[tuple[str, Any], ...]) -> Setting:
    config = RunConfig.of(dict(items))
    task = load(config)
    model = build_model(task, config.seed).to(device_of(config))
    half = client_half(config)
    return Setting(
        config, task, model, federation_of(config), records.travelling(model), half, half.sends(model, half.options),
        devices_of(config), Attack.of(config), processors_of(config), ClientPrivacy.of(config),
        Compressor(config) if config.compression.kind != "none" else None, SecureClients.of(config, half),
    )  # fmt: skip


def open_setting(contexts: Sequence[Context]) -> Setting:
    """Return the setting that the contexts' run configuration describes."""
    return _setting(tuple(sorted(contexts[0].run_config.items())))


def inputs(
    setting: Setting, split: str, clients: Sequence[int], config: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Return the cohort's standardised inputs (n, ...), labels (n,) and sizes, client after client."""
    data: Ragged = getattr(setting.data, split)
    parts = [data[client] for client in clients]
    if setting.task.standardise in ("federated", "server"):
        constants = {name: config[records.CONSTANTS + name] for name in ("mean", "std")}
        x = standardise.apply(np.concatenate([part.x for part in parts]), constants)
    elif setting.task.standardise == "local":
        own = [standardise.combine([standardise.statistics(setting.data.train[client].x)]) for client in clients]
        x = np.concatenate([standardise.apply(part.x, constants) for part, constants in zip(parts, own, strict=True)])
    else:
        x = np.concatenate([part.x for part in parts])
    y = np.concatenate([part.y for part in parts])
    return x, y, [len(part) for part in parts]


def received(content: RecordDict, setting: Setting) -> tuple[Tensors, dict[str, Tensors]]:
    """Return the global model and, by kind and name, what the strategy sent beside it."""
    own, others = bundle.split(content.array_records[records.ARRAYS])
    beside = {kind: records.to_tensors(arrays) for kind, arrays in others.items()}
    return records.to_tensors(records.in_dtypes_of(own, setting.like)), beside


def batches_of(
    config: RunConfig, server_round: int, clients: Sequence[int], sizes: Sequence[int], contexts: Sequence[Context]
) -> Batches:
    """Return the batches that the clients take in a round: a function of seed, round and client."""
    if not config.local_steps:
        return epochs_of(config, ("batches", server_round), clients, sizes, config.local_epochs)

    def shuffle(client: int, size: int) -> Callable[[int], np.ndarray]:
        return lambda epoch: rng(config.seed, "stream", client, epoch).permutation(size)

    starts = [_drawn(context) for context in contexts]
    shuffles = [shuffle(client, size) for client, size in zip(clients, sizes, strict=True)]
    return stream(sizes, config.batch_size, starts, config.local_steps, shuffles)


def epochs_of(
    config: RunConfig, path: tuple[int | str, ...], clients: Sequence[int], sizes: Sequence[int], epochs: int
) -> Batches:
    """Return whole epochs of batches, shuffled by seed, path and client."""

    def shuffled(at: np.ndarray, size: int) -> np.ndarray:
        chosen = np.asarray(clients)[at]
        return permutations(config.seed, *path, clients=chosen, size=size, times=epochs)

    return plan(sizes, config.batch_size, shuffled)


def note_batches(config: RunConfig, contexts: Sequence[Context], steps: Sequence[int]) -> None:
    """Let clients remember how far their shuffled iterators have come after these steps."""
    if config.local_steps:
        for context, taken in zip(contexts, steps, strict=True):
            context.state[STATE] = MetricRecord({BATCHES_DRAWN: _drawn(context) + taken})


def _drawn(context: Context) -> int:
    state = cast(MetricRecord, context.state.get(STATE, MetricRecord({BATCHES_DRAWN: 0})))
    return int(cast(int, state[BATCHES_DRAWN]))
