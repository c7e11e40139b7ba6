"""Flower's SecAgg+ round, all of its own code: the workflow, and its mod at every client, in this process."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.client.mod.secure_aggregation.secaggplus_mod import secaggplus_mod
from flwr.common import Code, FitIns, FitRes, Parameters, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS
from flwr.compat.common import recorddict_compat
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.server.workflow.secure_aggregation.secaggplus_workflow import SecAggPlusWorkflow, WorkflowState
from flwr.supercore.task_identity import TaskIdentity


class FlowerRound:
    """A round of Flower's: CPU seconds of all clients and of the server, by stage, and the bytes that clients send."""

    def __init__(self, updates: np.ndarray, weights: Iterable[int], threshold: int, max_weight: float = 1000.0) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        clients, size = updates.shape
        self._workflow = SecAggPlusWorkflow(1.0, threshold, max_weight=max_weight)
        self._contexts = {node: _context(node) for node in range(2, clients + 2)}
        self._replies = {
            node: FitRes(Status(Code.OK, ""), ndarrays_to_parameters([update]), weight, {})
            for node, update, weight in zip(self._contexts, updates, weights, strict=True)
        }
        manager: Any = SimpleNamespace(num_available=lambda: clients)
        self._context = LegacyContext(_context(1), strategy=self, client_manager=manager)  # type: ignore[arg-type]
        self._context.state[MAIN_CONFIGS_RECORD] = ConfigRecord({WorkflowKey.CURRENT_ROUND: 1})
        model = ndarrays_to_parameters([np.zeros(size, dtype=np.float32)])
        self._context.state[MAIN_PARAMS_RECORD] = recorddict_compat.parameters_to_arrayrecord(model, True)
        self._absent: dict[str, set[int]] = {}
        self._mean: np.ndarray | None = None
        self.client_seconds: dict[str, float] = defaultdict(float)
        self.server_seconds: dict[str, float] = defaultdict(float)
        self.uploaded = 0

    def run(self, absent: dict[str, Collection[int]] | None = None) -> np.ndarray | None:
        """Return the mean, None if the round ends without one; `absent` says who does not answer in which stage."""
        workflow, state = self._workflow, WorkflowState()
        stages = {
            "advertise": workflow.setup_stage, "share": workflow.share_keys_stage,
            "mask": workflow.collect_masked_vectors_stage, "unmask": workflow.unmask_stage,
        }  # fmt: skip
        self._absent = {stage: {client + 2 for client in lost} for stage, lost in (absent or {}).items()}
        for self._stage, step in stages.items():
            began, clients = time.process_time(), self.client_seconds[self._stage]
            try:
                goes_on = step(self, self._context, state)  # type: ignore[arg-type]
            except Exception:
                goes_on = False
            spent = time.process_time() - began
            self.server_seconds[self._stage] += spent - (self.client_seconds[self._stage] - clients) - self._else
            if not goes_on:
                return None
        return self._mean

    # What the workflow asks of a strategy.

    def configure_fit(self, server_round: int, parameters: Parameters, client_manager: Any) -> list[Any]:
        """Return what to send to whom."""
        return [(SimpleNamespace(node_id=node), FitIns(parameters, {})) for node in self._contexts]

    def aggregate_fit(self, server_round: int, results: list[Any], failures: list[Any]) -> tuple[Any, dict]:
        """Keep the mean, which all results have."""
        [self._mean] = parameters_to_ndarrays(results[0][1].parameters)
        return None, {}

    # What it asks of a grid.

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Return the clients' answers; an error for who is absent or fails."""
        answers: list[Message] = []
        self._else = 0.0
        for message in messages:
            node = message.metadata.dst_node_id
            counting = time.process_time()
            # Clients take their messages apart, and all have been given the same one.
            message.content = _copy(message.content)
            self._else += time.process_time() - counting
            began = time.process_time()
            try:
                if node in self._absent.get(self._stage, ()):
                    raise RuntimeError("is not there")
                answer = secaggplus_mod(message, self._contexts[node], self._trained)
            except Exception as error:
                answers.append(Message(Error(1, str(error)), reply_to=message))
                continue
            self.client_seconds[self._stage] += time.process_time() - began
            counting = time.process_time()
            self.uploaded += sum(map(_bytes, answer.content.config_records[RECORD_KEY_CONFIGS].values()))
            self._else += time.process_time() - counting
            answers.append(answer)
        return answers

    def _trained(self, message: Message, context: Context) -> Message:
        fit = self._replies[message.metadata.dst_node_id]
        return Message(recorddict_compat.fitres_to_recorddict(fit, True), reply_to=message)


def _copy(content: RecordDict) -> RecordDict:
    configs = {name: ConfigRecord(dict(record)) for name, record in content.config_records.items()}
    return RecordDict({**content, **configs})


def _bytes(value: Any) -> int:
    """Return how many bytes a value of a record takes on its way."""
    if isinstance(value, bytes | str):
        return len(value)
    return sum(map(_bytes, value)) if isinstance(value, list) else 8


def _context(node: int) -> Context:
    return Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})
