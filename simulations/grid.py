"""RayGrid: Flower's public `Grid` over a pool of workers, so any Flower Strategy and ServerApp drives it unchanged.

A round's messages that share their content become cohorts. Cohorts are composed from the clients and their costs alone,
and replies come back in that order: neither the number of workers nor the order of arrival can change a result.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from simulations.pool import Pool
from simulations.worker import RUN_ID, Job, node_of, partition_of


class RayGrid(Grid):
    """Flower's Grid on this machine (or a Ray cluster) for `clients` clients in cohorts of `cohort_size`."""

    def __init__(
        self, pool: Pool, clients: int, cohort_size: int, costs: Sequence[int] | np.ndarray | None = None
    ) -> None:
        self._pool = pool
        self._clients = clients
        self._cohort_size = cohort_size
        self._costs = np.ones(clients) if costs is None else np.asarray(costs)
        self._run = Run.create_empty(RUN_ID)
        self._sent = 0
        self._tickets: dict[int, list[Message]] = {}
        self._replies: dict[str, Message] = {}
        self.client_states: dict[int, RecordDict] = {}
        # A Message takes its origin from the process's identity, which only Flower's own runtime sets.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, 1

    def set_run(self, run: Run) -> None:
        """Set the run this grid works for."""
        self._run = run

    @property
    def run(self) -> Run:
        """Return the run this grid works for."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a new message."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all clients' nodes, in the order of their partitions."""
        return range(node_of(0), node_of(self._clients))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand messages to the pool in cohorts and return their ids in the order of the messages."""
        messages = list(messages)
        self._push(messages)
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to these messages that have come by now, each once."""
        self._collect(0)
        return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Return the replies in the order of the cohorts; those later than `timeout` seconds are left out.

        A reply may stand for a whole cohort where the server asked for partial means.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        cohorts = self._push(list(messages))
        while any(ticket in self._tickets for ticket in cohorts):
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                break
            self._collect(left)
        # What comes too late must not answer a later round, nor leave its state behind.
        late = {ticket for ticket in cohorts if self._tickets.pop(ticket, None) is not None}
        self._pool.cancel(late)
        order = [message.metadata.message_id for cohort in cohorts.values() for message in cohort]
        return [self._replies.pop(message_id) for message_id in order if message_id in self._replies]

    def _push(self, messages: list[Message]) -> dict[int, list[Message]]:
        """Submit the messages and return each cohort by its ticket."""
        groups: dict[tuple[int, str], list[Message]] = {}
        for message in messages:
            self._sent += 1
            message.metadata.__dict__["_message_id"] = f"message-{self._sent}"
            groups.setdefault((id(message.content), message.metadata.message_type), []).append(message)
        cohorts = {}
        for (_, message_type), group in groups.items():
            # Longest first: the last cohorts to start are the short ones. Like sizes also waste no padding.
            group.sort(key=lambda m: (-self._costs[partition_of(m.metadata.dst_node_id)], m.metadata.dst_node_id))
            content = self._pool.put(group[0].content)
            for start in range(0, len(group), self._cohort_size):
                cohort = group[start : start + self._cohort_size]
                nodes = tuple(m.metadata.dst_node_id for m in cohort)
                job = Job(message_type, nodes, tuple(self.client_states.get(node) for node in nodes))
                cohorts[self._pool.submit(job, content)] = cohort
        self._tickets |= cohorts
        return cohorts

    def _collect(self, timeout_seconds: float | None) -> None:
        for ticket, result in self._pool.wait(timeout_seconds).items():
            cohort = self._tickets.pop(ticket, None)
            if cohort is None:
                continue
            self.client_states.update(result.states)
            for positions, answer in result.replies:
                message = cohort[positions[0]]
                self._replies[message.metadata.message_id] = _reply(answer, message)


def _reply(answer: RecordDict | Error, message: Message) -> Message:
    keyword: dict[str, Any] = {"content" if isinstance(answer, RecordDict) else "error": answer}
    return Message(reply_to=message, **keyword)
