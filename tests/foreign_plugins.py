"""Somebody else's strategies and tasks, named module:attr by the tests."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from torch import nn

from core.data import Federation
from core.training import LocalRound, LocalUpdate, local_sgd
from strategies.fedprox import FedProx
from tasks.medical import Medical


class OwnStart(FedAvg):
    """Overrides `start`, and remembers a NumPy number and which rounds it saw."""

    def __init__(self, **fedavg: Any) -> None:
        super().__init__(**fedavg)
        self.starts, self.rounds = np.float32(0), []

    def start(self, *arguments: Any, **named: Any) -> Result:
        """Count the call, then run Flower's loop."""
        self.starts += np.float32(1)
        return super().start(*arguments, **named)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Note the round."""
        self.rounds.append(server_round)
        return super().configure_train(server_round, arrays, config, grid)


class Silent(FedAvg):
    """Forgets to say which round it is."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Drop the round from the config."""
        for message in super().configure_train(server_round, arrays, config, grid):
            message.content["config"].pop("server-round", None)
            yield message


class Deaf(FedAvg):
    """Takes no settings from outside, and so samples by Flower's own defaults: two clients at least."""

    def __init__(self) -> None:
        super().__init__()


class Curious(FedAvg):
    """Notes which numbers it is told beside the models."""

    partial_means = True
    told: ClassVar[set[str]] = set()

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Look into metrics and into the clients' columns."""
        replies = list(replies)
        for content in (reply.content for reply in replies if reply.has_content()):
            for record in (*content.metric_records.values(), *content.config_records.values()):
                self.told.update(record)
        return super().aggregate_train(server_round, replies)


class Unsaid(FedProx):
    """FedProx with a client half of its own, of which it does not say what it does with examples."""

    @staticmethod
    def local_update(r: LocalRound) -> LocalUpdate:
        """Return the cohort after plain SGD."""
        return local_sgd(replace(r, private=None))


class Bare(Unsaid):
    """Says that its steps are private, which they are not."""

    private_by_example = True


class Over(FedAvg):
    """Takes every batch twice."""

    private_by_example = True

    @staticmethod
    def local_update(r: LocalRound) -> LocalUpdate:
        """Return the cohort after two passes over the same batches."""
        return local_sgd(r, start=local_sgd(r).params)


class NormalisedMedical(Medical):
    """The medical task with a batch-normalised network."""

    def model(self) -> nn.Module:
        """Return the network."""
        return nn.Sequential(nn.Linear(30, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1), nn.Flatten(0))


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(30, 1)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.linear(x).flatten()


class ScaledMedical(Medical):
    """The medical task with a model that has a scalar parameter."""

    def model(self) -> nn.Module:
        """Return the model."""
        return _Scaled()


class Images(Medical):
    """A task of images that forgot to say that images are not standardised like tables."""

    def federation(self) -> Federation:
        """Return 6 x 5 images."""
        tables = super().federation()
        train = replace(tables.train, x=tables.train.x.reshape(-1, 1, 6, 5))
        return replace(tables, train=train)


class Twice(FedAvg):
    """Asks every client twice."""

    partial_means = True

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return two messages to each."""
        once = list(super().configure_train(server_round, arrays, config, grid))
        return once + [Message(message.content, message.metadata.dst_node_id, "train") for message in once]


class Half(FedAvg):
    """Asks half of the clients that it sees."""

    partial_means = True

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return every other message."""
        return list(super().configure_train(server_round, arrays, config, grid))[::2]


class Ahead(FedAvg):
    """Sends a model that is ahead of the global one."""

    partial_means = True

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the model times 1.1."""
        ahead = ArrayRecord({name: Array(1.1 * array.numpy()) for name, array in arrays.items()})
        return super().configure_train(server_round, ahead, config, grid)


class OwnNorm(FedAvg):
    """Lets clients clip to a norm of its own."""

    partial_means = True

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send another norm."""
        config["clipping-norm"] = 1.5
        return super().configure_train(server_round, arrays, config, grid)


class OwnLoop(FedAvg):
    """Has a loop of its own, in which it takes the mean without asking anybody."""

    partial_means = True

    def start(self, grid: Grid, initial_arrays: ArrayRecord, **named: Any) -> Result:  # type: ignore[override]
        """Run it."""
        arrays, evaluate = initial_arrays, named["evaluate_fn"]
        evaluate(0, arrays)
        for number in range(1, named["num_rounds"] + 1):
            messages = self.configure_train(number, arrays, named["train_config"], grid)
            found, _ = FedAvg.aggregate_train(self, number, grid.send_and_receive(messages))
            arrays = found or arrays
            evaluate(number, arrays)
        return Result()
