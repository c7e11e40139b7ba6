"""ClientApp of the scikit-learn app."""

import warnings
from collections.abc import Iterator

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from sklearn.metrics import log_loss

from sklearnexample.mods import accuracy_in_percent, count_calls
from sklearnexample.task import CLASSES, create_model, get_model_params, load_data, set_model_params

app = ClientApp(mods=[count_calls])


@app.lifespan()
def lifespan(context: Context) -> Iterator[None]:
    """Silence the warnings about few iterations, and note how often the app was entered and left."""
    visits = context.state.setdefault("visits", ConfigRecord({"entered": 0, "left": 0}))
    visits["entered"] += 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    visits["left"] += 1


def prepare(msg: Message, context: Context):
    """Return the model with the received parameters, and the local data."""
    model = create_model(context.run_config["local-iterations"], context.run_config["fit-intercept"])
    set_model_params(model, msg.content["arrays"].to_numpy_ndarrays())
    return model, *load_data(context.node_config["partition-id"], context.node_config["num-partitions"])


@app.train()
def train(msg: Message, context: Context):
    """Train the model on local data."""
    model, inputs, _, labels, _ = prepare(msg, context)
    model.fit(inputs, labels)
    metrics = MetricRecord(
        {
            "num-examples": len(labels),
            "train_logloss": float(log_loss(labels, model.predict_proba(inputs), labels=CLASSES)),
        }
    )
    content = RecordDict({"arrays": ArrayRecord(get_model_params(model)), "metrics": metrics})
    return Message(content=content, reply_to=msg)


@app.evaluate(mods=[accuracy_in_percent])
def evaluate(msg: Message, context: Context):
    """Evaluate the model on local data."""
    model, _, inputs, _, labels = prepare(msg, context)
    metrics = MetricRecord(
        {
            "num-examples": len(labels),
            "test_logloss": float(log_loss(labels, model.predict_proba(inputs), labels=CLASSES)),
            "accuracy": float(model.score(inputs, labels)),
            **context.state["visits"],
        }
    )
    return Message(content=RecordDict({"metrics": metrics}), reply_to=msg)
