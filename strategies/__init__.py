"""The table of aggregation strategies: Flower's own by name, ours beside them, anybody's by entry point or module:attr.

Each file names its paper and equation and says what becomes of the running statistics of normalisation layers; where
the server is Flower's own they are plain weighted means. Integer buffers never travel (`core.records.travelling`).

A strategy is any `flwr.serverapp.strategy.Strategy`. What it may carry besides:

- a static `local_update(r: LocalRound) -> LocalUpdate`: what its clients run; without it, local SGD;
- a static `initial_state(r: LocalRound) -> {kind: tensors}`: what a client keeps between rounds, as it begins;
- a static `personal_model(r: LocalRound) -> tensors`: the model that a client evaluates, where it is its own;
- a static `sends(model, options) -> names`: what its clients send back where that is not the model: its tensors, and
  `kind/name` beside them; virtual time counts it;
- a static `numbers(config, examples) -> {name: largest}`: what its clients say beside tensors and loss, and how large
  it can be for a client with so many examples; secure aggregation adds up no other numbers;
- `outgoing(arrays) -> arrays`: what is sent to clients, where that is not the model alone; `for_evaluation(arrays) ->
  arrays` is what those get who evaluate;
- `influence`: each client's share in the last model, by its number; the report counts what malicious ones have;
- `virtual_seconds`: the time of its own clock, where it works without rounds;
- `settings`: what a run needs that uses it, where neither preset nor user says otherwise;
- a static `check(config, model)` that raises `InputError` where it cannot work;
- `private_by_example = True`: its client half uses examples in gradient steps only (`local_sgd`), each batch once,
  which DP-SGD covers. The class that has `local_update` says so, and one that replaces it says it again;
- `set_up(server: ServerSide)`: hears of the run before its first round;
- `partial_means = True`: it only needs weighted means, so cohorts may answer with one mean instead of every update.
  A strategy that says nothing gets every update.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.serverapp.strategy import Strategy
from torch import nn

from core.config import RunConfig
from core.errors import InputError
from core.plugins import first_line, foreign
from core.plugins import load as load_plugin
from core.records import Tensors, travelling
from core.training import LocalRound, LocalUpdateFn, local_sgd

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
    "fednova": Entry(
        "strategies.fednova:FedNova", "normalised updates against unequal numbers of steps (Wang et al. 2020)", True
    ),
    "scaffold": Entry(
        "strategies.scaffold:Scaffold", "control variates against client drift (Karimireddy et al. 2020)", True
    ),
    "feddyn": Entry("strategies.feddyn:FedDyn", "a dynamic regulariser on clients (Acar et al. 2021)", True),
    "mimelite": Entry(
        "strategies.mimelite:MimeLite", "the server's momentum in local steps (Karimireddy et al. 2021)", True
    ),
    "moon": Entry("strategies.moon:Moon", "a contrastive term on features (Li et al. 2021)", True),
    "fedprox": Entry("strategies.fedprox:FedProx", "FedAvg with a proximal term on clients (Li et al. 2020)", True),
    "fedadam": Entry("strategies.fedopt:FedAdam", "Adam on the server (Reddi et al. 2021)", True),
    "fedyogi": Entry(_FLOWER + "FedYogi", "Yogi on the server (Reddi et al. 2021)", True),
    "fedadagrad": Entry("strategies.fedopt:FedAdagrad", "Adagrad on the server (Reddi et al. 2021)", True),
    "qfedavg": Entry(
        "strategies.qfedavg:QFedAvg", "fairer: clients with a high loss weigh more (Li et al. 2020)", False
    ),
    "agnostic": Entry("strategies.agnostic:Agnostic", "best for the worst mixture (Mohri et al. 2019)", False),
    "fedbn": Entry("strategies.personal_layers:FedBN", "normalisation layers stay local (Li et al. 2021)", True),
    "fedper": Entry("strategies.personal_layers:FedPer", "the last layers stay local (Arivazhagan et al. 2019)", True),
    "fedrep": Entry("strategies.personal_layers:FedRep", "local head and body in turn (Collins et al. 2021)", True),
    "ditto": Entry("strategies.ditto:Ditto", "a model of its own near the global one (Li et al. 2021)", True),
    "apfl": Entry("strategies.apfl:APFL", "a learnt mixture of own and global model (Deng et al. 2020)", True),
    "perfedavg": Entry("strategies.perfedavg:PerFedAvg", "a model to fine-tune from (Fallah et al. 2020)", True),
    "ifca": Entry("strategies.ifca:IFCA", "several models, clients choose theirs (Ghosh et al. 2020)", False),
    "fedmedian": Entry("strategies.median:FedMedian", "coordinate-wise median (Yin et al. 2018)", False),
    "fedtrimmedavg": Entry("strategies.median:FedTrimmedAvg", "coordinate-wise trimmed mean (Yin et al. 2018)", False),
    "krum": Entry("strategies.krum:Krum", "the update nearest to its neighbours (Blanchard et al. 2017)", False),
    "multikrum": Entry(
        "strategies.krum:MultiKrum", "mean of the updates Krum ranks first (Blanchard et al. 2017)", False
    ),
    "bulyan": Entry("strategies.krum:Bulyan", "Krum, then a trimmed mean (El Mhamdi et al. 2018)", False),
    "rfa": Entry("strategies.clipping:RFA", "geometric median (Pillutla et al. 2022)", False),
    "centredclipping": Entry(
        "strategies.clipping:CentredClipping", "clipped around the last update (Karimireddy et al. 2021)", False
    ),
    "normclipping": Entry("strategies.clipping:NormClipping", "mean of clipped updates (Sun et al. 2019)", False),
    "fltrust": Entry(
        "strategies.server_examples:FLTrust", "trust by agreement with the server's own (Cao et al. 2021)", False
    ),
    "feddf": Entry("strategies.server_examples:FedDF", "ensemble distillation on the server (Lin et al. 2020)", False),
    "fedasync": Entry("strategies.asynchronous:FedAsync", "a step for every answer (Xie et al. 2019)", False),
    "fedbuff": Entry(
        "strategies.asynchronous:FedBuff",
        "a step for a buffer of answers, `sampled` at most (Nguyen et al. 2022)",
        False,
    ),
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


def private_by_example(config: RunConfig) -> bool:
    """Return whether all that the strategy's clients make of their examples passes through per-example clipping.

    So it is for plain local SGD, and for client halves that say so. What a class says holds for its own client half:
    of one that a subclass puts in its place nothing is known.
    """
    for cls in strategy_class(config.strategy).__mro__:
        if "private_by_example" in vars(cls):
            return bool(vars(cls)["private_by_example"])
        if vars(cls).keys() & {"local_update", "initial_state"}:
            return False
    return True


def unsaid(config: RunConfig) -> set[str]:
    """Return which of partial_means and private_by_example a strategy that is not ours does not say and may be true."""
    cls = strategy_class(config.strategy)
    if config.strategy in STRATEGIES:
        return set()
    found = set() if hasattr(cls, "partial_means") else {"partial_means"}
    for base in cls.__mro__:
        if "private_by_example" in vars(base):
            break
        if vars(base).keys() & {"local_update", "initial_state"}:
            return found | {"private_by_example"}
    return found


def needs(name: str) -> dict[str, Any]:
    """Return settings that runs of a strategy have unless a preset or the user says otherwise."""
    return dict(getattr(strategy_class(name), "settings", {}))


def is_personal(config: RunConfig) -> bool:
    """Return whether clients evaluate a model of their own."""
    return bool(config.fine_tune_epochs) or hasattr(strategy_class(config.strategy), "personal_model")


@dataclass(frozen=True)
class ClientHalf:
    """What a strategy's clients do, each a static method of its class."""

    local_update: LocalUpdateFn
    initial_state: Callable[[LocalRound], dict[str, Tensors]]
    """What a client without a past keeps, (...) by kind and name; the round has no state yet."""
    personal_model: Callable[[LocalRound], Tensors] | None
    """The cohort's own models (C, ...) by name, which its clients evaluate; None where that is the global model."""
    sends: Callable[[nn.Module, Mapping[str, Any]], Sequence[str]]
    """(model, options) -> names of what a client sends back: the model's tensors, and kind/name beside them."""
    options: dict[str, Any]
    """The strategy's options as configured, with hyphens."""
    numbers: Callable[[RunConfig, int], Mapping[str, float]]
    """(config, examples) -> the largest absolute value of each number that a client of so many examples sends."""


def client_half(config: RunConfig) -> ClientHalf:
    """Return the client half of the configured strategy."""
    cls = strategy_class(config.strategy)
    return ClientHalf(
        getattr(cls, "local_update", local_sgd),
        getattr(cls, "initial_state", lambda r: {}),
        getattr(cls, "personal_model", None),
        getattr(cls, "sends", lambda model, options: list(travelling(model))),
        {**options_of(cls), **config.strategy_options},
        getattr(cls, "numbers", lambda config, examples: {}),
    )
