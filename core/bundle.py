"""What travels beside a model, and what a client keeps: tensors by kind ("control") and name ("0.weight").

A strategy's messages carry one `ArrayRecord`, as Flower's own do: the model under its names, anything else as
`kind/name`. A client's state is one flat vector a kind in Flower's `Context.state`: a thousand clients' states are read
and written faster so than a thousand times every layer.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context
from torch import Tensor

from core import records
from core.records import Tensors

Kinds = Mapping[str, Tensors]
CLIENT_STATE = "client-state"
_SLASH = "/"


def beside(kinds: Mapping[str, Mapping[str, Tensor | np.ndarray]]) -> dict[str, Tensor | np.ndarray]:
    """Return the tensors under the names they travel by: kind/name."""
    return {f"{kind}{_SLASH}{name}": tensor for kind, own in kinds.items() for name, tensor in own.items()}


def split(arrays: ArrayRecord) -> tuple[ArrayRecord, dict[str, ArrayRecord]]:
    """Return the model's own arrays, and the others by kind."""
    own: dict[str, Array] = {}
    others: dict[str, dict[str, Array]] = {}
    for name, array in arrays.items():
        kind, slash, rest = name.partition(_SLASH)
        if slash:
            others.setdefault(kind, {})[rest] = array
        else:
            own[name] = array
    return ArrayRecord(own), {kind: ArrayRecord(found) for kind, found in others.items()}


def join(arrays: ArrayRecord, kinds: Mapping[str, ArrayRecord]) -> ArrayRecord:
    """Return the model's arrays with others beside them."""
    return ArrayRecord({**arrays, **{f"{kind}/{name}": a for kind, own in kinds.items() for name, a in own.items()}})


def read_state(contexts: Sequence[Context], initial: Kinds) -> dict[str, Tensors]:
    """Return what C clients have kept, (C, ...) by kind and name; one that has kept nothing begins with `initial`.

    `initial` gives each kind's names and shapes; all are float32.
    """
    rows = {kind: _flat({name: t.unsqueeze(0) for name, t in own.items()})[0] for kind, own in initial.items()}
    kept: list[Mapping[str, Array]] = (
        [context.state.array_records.get(CLIENT_STATE, {}) for context in contexts] if initial else []
    )
    out: dict[str, Tensors] = {}
    for kind, own in initial.items():
        of_each = [records.to_numpy(record[kind]) if kind in record else rows[kind] for record in kept]
        stacked = torch.from_numpy(np.stack(of_each))
        if stacked.shape[1] != len(rows[kind]):
            raise ValueError(f"a client has kept '{kind}' for another model; start a new run")
        parts = stacked.split([t.numel() for t in own.values()], dim=1)
        out[kind] = {name: part.view(-1, *t.shape) for (name, t), part in zip(own.items(), parts, strict=True)}
    return out


def write_state(contexts: Sequence[Context], state: Kinds) -> None:
    """Let each client keep its row of the tensors (C, ...)."""
    if not state:
        return
    flat = {kind: _flat(own) for kind, own in state.items()}
    for i, context in enumerate(contexts):
        context.state[CLIENT_STATE] = ArrayRecord({kind: _array(rows[i]) for kind, rows in flat.items()})


def _flat(own: Tensors) -> np.ndarray:
    """Return tensors (C, ...) as rows (C, D) float32."""
    flat: np.ndarray = torch.cat([t.detach().float().flatten(1) for t in own.values()], dim=1).cpu().numpy()
    return flat


def _array(row: np.ndarray) -> Array:
    return Array(str(row.dtype), row.shape, "numpy.ndarray", _header(row.dtype.str, row.shape) + row.tobytes())


@functools.lru_cache(maxsize=64)
def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return the first bytes of a NumPy file: to write them takes longer than to copy a small vector."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()
