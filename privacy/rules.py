"""What a private run must not do: each rule refuses with the remedy. Privacy code refuses rather than guesses."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from core.config import RunConfig
from core.errors import InputError
from core.records import travelling
from core.steps import Loss
from privacy.accounting import epsilon
from privacy.audit.canaries import most
from privacy.client_level import ClientLevel
from privacy.coverage import covered
from privacy.example_level import ExampleLevel
from privacy.per_example import fitness

# By what else than updates these move the model. Other strategies that do find nothing there, and fail.
MOVED_BY = {
    "qfedavg": "its clients' losses",
    "agnostic": "its clients' losses",
    "ifca": "which model is best for a client",
}


# Of fewer examples the means are nearly the examples.
FEWEST_HELD = 20


@dataclass(frozen=True)
class Subject:
    """What the rules look at beside the configuration."""

    model: nn.Module
    standardise: str
    """Whose constants scale the inputs: federated, local, server, none."""
    linear: bool
    """Whether the strategy needs no more than a weighted mean."""
    by_example: bool
    """Whether what its clients do with an example passes through per-example clipping."""
    sizes: np.ndarray
    """Training examples of each client, (clients,) int64."""
    loss: Loss
    """(logits, y) -> each example's loss (B,)."""
    x: np.ndarray
    """A few examples (n, ...), for their shape."""
    y: np.ndarray
    unsaid: Collection[str] = ()
    """What a strategy that is not ours might say of itself and does not: partial_means, private_by_example."""


def of_means(strategy: str, unsaid: Collection[str], otherwise: str) -> str:
    """Return why a strategy cannot live on sums alone: it does not say that it can, or else it needs every update."""
    if "partial_means" not in unsaid:
        return f"strategy {strategy} needs every update, and {otherwise}"
    return (
        f"{strategy} does not say that it needs only weighted means; if so, set partial_means = True in the class: "
        f"{otherwise}"
    )


