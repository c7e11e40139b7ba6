"""Where clients train: the CPU, or the GPU that this process sees."""

from __future__ import annotations

import torch
from torch import Tensor

from core.config import RunConfig
from core.errors import InputError


def device_of(config: RunConfig) -> torch.device:
    """Return the configured device; `auto` is a GPU where this process sees one."""
    name = config.engine.device
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def decide_device(config: RunConfig) -> RunConfig:
    """Return the config with `engine.device` decided, which stands in config.toml since digits depend on it.

    Raises `InputError` for a GPU where there is none. A cluster may have some that this machine has not: there is
    then nothing to measure on, and cohort size and workers must be given.
    """
    if config.engine.device == "cuda" and not torch.cuda.is_available():
        if not config.engine.address:
            raise InputError("engine.device=cuda, but torch sees no CUDA device here; set engine.device=cpu.")
        if "auto" in (config.engine.cohort_size, config.engine.workers):
            raise InputError(
                "engine.device=cuda with engine.address, and this machine has no GPU to measure on; "
                "set engine.cohort-size (128, say) and engine.workers (the cluster's GPUs)."
            )
    return config.with_(engine__device=device_of(config).type)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on the device; to a GPU from page-locked memory, so that the copy runs beside the kernels."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
