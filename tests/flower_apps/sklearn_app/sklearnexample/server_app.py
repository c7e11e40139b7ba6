"""ServerApp of the scikit-learn app."""

import json
from collections.abc import Iterator

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from sklearnexample.task import create_model, get_model_params, load_all, set_model_params

app = ServerApp()
everything = {}


@app.lifespan()
def lifespan(context: Context) -> Iterator[None]:
    """Hold the data in memory while the app runs."""
    everything["data"] = load_all()
    yield
    everything.clear()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train with FedAvg and print what came out."""
    num_rounds = context.run_config["num-server-rounds"]
    model = create_model(context.run_config["local-iterations"], context.run_config["fit-intercept"])

    def global_evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Evaluate on all data, after the last round only."""
        if server_round < num_rounds:
            return None
        set_model_params(model, arrays.to_numpy_ndarrays())
        return MetricRecord({"score": float(model.score(*everything["data"]))})

    strategy = FedAvg(min_available_nodes=context.run_config["min-available-clients"])
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(get_model_params(model)),
        num_rounds=num_rounds,
        evaluate_fn=global_evaluate,
    )

    train_metrics = result.train_metrics_clientapp[num_rounds]
    summary = {
        "train_logloss": train_metrics["train_logloss"],
        "train_calls": train_metrics["calls"],
        **result.evaluate_metrics_clientapp[num_rounds],
        **result.evaluate_metrics_serverapp[num_rounds],
        "weights": sum(float(abs(array).sum()) for array in result.arrays.to_numpy_ndarrays()),
        "global_evaluations": len(result.evaluate_metrics_serverapp),
    }
    print("RESULT " + json.dumps({name: round(value, 6) for name, value in sorted(summary.items())}), flush=True)