def needs(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings that a private run has unless preset or user say otherwise: clients are drawn independently."""
    if wanted.get("privacy.level") != "client" or wanted.get("privacy.noise", "central") != "central":
        return {}
    return {"sampling.kind": "cyclic" if wanted.get("privacy.mechanism") == "banded" else "poisson"}


def check(config: RunConfig, subject: Subject) -> None:
    """Raise `InputError` where a run would not be as private as it says."""
    level = config.privacy.level
    of_level = {"none": [], "client": [_always, _of_clients], "example": [_always, _of_examples]}[level]
    for rule in [*of_level, _audited]:
        for sentence in rule(config, subject):
            raise InputError(sentence)
    if level == "none":
        return
    _affordable(config, subject)
    if level == "example":
        fitness.check(subject.model, subject.loss, torch.from_numpy(subject.x), torch.from_numpy(subject.y))


def _audited(config: RunConfig, subject: Subject) -> Iterator[str]:
    own, given = config.privacy, config.audit.canaries
    if not given:
        return
    if own.level == "none":
        yield f"audit.canaries={given} measures noise, and privacy.level=none has none; set a level, or drop it."
    elif own.level == "client" and (own.noise != "central" or own.mechanism != "gaussian"):
        yield (
            f"audit.canaries={given} is for noise that a server adds anew in every round; set privacy.noise=central "
            "and privacy.mechanism=gaussian, or drop it."
        )
    if own.population:
        yield (
            f"audit.canaries={given} measures the noise that is there, and with privacy.population={own.population} "
            "that is less than epsilon needs; drop one of them."
        )
    size = sum(p.numel() for p in travelling(subject.model).values())
    room = most(size) * (config.clients if own.level == "example" else 1)
    if given > room:
        yield f"audit.canaries={given} is more than a model of {size:,} parameters has room for; set {room} or fewer."


def _always(config: RunConfig, subject: Subject) -> Iterator[str]:
    own = config.privacy
    if not (own.epsilon or own.noise_multiplier):
        yield (
            f"privacy.level={own.level} has no noise; set privacy.epsilon (the budget, for example 8) or "
            "privacy.noise-multiplier."
        )
    parameters = {name: p for name, p in subject.model.named_parameters() if p.requires_grad}
    for name in sorted(travelling(subject.model).keys() - parameters.keys()):
        yield f"the model sends running statistics ({name}), which no clipping bounds; replace BatchNorm by GroupNorm."
    for name, p in parameters.items():
        if not p.is_floating_point():
            yield f"parameter {name} is not a real number and cannot be clipped; freeze or replace it."
    if subject.standardise == "server" and 0 < config.server_examples < FEWEST_HELD:
        yield (
            f"the means of server-examples={config.server_examples} scale all inputs and tell those examples nearly; "
            f"set {FEWEST_HELD} or more, of people who have agreed."
        )
    if config.sampling.kind in ("oort", "power-of-choice"):
        yield (
            f"sampling.kind={config.sampling.kind} chooses clients by their losses, which no epsilon covers; set "
            "uniform or poisson."
        )
    if own.preprocessing == "covered" and not covered(own.level, subject.standardise):
        whose = {"federated": "sums over all clients' examples", "local": "each client's own means"}
        yield (
            f"inputs are scaled by {whose[subject.standardise]}, which epsilon does not cover; set server-examples=50 "
            "or so with standardise=server (means of the server's own examples), or privacy.preprocessing=uncovered to "
            "go on and say so."
        )


def _of_clients(config: RunConfig, subject: Subject) -> Iterator[str]:
    own, sampling = config.privacy, config.sampling
    if own.noise == "distributed" and config.secure_aggregation.profile == "none":
        yield (
            "privacy.noise=distributed adds each client's share of noise inside secure aggregation; set "
            "secure-aggregation.profile=auto, or privacy.noise=central or local."
        )
    yield from delta_too_large(own.delta, max(config.clients, own.population), "clients")
    if config.strategy == "fednova" and (not config.local_steps or config.faults.late == "partial"):
        yield (
            "fednova sends how many steps each client took, which no epsilon covers; set local-steps, alike for all, "
            "and faults.late=lost."
        )
    if told := MOVED_BY.get(config.strategy):
        others = "or a server optimiser" if own.noise == "central" else "a server optimiser or a robust rule"
        yield (
            f"strategy {config.strategy} goes by {told}, which the noise on updates does not cover; choose fedavg, "
            f"fedprox, {others}."
        )
    if own.noise != "central":
        for key in ("mechanism", "clipping", "population"):
            if (value := getattr(own, key)) not in ("gaussian", "fixed", 0):
                yield f"privacy.{key}={value} is about the server's noise; set privacy.noise=central, or drop it."
        return
    if own.population and own.population <= config.clients:
        yield (
            f"privacy.population={own.population} is no more than the {config.clients} clients of this run; name the "
            "clients of the deployment that it stands for, or drop it."
        )
    if own.population and own.mechanism == "banded":
        yield "privacy.population scales the noise of privacy.mechanism=gaussian; set that, or drop it."
    if not subject.linear:
        yield of_means(config.strategy, subject.unsaid, (
            "privacy.noise=central gives it clients' noisy sum alone; "
            "choose privacy.noise=local, or a strategy of weighted means (fedavg, fedprox, fedadam, scaffold, ...)."
        ))  # fmt: skip
    everybody = config.count(config.sampled) == config.clients
    wanted = "cyclic" if own.mechanism == "banded" else "poisson"
    if sampling.kind != wanted and not (everybody and own.mechanism == "gaussian"):
        yield (
            f"sampling.kind={sampling.kind}: with privacy.mechanism={own.mechanism} what a round costs is known for "
            f"sampling.kind={wanted}; set it."
        )
    if sampling.over_selection > 1:
        yield (
            f"sampling.over-selection={sampling.over_selection:g}: whether a client counts would depend on who else is "
            "slow; set 1."
        )
    if own.mechanism == "banded" and own.clipping == "adaptive":
        yield (
            "privacy.mechanism=banded ties the rounds' noise together, so the clipping norm must stay; set "
            "privacy.clipping=fixed."
        )


def _of_examples(config: RunConfig, subject: Subject) -> Iterator[str]:
    own = config.privacy
    yield from delta_too_large(own.delta, int(subject.sizes.max()), "examples of the largest client")
    if "private_by_example" in subject.unsaid:
        yield (
            f"{config.strategy} does not say that its clients use examples in gradient steps alone, each batch once; "
            "if so, set private_by_example = True in the class, and per-example clipping covers them."
        )
    if not subject.by_example:
        yield (
            f"clients of strategy {config.strategy} use their examples otherwise than in gradient steps, which "
            "per-example clipping does not cover; choose fedavg, fedprox, scaffold, feddyn, moon, a server optimiser "
            "or a robust rule."
        )
    if config.strategy == "fedrep":
        yield from _in_turn(config, subject)
    if config.processors:
        yield f"processors={config.processors} see examples, and no epsilon covers what they send; drop them."
    if config.engine.precision != "float32":
        yield f"engine.precision={config.engine.precision}: examples are clipped in float32; set it."
    if config.engine.compile:
        yield "engine.compile=true does not compile gradients of single examples; set false."


def _in_turn(config: RunConfig, subject: Subject) -> Iterator[str]:
    """Yield why clients would have to take one batch for two steps, of which the account knows nothing."""
    sizes = subject.sizes[subject.sizes > 0]
    if ExampleLevel(config).steps(int(sizes.min())) == 1:
        yield (
            f"fedrep trains head and body in turn, and a client of {sizes.min()} examples takes one step a round; set "
            "local-epochs=2, or a smaller batch-size."
        )
    if config.faults.late == "partial":
        yield "fedrep trains head and body in turn, and what was done in time may be one step; set faults.late=lost."


def _affordable(config: RunConfig, subject: Subject) -> None:
    """Raise `InputError` where the first round alone would exceed the budget."""
    own = config.privacy
    if not own.epsilon:
        return
    if own.level == "client":
        found = ClientLevel.of(config)
        costs = [{event: count} for _, event, count in found.costs(1)]
        if event := found.own_event:
            costs = [{event: 1}]
    else:
        costs = ExampleLevel(config).round_costs(subject.sizes)
    least = min(epsilon(cost, own.delta) for cost in costs)
    if least > own.epsilon:
        raise InputError(
            f"privacy.noise-multiplier={own.noise_multiplier:g} spends epsilon {least:.3g} in one round, more than the "
            f"budget privacy.epsilon={own.epsilon:g}; raise one of them, or leave the noise to the budget (0)."
        )


def delta_too_large(delta: float, count: int, what: str) -> Iterator[str]:
    """Yield why a delta is too large for so many, if it is."""
    if delta * count >= 1:
        yield (
            f"privacy.delta={delta:g} with {count} {what} allows to publish one of them whole; set less than "
            f"{1 / count:.2g}."
        )
