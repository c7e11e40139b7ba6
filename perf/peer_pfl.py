"""Runs a workload of workloads.py in pfl-research and times every round: the other half of Fedra versus pfl.

A stand-alone program for an environment that has pfl and torch and nothing of Fedra: data and settings come as files.

    python peer_pfl.py FOLDER

FOLDER holds x.npy, y.npy (rows), starts.npy, sizes.npy (client i's rows are x[starts[i] : starts[i] + sizes[i]]) and
settings.json: workload ("a", "b", ...), clients, sampled, rounds, batch_size, learning_rate, local_epochs, seed.

Prints one line of JSON: seconds (a list, per round), clients (trained per round), loss_before and loss_after (of the
central model on the first 1000 rows). The run is one process with one torch thread. pfl takes a client's rows in the
order they are stored, every epoch: it does not shuffle.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# pfl moves every batch to the default device and, left alone, looks for an accelerator each time it does so.
os.environ["PFL_PYTORCH_DEVICE"] = "cpu"

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn import functional as F


class _Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(2000, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.encode = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encode(self.embed(x)).mean(dim=1))


# The networks of workloads.py, layer for layer.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "a": lambda: nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 1), nn.Flatten(0)),
    "b": lambda: nn.Sequential(nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 10)),
    "c": lambda: nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 7 * 7, 512), nn.ReLU(), nn.Linear(512, 62),
    ),
    "d": lambda: nn.Linear(784, 10),
    "e": _Transformer,
    "g": lambda: nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 14 * 14, 128), nn.ReLU(), nn.Linear(128, 10),
    ),
}  # fmt: skip


class Trained(nn.Module):
    """A network with the two methods that pfl's PyTorchModel calls."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.net = MODELS[name]()
        self.criterion = F.binary_cross_entropy_with_logits if name == "a" else F.cross_entropy

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss of a batch."""
        return self.criterion(self.net(x), y)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, object]:
        """Return no metrics: pfl always evaluates the clients of round 0, and training is what is timed."""
        return {}


def model(name: str) -> Trained:
    """Return the network of a workload, and its loss."""
    return Trained(name)


def cohorts(clients: int, sampled: int, seed: int) -> Iterator[int]:
    """Yield clients, none twice in a round; pfl's own samplers draw with replacement or go round-robin."""
    generator = np.random.default_rng(seed)
    while True:
        yield from generator.choice(clients, sampled, replace=False).tolist()


class Clock(TrainingProcessCallback):
    """Takes the time that each central iteration lasts."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        """Start the clock."""
        self.last = time.perf_counter()
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Note the time since the iteration before ended."""
        before, self.last = self.last, time.perf_counter()
        self.seconds.append(self.last - before)
        return False, Metrics()


def main() -> None:
    """Run the workload in the folder named on the command line and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    s = json.loads((folder / "settings.json").read_text())
    torch.set_num_threads(1)
    torch.manual_seed(s["seed"])
    np.random.seed(s["seed"])  # pfl seeds itself from numpy's global state
    x, y, starts, sizes = (np.load(folder / f"{name}.npy") for name in ("x", "y", "starts", "sizes"))
    inputs, labels = torch.from_numpy(x), torch.from_numpy(y).to(torch.float32 if s["workload"] == "a" else torch.int64)

    def client(i: int) -> PyTorchTensorDataset:
        rows = slice(starts[i], starts[i] + sizes[i])
        return PyTorchTensorDataset((inputs[rows], labels[rows]))

    # Views of rows already in memory as tensors: making a client costs microseconds, so no loader processes.
    data = FederatedDataset(client, cohorts(s["clients"], s["sampled"], s["seed"]).__next__)
    network, clock = model(s["workload"]), Clock()
    # Central SGD at rate 1 takes the mean of the clients' models as the new one: plain federated averaging.
    peer = PyTorchModel(network, torch.optim.SGD, central_optimizer=torch.optim.SGD(network.parameters(), lr=1.0))
    params = NNAlgorithmParams(s["rounds"], s["rounds"] + 1, train_cohort_size=s["sampled"], val_cohort_size=None)
    train = NNTrainHyperParams(
        local_batch_size=s["batch_size"], local_num_epochs=s["local_epochs"], local_learning_rate=s["learning_rate"]
    )

    def loss() -> float:
        with torch.no_grad():
            return network.loss(inputs[:1000], labels[:1000]).item()

    before = loss()
    backend = SimulatedBackend(training_data=data, val_data=data, postprocessors=[WeightByDatapoints()])
    FederatedAveraging().run(
        params, backend, peer, train, NNEvalHyperParams(local_batch_size=None), [clock], send_metrics_to_platform=False
    )
    print(json.dumps({"seconds": clock.seconds, "clients": s["sampled"], "loss_before": before, "loss_after": loss()}))


if __name__ == "__main__":
    main()
