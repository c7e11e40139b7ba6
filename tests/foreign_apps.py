"""Somebody else's ClientApps, for tests of the grid: they know nothing of Fedra."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

counting = ClientApp()
raising = ClientApp()
deadly = ClientApp()


def _reply(message: Message, context: Context, value: float) -> Message:
    arrays = ArrayRecord({"w": Array(np.array([value]))})
    metrics = MetricRecord({"num-examples": 1, "partition": int(context.node_config["partition-id"])})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@counting.train()
def count(message: Message, context: Context) -> Message:
    """Answer with how often this client was called, which it keeps in its state."""
    seen = context.state.metric_records.get("seen", MetricRecord({"times": 0}))["times"] + 1
    context.state["seen"] = MetricRecord({"times": seen})
    return _reply(message, context, float(seen))


@raising.train()
def fail_on_partition_one(message: Message, context: Context) -> Message:
    """Raise for one client."""
    if context.node_config["partition-id"] == 1:
        raise OSError("the disk of partition 1 is gone")
    return _reply(message, context, 1.0)


@deadly.train()
def die_once(message: Message, context: Context) -> Message:
    """Kill the whole process when partition 2 is asked: the first time, or always."""
    marker = Path(str(context.run_config["marker"]))
    if context.node_config["partition-id"] == 2 and (not marker.exists() or context.run_config["always"]):
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return _reply(message, context, float(context.node_config["partition-id"]))


popping = ClientApp()
echoing = ClientApp()
sleeping = ClientApp()


@sleeping.train()
def sleep_on_partition_one(message: Message, context: Context) -> Message:
    """Be very late for one client."""
    if context.node_config["partition-id"] == 1:
        time.sleep(20)
    return _reply(message, context, 1.0)


@popping.train()
def empty_the_message(message: Message, context: Context) -> Message:
    """Take the arrays out of the message, as careless apps do."""
    message.content.array_records["arrays"].popitem()
    return _reply(message, context, 1.0)


@echoing.train()
def echo(message: Message, context: Context) -> Message:
    """Answer with the value in the config."""
    return _reply(message, context, float(message.content["config"]["value"]))
