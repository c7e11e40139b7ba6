"""What travels beside a model, and what a client keeps: tensors by kind ("control") and name ("0.weight").

A strategy's messages carry one `ArrayRecord`, as Flower's own do: the model under its names, anything else as
`kind/name`. A client's state is one flat float32 vector a kind, as bytes, in Flower's `Context.state`: a thousand
clients' states are read and written faster so than a thousand times every layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context
from torch import Tensor

from core.records import Tensors

Kinds = Mapping[str, Tensors]
CLIENT_STATE = "client-state"


def beside(kinds: Mapping[str, Mapping[str, Tensor | np.ndarray]]) -> dict[str, Tensor | np.ndarray]:
    """Return the tensors under the names they travel by: kind/name."""
    return {f"{kind}/{name}": tensor for kind, own in kinds.items() for name, tensor in own.items()}


def split(arrays: ArrayRecord) -> tuple[ArrayRecord, dict[str, ArrayRecord]]:
    """Return the model's own arrays, and the others by kind."""
    own: dict[str, Array] = {}
    others: dict[str, dict[str, Array]] = {}
    for name, array in arrays.items():
        kind, slash, rest = name.partition("/")
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
    if not initial:
        return {}
    # Not `state.config_records`, which makes a dictionary of its own for every client.
    kept: list[Mapping[str, Any]] = [context.state.get(CLIENT_STATE, {}) for context in contexts]
    out: dict[str, Tensors] = {}
    for kind, own in initial.items():
        of_each = [np.frombuffer(record[kind], np.float32) if kind in record else rows[kind] for record in kept]
        if any(len(row) != len(rows[kind]) for row in of_each):
            raise ValueError(f"a client has kept '{kind}' for another model; start a new run")
        parts = torch.from_numpy(np.stack(of_each)).split([t.numel() for t in own.values()], dim=1)
        out[kind] = {name: part.view(-1, *t.shape) for (name, t), part in zip(own.items(), parts, strict=True)}
    return out


def write_state(contexts: Sequence[Context], state: Kinds) -> None:
    """Let each client keep its row of the tensors (C, ...)."""
    if not state:
        return
    flat = {kind: _flat(own) for kind, own in state.items()}
    for i, context in enumerate(contexts):
        record = context.state.get(CLIENT_STATE)
        if not isinstance(record, ConfigRecord) or record.keys() != flat.keys():
            context.state[CLIENT_STATE] = record = ConfigRecord()
        # Making a new one in every round takes twice as long.
        for kind, rows in flat.items():
            record[kind] = rows[i].tobytes()


def _flat(own: Tensors) -> np.ndarray:
    """Return tensors (C, ...) as rows (C, D) float32."""
    # Not flatten: a parameter without a dimension of its own has (C,).
    rows = [t.detach().float().reshape(len(t), -1) for t in own.values()]
    flat: np.ndarray = torch.cat(rows, dim=1).cpu().numpy()
    return flat
