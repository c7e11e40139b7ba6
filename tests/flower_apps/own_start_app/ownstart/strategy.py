"""FedAvg with a loop of its own."""

from logging import INFO

from flwr.app import ArrayRecord, ConfigRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result


class PatientFedAvg(FedAvg):
    """FedAvg that lowers the learning rate each round and ends when a round hardly improves the loss."""

    def __init__(self, tolerance: float, **kwargs):
        super().__init__(**kwargs)
        self.tolerance = tolerance
        self.history: list[dict[str, float]] = []

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn=None,
    ) -> Result:
        """Train until the loss stands still or the rounds are used up."""
        log(INFO, "Starting %s with tolerance %s", type(self).__name__, self.tolerance)
        train_config, evaluate_config = train_config or ConfigRecord(), evaluate_config or ConfigRecord()
        result = Result(arrays=initial_arrays)
        for server_round in range(1, num_rounds + 1):
            messages = self.configure_train(server_round, result.arrays, train_config, grid)
            replies = grid.send_and_receive(messages, timeout=timeout)
            arrays, train_metrics = self.aggregate_train(server_round, replies)
            if arrays is None:
                raise RuntimeError(f"No model in round {server_round}")
            result.arrays = arrays
            result.train_metrics_clientapp[server_round] = train_metrics

            messages = self.configure_evaluate(server_round, result.arrays, evaluate_config, grid)
            replies = list(grid.send_and_receive(messages, timeout=timeout))
            metrics = self.aggregate_evaluate(server_round, replies)
            result.evaluate_metrics_clientapp[server_round] = metrics

            worst = max(reply.content["metrics"]["loss"] for reply in replies if reply.has_content())
            self.history.append({"lr": train_config["lr"], "loss": metrics["loss"], "worst": worst})
            log(INFO, "Round %s: %s", server_round, self.history[-1])
            if server_round > 1 and self.history[-2]["loss"] - metrics["loss"] < self.tolerance:
                log(INFO, "The loss stands still: the end")
                break
            train_config["lr"] *= 0.8
        return result
