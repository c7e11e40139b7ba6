"""The ClientApp: train, evaluate, describe; written once for a cohort of clients. A deployed client is one of one."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from torch import Tensor, nn

from core import records
from core.batches import Batches, plan, stream
from core.config import RunConfig
from core.data import Federation, Ragged
from core.device import device_of
from core.metrics import score_counts, score_each, weighted_means
from core.seeding import derive, permutations, rng
from core.training import LocalUpdate, assemble, learning_rate, make_optimizer
from strategies import local_update
from tasks import load, standardise
from tasks.base import Task, build_model, predict
from tasks.source import federation_of

# Where a client keeps how far its shuffled iterator has come (only with local-steps).
STATE = "fedra"
BATCHES_DRAWN = "batches-drawn"
Reply = tuple[list[int], RecordDict | Error]
"""Positions of the clients that an answer stands for, and the answer."""


@dataclass(frozen=True)
class _Setting:
    """What a process keeps of a configuration between rounds."""

    config: RunConfig
    task: Task
    model: nn.Module
    data: Federation
    like: records.Tensors
    """What travels of the model: its names and dtypes."""


@functools.lru_cache(maxsize=1)
def _setting(items: tuple[tuple[str, Any], ...]) -> _Setting:
    config = RunConfig.of(dict(items))
    task = load(config)
    model = build_model(task, config.seed).to(device_of(config))
    return _Setting(config, task, model, federation_of(config), records.travelling(model))


class CohortApp(ClientApp):
    """A Flower ClientApp that can also answer for many clients at once, which is what the local engine asks of it."""

    def cohort(self, message_type: str, content: RecordDict, contexts: Sequence[Context]) -> list[Reply]:
        """Return answers that cover every context once. What raises for one client is that client's error alone.

        More clients than train together are several cohorts, one after the other.
        """
        together = contexts[0].run_config.get("engine.cohort-size")
        # One by one they are all handed over: a model is loaded once for them.
        size = together if message_type == "train" and isinstance(together, int) and together > 1 else len(contexts)
        replies: list[Reply] = []
        for start in range(0, len(contexts), size):
            answers = self._answer(message_type, content, contexts[start : start + size])
            replies += [([start + i for i in positions], answer) for positions, answer in answers]
        return _merged(replies) if records.config_of(content).get(records.PARTIAL_MEAN) else replies

    def _answer(self, message_type: str, content: RecordDict, contexts: Sequence[Context]) -> list[Reply]:
        try:
            return HANDLERS[message_type](content, contexts)
        except Exception as error:
            if len(contexts) > 1:
                # Somebody in the cohort fails: each answers alone, so that nobody else's work is lost.
                alone = [self._answer(message_type, content, [context]) for context in contexts]
                return [([i], answer) for i, replies in enumerate(alone) for _, answer in replies]
            logging.getLogger("fedra").warning("client %s failed: %s", _client(contexts[0]), error)
            return [([0], _error(f"client {_client(contexts[0])}: {type(error).__name__}: {error}"))]


def train(content: RecordDict, contexts: Sequence[Context]) -> list[Reply]:
    """Return the cohort's new models, or their weighted mean where the server asked for no more."""
    began = time.perf_counter()
    setting = _open(contexts)
    config = setting.config
    clients = [_client(context) for context in contexts]
    round_config = records.config_of(content)
    x, y, sizes = _inputs(setting, "train", clients, round_config)
    if min(sizes) == 0:
        raise ValueError("no training examples")
    server_round = records.server_round(content)
    if server_round is None:
        raise ValueError(f"the strategy sent no '{records.SERVER_ROUND}'; put it into the config in configure_train")
    cohort = assemble(
        config, setting.model, setting.task.loss, x, y,
        _batches(config, server_round, clients, sizes, contexts),
        make_optimizer(config, learning_rate(config, server_round)),
        global_params=_global(content, setting),
        config=round_config,
        seed=derive(config.seed, "model", server_round, clients[0]),
    )  # fmt: skip
    update = local_update(config)(cohort)
    if config.local_steps:
        for context in contexts:
            context.state[STATE] = MetricRecord({BATCHES_DRAWN: _drawn(context) + config.local_steps})
    seconds = (time.perf_counter() - began) / len(clients)
    # A sum is not finite where one of its terms is not, and costs an eighth of looking at each.
    finite = torch.stack([p.reshape(len(sizes), -1).sum(1) for p in update.params.values()]).isfinite().all(0).tolist()
    good = [i for i, ok in enumerate(finite) if ok]
    groups = [good] if round_config.get(records.PARTIAL_MEAN) and good else [[i] for i in good]
    answers: list[Reply] = [(group, _trained(update, group, clients, sizes, seconds)) for group in groups]
    # A model that is not finite would poison every mean it enters: it is this client's error, not everyone's.
    refused = [i for i, ok in enumerate(finite) if not ok]
    reason = "the trained model is not finite; lower learning-rate or set gradient-clip"
    return answers + [([i], _error(f"client {clients[i]}: {reason}")) for i in refused]


