"""Layers that never leave a client: FedBN's normalisation layers, FedPer's and FedRep's head.

- FedBN (Li et al., ICLR 2021, algorithm 1): parameters and running statistics of normalisation layers stay with each
  client; all others are averaged. Against feature shift: every hospital's scanner is normalised on its own.
- FedPer (Arivazhagan et al., 2019, algorithms 1 and 2): the last `personal_layers` layers stay; body and head train
  together.
- FedRep (Collins et al., ICML 2021, algorithm 1): the head trains first, `head_share` of the round's steps, against the
  body as it came; then the body against the new head.

A client evaluates the global model with its own layers. The global model keeps these layers as they were initialised:
its central metrics say little. Uplink is smaller by what stays. Running statistics of layers that are shared are plain
weighted means; those of layers that stay are the client's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from core.config import RunConfig
from core.errors import InputError
from core.records import Tensors, travelling
from core.training import LocalRound, LocalUpdate, everybody, local_sgd
from strategies.linear import Linear

PERSONAL = "personal"
_NORMALISATION = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)


class FedBN(Linear):
    """FedAvg of everything but normalisation layers."""

    private_by_example = True

    @staticmethod
    def check(config: RunConfig, model: nn.Module) -> None:
        """Refuse models without anything to keep: that would be FedAvg under another name."""
        if not _normalisation(model):
            raise InputError(f"fedbn keeps normalisation layers, and task {config.task}'s model has none; "
                             "choose a model with some, or fedavg.")  # fmt: skip

    @staticmethod
    def initial_state(r: LocalRound) -> dict[str, Tensors]:
        """Return the global model's normalisation layers as they are when a client first trains."""
        return {PERSONAL: {name: r.global_params[name] for name in _normalisation(r.model)}}

    @staticmethod
    def sends(model: nn.Module, options: Mapping[str, Any]) -> list[str]:
        """Return the names of what is not normalisation."""
        return _others(model, _normalisation(model))

    @staticmethod
    def local_update(r: LocalRound) -> LocalUpdate:
        """Return what is not normalisation."""
        return _kept(local_sgd(r, start=personal_model(r)), _normalisation(r.model))

    @staticmethod
    def personal_model(r: LocalRound) -> Tensors:
        """Return the global model with each client's own normalisation layers."""
        return personal_model(r)


class FedPer(Linear):
    """FedAvg of everything but the last layers."""

    private_by_example = True

    def __init__(self, *, personal_layers: int = 1, **fedavg: Any) -> None:
        if personal_layers < 1:
            raise ValueError("personal-layers must be at least 1")
        super().__init__(**fedavg)
        self.personal_layers = int(personal_layers)

    @staticmethod
    def check(config: RunConfig, model: nn.Module) -> None:
        """Refuse to keep so many layers that nothing is left to share."""
        layers = config.strategy_options.get("personal-layers", 1)
        if len(head(model, int(layers))) >= len(travelling(model)):
            raise InputError(f"strategy-options.personal-layers={layers} are all layers of task "
                             f"{config.task}'s model; lower it, so that some are shared.")  # fmt: skip

    @staticmethod
    def initial_state(r: LocalRound) -> dict[str, Tensors]:
        """Return the global model's last layers."""
        return {PERSONAL: {name: r.global_params[name] for name in head(r.model, r.options["personal-layers"])}}

    @staticmethod
    def sends(model: nn.Module, options: Mapping[str, Any]) -> list[str]:
        """Return the names of the body."""
        return _others(model, head(model, options["personal-layers"]))

    @staticmethod
    def local_update(r: LocalRound) -> LocalUpdate:
        """Return the body."""
        return _kept(local_sgd(r, start=personal_model(r)), head(r.model, r.options["personal-layers"]))

    @staticmethod
    def personal_model(r: LocalRound) -> Tensors:
        """Return the global body with each client's own head."""
        return personal_model(r)


class FedRep(FedPer):
    """FedPer whose head and body take turns."""

    private_by_example = True

    def __init__(self, *, head_share: float = 0.5, **fedper: Any) -> None:
        if not 0 < head_share < 1:
            raise ValueError("head-share must be above 0 and below 1")
        super().__init__(**fedper)
        self.head_share = head_share

    @staticmethod
    def check(config: RunConfig, model: nn.Module) -> None:
        """Refuse rounds of one step, which cannot be shared between head and body."""
        FedPer.check(config, model)
        if config.local_steps == 1:
            raise InputError("local-steps=1: fedrep trains head and body in turn; set local-steps=2 or more.")

    @staticmethod
    def local_update(r: LocalRound) -> LocalUpdate:
        """Return the body, trained after the head."""
        own = head(r.model, r.options["personal-layers"])
        steps = r.batches.steps.numpy()
        first = np.clip(np.round(steps * r.options["head-share"]).astype(np.int64), 1, np.maximum(steps - 1, 1))
        heads = local_sgd(replace(r, batches=r.batches.cut(first)), start=personal_model(r), only=own)
        rest = replace(r, batches=r.batches.after(first)) if (steps > 1).any() else r
        body = [name for name in r.global_params if name not in own]
        return _kept(local_sgd(rest, start=heads.params, only=body), own)


def personal_model(r: LocalRound) -> Tensors:
    """Return the global model (C, ...) with the layers that each client has kept."""
    return {**everybody(r.global_params, len(r.batches.steps)), **r.state[PERSONAL]}


def head(model: nn.Module, layers: int) -> list[str]:
    """Return the names of all that travels of the model's last `layers` modules that have parameters."""
    last = _owners(model)[-int(layers) :]
    return [name for name in travelling(model) if name.rpartition(".")[0] in last]


def last_module(model: nn.Module) -> nn.Module:
    """Return the last module that has parameters: the classifier."""
    return model.get_submodule(_owners(model)[-1])


def _owners(model: nn.Module) -> list[str]:
    """Return the names of the modules whose own tensors travel, in the order in which the model has them."""
    owners = {name.rpartition(".")[0] for name in travelling(model)}
    return [name for name, _ in model.named_modules() if name in owners]


def _normalisation(model: nn.Module) -> list[str]:
    own = {name for name, module in model.named_modules() if isinstance(module, _NORMALISATION)}
    return [name for name in travelling(model) if name.rpartition(".")[0] in own]


def _others(model: nn.Module, personal: Collection[str]) -> list[str]:
    """Return the names of all that travels but personal layers."""
    return [name for name in travelling(model) if name not in personal]


def _kept(update: LocalUpdate, personal: Collection[str]) -> LocalUpdate:
    """Return the update without its personal layers, which the client keeps."""
    kept = {name: update.params[name] for name in personal}
    return replace(update, params={n: p for n, p in update.params.items() if n not in kept}, state={PERSONAL: kept})
