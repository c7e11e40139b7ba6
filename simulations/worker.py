"""What answers for clients: the body of a Ray actor, and the very same object in process when there are no workers."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.app.constants import DEFAULT_TTL
from flwr.app.metadata import Metadata
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from client.app import CohortApp, Reply
from core import records
from core.config import RunConfig
from core.data import Federation
from core.seeding import derive, seed_globals
from simulations import flower_app
from tasks.source import provide

RUN_ID = 1
KEEPING = frozenset({"train", records.QUERY_STATISTICS, *records.SECURE_STAGES})
SERVER_NODE = 1
# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
Nodes = TypeVar("Nodes", int, np.ndarray)


@dataclass(frozen=True)
class Job:
    """A cohort's share of a round: which clients (node ids), of which message type, and the state each has kept."""

    message_type: str
    nodes: tuple[int, ...]
    states: tuple[RecordDict | None, ...]
    headers: tuple[tuple[str, str], ...]
    """Message id and group id of each client's message."""


@dataclass(frozen=True)
class Result:
    """The answers of a job (positions in its nodes, content or error) and the states that are not empty, by node."""

    replies: list[Reply]
    states: dict[int, RecordDict]


class Worker:
    """Holds the ClientApp and the federation's data, and answers jobs."""

    def __init__(
        self,
        app: str,
        run_config: dict[str, Any],
        clients: int,
        federation: Federation | None,
        folder: str = "",
        seed: int | None = None,
    ) -> None:
        # One thread a worker: parallelism is over cohorts, and sums must not depend on how many cores there are.
        torch.set_num_threads(1)
        keep_memory()
        self.app: ClientApp = _load_app(app, folder)
        self.seed = seed
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
            replies = [
                ([i], self._single(job.message_type, header, content, context))
                for i, (header, context) in enumerate(zip(job.headers, contexts, strict=True))
            ]
        # Our own clients change what they keep by these only; anybody's may at any time.
        keeps = job.message_type in KEEPING or not isinstance(self.app, CohortApp)
        states = {context.node_id: context.state for context in contexts if keeps and len(context.state)}
        return Result(replies, states)

    def _context(self, node: int, state: RecordDict | None) -> Context:
        return Context(
            run_id=RUN_ID,
            node_id=node,
            node_config={"partition-id": partition_of(node), "num-partitions": self.clients},
            state=RecordDict() if state is None else state,
            run_config=self.run_config,
        )

    def _single(
        self, message_type: str, header: tuple[str, str], content: RecordDict, context: Context
    ) -> RecordDict | Error:
        message_id, group_id = header
        metadata = Metadata(
            RUN_ID, message_id, SERVER_NODE, context.node_id, "", group_id, time.time(), DEFAULT_TTL, message_type
        )
        if self.seed is not None:
            seed_globals(self.seed, context.node_id, message_id)
            torch.manual_seed(derive(self.seed, "torch", context.node_id, message_id))
        # An app may empty or edit its message: every client gets records of its own (the arrays' bytes are shared).
        content = RecordDict({name: record.copy() for name, record in content.items()})
        try:
            reply = self.app(Message(metadata=metadata, content=content), context)  # type: ignore[call-overload]
        except Exception:
            return Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, traceback.format_exc(limit=3))
        return reply.content if reply.has_content() else reply.error


def keep_memory() -> None:
    """Let the C library keep freed memory: gradients are as large in every step, and fresh pages cost more than sums.

    Measured on the workloads of perf/: a fifth less time a step. Nothing happens where the C library is another one.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _load_app(reference: str, folder: str) -> ClientApp:
    if folder:
        app: ClientApp = flower_app.load(Path(folder), reference, ClientApp)
    else:
        module, _, attribute = reference.partition(":")
        app = getattr(importlib.import_module(module), attribute)
    return app


def node_of(partition: int) -> int:
    """Return the node id of a partition: Flower reserves 0 and 1."""
    return partition + 2


def partition_of(node: Nodes) -> Nodes:
    """Return the partition of a node, or those of an array of nodes."""
    return node - 2
