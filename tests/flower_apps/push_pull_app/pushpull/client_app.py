"""ClientApp that answers questions about its rows of the iris data."""

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from sklearn.datasets import load_iris

app = ClientApp()


def load_column(context: Context) -> np.ndarray:
    """Return the partition's values of the feature; partition i has i + 1 shares of the rows."""
    iris = load_iris()
    column = iris.data[:, iris.feature_names.index(context.run_config["feature"])]
    partition_id, num_partitions = context.node_config["partition-id"], context.node_config["num-partitions"]
    ends = np.cumsum(np.arange(num_partitions + 1)) * len(column) // (num_partitions * (num_partitions + 1) // 2)
    return np.random.default_rng(1).permutation(column)[ends[partition_id] : ends[partition_id + 1]]


@app.query()
def query(msg: Message, context: Context):
    """Answer with the number of values and their sums."""
    column = load_column(context)
    answer = MetricRecord({"count": len(column), "sums": [float(column.sum()), float((column**2).sum())]})
    return Message(content=RecordDict({"answer": answer}), reply_to=msg)


@app.query("extremes")
def extremes(msg: Message, context: Context):
    """Answer with the smallest and the largest value, and with the name of the feature."""
    column = load_column(context)
    answer = MetricRecord({"min": float(column.min()), "max": float(column.max())})
    about = ConfigRecord({"feature": context.run_config["feature"], "asked": msg.metadata.message_type})
    return Message(content=RecordDict({"answer": answer, "about": about}), reply_to=msg)


@app.query("histogram")
def histogram(msg: Message, context: Context):
    """Answer with the counts between the edges that the server sent, or refuse when the rows are few."""
    column = load_column(context)
    if len(column) < context.run_config["min-examples"]:
        raise ValueError(f"{len(column)} rows are too few")
    [edges] = msg.content["edges"].to_numpy_ndarrays()
    counts, _ = np.histogram(column, edges)
    return Message(content=RecordDict({"counts": ArrayRecord([counts])}), reply_to=msg)
