"""Flower's records, and the only place with their keys: every name that crosses between server and client."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict
from torch import Tensor, nn

# Names of records inside a message.
ARRAYS = "arrays"
CONFIG = "config"
METRICS = "metrics"
CLIENTS = "clients"
# Keys inside records. The first two are Flower's.
NUM_EXAMPLES = "num-examples"
SERVER_ROUND = "server-round"
CLIENT = "client"
WEIGHT = "weight"
TRAIN_LOSS = "train-loss"
TRAIN_SECONDS = "train-seconds"
PARTIAL_MEAN = "partial-mean"
DEADLINE = "deadline-seconds"
VIRTUAL_SECONDS = "virtual-seconds"
UPLINK_BYTES = "uplink-bytes"
ENCODED = "encoded"
# Differential privacy: the round's clipping norm, who is within it, how many private steps or updates an answer took,
# and how many examples were left out of them because their gradients were not finite.
CLIPPING_NORM = "clipping-norm"
WITHIN = "within-clipping-norm"
PRIVATE_STEPS, DROPPED = "private-steps", "dropped-examples"
# What the canary examples of an audited client look like to an observer.
CANARIES = "canary-scores"
# Code of an error that is no fault: the client could not be reached, or was too late.
LOST = 1000
# How the reason begins for which the server took nothing of an answer.
REJECTED = "rejected"
SPLIT = "split"
THRESHOLD = "threshold"
SCORE_COUNTS = "score-counts"
LABEL_COUNTS = "label-counts"
SIZES = "sizes"
CONSTANTS = "constants."
# What a client reveals about its inputs so that all can standardise alike: sums and counts.
INPUT_SUM, INPUT_SQUARES, INPUT_COUNT = "input-sum", "input-squares", "input-count"
# Secure aggregation: the record with a client's part of a message, and what all of a round must know to add up.
SECURE = "secure-aggregation"
PART = "part"
COHORT, LARGEST_WEIGHT = "secure-cohort", "secure-largest-weight"
# Message types beside Flower's train and evaluate.
QUERY_STATISTICS = "query.statistics"
QUERY_ADVERTISE, QUERY_SHARE, QUERY_CONFIRM, QUERY_UNMASK = SECURE_STAGES = (
    "query.advertise", "query.share", "query.confirm", "query.unmask",
)  # fmt: skip

# Numbers of a reply that add up where replies are merged; every other metric is a mean.
SUMMED = (NUM_EXAMPLES, WEIGHT, SCORE_COUNTS)

NPY_MAGIC = b"\x93NUMPY"
Tensors = dict[str, Tensor]
Columns = dict[str, list[Any]]


def travelling(model: nn.Module) -> Tensors:
    """Return what is sent of a model: trainable parameters and the running statistics of normalisation layers.

    Constant buffers stay where they are: a mean of equal floats is not exactly that float, and an adaptive server
    optimiser would turn the rounding into steps. Integer buffers (num_batches_tracked) are never averaged.
    """
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for prefix, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            for name in ("running_mean", "running_var"):
                tensors[f"{prefix}.{name}" if prefix else name] = getattr(module, name).detach()
    return tensors


def to_arrays(tensors: Mapping[str, Tensor | np.ndarray]) -> ArrayRecord:
    """Return the tensors as Flower's record, in the given order."""
    found = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in tensors.items()}
    return ArrayRecord({name: Array(np.asarray(value, order="C")) for name, value in found.items()})


def to_tensors(arrays: ArrayRecord) -> Tensors:
    """Return a record's arrays as torch tensors that own their memory."""
    return {name: torch.from_numpy(np.array(to_numpy(array))) for name, array in arrays.items()}


def to_numpy(array: Array) -> np.ndarray:
    """Return an array's values without a copy, read-only; what is not plainly a NumPy file goes through Flower.

    Flower's own reader parses the file's header as Python, which for small arrays takes longer than to train on them.
    """
    header = array.data[:128]
    size = math.prod(array.shape) * np.dtype(array.dtype).itemsize
    if header.startswith(NPY_MAGIC) and b"'fortran_order': False" in header and len(array.data) > size > 0:
        return np.frombuffer(array.data, array.dtype, offset=len(array.data) - size).reshape(array.shape)
    return array.numpy()


def in_dtypes_of(arrays: ArrayRecord, like: Mapping[str, Tensor | np.ndarray | Array]) -> ArrayRecord:
    """Return the arrays in the dtypes of those in `like`: NumPy's means and powers turn float32 into float64."""
    wanted = {name: str(v.dtype).removeprefix("torch.") for name, v in like.items()}
    if all(array.dtype == wanted[name] for name, array in arrays.items()):
        return arrays
    return to_arrays({name: to_numpy(array).astype(wanted[name]) for name, array in arrays.items()})


