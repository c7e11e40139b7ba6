"""ServerApp: FedAvg; it notes when each round ends."""

import itertools
import json
import time
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from quickstart.task import Net

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train and write the seconds of every round but the first."""
    torch.manual_seed(0)
    ends = []
    strategy = FedAvg(fraction_train=context.run_config["fraction-train"], fraction_evaluate=0.0)
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Net().state_dict()),
        train_config=ConfigRecord({"lr": context.run_config["lr"]}),
        num_rounds=context.run_config["num-server-rounds"],
        evaluate_fn=lambda server_round, arrays: ends.append(time.perf_counter()),
    )
    seconds = [after - before for before, after in itertools.pairwise(ends[1:])]
    Path(context.run_config["seconds-file"]).write_text(json.dumps(seconds))
