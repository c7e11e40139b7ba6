"""What a server half may be given before the first round, if it has a method `set_up(server)`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from core.compression import ratio
from core.config import RunConfig
from core.data import Split
from core.devices import Devices, Work, full_work
from core.records import Tensors


@dataclass(frozen=True)
class ServerSide:
    """The run as the server sees it."""

    config: RunConfig
    fresh_model: Callable[[int], nn.Module]
    """(seed) -> the task's model, newly initialised."""
    initial: Tensors
    """The global model before the first round."""
    loss: Callable[[Tensor, Tensor], Tensor]
    """(logits, y) -> each example's loss (B,)."""
    data: Split | None
    """The `server-examples`, standardised; None where there are none."""
    devices: Devices | None
    sizes: np.ndarray
    """Training examples of each client, (clients,) int64; the mean for those that were not asked."""
    client_of: Callable[[int], int]
    """Node id -> number of its client."""

    def expected_seconds(self, server_round: int, clients: np.ndarray, down: int) -> np.ndarray:
        """Return the virtual seconds (C,) that clients would take for a round's whole work on `down` bytes of model."""
        assert self.devices is not None
        examples = full_work(self.config, self.sizes[clients])[1]
        return self.devices.seconds(server_round, clients, examples, down, round(down * ratio(self.config)))

    def work(self, server_round: int, clients: np.ndarray, down: int) -> Work:
        """Return what becomes of sampled clients in a round without a deadline, as they will find themselves."""
        assert self.devices is not None
        return self.devices.work(
            server_round, clients, self.sizes[clients], down, round(down * ratio(self.config)), 0.0
        )
