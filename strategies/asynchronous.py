"""FedAsync and FedBuff: no rounds; clients finish when their devices do, on the virtual clock (`devices.kind`).

As many clients as a round samples are always at work. One that finishes is replaced at once by another, which begins
with the global model of that moment; when its answer comes, the model has moved on by its staleness t. A client whose
answer waits in a buffer, or was lost, rests until the server has stepped.

- FedAsync (Xie, Koyejo and Gupta, 2019, algorithm 1): x <- (1 - a_t) x + a_t x_k after every answer, with a_t = mixing
  (1 + t)^-staleness_exponent (polynomial).
- FedBuff (Nguyen et al., AISTATS 2022, algorithm 1): after `buffer_size` answers x <- x + eta_g mean((1 + t)^-1/2 (x_k
  - x at its start)).

Who finishes when is known beforehand, so a client is only trained when its answer is due; those that began with the
same model train as one cohort. A round, in what a run records, is one step of the server. Running statistics move
towards those that came, as far as weights do but for eta_g.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid, strategy
from torch import nn

from core import records
from core.config import RunConfig
from core.errors import InputError
from core.records import to_arrays, to_numpy
from core.seeding import rng
from core.server_side import ServerSide
from strategies.requirements import trainable


class _WithoutRounds(strategy.FedAvg):
    """Keeps the virtual clock, and hands each step the answers that came by then."""

    settings: ClassVar[dict[str, Any]] = {"devices.kind": "lognormal"}
    buffer_size = 1
    """Answers that a step of the server waits for."""

    def __init__(self, *, staleness_exponent: float = 0.5, **fedavg: Any) -> None:
        super().__init__(**fedavg)
        self.staleness_exponent = staleness_exponent
        self.virtual_seconds = 0.0
        self.flying: list[list[float]] = []
        """Clients at work: when they finish, their node, and the version of the model they began with."""
        self.versions: dict[int, ArrayRecord] = {}
        self.due: dict[int, int] = {}
        """Version by node of the clients that answer in this step."""
        self.launched = 0

    @staticmethod
    def check(config: RunConfig, model: nn.Module) -> None:
        """Refuse runs without a virtual clock, and what only rounds have."""
        if config.devices.kind == "none":
            raise InputError(f"{config.strategy} needs virtual time; set devices.kind=lognormal or devices.kind=trace.")
        if config.privacy.level == "client" and config.privacy.noise == "central":
            raise InputError(
                f"{config.strategy} takes answers as they come, and privacy.noise=central shows it sums of whole "
                "rounds alone; set privacy.noise=local, or choose a strategy of weighted means (fedavg, fedprox, ...)."
            )
        if config.devices.deadline_seconds or config.sampling.over_selection > 1 or config.sampling.kind != "uniform":
            raise InputError(
                f"{config.strategy} has no rounds: leave devices.deadline-seconds at 0, sampling.over-selection at 1 "
                "and sampling.kind at uniform."
            )

    def set_up(self, server: ServerSide) -> None:
        """Learn the clients' devices, and which tensors are parameters."""
        self.server = server
        self.names = trainable(server)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return messages to the clients whose answers come next, each with the model it began with."""
        version = server_round - 1
        self.versions[version] = arrays
        nodes = list(grid.get_node_ids())
        contents: dict[int, RecordDict] = {}
        self.due, answers = {}, 0
        self._launch(version, self.min_train_nodes - len(self.flying), nodes)
        # Lost answers fill no buffer. Where everybody has answered or is lost, the step takes what came.
        while answers < self.buffer_size and self.flying:
            first = min(self.flying)
            self.flying.remove(first)
            self.virtual_seconds, node, began = first[0], int(first[1]), int(first[2])
            self.due[node] = began
            if began not in contents:
                contents[began] = RecordDict({
                    self.arrayrecord_key: self.versions[began],
                    self.configrecord_key: ConfigRecord({**config, records.SERVER_ROUND: began + 1}),
                })  # fmt: skip
            answers += self._comes(node, contents[began])
            self._launch(version, 1, nodes)
        return [Message(contents[began], node, MessageType.TRAIN) for node, began in self.due.items()]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the model after the step, and the aggregated metrics."""
        answered, _ = self._check_and_log_replies(replies, is_train=True)
        current = self.versions[server_round - 1]
        new = None
        if answered:
            model = {name: to_numpy(array) for name, array in current.items()}
            moved = self.step(model, [self._answer(reply, server_round - 1) for reply in answered])
            new = to_arrays({name: value.astype(model[name].dtype) for name, value in moved.items()})
        needed = {int(version) for _, _, version in self.flying}
        self.versions = {version: kept for version, kept in self.versions.items() if version in needed}
        if new is None:
            return None, None
        contents = [reply.content for reply in answered]
        return new, self.train_metrics_aggr_fn(contents, self.weighted_by_key)

    def step(self, model: dict[str, np.ndarray], answers: list[_Answer]) -> dict[str, np.ndarray]:
        """Return the global model moved by the answers."""
        raise NotImplementedError

    def discount(self, staleness: int) -> float:
        """Return s(t) = (1 + t)^-a."""
        return float((1 + staleness) ** -self.staleness_exponent)

    def _answer(self, reply: Message, version: int) -> _Answer:
        began = self.due[reply.metadata.src_node_id]
        [arrays] = reply.content.array_records.values()
        origin = self.versions[began]
        trained = {name: to_numpy(array) for name, array in arrays.items()}
        return version - began, trained, {name: to_numpy(array) for name, array in origin.items()}

    def _comes(self, node: int, content: RecordDict) -> bool:
        """Return whether the client's answer to a message is not lost, as it will find itself."""
        return bool(self.server.work(np.array([self.server.client_of(node)]), content).steps[0])

    def _launch(self, version: int, count: int, nodes: list[int]) -> None:
        """Let `count` idle clients begin with the current model."""
        for _ in range(count):
            at_work = {int(node) for _, node, _ in self.flying} | self.due.keys()
            idle = [node for node in nodes if node not in at_work]
            if not idle:
                return
            node = idle[int(rng(self.server.config.seed, "launch", self.launched).integers(len(idle)))]
            self.launched += 1
            client = np.array([self.server.client_of(node)])
            [seconds] = self.server.expected_seconds(version + 1, client, self.versions[version]).tolist()
            self.flying.append([self.virtual_seconds + seconds, node, version])


