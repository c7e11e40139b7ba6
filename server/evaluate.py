"""How good the global model is: on the central test set, and on each client's own splits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from core import records
from core.config import RunConfig
from core.data import Split
from core.errors import RunError
from core.metrics import best_threshold, score, spread, weighted_means
from core.records import Columns
from core.seeding import rng
from privacy.secagg.rounds import SIZE_CLASSES
from server.malice import backdoor_success
from server.observe import ObservedGrid
from tasks import standardise
from tasks.base import Task, build_model, predict
from tasks.source import federation_of

DESCRIBED = 10_000


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of one model: metrics by name on each kind of data, and the decision threshold that was used."""

    central: dict[str, float]
    """On the central test set."""
    clients: dict[str, dict[str, float]]
    """On the clients' own test splits: mean, worst and std of each metric."""
    validation: dict[str, float]
    """On the clients' validation splits, weighted by examples; nan where there are none."""
    threshold: float
    attack_success: float | None
    """Share of triggered test examples that the model gives the backdoor's label; None without a backdoor."""
    each: Columns
    """Test metrics of every client that evaluated, in the order of the clients, beside their numbers (`client`)."""


@dataclass(frozen=True)
class Description:
    """What the clients said of themselves at the start: names, sizes of their splits, label counts, input constants."""

    names: list[str]
    sizes: list[list[int]]
    label_counts: list[list[int]]
    constants: dict[str, list[float]]
    order: dict[int, int]
    """Client number by node id."""
    together: bool = False
    """Whether sizes and label counts have one row, which is of all clients together."""

    def heterogeneity(self, task: Task) -> dict[str, Any]:
        """Return what heterogeneity.json holds: a row for each client that described itself, or one of all."""
        splits = dict(zip(("train", "validation", "test"), zip(*self.sizes, strict=True), strict=True))
        rows = {"label_counts": self.label_counts, "sizes": splits}
        about = {"labels": task.labels, "clients": sorted(self.order.values()), "names": self.names}
        return {**about, "together": rows} if self.together else {**about, **rows}

    def training_sizes(self, clients: int) -> np.ndarray:
        """Return every client's training examples, (clients,) int64: the mean where one did not describe itself."""
        described = np.array([sizes[0] for sizes in self.sizes])
        if self.together:
            return np.full(clients, round(described.sum() / clients))
        sizes = np.full(clients, round(described.mean()))
        sizes[list(self.order.values())] = described
        return sizes

    def config(self) -> dict[str, list[float]]:
        """Return the constants as they stand in a message's config."""
        return {records.CONSTANTS + name: values for name, values in self.constants.items()}


def describe(grid: ObservedGrid, config: RunConfig, task: Task) -> Description:
    """Ask the clients for counts and sums, and return them with the constants made from the sums of all.

    Of more than `DESCRIBED` clients as many are drawn. Raises `RuntimeError` when one cannot answer: constants of those
    that happen to answer would be quietly wrong.
    """
    content = RecordDict({records.CONFIG: ConfigRecord({})})
    nodes: Sequence[int] | np.ndarray = list(grid.get_node_ids())
    if grid.numbered and len(nodes) > DESCRIBED:
        chosen = rng(config.seed, "described").choice(len(nodes), DESCRIBED, replace=False, shuffle=False)
        nodes = [nodes[i] for i in np.sort(chosen)]
    messages = [Message(content, node, records.QUERY_STATISTICS) for node in nodes]
    replies = list(grid.send_and_receive(messages, timeout=config.timeout_seconds))
    failed = [str(reply.error.reason) for reply in replies if reply.has_error()]
    if failed or len(replies) < len(messages):
        raise RunError(
            f"{len(messages) - len(replies) + len(failed)} clients did not describe their data: {failed[:3]}"
        )
    rows = []
    for reply in replies:
        about: dict[str, Any] = dict(reply.content.config_records[records.CLIENTS])
        rows.append(
            (about[records.CLIENT][0], about["name"], records.metrics_of(reply.content), reply.metadata.src_node_id)
        )
    rows.sort(key=lambda row: row[0])
    numbers = [client for client, *_ in rows]
    if len(set(numbers)) < len(numbers) or not all(0 <= client < config.clients for client in numbers):
        raise RunError(f"clients say that their numbers are {numbers[:5]}...; each must have one of its own from 0")
    order = {node: client for client, _, _, node in rows}
    described = [metrics for _, _, metrics, _ in rows]
    if grid.secure is not None:
        described = [_summed(grid, config, task, order)]
    constants: dict[str, list[float]] = {}
    if task.standardise == "server":
        own = federation_of(config).server
        assert own is not None
        constants = standardise.combine([standardise.statistics(own.x)])
    elif task.standardise != "none":
        constants = standardise.combine(described)
    return Description(
        names=[name for _, name, _, _ in rows],
        sizes=[list(metrics[records.SIZES]) for metrics in described],
        label_counts=[list(metrics[records.LABEL_COUNTS]) for metrics in described],
        constants=constants,
        order=order,
        together=grid.secure is not None,
    )


