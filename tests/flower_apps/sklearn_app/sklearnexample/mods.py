"""Mods of the scikit-learn ClientApp."""

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp.typing import ClientAppCallable


def count_calls(msg: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Count the messages this node has handled, and report the number with the metrics."""
    counter = context.state.setdefault("counter", ConfigRecord({"calls": 0}))
    counter["calls"] += 1
    reply = call_next(msg, context)
    reply.content["metrics"]["calls"] = counter["calls"]
    return reply


def accuracy_in_percent(msg: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Turn the accuracy into percent."""
    reply = call_next(msg, context)
    reply.content["metrics"]["accuracy"] *= 100.0
    return reply
