"""What answers for clients: the body of a Ray actor, and the very same object in process when there are no workers."""

from __future__ import annotations

import importlib
import traceback
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.app.metadata import Metadata
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from client.app import CohortApp, Reply
from core.config import RunConfig
from core.data import Federation
from tasks.source import provide

RUN_ID = 1


@dataclass(frozen=True)
class Job:
    """A cohort's share of a round: which clients (node ids), of which message type, and the state each has kept."""

    message_type: str
    nodes: tuple[int, ...]
    states: tuple[RecordDict | None, ...]


@dataclass(frozen=True)
class Result:
    """The answers of a job (positions in its nodes, content or error) and the states that are not empty, by node."""

    replies: list[Reply]
    states: dict[int, RecordDict]


class Worker:
    """Holds the ClientApp and the federation's data, and answers jobs."""

    def __init__(self, app: str, run_config: dict[str, Any], clients: int, federation: Federation | None) -> None:
        # One thread a worker: parallelism is over cohorts, and sums must not depend on how many cores there are.
        torch.set_num_threads(1)
        module, _, attribute = app.partition(":")
        self.app: ClientApp = getattr(importlib.import_module(module), attribute)
        self.run_config = run_config
        self.clients = clients
        if federation is not None:
            provide(RunConfig.of(run_config), federation)

    def ready(self) -> bool:
        """Return once the worker is there."""
        return True

    def answer(self, job: Job, content: RecordDict) -> Result:
        """Return the answers of the job's clients to `content`."""
        contexts = [self._context(node, state) for node, state in zip(job.nodes, job.states, strict=True)]
        if isinstance(self.app, CohortApp):
            replies = self.app.cohort(job.message_type, content, contexts)
        else:
            replies = [([i], self._single(job.message_type, content, context)) for i, context in enumerate(contexts)]
        return Result(replies, {context.node_id: context.state for context in contexts if len(context.state)})

    def _context(self, node: int, state: RecordDict | None) -> Context:
        return Context(
            run_id=RUN_ID,
            node_id=node,
            node_config={"partition-id": partition_of(node), "num-partitions": self.clients},
            state=RecordDict() if state is None else state,
            run_config=self.run_config,
        )

    def _single(self, message_type: str, content: RecordDict, context: Context) -> RecordDict | Error:
        metadata = Metadata(RUN_ID, "", 0, context.node_id, "", "", 0.0, 0.0, message_type)
        # An app may empty or edit its message: every client gets records of its own (the arrays' bytes are shared).
        content = RecordDict({name: record.copy() for name, record in content.items()})
        try:
            reply = self.app(Message(metadata=metadata, content=content), context)  # type: ignore[call-overload]
        except Exception:
            return Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, traceback.format_exc(limit=3))
        return reply.content if reply.has_content() else reply.error


def node_of(partition: int) -> int:
    """Return the node id of a partition: Flower reserves 0 and 1."""
    return partition + 2


def partition_of(node: int) -> int:
    """Return the partition of a node."""
    return node - 2
