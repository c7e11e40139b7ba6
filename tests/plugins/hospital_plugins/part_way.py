"""A server half of one's own that no entry point names: strategy=hospital_plugins.part_way:PartWay."""

from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAvg


class PartWay(FedAvg):
    """FedAvg that goes only part of the way to the clients' mean: w + step (mean - w)."""

    def __init__(self, *, step=0.5, **fedavg):
        super().__init__(**fedavg)
        self.step = step

    def configure_train(self, server_round, arrays, config, grid):
        self.before = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        if arrays is not None:
            weights = {name: (self.before[name].numpy(), arrays[name].numpy()) for name in arrays}
            arrays = ArrayRecord({name: Array(w + self.step * (mean - w)) for name, (w, mean) in weights.items()})
        return arrays, metrics
