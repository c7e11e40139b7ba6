"""Asking nodes over Flower's grids: a reply is fetched soon after it is there, and it is always somebody's.

Flower's own loop looks every three seconds. Of a node that has gone it says that the server itself answered, and it
breaks where a message cannot be delivered at all.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

# How often replies are asked for: soon at first, then less often.
FIRST_WAIT, LONGEST_WAIT, SLOWER = 0.02, 0.1, 1.5


def ask(grid: Grid, messages: Iterable[Message], seconds: float | None) -> Iterable[Message]:
    """Send messages and return one reply to each, as they come, until all are there or `seconds` have passed."""
    found = list(messages)
    # The local engine answers at once, and for whole cohorts.
    return (
        grid.send_and_receive(found, timeout=seconds) if hasattr(grid, "client_of") else _fetched(grid, found, seconds)
    )


def _fetched(grid: Grid, messages: Sequence[Message], seconds: float | None) -> Iterator[Message]:
    pushed = set(grid.push_messages(messages))
    asked = {message.metadata.message_id: message for message in messages}
    for gone in asked.keys() - pushed:
        yield Message(Error(ErrorCode.NODE_UNAVAILABLE, "the node has left"), reply_to=asked[gone])
    waiting, wait = asked.keys() & pushed, FIRST_WAIT
    deadline = None if seconds is None else time.monotonic() + seconds
    while waiting and (deadline is None or time.monotonic() < deadline):
        came = list(grid.pull_messages(waiting))
        for reply in came:
            if reply.metadata.reply_to_message_id not in waiting:
                continue
            waiting.discard(reply.metadata.reply_to_message_id)
            own = asked[reply.metadata.reply_to_message_id]
            stranger = reply.metadata.src_node_id != own.metadata.dst_node_id
            yield Message(reply.error, reply_to=own) if stranger and reply.has_error() else reply
        wait = FIRST_WAIT if came else min(wait * SLOWER, LONGEST_WAIT)
        if waiting:
            time.sleep(wait)
