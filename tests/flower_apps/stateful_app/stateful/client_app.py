"""ClientApp that remembers: a counter and a momentum live in the context's state."""

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


def load_data(partition_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Generate a partition of a linear regression."""
    rng = np.random.default_rng(100 + partition_id)
    inputs = rng.normal(size=(50, 3))
    return inputs, inputs @ np.array([1.0, -1.0, 2.0]) + 0.1 * partition_id


def remember(context: Context) -> tuple[ConfigRecord, np.ndarray]:
    """Return this node's counters and its momentum; make both on the first call."""
    partition_id = context.node_config["partition-id"]
    if "counters" not in context.state:
        context.state["counters"] = ConfigRecord({"train": 0, "evaluate": 0, "owner": partition_id})
        context.state["momentum"] = ArrayRecord([np.zeros(3)])
    counters = context.state["counters"]
    if counters["owner"] != partition_id:
        raise RuntimeError(f"Partition {partition_id} found the state of partition {counters['owner']}")
    return counters, context.state["momentum"].to_numpy_ndarrays()[0]


@app.train()
def train(msg: Message, context: Context):
    """Take one step with momentum, and keep the momentum for the next round."""
    counters, momentum = remember(context)
    inputs, targets = load_data(context.node_config["partition-id"])
    [weights] = msg.content["arrays"].to_numpy_ndarrays()

    gradient = 2.0 * inputs.T @ (inputs @ weights - targets) / len(targets)
    momentum = context.run_config["local.momentum"] * momentum + gradient
    weights = weights - context.run_config["local.learning-rate"] * momentum

    counters["train"] += 1
    context.state["momentum"] = ArrayRecord([momentum])
    metrics = MetricRecord({"calls": counters["train"], "num-examples": len(targets)})
    return Message(content=RecordDict({"arrays": ArrayRecord([weights]), "metrics": metrics}), reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context):
    """Report the loss and what is remembered."""
    counters, momentum = remember(context)
    inputs, targets = load_data(context.node_config["partition-id"])
    [weights] = msg.content["arrays"].to_numpy_ndarrays()

    counters["evaluate"] += 1
    metrics = MetricRecord(
        {
            "loss": float(np.mean((inputs @ weights - targets) ** 2)),
            "train_calls": counters["train"],
            "evaluate_calls": counters["evaluate"],
            "momentum": momentum.tolist(),
            "num-examples": len(targets),
        }
    )
    return Message(content=RecordDict({"metrics": metrics}), reply_to=msg)
