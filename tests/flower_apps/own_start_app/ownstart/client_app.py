"""ClientApp: one step of training, one of evaluation."""

from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from ownstart.task import cross_entropy, load_data
from ownstart.task import train as train_fn

app = ClientApp()


def prepare(msg: Message, context: Context):
    """Return the received model and the local data."""
    model = {name: array.numpy() for name, array in msg.content["arrays"].items()}
    return model, *load_data(context.node_config["partition-id"], context.node_config["num-partitions"])


@app.train()
def train(msg: Message, context: Context):
    """Train with the learning rate that the server asks for."""
    model, inputs, targets = prepare(msg, context)
    train_fn(model, inputs, targets, msg.content["config"]["lr"])
    arrays = ArrayRecord({name: Array(value) for name, value in model.items()})
    metrics = MetricRecord({"loss": cross_entropy(model, inputs, targets), "num-examples": len(targets)})
    return Message(content=RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context):
    """Evaluate on the local data."""
    model, inputs, targets = prepare(msg, context)
    metrics = MetricRecord({"loss": cross_entropy(model, inputs, targets), "num-examples": len(targets)})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=msg)
