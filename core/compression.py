"""How an update travels to the server in fewer bytes; clients encode, and the server decodes what it receives.

An update is a client's model minus the global one, all its tensors as one vector. Rounding is stochastic, so that its
error has mean zero (Alistarh et al., NeurIPS 2017, "QSGD"); a random rotation before it spreads a few large numbers
over all of them (Suresh et al., ICML 2017); top-k keeps what it does not send for the next round (Stich et al., NeurIPS
2018, "Sparsified SGD with memory"). What a strategy sends beside the model (scaffold's controls) stays float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from core import bundle, hadamard, records
from core.config import RunConfig
from core.records import Tensors
from core.sections import Compression
from core.seeding import derive
from core.training import LocalRound, LocalUpdate

KINDS = {
    "none": "float32, as it is: 4 bytes a number",
    "fp16": "half precision: 2 bytes a number",
    "int8": "127 steps a sign and one scale a tensor, rounded stochastically: 1 byte a number",
    "int4": "7 steps a sign and one scale a tensor, rounded stochastically: half a byte a number",
    "top-k": "the largest compression.fraction of numbers, the rest kept for the next round: 8 bytes for each",
}
COMPRESSED = "compressed"
RESIDUAL = "compression-residual"
_LEVELS = {"int8": 127, "int4": 7}


@dataclass(frozen=True)
class Encoded:
    """A cohort's encoded updates: arrays (C, ...) by name, and what else travels as it is."""

    arrays: dict[str, Tensor]
    beside: dict[str, Tensors]

    def bytes(self) -> int:
        """Return the bytes of arrays that each client sends."""
        # With the arrays' headers, as an update that is not compressed is counted.
        return sum(len(array.data) for array in packed(self, 0).values())


def uplink_bytes(config: RunConfig, names: Sequence[str], sent: Mapping[str, Array]) -> int:
    """Return the bytes of arrays that a client sends back which received `sent`.

    `names` are the model's tensors, which travel as they are encoded, and `kind/name` beside them, which have the shape
    of `name`. Known before anybody trains: server and clients count virtual time by it.
    """
    beside = [sent[name.partition("/")[2]] for name in names if "/" in name]
    own = [sent[name] for name in names if "/" not in name]
    if config.compression.kind == "none":
        return sum(len(array.data) for array in (*own, *beside))
    encoded = _encoded_bytes(config.compression, tuple(math.prod(array.shape) for array in own))
    return encoded + sum(len(array.data) for array in beside)


@functools.lru_cache(maxsize=8)
def _encoded_bytes(compression: Compression, widths: tuple[int, ...]) -> int:
    nothing, config = torch.zeros(1, sum(widths)), RunConfig(compression=compression)
    return Encoded(_encode(nothing, config, list(widths), (0,), 1), {}).bytes()