class FedBuff(_WithoutRounds):
    """The server steps after every `buffer_size` answers, by the mean of their stale updates.

    Where no `buffer_size` is asked for it is 10, or `sampled` where that is less.
    """

    def __init__(self, *, buffer_size: int = 10, server_learning_rate: float = 1.0, **options: Any) -> None:
        if buffer_size < 1:
            raise ValueError("buffer-size must be at least 1")
        super().__init__(**options)
        # Never more than are at work; `check` has refused more that was asked for.
        self.buffer_size = min(int(buffer_size), self.min_train_nodes)
        self.server_learning_rate = server_learning_rate

    @staticmethod
    def check(config: RunConfig, model: nn.Module) -> None:
        """Refuse also a buffer that clients at work could never fill."""
        _WithoutRounds.check(config, model)
        size, at_work = config.strategy_options.get("buffer-size", 1), config.count(config.sampled)
        if isinstance(size, int | float) and size > at_work:
            raise InputError(
                f"strategy-options.buffer-size={size:g} is more than the {at_work} clients at work at a time; "
                f"lower it to {at_work} or less, or raise sampled."
            )

    def step(self, model: dict[str, np.ndarray], answers: list[_Answer]) -> dict[str, np.ndarray]:
        """Return the global model moved by the buffer's stale updates."""
        total = {name: np.zeros(value.shape) for name, value in model.items()}
        for staleness, trained, began in answers:
            for name in total:
                # Statistics move towards the answer's own: a stale difference could make a variance negative.
                origin = began[name] if name in self.names else model[name]
                total[name] += self.discount(staleness) * (trained[name] - origin)
        eta = {name: self.server_learning_rate if name in self.names else 1.0 for name in model}
        return {name: model[name] + eta[name] / len(answers) * total[name] for name in model}


class FedAsync(_WithoutRounds):
    """The server steps after every answer, towards the model that came."""

    def __init__(self, *, mixing: float = 0.6, **options: Any) -> None:
        if not 0 < mixing <= 1:
            raise ValueError("mixing must be above 0 and up to 1")
        super().__init__(**options)
        self.mixing = mixing

    def step(self, model: dict[str, np.ndarray], answers: list[_Answer]) -> dict[str, np.ndarray]:
        """Return (1 - a_t) x + a_t x_k."""
        [(staleness, trained, _)] = answers
        share = self.mixing * self.discount(staleness)
        return {name: (1 - share) * value + share * trained[name] for name, value in model.items()}


_Answer = tuple[int, dict[str, np.ndarray], dict[str, np.ndarray]]
"""Staleness, the model that came, and the one it began with."""
