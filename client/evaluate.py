"""A cohort evaluates, and describes its data: counts and metrics leave a client, never a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import Context, RecordDict
from torch.func import functional_call

from client import replies
from client.replies import Reply
from client.setting import Setting, epochs_of, inputs, open_setting, received
from core import adversary, records
from core.metrics import score_counts, score_each, weighted_means
from core.optimizers import learning_rate, make_optimizer
from core.records import Tensors, client_of
from core.seeding import seeds
from core.training import LocalRound, LocalUpdate, assemble, local_sgd, train_each
from privacy.secagg.rounds import SIZE_CLASSES
from tasks import standardise
from tasks.base import predict, probabilities


def evaluate(content: RecordDict, contexts: Sequence[Context]) -> list[Reply]:
    """Return each client's metrics on the split that the message names (test by default).

    They are those of the global model, or of the client's own where the strategy or `fine-tune-epochs` makes one. On
    the training examples it is the global model's loss alone, by which a server may choose clients.
    """
    setting = open_setting(contexts)
    task, config = setting.task, records.config_of(content)
    clients = [client_of(context) for context in contexts]
    split = str(config.get(records.SPLIT, "test"))
    x, y, sizes = inputs(setting, split, clients, config)
    names: Sequence[str] = task.metrics
    if split == "train":
        names = ("loss",)
        x, y = adversary.poisoned(setting.config, x, y, sizes, clients, len(task.labels))
    if split != "train" and (setting.half.personal_model or setting.config.fine_tune_epochs):
        p = _predict_each(setting, _personal(setting, content, contexts, clients), x, sizes)
    else:
        params, _ = received(content, setting)
        p = predict(records.load_into(setting.model, params), torch.from_numpy(x))
    each = score_each(p, y, sizes, names, float(config.get(records.THRESHOLD, 0.5)))
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
        columns |= {name: values.tolist() for name, values in own.items()}
        answers.append((group, replies.answer(metrics, columns)))
    return answers


def _personal(setting: Setting, content: RecordDict, contexts: Sequence[Context], clients: Sequence[int]) -> Tensors:
    """Return each client's own model (C, ...) by name, fine-tuned on its training examples where that is asked for."""
    config, round_config = setting.config, records.config_of(content)
    params, sent = received(content, setting)
    number = records.server_round(content) or 0
    x, y, sizes = inputs(setting, "train", clients, round_config)
    if config.fine_tune_epochs and min(sizes) == 0:
        raise ValueError("no training examples to fine-tune on")
    epochs = max(config.fine_tune_epochs, 1)
    drawn = seeds(config.seed, "fine-tune", number, clients=clients)
    r = assemble(
        config, setting.model, setting.task.loss, x, y,
        epochs_of(config, ("fine-tune", number), clients, sizes, epochs),
        make_optimizer(config, learning_rate(config, number)),
        global_params=params,
        config=round_config,
        seed=drawn[0],
        seeds=drawn,
        sizes=tuple(sizes),
        options=setting.half.options,
        sent=sent,
    )  # fmt: skip
    r = setting.with_past(r, contexts)
    make = setting.half.personal_model

    def own(each: LocalRound) -> LocalUpdate:
        start = make(each) if make else None
        if config.fine_tune_epochs or start is None:
            return local_sgd(each, start=start)
        return LocalUpdate(start, torch.zeros(len(each.sizes)))

    return train_each(own, r).params


def _predict_each(setting: Setting, params: Tensors, x: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Return probabilities of rows x, client after client, each by its own model (C, ...)."""
    model, ends = setting.model.eval(), np.cumsum(sizes)
    parts = []
    with torch.no_grad():
        for i, (end, size) in enumerate(zip(ends, sizes, strict=True)):
            own = {name: t[i] for name, t in params.items()}
            rows = torch.from_numpy(x[end - size : end]).to(next(iter(own.values())).device)
            parts.append(probabilities(functional_call(model, own, (rows,))))
    return np.concatenate(parts)


def statistics(content: RecordDict, contexts: Sequence[Context]) -> list[Reply]:
    """Return how many examples of each label a client has, and the sums that standardisation needs; never a row.

    Under secure aggregation a client says who it is, and what it has only as a part of everybody's sum.
    """
    setting = open_setting(contexts)
    clients = [client_of(context) for context in contexts]
    if setting.secure and records.SECURE in content:
        return setting.secure.masked_statistics([_summed(setting, client) for client in clients], content, contexts)
    answers: list[Reply] = []
    for i, client in enumerate(clients):
        metrics: dict[str, Any] = {} if setting.secure else _statistics(setting, client)
        answers.append(([i], replies.answer(metrics, {records.CLIENT: [client], "name": setting.data.name(client)})))
    return answers


def _statistics(setting: Setting, client: int) -> dict[str, list[Any]]:
    splits = setting.data.client(client)
    metrics: dict[str, Any] = {
        records.SIZES: [len(split) for split in splits.values()],
        records.LABEL_COUNTS: np.bincount(splits["train"].y, minlength=len(setting.task.labels)).tolist(),
    }
    if setting.task.standardise in ("federated", "local"):
        metrics |= standardise.statistics(splits["train"].x)
    return metrics


def _summed(setting: Setting, client: int) -> list[float]:
    """Return a client's statistics as one list of numbers, and in which power of two its training examples lie."""
    metrics = _statistics(setting, client)
    classes = np.zeros(SIZE_CLASSES)
    classes[int(metrics[records.SIZES][0]).bit_length()] = 1
    return [*classes.tolist(), *(number for column in metrics.values() for number in column)]