def _summed(grid: ObservedGrid, config: RunConfig, task: Task, order: dict[int, int]) -> dict[str, Any]:
    """Return what clients have said of themselves by one secure sum: what one client with all examples would say.

    They also say in which power of two their number of examples lies: the largest bounds their weights.
    """
    assert grid.secure is not None
    features = federation_of(config).central.x.shape[1] if task.standardise in ("federated", "local") else 0
    lengths = {records.SIZES: 3, records.LABEL_COUNTS: len(task.labels)}
    if features:
        lengths |= {records.INPUT_SUM: features, records.INPUT_SQUARES: features, records.INPUT_COUNT: 1}
    grid.order_by(order)
    content = RecordDict({records.CONFIG: ConfigRecord({})})
    nodes = {client: node for node, client in order.items()}
    numbers = grid.secure.add_up(content, nodes, SIZE_CLASSES + sum(lengths.values()), config.timeout_seconds)
    classes, numbers = numbers[:SIZE_CLASSES], numbers[SIZE_CLASSES:]
    grid.secure.largest_weight = max(1, (1 << max(i for i, count in enumerate(classes) if count)) - 1)
    found: dict[str, Any] = {}
    for name, length in lengths.items():
        values, numbers = numbers[:length], numbers[length:]
        found[name] = values if name.startswith("input") else [round(value) for value in values]
    return found


class Evaluator:
    """Evaluates models of one run; which clients evaluate is drawn once, so that rounds can be compared."""

    def __init__(self, grid: Grid, config: RunConfig, task: Task, central: Split, about: Description,
        for_evaluation: Callable[[ArrayRecord], ArrayRecord] | None = None,
    ) -> None:  # fmt: skip
        self._grid, self._task, self._config = grid, task, config
        self._for_evaluation = for_evaluation or (lambda arrays: arrays)
        self._model = build_model(task, config.seed)
        self._constants = about.config()
        x = standardise.apply(central.x, about.constants) if about.constants else central.x
        self._central = Split(x, central.y)
        nodes = sorted(about.order, key=about.order.__getitem__)
        # Of those that described themselves: a message to each of a million clients would take longer than training.
        chosen = rng(config.seed, "evaluated").permutation(len(nodes))[: config.count(config.evaluated)]
        self._nodes = [nodes[i] for i in sorted(chosen)]
        self._has_validation = any(sizes[1] for sizes in about.sizes)

    def __call__(self, server_round: int, arrays: ArrayRecord, timeout: float) -> Evaluation:
        """Return the evaluation of `arrays`; the threshold comes from validation splits, never from test data."""
        sent = self._for_evaluation(arrays)
        threshold, validation = 0.5, dict.fromkeys(self._task.metrics, float("nan"))
        if self._has_validation:
            answers = self._ask(server_round, sent, "validation", threshold, timeout)
            if self._task.tuned_threshold:
                counts = [records.metrics_of(answer)[records.SCORE_COUNTS] for answer in answers]
                threshold = best_threshold(np.sum(counts, axis=0).reshape(2, -1))
                # Only what depends on the threshold changes, but F1 at 0.5 would be a misleading thing to track.
                answers = self._ask(server_round, sent, "validation", threshold, timeout)
            columns = _columns(answers)
            validation = weighted_means(self._metrics(columns), columns[records.NUM_EXAMPLES])
        columns = _columns(self._ask(server_round, sent, "test", threshold, timeout))
        each = {records.CLIENT: columns[records.CLIENT], **{name: columns[name] for name in self._task.metrics}}
        records.load_into(self._model, records.to_tensors(arrays))
        p = predict(self._model, torch.from_numpy(self._central.x))
        central = score(p, self._central.y, self._task.metrics, threshold)
        success = backdoor_success(self._config, self._model, self._central, threshold)
        return Evaluation(central, spread(self._metrics(columns)), validation, threshold, success, each)

    def _metrics(self, columns: Columns) -> dict[str, np.ndarray]:
        return {name: np.array(columns[name]) for name in self._task.metrics}

    def losses(self, server_round: int, arrays: ArrayRecord, nodes: Sequence[int], timeout: float) -> Columns:
        """Return the loss of the global model on the training examples of those clients that answer, by client."""
        return _columns(self._ask(server_round, arrays, "train", 0.5, timeout, nodes))

    def _ask(
        self, server_round: int, arrays: ArrayRecord, split: str, threshold: float, timeout: float,
        nodes: Sequence[int] | None = None,
    ) -> list[RecordDict]:  # fmt: skip
        config = ConfigRecord(
            {
                records.SERVER_ROUND: server_round,
                records.SPLIT: split,
                records.THRESHOLD: threshold,
                records.PARTIAL_MEAN: getattr(self._grid, "numbered", False),
                **self._constants,
            }
        )
        content = RecordDict({records.ARRAYS: arrays, records.CONFIG: config})
        messages = [Message(content, node, "evaluate") for node in (self._nodes if nodes is None else nodes)]
        replies = list(self._grid.send_and_receive(messages, timeout=timeout))
        if all(reply.has_error() for reply in replies):
            reason = str(replies[0].error.reason) if replies else "none answered in timeout-seconds"
            raise RunError(f"no client could evaluate round {server_round} on its {split} split: {reason}")
        return [reply.content for reply in replies if reply.has_content()]


def _columns(answers: Sequence[RecordDict]) -> Columns:
    """Return the columns of all answers, one after the other, sorted by client."""
    parts = [dict(answer.config_records[records.CLIENTS]) for answer in answers]
    columns = {name: [value for part in parts for value in cast(list[Any], part[name])] for name in parts[0]}
    order = np.argsort(columns[records.CLIENT], kind="stable")
    return {name: [values[i] for i in order] for name, values in columns.items()}
