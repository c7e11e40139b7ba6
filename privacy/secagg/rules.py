"""What secure aggregation cannot do, each refused with the remedy; and what it says nothing about."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

from torch import nn

from core import records
from core.config import RunConfig
from core.errors import InputError
from core.records import travelling
from privacy.rules import MOVED_BY, of_means
from privacy.secagg import exact
from privacy.secagg.rounds import payload_of, plan_of

_ASYNCHRONOUS = ("fedasync", "fedbuff")


def check(
    config: RunConfig, model: nn.Module, numbers: Callable[[RunConfig, int], Mapping[str, float]], *, linear: bool,
    unsaid: Collection[str] = (),
) -> None:  # fmt: skip
    """Raise `InputError` where the configured run could not take secure sums; `linear` strategies need no more.

    `unsaid` is what the strategy does not say of itself (privacy/rules.py: Subject).
    """
    if config.secure_aggregation.profile == "none":
        return
    for sentence in _refused(config, linear, unsaid):
        raise InputError(sentence)
    size, cohort = sum(p.numel() for p in travelling(model).values()), _cohort(config)
    plan_of(config, cohort)
    # The largest weight is known once clients have said it; here it is as small as can be.
    told = {records.COHORT: cohort, records.LARGEST_WEIGHT: 1, records.SERVER_ROUND: 1}
    payload_of(config, size, told | {records.CLIPPING_NORM: config.privacy.clipping_norm}, numbers)


def _cohort(config: RunConfig) -> int:
    """Return the clients of a round's largest sum, as planned."""
    return -(-config.count(config.sampled) // config.secure_aggregation.groups)


def _refused(config: RunConfig, linear: bool, unsaid: Collection[str]) -> Iterator[str]:
    own, private, sampling = config.secure_aggregation, config.privacy, config.sampling
    sampled = config.count(config.sampled)
    if config.strategy in MOVED_BY or config.strategy in _ASYNCHRONOUS:
        told = MOVED_BY.get(config.strategy, "each update as it comes")
        yield (
            f"strategy {config.strategy} goes by {told}, and secure aggregation shows sums alone; choose fedavg, "
            "fedprox, scaffold, a server optimiser, or a robust rule with secure-aggregation.groups."
        )
    if not linear and own.groups == 1:
        yield of_means(config.strategy, unsaid, (
            "secure aggregation shows the sum alone; set "
            "secure-aggregation.groups=5 or so, and it works on the means of random groups, or choose a strategy of "
            "weighted means (fedavg, fedprox, fedadam, scaffold, ...)."
        ))  # fmt: skip
    if sampled < own.groups * own.min_cohort:
        yield (
            f"{sampled} clients a round in secure-aggregation.groups={own.groups} are fewer than {own.min_cohort} in "
            "each; raise sampled, or lower groups or secure-aggregation.min-cohort (3 at least)."
        )
    if config.clients > (most := exact.most_clients(own.bits)):
        yield (
            f"secure-aggregation.bits={own.bits} hold sums of {most} clients, and there are {config.clients}; set "
            f"{exact.least_bits(config.clients)} or more (32 is the default)."
        )
    if config.compression.kind != "none":
        yield (
            f"compression.kind={config.compression.kind} sends codes, which do not add up under masks; set none: "
            f"numbers travel in secure-aggregation.bits={own.bits} each."
        )
    if sampling.kind in ("oort", "power-of-choice"):
        yield (
            f"sampling.kind={sampling.kind} chooses clients by their losses, which secure aggregation hides; set "
            "uniform, poisson or cyclic."
        )
    if config.devices.kind != "none":
        yield (
            f"devices.kind={config.devices.kind} tells the server how long each client takes, and so how many examples "
            "it has; set none, and faults.* for dropouts."
        )
    if private.level == "example":
        yield (
            "privacy.level=example keeps an account of each client's steps, which secure aggregation hides; set "
            "privacy.level=client."
        )
    if private.level == "client" and private.noise == "central" and config.attack.kind != "none":
        yield (
            f"attack.kind={config.attack.kind}: the server clips what malicious clients send, and under secure "
            "aggregation it cannot see it; drop one of them."
        )
    if private.level == "client" and private.noise == "distributed" and own.groups > 1:
        yield (
            f"privacy.noise=distributed is made for one sum, and secure-aggregation.groups={own.groups} has several; "
            "set 1, or privacy.noise=local."
        )
    if config.attack.kind == "wrong-shape":
        yield (
            "attack.kind=wrong-shape sends what is no vector of the round, and the protocol drops it unread; choose "
            "another kind."
        )


def uncovered(config: RunConfig, model: nn.Module) -> list[str]:
    """Return what secure aggregation does not hide from the server, a phrase each."""
    own, found = config.secure_aggregation, []
    if not own.roster:
        found.append("anything from whoever runs this machine: clients' keys are simulated")
    found.append("who takes part in which round")
    found.append("each client's evaluation metrics, and how many test and validation examples they are of")
    found.append(
        "the sums themselves, those of sizes and labels before training too, and the model that is made of them"
    )
    if any(isinstance(module, nn.Embedding | nn.EmbeddingBag) for module in model.modules()):
        found.append(
            "a word that one client of a sum alone has used: its row of the embedding has no others to hide in"
        )
    if config.baselines:
        found.append("the baselines, trained on clients' examples in one place")
    return found
