"""RayGrid: Flower's public `Grid` over a pool of workers, so any Flower Strategy and ServerApp drives it unchanged.

A round's messages that share their content become cohorts. Cohorts are composed from the clients and their costs alone,
and replies come back in that order: neither the number of workers nor the order of arrival can change a result.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from core.records import PARTIAL_MEAN, SECURE_STAGES, MergedReply, config_of, refusal
from simulations.pool import Pool
from simulations.worker import RUN_ID, Job, Result, node_of, partition_of


@dataclass(frozen=True)
class _Shared:
    """What all cohorts of a message share: the content in the pool, and whether the server takes means of it."""

    reference: Any
    partial: bool
    arrays: ArrayRecord


@dataclass(frozen=True)
class _Cohort:
    """Clients that are asked together."""

    message_type: str
    messages: list[Message]
    shared: _Shared

    def takes(self, reply: Message) -> bool:
        """Return whether the reply may enter a mean; what the server would refuse goes to it alone."""
        return self.shared.partial and reply.has_content() and not refusal(reply.content, self.shared.arrays)


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
        self._tickets: dict[int, _Cohort] = {}
        self._pulled: dict[str, Message] = {}
        self.client_states: dict[int, RecordDict] = {}
        self.changed_states: set[int] = set()
        """Nodes whose state is another than when the set was last emptied."""
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

    def client_of(self, node: int) -> int:
        """Return the number of a node's client: nodes are listed in this order."""
        return partition_of(node)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand messages to the pool in cohorts and return their ids in the order of the messages."""
        messages = list(messages)
        for cohort in self._cohorts(messages):
            self._tickets[self._submit(cohort)] = cohort
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to these messages that have come by now, each once."""
        for ticket, result in self._pool.wait(0).items():
            self._keep(ticket, result)
        return [self._pulled.pop(message_id) for message_id in message_ids if message_id in self._pulled]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Return the replies in the order of the cohorts; those later than `timeout` seconds are left out.

        Where the server asked for partial means one reply stands for all clients that answered, added up cohort by
        cohort: memory does not grow with the number of clients.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        cohorts = self._cohorts(list(messages))
        under_way: dict[int, int] = {}
        done: dict[int, list[Message]] = {}
        replies: list[Message] = []
        merged: dict[int, tuple[Message, MergedReply]] = {}
        sent = taken = 0
        while taken < len(cohorts):
            # A window: what is finished out of order waits for its turn, so that sums are taken in a fixed order.
            while sent < min(len(cohorts), taken + self._pool.window):
                under_way[self._submit(cohorts[sent])] = sent
                sent += 1
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                break
            for ticket, result in self._pool.wait(left).items():
                if (place := under_way.pop(ticket, None)) is not None:
                    done[place] = self._replies_of(cohorts[place], result)
                else:
                    self._keep(ticket, result)
            while taken in done:
                for reply in done.pop(taken):
                    if cohorts[taken].takes(reply):
                        first, mean = merged.setdefault(id(cohorts[taken].shared), (reply, MergedReply()))
                        mean.add(reply.content)
                    else:
                        replies.append(reply)
                taken += 1
        # What comes too late must not answer a later round, nor leave its state behind.
        self._pool.cancel(under_way)
        for place in sorted(done):
            replies.extend(done[place])
        for first, mean in merged.values():
            first.content = mean.content()
        return [*(first for first, _ in merged.values()), *replies]

    def _keep(self, ticket: int, result: Result) -> None:
        """Keep the replies to pushed messages until they are pulled; those to a round that is over are dropped."""
        if (cohort := self._tickets.pop(ticket, None)) is not None:
            for reply in self._replies_of(cohort, result):
                self._pulled[reply.metadata.reply_to_message_id] = reply

    def _cohorts(self, messages: list[Message]) -> list[_Cohort]:
        """Return the messages in cohorts: those that share their content, the longest clients first."""
        groups: dict[tuple[int, str], list[Message]] = {}
        for message in messages:
            self._sent += 1
            message.metadata.__dict__["_message_id"] = f"message-{self._sent}"
            groups.setdefault((id(message.content), message.metadata.message_type), []).append(message)
        cohorts = []
        for (_, message_type), group in groups.items():
            nodes = np.array([message.metadata.dst_node_id for message in group])
            # The last cohorts to start are the short ones, and like sizes waste no padding.
            order = np.lexsort((nodes, -self._costs[partition_of(nodes)]))
            content = group[0].content
            partial = bool(config_of(content).get(PARTIAL_MEAN))
            arrays = next(iter(content.array_records.values()), ArrayRecord())
            shared = _Shared(self._pool.put(content), partial, arrays)
            size = self._cohort_size
            if message_type in SECURE_STAGES:
                # What two clients derive alike is derived once where both are in a cohort, and nothing fills memory.
                size = max(size, -(-len(group) // self._pool.workers))
            for start in range(0, len(group), size):
                cohorts.append(_Cohort(message_type, [group[i] for i in order[start : start + size]], shared))
        return cohorts

    def _submit(self, cohort: _Cohort) -> int:
        nodes = tuple(message.metadata.dst_node_id for message in cohort.messages)
        states = tuple(self.client_states.get(node) for node in nodes)
        headers = tuple((message.metadata.message_id, message.metadata.group_id) for message in cohort.messages)
        return self._pool.submit(Job(cohort.message_type, nodes, states, headers), cohort.shared.reference)

    def _replies_of(self, cohort: _Cohort, result: Result) -> list[Message]:
        self.client_states.update(result.states)
        self.changed_states.update(result.states)
        return [_reply(answer, cohort.messages[positions[0]]) for positions, answer in result.replies]


def _reply(answer: RecordDict | Error, message: Message) -> Message:
    keyword: dict[str, Any] = {"content" if isinstance(answer, RecordDict) else "error": answer}
    return Message(reply_to=message, **keyword)
