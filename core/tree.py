"""Save nested state without pickles: plain values as JSON, arrays as safetensors.

A tree is made of dicts (string or integer keys), lists, tuples, numbers, strings, bytes, None, NumPy arrays and
Flower's records. Anything else raises `TypeError` naming the place: a checkpoint must not lose something silently.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from safetensors.numpy import load_file, save

from core.records import to_numpy

_RECORDS = {"arrays": ArrayRecord, "config": ConfigRecord, "metrics": MetricRecord, "records": RecordDict}


def dump(tree: Any, name: str) -> dict[str, bytes]:
    """Return the contents of name.json and name.safetensors, which hold `tree`; `TypeError` names what cannot be."""
    arrays: dict[str, np.ndarray] = {}
    text = json.dumps(_pack(tree, name, arrays))
    return {f"{name}.safetensors": save(arrays), f"{name}.json": text.encode()}


def load(folder: Path, name: str) -> Any:
    """Return the tree whose `dump` lies in the folder."""
    arrays = load_file(folder / f"{name}.safetensors")
    return _unpack(json.loads((folder / f"{name}.json").read_text()), arrays)


def packable(value: Any) -> bool:
    """Return whether `dump` takes the value."""
    try:
        _pack(value, "", {})
    except TypeError:
        return False
    return True


def _pack(value: Any, where: str, arrays: dict[str, np.ndarray]) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    # np.float64 is a float as well, but has a dtype to keep.
    if isinstance(value, int | float) and not isinstance(value, np.generic):
        return value
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf" and value.dtype.itemsize <= 8:
        if where in arrays:
            raise TypeError(f"{where}: two keys have the same name")
        arrays[where] = np.asarray(value, order="C")
        return {"array" if isinstance(value, np.ndarray) else "scalar": where}
    if isinstance(value, bytes):
        return {"bytes": _pack(np.frombuffer(value, np.uint8), where, arrays)}
    if isinstance(value, Array):
        return {"flower-array": _pack(to_numpy(value), where, arrays)}
    for kind, record in _RECORDS.items():
        if isinstance(value, record):
            return {kind: _pack(dict(value), where, arrays)}
    if isinstance(value, dict) and all(isinstance(key, str | int) for key in value):
        return {"dict": [[key, _pack(item, f"{where}/{key}", arrays)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_pack(item, f"{where}/{i}", arrays) for i, item in enumerate(value)]}
    raise TypeError(f"{where}: {type(value).__name__} cannot be saved")


def _unpack(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "array":
        return arrays[content]
    if kind == "scalar":
        return arrays[content][()]
    if kind == "flower-array":
        return Array(np.asarray(_unpack(content, arrays)))
    if kind == "bytes":
        return _unpack(content, arrays).tobytes()
    if kind in _RECORDS:
        return _RECORDS[kind](_unpack(content, arrays))
    if kind == "dict":
        return {key: _unpack(item, arrays) for key, item in content}
    items = [_unpack(item, arrays) for item in content]
    return items if kind == "list" else tuple(items)
