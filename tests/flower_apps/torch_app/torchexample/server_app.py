"""ServerApp of the PyTorch app."""

import json

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from torchexample.task import Net, load_central_data
from torchexample.task import test as test_fn

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train with FedAvg and print what came out."""
    num_rounds: int = context.run_config["num-server-rounds"]
    lr: float = context.run_config["learning-rate"]

    torch.manual_seed(context.run_config["seed"])
    arrays = ArrayRecord(Net().state_dict())

    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=context.run_config["fraction-evaluate"])
    result = strategy.start(
        grid=grid,
        initial_arrays=arrays,
        train_config=ConfigRecord({"lr": lr}),
        num_rounds=num_rounds,
        evaluate_fn=lambda server_round, arrays: global_evaluate(arrays, context.run_config["batch-size"]),
    )

    state_dict = result.arrays.to_torch_state_dict()
    last = {
        **result.train_metrics_clientapp[num_rounds],
        **result.evaluate_metrics_clientapp[num_rounds],
        **result.evaluate_metrics_serverapp[num_rounds],
        "first_loss": result.evaluate_metrics_serverapp[0]["loss"],
        "weights": sum(tensor.abs().sum().item() for tensor in state_dict.values()),
    }
    print("RESULT " + json.dumps({name: round(value, 6) for name, value in sorted(last.items())}), flush=True)


def global_evaluate(arrays: ArrayRecord, batch_size: int) -> MetricRecord:
    """Evaluate the global model on the server's images."""
    model = Net()
    model.load_state_dict(arrays.to_torch_state_dict())
    loss, accuracy = test_fn(model, load_central_data(batch_size), torch.device("cpu"))
    return MetricRecord({"loss": loss, "accuracy": accuracy})
