"""Every setting of a run: a field, a default and a sentence. One flat set of dotted keys everywhere.

The same keys stand in presets (TOML), on the command line (`partition.alpha=0.1`), in `flwr run --run-config`
and in the `config.toml` that a run leaves behind.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import Field, ValidationError, model_validator

from core.errors import InputError, unknown
from core.sections import (
    Attack,
    Audit,
    Baseline,
    Compression,
    Devices,
    EarlyStopping,
    Engine,
    Faults,
    Partition,
    Privacy,
    Sampling,
    Section,
    SecureAggregation,
    hyphens,
)

Scalar = bool | int | float | str
# Flower's run configuration must list every key with a value; this one stands for "whatever the strategy says".
DEFAULT = "default"
# What pydantic calls a number outside its bounds.
BOUNDS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}
# From here on a number is shown by its power of ten.
LONG = 1e7


class RunConfig(Section):
    """A complete description of a run. `RunConfig.of({...})` reads flat dotted keys and raises `InputError`."""

    preset: str = Field("custom", description="Name that the run folder carries.")
    task: str = Field("medical", description="Data, model, loss and metrics: `fedra list` names them.")
    dataset: str = Field("", description="The task's data set; empty is its offline default.")
    data_dir: str = Field("", description="Folder with the data set's files; empty downloads or generates.")
    model: str = Field("", description="The task's model; empty is its default.")
    clients: int = Field(10, ge=1, description="Number of clients; a natural partition with fewer groups is refused.")
    partition: Partition = Partition()
    standardise: Literal["auto", "federated", "local", "server", "none"] = Field(
        "auto",
        description="Whose means scale the inputs: all clients', each client's own, or those of server-examples; auto "
        "is the task's choice, and what privacy.level covers.",
    )
    strategy: str = Field("fedavg", description="Name in `fedra list`, entry point, or module:attr.")
    strategy_options: dict[str, Scalar] = Field(default_factory=dict, description="Options of the strategy.")
    rounds: int = Field(20, ge=1, description="Rounds of federated training.")
    sampled: float = Field(0, ge=0, description="Clients a round: a count, a fraction below 1, or 0 for all.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of everything that is random.")
    local_epochs: int = Field(1, ge=1, description="Passes over its examples that a client makes in a round.")
    local_steps: int = Field(
        0,
        ge=0,
        description="Batches a round, the shuffle carrying on across rounds; 0 uses local-epochs.",
    )
    batch_size: int = Field(32, ge=1, description="Examples in a batch; the last short one is kept.")
    optimizer: str = Field("sgd", description="Local optimiser: sgd, adam, adamw, adagrad, rmsprop.")
    learning_rate: float = Field(0.05, gt=0, description="Local learning rate in round 1.")
    learning_rate_schedule: Literal["constant", "cosine", "exponential"] = Field(
        "constant",
        description="Learning rate over rounds: constant, cosine to 0, or times learning-rate-decay.",
    )
    learning_rate_decay: float = Field(0.99, gt=0, le=1, description="Factor a round for the exponential schedule.")
    momentum: float = Field(0.0, ge=0, lt=1, description="Momentum of local sgd and rmsprop.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of the local optimiser.")
    gradient_clip: float = Field(
        0.0, ge=0, description="Largest L2 norm of a client's batch gradient; 0 does not clip."
    )
    positive_weight: float = Field(
        1.0, gt=0, description="Weight of positive examples in the loss of a task with two classes; others refuse it."
    )
    evaluate_every: int = Field(1, ge=1, description="Rounds between evaluations; the last round is always evaluated.")
    evaluated: float = Field(
        0, ge=0, description="Clients that evaluate: a count, a fraction below 1, or 0 for all (10,000 at most)."
    )
    early_stopping: EarlyStopping = EarlyStopping()
    keep: Literal["last", "best"] = Field(
        "last", description="Model to save: the last, or the best on the clients' validation splits."
    )
    timeout_seconds: float = Field(
        3600.0, gt=0, description="Seconds that a round's clients have to answer; later replies are left out."
    )
    baselines: bool = Field(False, description="Also train on pooled data and on each client alone.")
    baseline: Baseline = Baseline()
    sampling: Sampling = Sampling()
    devices: Devices = Devices()
    faults: Faults = Faults()
    attack: Attack = Attack()
    compression: Compression = Compression()
    privacy: Privacy = Privacy()
    secure_aggregation: SecureAggregation = SecureAggregation()
    audit: Audit = Audit()
    processors: str = Field(
        "", description="Update processors after our own, in this order: entry points or module:attr, with commas."
    )
    fine_tune_epochs: int = Field(
        0, ge=0, description="Epochs on its own examples that a client trains the model before it evaluates it."
    )
    server_examples: int = Field(
        0, ge=0, description="Examples that the server holds itself, kept from all clients (fltrust, feddf)."
    )
    engine: Engine = Engine()
    out: str = Field("runs", description="Folder in which run folders are made.")

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        for key in ("sampled", "evaluated"):
            value = getattr(self, key)
            if value >= 1 and value != int(value):
                raise ValueError(f"{key}={written(value)} is neither a whole number of clients nor a fraction below 1")
            if value > self.clients:
                raise ValueError(f"{key}={value:g} is more than the {self.clients} clients; lower it or raise clients")
        return self

    @classmethod
    def of(cls, flat: Mapping[str, Any]) -> RunConfig:
        """Return the config of flat dotted keys; `InputError` names the first wrong value, choices and remedy."""
        known = keys()
        for key in flat:
            if key == "strategy-options":
                raise InputError(
                    f"strategy-options={flat[key]} names no option; write strategy-options.KEY=..., for example "
                    "strategy=fedprox strategy-options.proximal-mu=0.1; `fedra list` shows each strategy's."
                )
            if key not in known and not key.startswith("strategy-options."):
                raise unknown("key", key, known)
        values = {k: v for k, v in flat.items() if not (k.startswith("strategy-options.") and v == DEFAULT)}
        try:
            return cls.model_validate(_nest(values))
        except ValidationError as error:
            raise InputError(_sentence(error.errors()[0])) from None

    def flat(self) -> dict[str, Scalar]:
        """Return every setting under its dotted key: itself a preset, and what Flower calls a run config."""
        return dict(_flatten(self.model_dump(by_alias=True)))

    def with_(self, **changes: Any) -> RunConfig:
        """Return a copy with changed settings, written as `dotted` says: with_(rounds=3, engine__workers=0)."""
        return self.of({**self.flat(), **{dotted(key): value for key, value in changes.items()}})

    def toml(self) -> str:
        """Return the complete configuration as TOML; `fedra run` takes it as a preset."""
        return tomli_w.dumps(_nest(self.flat()))

    def count(self, value: float) -> int:
        """Return how many clients `sampled` or `evaluated` stands for: at least one."""
        if value == 0:
            return self.clients
        return int(value) if value >= 1 else max(1, round(value * self.clients))


def written(value: Scalar) -> str:
    """Return a value as a user writes it: true, 1e+09, and (empty) for nothing."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and abs(value) >= LONG:
        return f"{value:g}"
    return str(value) or "(empty)"


