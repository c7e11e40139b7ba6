"""ServerApp that runs the strategy with its own loop."""

import json

from flwr.app import Array, ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp

from ownstart.strategy import PatientFedAvg
from ownstart.task import get_model

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train and print the history that the strategy kept."""
    strategy = PatientFedAvg(tolerance=context.run_config["tolerance"], fraction_train=1.0, fraction_evaluate=1.0)
    result = strategy.start(
        grid,
        ArrayRecord({name: Array(value) for name, value in get_model().items()}),
        num_rounds=context.run_config["num-server-rounds"],
        train_config=ConfigRecord({"lr": context.run_config["learning-rate"]}),
    )
    summary = {
        "rounds": len(strategy.history),
        "last": {name: round(value, 6) for name, value in strategy.history[-1].items()},
        "losses": [round(entry["loss"], 6) for entry in strategy.history],
        "weights": round(sum(float(abs(array.numpy()).sum()) for array in result.arrays.values()), 6),
    }
    print("RESULT " + json.dumps(summary), flush=True)