def load_into(model: nn.Module, tensors: Tensors) -> nn.Module:
    """Copy travelling tensors into a model and return it; keys that do not match the model are an error."""
    own = travelling(model)
    if own.keys() != tensors.keys():
        missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
        raise ValueError(f"arrays do not fit the model: missing {missing}, unexpected {extra}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    return model


def refusal(content: RecordDict, sent: Mapping[str, Array]) -> str:
    """Return why a client's answer must not enter a model, empty where it may.

    `sent` are the arrays that went out: an answer has numbers that are finite, in the shapes of the same names. What
    travels beside the model as `kind/name` has the shape of `name`, where there is such a one.
    """
    for record in content.array_records.values():
        for name, array in record.items():
            like = sent.get(name) or sent.get(name.partition("/")[2])
            if like is None and "/" not in name:
                return f"it sent '{name}', which the model does not have"
            if like is not None and tuple(array.shape) != tuple(like.shape):
                return f"it sent '{name}' of shape {tuple(array.shape)} in place of {tuple(like.shape)}"
            if not array.data.startswith(_header(array.dtype, tuple(array.shape))):
                return f"it sent '{name}' in a form that is not what it says"
            values = to_numpy(array)
            if (like is not None and values.dtype.kind != np.dtype(like.dtype).kind) or values.dtype.kind not in "fiu":
                return f"it sent '{name}' of type {values.dtype}"
            # A sum is not finite where one of its terms is not: faster than to look at each.
            if values.dtype.kind == "f" and not np.isfinite(values.sum(dtype=np.float64)):
                return f"it sent '{name}' with numbers that are not finite"
    return ""


@functools.lru_cache(maxsize=256)
def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return the first bytes of a NumPy file: what an array says of itself must be what is in it."""
    file = io.BytesIO()
    described = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, described)
    return file.getvalue()


def config_of(content: RecordDict) -> dict[str, Any]:
    """Return the message's config as a dict (empty when it carries none)."""
    return dict(content.config_records.get(CONFIG, ConfigRecord()))


def metrics_of(content: RecordDict) -> dict[str, Any]:
    """Return the reply's first metric record as a dict; Flower's strategies expect exactly one."""
    return dict(next(iter(content.metric_records.values()), MetricRecord()))


def client_of(context: Context) -> int:
    """Return the client's number, from 0."""
    return int(context.node_config["partition-id"])


def server_round(content: RecordDict) -> int | None:
    """Return the round that Flower's strategies write into the outgoing config; None where there is none."""
    return config_of(content).get(SERVER_ROUND)


def array_bytes(content: RecordDict) -> int:
    """Return the bytes of all arrays in the content."""
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())


class WeightedMean:
    """A mean of arrays by name, weighted, one set at a time: all together would not fit in memory."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._total: dict[str, np.ndarray] = {}

    def add(self, values: Mapping[str, Any], weight: float) -> None:
        """Add arrays (or numbers) with a weight."""
        self._weight += weight
        for name, value in values.items():
            share = np.multiply(value, weight, dtype=np.float64)
            if name in self._total:
                self._total[name] += share
            else:
                self._total[name] = np.asarray(share)

    def mean(self) -> dict[str, np.ndarray]:
        """Return the means, float64; none where nothing was added."""
        return {name: total / self._weight for name, total in self._total.items()}


class MergedReply:
    """Many clients' replies as one: arrays and metrics as means weighted by num-examples, columns end to end."""

    def __init__(self) -> None:
        self._arrays: dict[str, WeightedMean] = {}
        self._metrics = WeightedMean()
        self._summed: dict[str, Any] = {}
        self._columns: Columns = {}
        self._like: RecordDict | None = None
        self._added = 0

    def add(self, content: RecordDict) -> None:
        """Add a reply's content."""
        self._added += 1
        if self._like is None:
            # Most rounds of small federations have one cohort, and its reply is the mean already.
            self._like = content
            return
        if self._added == 2:
            self._fold(self._like)
        self._fold(content)

    def _fold(self, content: RecordDict) -> None:
        metrics = metrics_of(content)
        weight = float(metrics.get(WEIGHT, metrics[NUM_EXAMPLES]))
        for name, record in content.array_records.items():
            self._arrays.setdefault(name, WeightedMean()).add(
                {k: to_numpy(array) for k, array in record.items()}, weight
            )
        self._metrics.add({name: value for name, value in metrics.items() if name not in SUMMED}, weight)
        for name in metrics.keys() & set(SUMMED):
            self._summed[name] = np.add(self._summed.get(name, 0), metrics[name])
        for name, column in content.config_records.get(CLIENTS, ConfigRecord()).items():
            self._columns.setdefault(name, []).extend(cast(list[Any], column))

    def content(self) -> RecordDict:
        """Return the merged content, arrays in the dtypes they came in."""
        assert self._like is not None
        if self._added == 1:
            return self._like
        metrics = {name: value.tolist() for name, value in {**self._summed, **self._metrics.mean()}.items()}
        merged = RecordDict({METRICS: MetricRecord(metrics), CLIENTS: ConfigRecord(dict(self._columns))})
        for name, mean in self._arrays.items():
            like = self._like.array_records[name]
            merged[name] = in_dtypes_of(to_arrays(mean.mean()), like)
        return merged