class Compressor:
    """The client's side: an update processor that replaces what a client learnt by what the server will decode."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    def initial_state(self, r: LocalRound) -> dict[str, Tensors]:
        """Return the residual of a client that has sent nothing yet; only top-k keeps one."""
        if self._config.compression.kind != "top-k":
            return {}
        return {RESIDUAL: {name: torch.zeros_like(p) for name, p in r.global_params.items()}}

    def __call__(self, update: LocalUpdate, r: LocalRound) -> tuple[LocalUpdate, Encoded]:
        """Return the update as the server will see it, and its encoding."""
        names, number = list(update.params), int(r.config[records.SERVER_ROUND])
        flat = _flat({name: update.params[name] - r.global_params[name] for name in names})
        state = dict(update.state)
        if (kept := r.state.get(RESIDUAL)) is not None:
            flat = flat + _flat({name: kept[name] for name in names})
        shapes = {name: p.shape[1:] for name, p in update.params.items()}
        arrays = _encode(flat, self._config, _widths(shapes), r.seeds, number)
        decoded = _decode(arrays, self._config, _widths(shapes), number)
        if kept is not None:
            state[RESIDUAL] = {**kept, **_unflat(flat - decoded, shapes)}
        params = {name: r.global_params[name] + p for name, p in _unflat(decoded, shapes).items()}
        return replace(update, params=params, state=state), Encoded(arrays, update.beside)


def packed(encoded: Encoded, client: int) -> ArrayRecord:
    """Return what one client of the cohort sends."""
    own = {COMPRESSED: encoded.arrays, **encoded.beside}
    return records.to_arrays(bundle.beside({k: {n: t[client] for n, t in v.items()} for k, v in own.items()}))


def unpacked(
    arrays: ArrayRecord, config: RunConfig, names: Sequence[str], model: Mapping[str, np.ndarray], server_round: int
) -> ArrayRecord:
    """Return a client's model from what it sent: tensors `names` of the global `model`, and what travelled beside them.

    Raises `ValueError` where the message does not hold what the configuration says.
    """
    _, others = bundle.split(arrays)
    found = others.pop(COMPRESSED, None)
    if found is None or not set(names) <= set(model):
        raise ValueError("the update is not encoded as compression.kind says")
    shapes = {name: torch.Size(model[name].shape) for name in names}
    own = {name: torch.from_numpy(np.array(records.to_numpy(array))).unsqueeze(0) for name, array in found.items()}
    flat = _decode(own, config, _widths(shapes), server_round)
    params = {name: model[name] + p[0].numpy() for name, p in _unflat(flat, shapes).items()}
    return bundle.join(records.to_arrays(params), others)


def _encode(
    flat: Tensor, config: RunConfig, widths: list[int], seeds: Sequence[int], server_round: int
) -> dict[str, Tensor]:
    """Return the arrays that stand for vectors (C, D)."""
    own = config.compression
    if own.kind == "fp16":
        # Beyond half precision's range a number would become infinite.
        return {"values": flat.clamp(-65504, 65504).half()}
    if own.kind == "top-k":
        k = max(1, math.ceil(own.fraction * flat.shape[1]))
        places = flat.abs().topk(k, dim=1).indices.sort(dim=1).values
        return {"places": places.int(), "values": flat.gather(1, places)}
    levels = _LEVELS[own.kind]
    if own.rotation:
        flat = hadamard.rotated(flat, _signs(flat.shape[1], config, server_round))
        widths = [flat.shape[1]]
    parts = flat.split(widths, dim=1)
    scales = torch.stack([part.abs().amax(1) for part in parts], dim=1)
    steps = torch.cat([part / (s / levels).clamp_min(1e-30).unsqueeze(1) for part, s in _zip(parts, scales)], dim=1)
    noise = torch.stack([_uniform(steps.shape[1], seed) for seed in seeds]).to(steps.device)
    codes = (steps + noise).floor().clamp(-levels, levels).to(torch.int8)
    return {"codes": codes if own.kind == "int8" else _nibbles(codes), "scales": scales}


def _decode(arrays: Mapping[str, Tensor], config: RunConfig, widths: list[int], server_round: int) -> Tensor:
    """Return the vectors (C, D) that the arrays stand for."""
    own, size = config.compression, sum(widths)
    if own.kind == "fp16":
        flat = arrays["values"].float()
    elif own.kind == "top-k":
        values, wanted = arrays["values"], max(1, math.ceil(own.fraction * size))
        if arrays["places"].shape != values.shape or values.shape[1:] != (wanted,):
            raise ValueError(f"{tuple(values.shape[1:])} numbers were sent, not {wanted}")
        flat = values.new_zeros(len(values), size).scatter(1, arrays["places"].long(), values)
    else:
        widths = [hadamard.power_of_two(size)] if own.rotation else widths
        codes = arrays["codes"] if own.kind == "int8" else _from_nibbles(arrays["codes"], sum(widths))
        parts = codes.float().split(widths, dim=1)
        whole = [part * (s / _LEVELS[own.kind]).unsqueeze(1) for part, s in _zip(parts, arrays["scales"])]
        flat = torch.cat(whole, dim=1)
        if own.rotation:
            flat = hadamard.rotated_back(flat, _signs(size, config, server_round), size)
    if flat.shape[1] != size:
        raise ValueError(f"an encoded update has {flat.shape[1]} numbers and the model {size}")
    return flat


def _zip(parts: Sequence[Tensor], scales: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(parts, scales.unbind(1), strict=True))


def _uniform(size: int, seed: int) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(derive(seed, "rounding")))


def _nibbles(codes: Tensor) -> Tensor:
    """Return codes (C, D) of -8..7 two in a byte, (C, ceil(D / 2)) uint8."""
    low = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2)) + 8
    return (low[:, ::2] * 16 + low[:, 1::2].to(torch.int16)).to(torch.uint8)


def _from_nibbles(packed: Tensor, size: int) -> Tensor:
    both = torch.stack([packed // 16, packed % 16], dim=2).flatten(1)
    return both[:, :size].to(torch.int8) - 8


def _signs(size: int, config: RunConfig, server_round: int) -> Tensor:
    return hadamard.signs(hadamard.power_of_two(size), config.seed, "rotation", server_round)


def _widths(shapes: Mapping[str, torch.Size]) -> list[int]:
    return [math.prod(shape) for shape in shapes.values()]


def _flat(tensors: Tensors) -> Tensor:
    return torch.cat([t.reshape(len(t), -1) for t in tensors.values()], dim=1)


def _unflat(flat: Tensor, shapes: Mapping[str, torch.Size]) -> Tensors:
    parts = flat.split(_widths(shapes), dim=1)
    return {name: part.reshape(-1, *shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