def _merged(replies: Sequence[Reply]) -> list[Reply]:
    """Return the cohorts' means as one, and the errors as they are."""
    whole = [(positions, answer) for positions, answer in replies if isinstance(answer, RecordDict)]
    merged = records.MergedReply()
    for _, answer in whole:
        merged.add(answer)
    means: list[Reply] = [([i for positions, _ in whole for i in positions], merged.content())] if whole else []
    return means + [reply for reply in replies if isinstance(reply[1], Error)]


def evaluate(content: RecordDict, contexts: Sequence[Context]) -> list[Reply]:
    """Return each client's metrics of the global model on the split that the message names (test by default)."""
    setting = _open(contexts)
    task, config = setting.task, records.config_of(content)
    clients = [_client(context) for context in contexts]
    split = str(config.get(records.SPLIT, "test"))
    x, y, sizes = _inputs(setting, split, clients, config)
    p = predict(records.load_into(setting.model, _global(content, setting)), torch.from_numpy(x))
    each = score_each(p, y, sizes, task.metrics, float(config.get(records.THRESHOLD, 0.5)))
    # One answer for the cohort where the server takes that, with a column for each metric.
    groups = [list(range(len(clients)))] if config.get(records.PARTIAL_MEAN) else [[i] for i in range(len(clients))]
    answers: list[Reply] = []
    ends = np.cumsum(sizes)
    for group in groups:
        own = {name: values[group] for name, values in each.items()}
        examples = [sizes[i] for i in group]
        metrics: dict[str, Any] = {records.NUM_EXAMPLES: sum(examples), **weighted_means(own, examples)}
        if split == "validation" and task.tuned_threshold:
            rows = slice(ends[group[0]] - sizes[group[0]], ends[group[-1]])
            metrics[records.SCORE_COUNTS] = score_counts(p[rows], y[rows]).ravel().tolist()
        columns = {records.CLIENT: [clients[i] for i in group], records.NUM_EXAMPLES: examples}
        answers.append((group, _answer(metrics, columns | {name: values.tolist() for name, values in own.items()})))
    return answers


def statistics(content: RecordDict, contexts: Sequence[Context]) -> list[Reply]:
    """Return how many examples of each label a client has, and the sums that standardisation needs; never a row."""
    setting = _open(contexts)
    answers: list[Reply] = []
    for i, context in enumerate(contexts):
        client = _client(context)
        splits = setting.data.client(client)
        metrics: dict[str, Any] = {
            records.SIZES: [len(split) for split in splits.values()],
            records.LABEL_COUNTS: np.bincount(splits["train"].y, minlength=len(setting.task.labels)).tolist(),
        }
        if setting.task.standardise != "none":
            metrics |= standardise.statistics(splits["train"].x)
        answers.append(([i], _answer(metrics, {records.CLIENT: [client], "name": setting.data.name(client)})))
    return answers


HANDLERS: dict[str, Callable[[RecordDict, Sequence[Context]], list[Reply]]] = {
    "train": train,
    "evaluate": evaluate,
    records.QUERY_STATISTICS: statistics,
}
app = CohortApp()


