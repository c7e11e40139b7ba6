"""ServerApp that checks what its clients remember."""

import json

import numpy as np
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train, then check that every node counted every round."""
    num_rounds = context.run_config["num-server-rounds"]
    result = FedAvg().start(grid=grid, initial_arrays=ArrayRecord([np.zeros(3)]), num_rounds=num_rounds)

    for server_round, record in result.evaluate_metrics_clientapp.items():
        for name in ("train_calls", "evaluate_calls"):
            if round(record[name], 6) != server_round:
                raise RuntimeError(f"{name} is {record[name]} after round {server_round}: a state was lost")

    last = result.evaluate_metrics_clientapp[num_rounds]
    summary = {
        "calls": [round(record["calls"], 6) for record in result.train_metrics_clientapp.values()],
        "losses": [round(record["loss"], 6) for record in result.evaluate_metrics_clientapp.values()],
        "momentum": [round(value, 6) for value in last["momentum"]],
        "weights": [round(value, 6) for value in result.arrays.to_numpy_ndarrays()[0].tolist()],
    }
    print("RESULT " + json.dumps(summary), flush=True)
