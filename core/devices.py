"""Virtual time: what each client's device can do and what a round therefore takes, a function of the configuration.

A device has seconds an example, bandwidths and an availability. By default they are log-normal over clients, as
FedScale (Lai et al., ICML 2022) and Oort (Lai et al., OSDI 2021) report of phones; a CSV file may give each client's
own. Server and clients compute the same numbers without asking each other. Nothing waits: time is only counted.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.config import RunConfig
from core.errors import InputError, unknown
from core.seeding import uniforms

# Where a client may drop out of a round; only secure aggregation has others than train.
STAGES = ("advertise", "share", "train", "confirm", "unmask")
COLUMNS = ("seconds_per_example", "uplink_bytes_per_second", "downlink_bytes_per_second", "availability")


@dataclass(frozen=True)
class Work:
    """What becomes of C sampled clients in a round."""

    steps: np.ndarray
    """Local steps that each does, (C,) int64; 0 where its answer is lost."""
    seconds: np.ndarray
    """Virtual seconds from the server's sending until the answer is there, (C,) float64."""
    reasons: list[str]
    """Why an answer is lost, a sentence for each client; empty where it is not."""


class Devices:
    """The devices of all clients: arrays (clients,) float64 by name in `COLUMNS`."""

    def __init__(self, config: RunConfig) -> None:
        self._config, own = config, config.devices
        n = config.clients
        medians = {name: float(getattr(own, name)) for name in COLUMNS}
        spreads = {"seconds_per_example": own.compute_spread, "availability": 0.0}
        self.columns: dict[str, np.ndarray] = {}
        if own.kind == "trace":
            self.columns = _read_trace(Path(own.trace), n)
        for name in COLUMNS:
            sigma = 0.0 if own.kind == "none" else spreads.get(name, own.bandwidth_spread)
            drawn = (
                _normal(config.seed, "devices", name, clients=np.arange(n)) if sigma and own.kind != "trace" else 0.0
            )
            self.columns.setdefault(name, np.broadcast_to(medians[name] * np.exp(sigma * drawn), (n,)))

    def seconds(self, server_round: int, clients: np.ndarray, examples: np.ndarray, down: int, up: int) -> np.ndarray:
        """Return the virtual seconds (C,) in which clients process `examples` (C,) and move `down` and `up` bytes."""
        own = {name: values[clients] for name, values in self.columns.items()}
        compute = own["seconds_per_example"] * examples
        if self._config.devices.jitter:
            compute = compute * np.exp(self._config.devices.jitter * _normal(
                self._config.seed, "jitter", server_round, clients=clients))  # fmt: skip
        return down / own["downlink_bytes_per_second"] + compute + up / own["uplink_bytes_per_second"]

    def work(
        self,
        server_round: int,
        clients: Sequence[int] | np.ndarray,
        sizes: Sequence[int] | np.ndarray,
        down: int,
        up: int,
        deadline: float,
    ) -> Work:
        """Return what the clients get done of their round's work on `sizes` (C,) examples before the deadline."""
        faults, seed = self._config.faults, self._config.seed
        at = np.asarray(clients)
        draw = functools.partial(uniforms, seed, clients=at)
        full, examples = full_work(self._config, np.asarray(sizes))
        gone = draw("available", server_round) >= self.columns["availability"][at]
        lost = dropped(self._config, "train", server_round, at)
        slow = draw("straggler", server_round) < faults.stragglers
        epochs = 1 if self._config.local_steps else self._config.local_epochs
        # FedProx, section 5.2: a straggler has time for a number of epochs drawn uniformly from those asked for.
        drawn = np.floor(draw("epochs", server_round) * epochs) + 1 if epochs > 1 else draw("epochs", server_round)
        done = np.where(slow, np.maximum(1, np.floor(full * drawn / epochs)).astype(np.int64), full)
        # At least one step, but none of a client that has no examples.
        done = np.minimum(done, full)
        each = examples / np.maximum(full, 1)
        seconds = self.seconds(server_round, at, each * done, down, up)
        late = np.zeros(len(at), dtype=bool)
        if deadline:
            fixed = self.seconds(server_round, at, np.zeros(len(at)), down, up)
            late = seconds > deadline
            per_step = np.maximum((seconds - fixed) / np.maximum(done, 1), 1e-300)
            fit = np.floor(np.maximum(deadline - fixed, 0) / per_step).astype(np.int64)
            if faults.late == "partial":
                done = np.where(late, np.minimum(done, fit), done)
                late = done == 0
                seconds = np.minimum(seconds, deadline)
        if faults.late == "lost":
            late |= slow & (done < full)
        reasons = [
            "it cannot be reached in this round" if g
            else "its answer was lost" if d
            else "it did not finish in time" if s
            else "no training examples" if not n
            else ""
            for g, d, s, n in zip(gone, lost, late, full, strict=True)
        ]  # fmt: skip
        return Work(np.where(gone | lost | late, 0, done), seconds, reasons)


