"""ServerApp of the NumPy app."""

import json

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from numpyexample.task import get_model

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train with FedAvg and print the model and its errors."""
    num_rounds = context.run_config["num-server-rounds"]
    result = FedAvg().start(grid=grid, initial_arrays=ArrayRecord(get_model()), num_rounds=num_rounds)

    weights, bias = result.arrays.to_numpy_ndarrays()
    summary = {
        "weights": [round(weight, 6) for weight in weights.tolist()],
        "bias": round(bias.item(), 6),
        "train_mse": [round(record["train_mse"], 6) for record in result.train_metrics_clientapp.values()],
        "mse": [round(record["mse"], 6) for record in result.evaluate_metrics_clientapp.values()],
    }
    print("RESULT " + json.dumps(summary), flush=True)
