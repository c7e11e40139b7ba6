"""The table of aggregation strategies: Flower's own by name, ours beside them, anybody's by entry point or module:attr.

A strategy is any `flwr.serverapp.strategy.Strategy`. What it may carry besides:

- a static `local_update(r: LocalRound) -> LocalUpdate`: what its clients run; without it, local SGD;
- `partial_means = True`: it only needs weighted means, so cohorts may answer with one mean instead of every update.
  A strategy that says nothing gets every update.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from flwr.serverapp.strategy import Strategy

from core.config import RunConfig
from core.errors import InputError
from core.plugins import first_line, foreign
from core.plugins import load as load_plugin
from core.training import LocalUpdateFn, local_sgd

_FLOWER = "flwr.serverapp.strategy:"


@dataclass(frozen=True)
class Entry:
    """One line of the table: where the class is, what `fedra list` says, and whether it only needs weighted means."""

    target: str
    sentence: str
    partial_means: bool


STRATEGIES = {
    "fedavg": Entry(_FLOWER + "FedAvg", "weighted mean of the clients' models (McMahan et al. 2017)", True),
    "fedavgm": Entry("strategies.fedopt:FedAvgM", "FedAvg with server momentum (Hsu et al. 2019)", True),
    "fedprox": Entry("strategies.fedprox:FedProx", "FedAvg with a proximal term on clients (Li et al. 2020)", True),
    "fedadam": Entry("strategies.fedopt:FedAdam", "Adam on the server (Reddi et al. 2021)", True),
    "fedyogi": Entry(_FLOWER + "FedYogi", "Yogi on the server (Reddi et al. 2021)", True),
    "fedadagrad": Entry("strategies.fedopt:FedAdagrad", "Adagrad on the server (Reddi et al. 2021)", True),
    "qfedavg": Entry(
        "strategies.qfedavg:QFedAvg", "fairer: clients with a high loss weigh more (Li et al. 2020)", False
    ),
    "fedmedian": Entry(_FLOWER + "FedMedian", "coordinate-wise median (Yin et al. 2018)", False),
    "fedtrimmedavg": Entry(_FLOWER + "FedTrimmedAvg", "coordinate-wise trimmed mean (Yin et al. 2018)", False),
    "krum": Entry(_FLOWER + "Krum", "the model nearest to its neighbours (Blanchard et al. 2017)", False),
    "multikrum": Entry(
        "strategies.multikrum:MultiKrum", "mean of the models Krum ranks first (Blanchard et al. 2017)", False
    ),
    "bulyan": Entry(_FLOWER + "Bulyan", "Krum, then a trimmed mean (El Mhamdi et al. 2018)", False),
}

GROUP = "fedra.strategies"

# What the server decides from the run's own settings, so that an option cannot contradict them.
_OURS = {
    "fraction_train", "fraction_evaluate", "min_train_nodes", "min_evaluate_nodes", "min_available_nodes",
    "weighted_by_key", "arrayrecord_key", "configrecord_key", "train_metrics_aggr_fn", "evaluate_metrics_aggr_fn",
    "selection_rule", "train_loss_key",
}  # fmt: skip


def sentences() -> dict[str, str]:
    """Return each of our strategies' name with a sentence and its options."""
    return {name: f"{entry.sentence}{_options(strategy_class(name))}" for name, entry in STRATEGIES.items()}


def plugins() -> dict[str, str]:
    """Return the strategies of other packages: where each comes from, a sentence, its options."""

    def describe(name: str, found: object) -> str:
        return f"{first_line(found)}{_options(_checked(name, found))}"

    return foreign("strategy", _targets(), GROUP, describe)


def _options(cls: type[Strategy]) -> str:
    defaults = options_of(cls).items()
    shown = [key if value is inspect.Parameter.empty else f"{key}={value}" for key, value in defaults]
    return f"; {', '.join(shown)}" if shown else ""


def _targets() -> dict[str, str]:
    return {name: entry.target for name, entry in STRATEGIES.items()}


def strategy_class(name: str) -> type[Strategy]:
    """Return the strategy class called `name`; `InputError` when there is none."""
    return _checked(name, load_plugin("strategy", name, _targets(), GROUP))


def _checked(name: str, found: object) -> type[Strategy]:
    if not (inspect.isclass(found) and issubclass(found, Strategy)):
        raise InputError(f"strategy '{name}' is {found!r}, not a subclass of flwr.serverapp.strategy.Strategy.")
    return found


def parameters_of(cls: type[Strategy]) -> dict[str, object]:
    """Return every name, with its default, that reaches the class's constructor or, through **options, a base's."""
    found: dict[str, object] = {}
    for base in cls.__mro__:
        init = base.__dict__.get("__init__")
        if init is None:
            continue
        parameters = list(inspect.signature(init).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                found.setdefault(parameter.name, parameter.default)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def options_of(cls: type[Strategy]) -> dict[str, object]:
    """Return the options a user may set under `strategy-options.` and their defaults, with hyphens."""
    return {name.replace("_", "-"): value for name, value in parameters_of(cls).items() if name not in _OURS}


def makes_partial_means(config: RunConfig) -> bool:
    """Return whether cohorts may answer the configured strategy with one weighted mean."""
    entry = STRATEGIES.get(config.strategy)
    return entry.partial_means if entry else bool(getattr(strategy_class(config.strategy), "partial_means", False))


def local_update(config: RunConfig) -> LocalUpdateFn:
    """Return the client half of the configured strategy."""
    return getattr(strategy_class(config.strategy), "local_update", local_sgd)