def dropped(config: RunConfig, stage: str, server_round: int, clients: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return which clients drop out of a round at this of its messages, (C,) bool."""
    faults = config.faults
    lost: np.ndarray = uniforms(config.seed, "dropout", server_round, clients=clients) < faults.dropout
    if faults.stage == "any":
        drawn = uniforms(config.seed, "stage", server_round, clients=clients) * len(STAGES)
        return lost & (drawn.astype(np.int64) == STAGES.index(stage))
    return lost & (faults.stage == stage)


def full_work(config: RunConfig, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the local steps (C,) int64 of clients with `sizes` examples in a round, and the examples they process."""
    if config.local_steps:
        steps = np.where(sizes > 0, config.local_steps, 0)
        return steps, steps * np.minimum(sizes, config.batch_size)
    return config.local_epochs * -(-sizes // config.batch_size), config.local_epochs * sizes


def devices_of(config: RunConfig) -> Devices | None:
    """Return the clients' devices; None where the configuration has neither devices nor faults."""
    faults = config.faults
    return Devices(config) if config.devices.kind != "none" or faults.dropout or faults.stragglers else None


def check(config: RunConfig) -> None:
    """Raise `InputError` for a trace that cannot be read, and for settings of which one undoes the other."""
    own = config.devices
    if own.kind == "trace" and not own.trace:
        raise InputError("devices.kind=trace reads a file and none is named; set devices.trace=FILE.csv.")
    if config.sampling.over_selection > 1 and config.faults.late == "partial":
        raise InputError("sampling.over-selection drops who is late and faults.late=partial keeps them; choose one.")
    devices_of(config)


def _normal(seed: int, *path: int | str, clients: np.ndarray) -> np.ndarray:
    """Return a standard normal number for each client by Box and Muller's transform, (C,)."""
    first, second = uniforms(seed, *path, "radius", clients=clients), uniforms(seed, *path, "angle", clients=clients)
    normal: np.ndarray = np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * math.pi * second)
    return normal


def _read_trace(path: Path, clients: int) -> dict[str, np.ndarray]:
    import pandas as pd

    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise InputError(f"devices.trace={path} cannot be read ({error}); give a CSV file, a row a client.") from None
    known = list(map(str, table.columns))
    for name in known:
        if name not in COLUMNS:
            raise unknown(f"column of devices.trace={path}", name, COLUMNS)
    if len(table) < clients:
        raise InputError(
            f"devices.trace={path} has {len(table)} rows for {clients} clients; add rows or lower clients."
        )
    columns: dict[str, np.ndarray] = {}
    for name in known:
        values = pd.to_numeric(table[name], errors="coerce").to_numpy(dtype=np.float64)[:clients]
        good = np.isfinite(values) & (values > 0) & ((values <= 1) | (name != "availability"))
        if not good.all():
            row = int(np.flatnonzero(~good)[0])
            raise InputError(
                f"devices.trace={path}, column {name}, row {row + 1}: {table[name].iloc[row]!r} is not a number above 0"
                f"{' and up to 1' if name == 'availability' else ''}; correct the file."
            )
        columns[name] = values
    return columns
