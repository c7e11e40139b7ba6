"""Flower's grids, asked sooner: a reply is fetched soon after it is there, and it is always somebody's.

Flower's own loop looks every three seconds. Of a node that has gone it says that the server itself answered, and it
breaks where a message cannot be delivered at all.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from server.wrapped import WrappedGrid

# How often replies are asked for: soon at first, then less often.
FIRST_WAIT, LONGEST_WAIT, SLOWER = 0.02, 0.1, 1.5


class PolledGrid(WrappedGrid):
    """A Grid with a loop of its own over another's push and pull. The local engine's needs none: it answers at once."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and return the replies, in the order they came, once all are there or `timeout` has passed."""
        messages = list(messages)
        pushed = set(self.push_messages(messages))
        asked = {message.metadata.message_id: message for message in messages}
        replies = [
            Message(Error(ErrorCode.NODE_UNAVAILABLE, "the node has left"), reply_to=asked[gone])
            for gone in asked.keys() - pushed
        ]
        waiting, wait = asked.keys() & pushed, FIRST_WAIT
        deadline = None if timeout is None else time.monotonic() + timeout
        while waiting and (deadline is None or time.monotonic() < deadline):
            came = list(self.pull_messages(waiting))
            for reply in came:
                own = asked[reply.metadata.reply_to_message_id]
                waiting.discard(reply.metadata.reply_to_message_id)
                stranger = reply.metadata.src_node_id != own.metadata.dst_node_id
                replies.append(Message(reply.error, reply_to=own) if stranger and reply.has_error() else reply)
            wait = FIRST_WAIT if came else min(wait * SLOWER, LONGEST_WAIT)
            if waiting:
                time.sleep(wait)
        return replies