def _one(message: Message, context: Context) -> Message:
    torch.set_num_threads(1)
    [(_, answer)] = app.cohort(message.metadata.message_type, message.content, [context])
    return Message(answer, reply_to=message)


app.train()(_one)
app.evaluate()(_one)
app.query(records.QUERY_STATISTICS.removeprefix("query."))(_one)


def _open(contexts: Sequence[Context]) -> _Setting:
    return _setting(tuple(sorted(contexts[0].run_config.items())))


def _client(context: Context) -> int:
    return int(context.node_config["partition-id"])


def _inputs(
    setting: _Setting, split: str, clients: Sequence[int], config: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Return the cohort's standardised inputs (n, ...), labels (n,) and sizes, client after client."""
    data: Ragged = getattr(setting.data, split)
    parts = [data[client] for client in clients]
    if setting.task.standardise == "federated":
        constants = {name: config[records.CONSTANTS + name] for name in ("mean", "std")}
        x = standardise.apply(np.concatenate([part.x for part in parts]), constants)
    elif setting.task.standardise == "local":
        own = [standardise.combine([standardise.statistics(setting.data.train[client].x)]) for client in clients]
        x = np.concatenate([standardise.apply(part.x, constants) for part, constants in zip(parts, own, strict=True)])
    else:
        x = np.concatenate([part.x for part in parts])
    y = np.concatenate([part.y for part in parts])
    return x, y, [len(part) for part in parts]


def _batches(
    config: RunConfig, server_round: int, clients: Sequence[int], sizes: Sequence[int], contexts: Sequence[Context]
) -> Batches:
    if not config.local_steps:

        def shuffled(at: np.ndarray, size: int) -> np.ndarray:
            chosen, path = np.asarray(clients)[at], ("batches", server_round)
            return permutations(config.seed, *path, clients=chosen, size=size, times=config.local_epochs)

        return plan(sizes, config.batch_size, shuffled)

    def shuffle(client: int, size: int) -> Callable[[int], np.ndarray]:
        return lambda epoch: rng(config.seed, "stream", client, epoch).permutation(size)

    starts = [_drawn(context) for context in contexts]
    shuffles = [shuffle(client, size) for client, size in zip(clients, sizes, strict=True)]
    return stream(sizes, config.batch_size, starts, config.local_steps, shuffles)


def _drawn(context: Context) -> int:
    state = cast(MetricRecord, context.state.get(STATE, MetricRecord({BATCHES_DRAWN: 0})))
    return int(cast(int, state[BATCHES_DRAWN]))


def _trained(
    update: LocalUpdate, group: list[int], clients: Sequence[int], sizes: Sequence[int], seconds: float
) -> RecordDict:
    weights = torch.tensor([float(sizes[i]) for i in group], device=update.loss.device)
    share = weights / weights.sum()

    def mean(values: Tensor) -> Tensor:
        if len(group) == 1:
            return values[group[0]]
        # Choosing copies every model: not where all are chosen.
        return torch.tensordot(share, values if len(group) == len(sizes) else values[group], dims=1)

    metrics = {records.TRAIN_LOSS: update.loss, **update.metrics}
    content = _answer(
        {records.NUM_EXAMPLES: sum(sizes[i] for i in group), **{k: float(mean(v)) for k, v in metrics.items()}},
        {
            records.CLIENT: [clients[i] for i in group],
            records.NUM_EXAMPLES: [sizes[i] for i in group],
            records.TRAIN_LOSS: update.loss[group].tolist(),
            records.TRAIN_SECONDS: [seconds] * len(group),
        },
    )
    content[records.ARRAYS] = records.to_arrays({name: mean(p) for name, p in update.params.items()})
    return content


def _global(content: RecordDict, setting: _Setting) -> records.Tensors:
    return records.to_tensors(records.in_dtypes_of(content.array_records[records.ARRAYS], setting.like))


def _answer(metrics: dict[str, Any], clients: dict[str, Any]) -> RecordDict:
    return RecordDict({records.METRICS: MetricRecord(metrics), records.CLIENTS: ConfigRecord(clients)})


def _error(reason: str) -> Error:
    return Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
