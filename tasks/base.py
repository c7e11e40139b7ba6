"""What a task is. Any object with these attributes will do (structural typing, no base class)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.config import RunConfig
from core.data import Federation
from core.device import to_device
from core.errors import InputError, unknown

if TYPE_CHECKING:
    import pandas as pd

Standardise = Literal["federated", "local", "server", "none"]
"""All clients' constants (from sums and counts), each client's own, those of the server's examples, or none."""


class Task(Protocol):
    """Data, model, loss and metrics of a learning problem, made from a `RunConfig`. It loads data only when asked.

    It may also have `models`, a mapping from the names that `model=` takes: a strategy that refuses the configured
    model is then tried with the others, to say which it would take.
    """

    labels: tuple[str, ...]
    """Names of the classes; label k of the data is labels[k]."""
    metrics: tuple[str, ...]
    """Names in `core.metrics` that describe this task; the first two after loss stand in the progress display."""
    standardise: Standardise
    """Whose means and deviations scale the inputs, unless the run says otherwise."""
    tuned_threshold: bool
    """Whether a binary prediction turns positive where F1 is best on the clients' validation splits, not at 0.5."""

    def federation(self) -> Federation:
        """Return all clients' raw data and the central test set; raise `InputError` when it cannot be had."""
        ...

    def model(self) -> nn.Module:
        """Return the model, freshly initialised from torch's global generator: logits (B,) or (B, classes)."""
        ...

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return each example's loss, (B,)."""
        ...


@dataclass(frozen=True)
class Table:
    """A data set before it is dealt to clients."""

    x: np.ndarray
    """(n, ...) float32 features or int64 tokens."""
    y: np.ndarray
    """(n,) int64 labels."""
    natural: np.ndarray | None = None
    """(n,) int64: the hospital, bank or author each row belongs to, where there is one."""
    names: tuple[str, ...] = ()
    """Names of the natural groups."""
    central: np.ndarray | None = None
    """(n,) bool: rows of the central test set where the data set fixes them (the last weeks, say)."""
    feature: np.ndarray | None = None
    """(n,) float64: what kind=feature sorts by; by default the first principal component of x."""


@dataclass(frozen=True)
class Dataset:
    """One source of data for a task: its shape is known before anything is read."""

    sentence: str
    """What `fedra list` says of it."""
    read: Callable[[RunConfig, Path | None], Table]
    """(config, folder of the files or None) -> Table. `InputError` names the missing file, column or line."""
    labels: tuple[str, ...]
    features: int
    """Width of x: features, or tokens in a text."""
    reads_files: bool = False
    """Whether `data-dir` means something to it."""


def choose(datasets: Mapping[str, Dataset], config: RunConfig) -> tuple[str, Dataset]:
    """Return the configured data set and its name; the first of the table is the offline default."""
    name = config.dataset or next(iter(datasets))
    if name not in datasets:
        raise unknown(f"dataset of task {config.task}", name, datasets)
    if config.data_dir and not datasets[name].reads_files:
        with_files = [key for key, dataset in datasets.items() if dataset.reads_files]
        remedy = f"choose dataset={'|'.join(with_files)}" if with_files else "leave it out"
        raise InputError(f"dataset={name} reads no files, so data-dir has no effect; {remedy}.")
    return name, datasets[name]


def choose_model(models: Mapping[str, Callable[[], nn.Module]], config: RunConfig) -> nn.Module:
    """Return the configured model, freshly initialised; the first of the table is the default."""
    name = config.model or next(iter(models))
    if name not in models:
        raise unknown(f"model of task {config.task}", name, models)
    return models[name]()


def build_model(task: Task, seed: int) -> nn.Module:
    """Return the task's model as `torch.manual_seed(seed)` initialises it, leaving the global generator untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return task.model()


def classification_loss(logits: Tensor, y: Tensor, positive_weight: float = 1.0) -> Tensor:
    """Return each example's cross-entropy, (B,): binary for logits (B,), with weighted positives; else for (B, K)."""
    if logits.ndim == y.ndim:
        return F.binary_cross_entropy_with_logits(
            logits, y.to(logits.dtype), reduction="none", pos_weight=logits.new_tensor(positive_weight)
        )
    return F.cross_entropy(logits, y, reduction="none")


def probabilities(logits: Tensor) -> np.ndarray:
    """Return probabilities (n,) of the positive class for logits (n,), (n, classes) for logits (n, classes)."""
    return (torch.sigmoid(logits) if logits.ndim == 1 else torch.softmax(logits, dim=1)).cpu().numpy()


def predict(model: nn.Module, x: Tensor, chunk: int = 4096) -> np.ndarray:
    """Return the model's probabilities for x (n, ...): (n,) for two classes, else (n, classes)."""
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        starts = range(0, max(len(x), 1), chunk)
        parts = [probabilities(model(to_device(x[start : start + chunk], device))) for start in starts]
    return np.concatenate(parts)


def numbers(frame: pd.DataFrame) -> np.ndarray:
    """Return a table's cells (n, columns) float32; `InputError` names the column of those that are none."""
    import pandas as pd

    out = np.empty(frame.shape, dtype=np.float32)
    for i, column in enumerate(frame.columns):
        cells = frame[column]
        out[:, i] = pd.to_numeric(cells, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
        text = np.flatnonzero(np.isnan(out[:, i]) & cells.notna().to_numpy())
        if len(text):
            raise InputError(
                f"column {column!r} has {cells.iloc[text[0]]!r} in row {text[0] + 1}, which is not a number, and "
                f"{len(text)} such cells in all; correct or encode them, or leave the column out."
            )
        refuse_not_finite(out[:, i], f"column {column!r}")
    return out


def refuse_not_finite(values: np.ndarray, what: str) -> None:
    """Raise `InputError` where some values (n, ...) are missing or infinite; `what` names them in the sentence."""
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise InputError(
            f"{what} has {bad:,} of {values.size:,} values missing or not finite; fill them in, drop their rows, or "
            "leave the column out: they would make every model nothing."
        )


def refuse_missing(frame_name: str, missing: list[str], found: list[str]) -> InputError:
    """Return the error for columns that a file lacks."""
    return InputError(
        f"{frame_name} lacks column {', '.join(map(repr, missing))}; it has {', '.join(map(str, found))}."
    )
