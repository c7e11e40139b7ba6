"""What a server half may be given before the first round, if it has a method `set_up(server)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import ArrayRecord, RecordDict
from torch import Tensor, nn

from core import records
from core.compression import uplink_bytes
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
    sends: Sequence[str]
    """Names of what a client sends back: the model's tensors, and kind/name beside them."""

    def expected_seconds(self, server_round: int, clients: np.ndarray, sent: ArrayRecord) -> np.ndarray:
        """Return the virtual seconds (C,) that clients would take for a round's whole work on the arrays sent."""
        assert self.devices is not None
        examples = full_work(self.config, self.sizes[clients])[1]
        down = sum(len(array.data) for array in sent.values())
        up = uplink_bytes(self.config, self.sends, sent)
        return self.devices.seconds(server_round, clients, examples, down, up)

    def work(self, clients: np.ndarray, content: RecordDict, deadline: float = 0.0) -> Work:
        """Return what becomes of sampled clients that receive a training message, as they will find themselves."""
        assert self.devices is not None
        up = uplink_bytes(self.config, self.sends, content.array_records[records.ARRAYS])
        number, down = records.server_round(content) or 0, records.array_bytes(content)
        return self.devices.work(number, clients, self.sizes[clients], down, up, deadline)
