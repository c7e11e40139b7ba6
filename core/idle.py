"""Settings that act only beside others: one that is changed where it does nothing is refused, not passed over.

A run's config.toml names every setting, so a value at its default is never refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from core.adversary import STRENGTHS
from core.config import RunConfig, Scalar, written
from core.errors import InputError

Flat = Mapping[str, Scalar]


@dataclass(frozen=True)
class Acts:
    """Where a setting acts."""

    words: str
    """What follows "it acts"."""
    where: Callable[[Flat], bool]
    """Whether it acts in a run with these settings."""
    by: tuple[str, ...]
    """The settings that decide."""


def _with(key: str, *values: Scalar) -> Acts:
    """Return that a setting acts where another has one of these values."""
    return Acts(f"with {key}={_or(map(written, values))}", lambda flat: flat[key] in values, (key,))


def _unless(key: str, value: Scalar) -> Acts:
    """Return that a setting acts where another has any value but this."""
    return Acts(f"with another {key}", lambda flat: flat[key] != value, (key,))


def _or(parts: Iterable[str]) -> str:
    *others, last = parts
    return f"{', '.join(others)} or {last}" if others else last


_MOMENTUM = ("sgd", "rmsprop")
_VIRTUAL_TIME = _with("devices.kind", "lognormal", "trace")
ACTS = {
    "partition.alpha": _with("partition.kind", "dirichlet", "quantity", "mixed"),
    "partition.shards": _with("partition.kind", "shards"),
    "partition.strictness": _with("partition.kind", "feature"),
    "local-epochs": _with("local-steps", 0),
    "learning-rate-decay": _with("learning-rate-schedule", "exponential"),
    "momentum": Acts(
        "with optimizer=sgd or rmsprop, or such a baseline.optimizer with baselines=true",
        lambda flat: (
            flat["optimizer"] in _MOMENTUM or bool(flat["baselines"] and flat["baseline.optimizer"] in _MOMENTUM)
        ),
        ("optimizer", "baseline.optimizer", "baselines"),
    ),
    "early-stopping.patience": _unless("early-stopping.metric", ""),
    **dict.fromkeys(
        ("baseline.optimizer", "baseline.learning-rate", "baseline.epochs", "baseline.alone-epochs"),
        _with("baselines", True),
    ),
    "sampling.candidates": _with("sampling.kind", "power-of-choice"),
    "sampling.exploration": _with("sampling.kind", "oort"),
    **dict.fromkeys(
        (
            "sampling.over-selection", "devices.seconds-per-example", "devices.uplink-bytes-per-second",
            "devices.downlink-bytes-per-second", "devices.jitter", "devices.availability", "devices.deadline-seconds",
        ),
        _VIRTUAL_TIME,
    ),
    "devices.trace": _with("devices.kind", "trace"),
    "devices.compute-spread": _with("devices.kind", "lognormal"),
    "devices.bandwidth-spread": _with("devices.kind", "lognormal"),
    "faults.late": Acts(
        "with devices.deadline-seconds or faults.stragglers above 0",
        lambda flat: bool(flat["devices.deadline-seconds"] or flat["faults.stragglers"]),
        ("devices.deadline-seconds", "faults.stragglers"),
    ),
    "attack.fraction": _unless("attack.kind", "none"),
    "attack.strength": _with("attack.kind", *STRENGTHS, "alie"),
    "attack.target": _with("attack.kind", "backdoor"),
    "compression.fraction": _with("compression.kind", "top-k"),
    "compression.rotation": _with("compression.kind", "int8", "int4"),
    **dict.fromkeys(
        (
            "privacy.epsilon", "privacy.delta", "privacy.noise-multiplier", "privacy.clipping-norm",
            "privacy.noise-seed", "privacy.preprocessing",
        ),
        _with("privacy.level", "example", "client"),
    ),
    **dict.fromkeys(
        ("privacy.noise", "privacy.mechanism", "privacy.clipping", "privacy.weight-cap", "privacy.population"),
        _with("privacy.level", "client"),
    ),
    **dict.fromkeys(
        (
            "faults.stage", *(f"secure-aggregation.{key}" for key in (
                "bits", "clip", "min-cohort", "dropout-tolerance", "corrupt", "groups", "roster", "stage-seconds",
            )),
        ),
        _unless("secure-aggregation.profile", "none"),
    ),
    "secure-aggregation.threshold": _with("secure-aggregation.profile", "semi-honest"),
    "privacy.clipping-quantile": _with("privacy.clipping", "adaptive"),
    "privacy.clipping-rate": _with("privacy.clipping", "adaptive"),
    "engine.gpus-per-worker": _unless("engine.workers", 0),
    "engine.address": _unless("engine.workers", 0),
}  # fmt: skip


def idle(config: RunConfig) -> list[str]:
    """Return the settings that are not at their default and do nothing."""
    flat = config.flat()
    return [key for key, acts in ACTS.items() if flat[key] != _defaults()[key] and not acts.where(flat)]


def refuse_idle(configs: Sequence[RunConfig]) -> None:
    """Raise `InputError` for a setting that is changed and acts in none of the configurations.

    Several are compared or searched: what acts in one of them may stand beside the others.
    """
    flats = [config.flat() for config in configs]
    for key, acts in ACTS.items():
        changed = [flat for flat in flats if flat[key] != _defaults()[key]]
        if changed and not any(map(acts.where, flats)):
            there = " and ".join(f"{other}={written(changed[0][other])}" for other in acts.by)
            raise InputError(
                f"{key}={written(changed[0][key])} does nothing with {there}; it acts {acts.words}: "
                f"set that, or drop {key}."
            )


def without_idle(config: RunConfig, keys: Collection[str] | None = None) -> RunConfig:
    """Return the configuration with settings that do nothing at their defaults: all, or those among `keys`."""
    found = {key: _defaults()[key] for key in idle(config) if keys is None or key in keys}
    return RunConfig.of({**config.flat(), **found}) if found else config


def put_out_of_action(config: RunConfig, given: Collection[str]) -> RunConfig:
    """Return a preset's configuration after settings `given` with it: what these put out of action is at its default.

    `fedra run digits partition.kind=iid` has no use for the preset's partition.alpha, and nobody asked for it.
    """
    changed = set(given)
    while keys := [key for key in idle(config) if key not in changed and changed & set(ACTS[key].by)]:
        config = without_idle(config, keys)
        # One that is gone may have been what another needed.
        changed |= set(keys)
    return config


def _defaults() -> Flat:
    return RunConfig().flat()
