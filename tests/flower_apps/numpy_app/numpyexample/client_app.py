"""ClientApp of the NumPy app."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from numpyexample.task import load_data, mean_squared_error
from numpyexample.task import train as train_fn

app = ClientApp()


@app.train()
def train(msg: Message, context: Context):
    """Train the model on local data."""
    inputs, targets = load_data(context.node_config["partition-id"])
    model = msg.content["arrays"].to_numpy_ndarrays()
    model = train_fn(model, inputs, targets, context.run_config["learning-rate"])
    metrics = {"train_mse": mean_squared_error(model, inputs, targets), "num-examples": len(targets)}
    content = RecordDict({"arrays": ArrayRecord(model), "metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context):
    """Evaluate the model on local data."""
    inputs, targets = load_data(context.node_config["partition-id"])
    model = msg.content["arrays"].to_numpy_ndarrays()
    metrics = {"mse": mean_squared_error(model, inputs, targets), "num-examples": len(targets)}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)