def dotted(keyword: str) -> str:
    """Return the key of a Python keyword: engine__cohort_size is engine.cohort-size."""
    return keyword.replace("__", ".").replace("_", "-")


def keys() -> dict[str, str]:
    """Return every dotted key with its sentence, in the order of the fields (strategy options apart)."""
    out: dict[str, str] = {}
    for name, field in RunConfig.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            out |= {f"{hyphens(name)}.{hyphens(n)}": f.description or "" for n, f in kind.model_fields.items()}
        elif name != "strategy_options":
            out[hyphens(name)] = field.description or ""
    return out


def read_toml(path: Path) -> dict[str, Scalar]:
    """Return the flat keys of a preset file; `InputError` when it cannot be read."""
    try:
        return dict(_flatten(tomllib.loads(path.read_text(encoding="utf-8"))))
    except OSError as error:
        raise InputError(f"cannot read preset {path}: {error.strerror}; give a preset's name or a TOML file.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid TOML: {error}.") from None


def parse_override(text: str) -> tuple[str, Scalar]:
    """Return (key, value) of a command-line `key=value`; the value is read as TOML, a bare word as a string."""
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise InputError(f"'{text}' is not key=value; write for example rounds=5.")
    try:
        return key, tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return key, raw


def _flatten(nested: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Scalar]]:
    for key, value in nested.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, dot, name = key.partition(".")
        if dot:
            nested.setdefault(section, {})[name] = value
        else:
            nested[key] = value
    return nested


def _bounds(key: str) -> str:
    """Return between which numbers a setting is, as in " from 1"; empty where all are taken."""
    section, _, name = key.rpartition(".")
    fields = RunConfig.model_fields
    if section:
        owner: Any = fields[section.replace("-", "_")].annotation
        fields = owner.model_fields
    words = {"gt": "above", "ge": "from", "lt": "below", "le": "up to"}
    found = fields[name.replace("-", "_")].metadata
    bounds = [f" {said} {getattr(one, kind):g}" for kind, said in words.items() for one in found if hasattr(one, kind)]
    return " and".join(bounds)


def _sentence(error: Mapping[str, Any]) -> str:
    """Turn pydantic's report into the value, the choices and the remedy."""
    where = ".".join(str(part) for part in error["loc"] if part not in ("int", "literal['auto']"))
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if error["type"] == "literal_error" and "literal['auto']" in error["loc"]:
        message = "must be 'auto' or a number"
    elif error["type"].startswith("int_"):
        message = f"must be a whole number{_bounds(where)}"
    elif error["type"].startswith("float_") or error["type"] in BOUNDS:
        message = f"must be a number{_bounds(where)}"
    elif error["type"] == "string_type":
        message = "must be text"
    elif error["type"] in ("bool_parsing", "bool_type"):
        message = "must be true or false"
    if not where:
        return f"{message}."
    hint = keys().get(where, "")
    given = error["input"]
    shown = repr(given) if isinstance(given, str) else written(given)
    return f"{where}={shown} is not valid: {message[0].lower()}{message[1:]}. {hint}".strip()
