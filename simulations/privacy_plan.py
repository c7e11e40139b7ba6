"""fedra privacy: what a budget costs before anything is run: how much noise, over how many rounds, of how many clients.

The answers are a run's own: its configuration, mechanisms and accountant. Noise is compared with the clipping norm S,
the most that a mean update can be long. On each number of the mean its standard deviation is z S / (q N) under central
noise, z S / sqrt(q N) where every client adds its own, and in DP-SGD z S / (B sqrt(q N)), on the mean gradient of a
step with batches of B.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from core.config import RunConfig
from core.errors import InputError
from privacy.accounting import epsilon
from privacy.client_level import ClientLevel, planned
from privacy.example_level import ExampleLevel
from privacy.rules import delta_too_large
from reports.plan_page import about, columns, explained, lengths, names, write_plan_page
from reports.words import rate

BUDGETS = (1.0, 2.0, 4.0, 8.0)
# Around what was asked for: half of it and twice.
AROUND = (0.5, 1.0, 2.0)
# In clipping norms: longer noise began to cost accuracy where it was tried (docs/guides/privacy-plan.md).
USABLE = 1.0
POINTS = 24
# What a preset may have otherwise than a plan, also where the plan has the default.
PLANNED = ("clients", "rounds", "sampled")
# The means of so many scale the inputs, which epsilon would not cover if they were the clients'.
SERVER_EXAMPLES = 50
LARGER = (2, 5, 10, 100)
FILE = "privacy-plan"


def privacy_plan(given: Mapping[str, Any], *, out: str = "", console: Console) -> dict[str, Any]:
    """Show what the given options cost, write the page into the folder `out` if there is one, and return the numbers.

    `given` holds the options that were named: clients, sampled, rounds, level, noise, delta, epsilon, noise-multiplier,
    examples, batch-size, local-epochs, local-steps, parameters.
    """
    config = _config(given)
    found = plan(config, examples=given.get("examples", 0), parameters=given["parameters"])
    _show(found, console)
    if out:
        folder = Path(out)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{FILE}.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
            page = write_plan_page(folder / f"{FILE}.html", found)
        except OSError as error:
            raise InputError(f"--out {out} is not a folder to write in: {error.strerror}; name another.") from None
        console.print(f"Page: {page}", highlight=False, soft_wrap=True, markup=False)
    return found


def _config(given: Mapping[str, Any]) -> RunConfig:
    """Return the configuration that the options stand for."""
    own = ("level", "noise", "delta", "epsilon", "noise-multiplier")
    plain = ("clients", "sampled", "rounds", "batch-size", "local-epochs", "local-steps")
    flat = {f"privacy.{name}": given[name] for name in own if name in given}
    if flat.get("privacy.noise") == "distributed":
        flat["secure-aggregation.profile"] = "auto"
    config = RunConfig.of({**flat, **{name: given[name] for name in plain if name in given}})
    level, noise = config.privacy.level, config.privacy.noise
    if level == "none":
        raise InputError("--level none protects nobody; choose client or example.")
    for name in ("epsilon", "noise-multiplier"):
        if given.get(name) == 0:
            raise InputError(f"--{name} 0 leaves nothing to plan; give more than 0, or leave it out.")
    if {"epsilon", "noise-multiplier"} <= given.keys():
        raise InputError(
            f"--epsilon {given['epsilon']:g} and --noise-multiplier {given['noise-multiplier']:g}: each follows from "
            "the other; give one."
        )
    if level == "example" and noise != "central":
        raise InputError(f"--noise {noise} is for --level client: at level example clients add noise to their steps.")
    if level == "example" and "examples" not in given:
        raise InputError("--level example asks how many examples a client has; give --examples, for example 500.")
    for name in ("examples", "batch-size", "local-epochs", "local-steps"):
        if level == "client" and name in given:
            raise InputError(
                f"--{name} {given[name]} changes nothing at --level client; drop it, or set --level example."
            )
    many = (given["examples"], "examples of a client") if level == "example" else (config.clients, "clients")
    for sentence in delta_too_large(config.privacy.delta, *many):
        raise InputError(sentence)
    return config


def plan(config: RunConfig, *, examples: int = 0, parameters: int) -> dict[str, Any]:
    """Return what page and terminal show of a private run: around its epsilon or noise multiplier, or for `BUDGETS`.

    `examples` are those of a client, for level example; `parameters` the numbers of the model.
    """
    own = config.privacy
    wanted = own.epsilon or own.noise_multiplier
    if own.noise_multiplier:
        made = [config.with_(privacy__noise_multiplier=own.noise_multiplier * factor) for factor in AROUND]
    else:
        budgets = [own.epsilon * factor for factor in AROUND] if wanted else BUDGETS
        made = [_calibrated(config.with_(privacy__epsilon=budget), examples) for budget in budgets]
    asked = [factor == 1 for factor in AROUND] if wanted else [False] * len(made)
    sampled = config.count(config.sampled)
    central = own.level == "client" and own.noise == "central"
    shown = sorted({max(1, config.rounds // 4), max(1, config.rounds // 2), config.rounds, 2 * config.rounds})
    # Epsilon grows with the root of rounds.
    drawn = sorted({*shown, *(np.linspace(1, math.sqrt(2 * config.rounds), POINTS) ** 2).round().astype(int).tolist()})
    rows = [_row(one, examples, parameters, ask) for one, ask in zip(made, asked, strict=True)]
    run = config if wanted else config.with_(privacy__epsilon=BUDGETS[0])
    settings = {key: value for key, value in run.flat().items() if key in PLANNED or value != RunConfig().flat()[key]}
    return {
        "level": own.level,
        "noise": own.noise if own.level == "client" else "in every step",
        "delta": own.delta,
        "clients": config.clients,
        "sampled": sampled,
        "rounds": config.rounds,
        "participations": config.rounds if central else planned(config.rounds, sampled / config.clients),
        "parameters": parameters,
        "examples": examples,
        "batch_size": min(config.batch_size, examples),
        "steps": ExampleLevel(config).steps(examples) if examples else 0,
        "usable": USABLE,
        "rows": rows,
        "rounds_shown": shown,
        "rounds_drawn": drawn,
        "epsilons": [[_epsilon(one, examples, rounds) for rounds in drawn] for one in made],
        "larger": _larger(config, rows) if central else [],
        "falls_with": 1.0 if own.level == "client" and own.noise != "local" else 0.5,
        "settings": settings | (_of_examples(config) if examples else {}),
    }


def _of_examples(config: RunConfig) -> dict[str, Any]:
    """Return what the plan takes for granted of a run that hides examples, where a preset may have something else."""
    often = {"local-steps": config.local_steps}
    if not config.local_steps:
        often["local-epochs"] = config.local_epochs
    return {"batch-size": config.batch_size, **often, "server-examples": SERVER_EXAMPLES}


def _calibrated(config: RunConfig, examples: int) -> RunConfig:
    """Return the configuration with the noise multiplier that its budget takes."""
    found = ExampleLevel(config).noise_multiplier(examples) if examples else ClientLevel.of(config).noise_multiplier
    return config.with_(privacy__noise_multiplier=found)


def _epsilon(config: RunConfig, examples: int, rounds: int) -> float:
    """Return the epsilon of so many rounds; where each client has its own, of one that is drawn often."""
    times = planned(rounds, config.count(config.sampled) / config.clients)
    if examples:
        spent = {event: count * times for event, count in ExampleLevel(config).cost(examples).items()}
    else:
        level = ClientLevel.of(config)
        if event := level.own_event:
            spent = {event: times}
        else:
            [(_, event, _)] = level.costs(1)
            spent = {event: rounds}
    return epsilon(spent, config.privacy.delta)


def _row(config: RunConfig, examples: int, parameters: int, asked: bool) -> dict[str, Any]:
    z, sampled = config.privacy.noise_multiplier, config.count(config.sampled)
    if examples or config.privacy.noise == "local":
        # Each client's own noise is one of many; it takes four times the clients to halve it.
        batch = ExampleLevel(config).rate(examples) * examples if examples else 1.0
        each, power = z / (batch * math.sqrt(sampled)), 2
    else:
        each, power = z / sampled, 1
    length = each * math.sqrt(parameters)
    return {
        "epsilon": _epsilon(config, examples, config.rounds),
        "noise_multiplier": z,
        "each": each,
        "length": length,
        "clients": math.ceil(config.clients * (length / USABLE) ** power),
        "asked": asked,
    }


def _larger(config: RunConfig, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what more clients, the same share of them in a round, make of the noise, as many as delta allows."""
    sampled = config.count(config.sampled)
    return [
        {
            "clients": config.clients * factor,
            "sampled": sampled * factor,
            "scale": 1 / factor,
            "lengths": [row["length"] / factor for row in rows],
        }
        for factor in LARGER
        if config.privacy.delta * config.clients * factor < 1
    ]


def _show(found: Mapping[str, Any], console: Console) -> None:
    """Print the tables."""

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], bold: int = -1) -> None:
        made = Table(title=title, title_justify="left", box=None, padding=(0, 3, 0, 0))
        for heading in headings:
            made.add_column(heading, justify="right")
        for i, row in enumerate(rows):
            made.add_row(*row, style="bold" if i == bold else "")
        console.print(made)

    say(about(found))
    asked = [row["asked"] for row in found["rows"]]
    table("What a budget costs", *columns(found), asked.index(True) if any(asked) else -1)
    at = [found["rounds_drawn"].index(rounds) for rounds in found["rounds_shown"]]
    over = [[f"{found['rounds_drawn'][i]:,}", *(rate(own[i]) for own in found["epsilons"])] for i in at]
    table("Epsilon over rounds", ["Rounds", *names(found)], over)
    if found["larger"]:
        table("Noise on the model with more clients, the same share of them a round", *lengths(found))
    for sentence in explained(found):
        say(sentence)
