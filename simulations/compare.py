"""fedra compare: strategies, or any settings, times seeds: tables with means and confidence intervals, one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from core.config import RunConfig, Scalar, parse_override, written
from core.errors import InputError, RunError, told
from core.idle import refuse_idle, without_idle
from reports.compare import write_comparison
from reports.protection import compared
from reports.variants import HOW, STRATEGY, details, failures, personal, table
from reports.words import plural
from server.malice import warnings
from simulations.progress import bar, training_baselines
from simulations.run import Run, check_run, preset, quiet, simulate
from simulations.search_space import PLAIN, holds

# Settings in which a comma is part of one value. Seeds have a setting of their own: seeds=3.
COMMA_IS_TEXT = (*PLAIN, "seed", "seeds")


def compare(name: str, overrides: Mapping[str, Any], console: Console) -> Path:
    """Run every variant with every seed, print the tables and return the page's path.

    A setting may be a list with commas (strategy=fedavg,krum), several make a grid; `seeds` says how many seeds follow
    `seed`; other settings hold for all. Every configuration is checked before the first run starts. A run that fails
    does not count, the others go on, and at the end a `RuntimeError` says so.
    """
    quiet()
    lists, overrides = _lists(overrides)
    seeds = overrides.pop("seeds", 3)
    if not isinstance(seeds, int) or seeds < 1:
        raise InputError(f"seeds={seeds} is not a whole number from 1; write for example seeds=3.")
    some = {**overrides, **{key: values[0] for key, values in lists.items()}}
    plain = preset(name, {key: value for key, value in some.items() if key not in ("strategy", "seed")})
    lists = lists or {"strategy": [overrides.get("strategy", plain.strategy)]}
    by = STRATEGY if list(lists) == ["strategy"] else ", ".join(lists)
    first = RunConfig.of({"seed": overrides.pop("seed", plain.seed)}).seed
    variants = _variants(lists, overrides)
    planned = [
        (variant, preset(name, {**settings, "seed": seed}))
        for variant, settings in variants.items()
        for seed in range(first, first + seeds)
    ]
    # What acts in some variants may stand beside the others.
    refuse_idle([config for _, config in planned])
    planned = [(variant, without_idle(config)) for variant, config in planned]
    for _, config in planned:
        check_run(config)
    for said in dict.fromkeys(said for _, config in planned for said in warnings(config)):
        console.print(f"Warning: {said}", markup=False, highlight=False, soft_wrap=True)
    folder = Path(plain.out).absolute() / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-compare-{plain.preset}"
    rows: list[dict[str, Any]] = []
    errors: list[Exception] = []
    try:
        for number, (variant, config) in enumerate(planned, start=1):
            console.print(f"[{number}/{len(planned)}] {variant}, seed {config.seed}", markup=False, highlight=False)
            row = {"variant": variant, "strategy": config.strategy, "seed": config.seed}
            rows.append({**row, **_run(config.with_(out=str(folder)), errors, console)})
    except KeyboardInterrupt:
        if folder.is_dir():
            said = f"{len(rows)} of {plural(len(planned), 'run')} done; their folders, each with its report, are in"
            console.print(f"{said} {folder}", markup=False, highlight=False, soft_wrap=True)
        raise
    # The page has every metric; a terminal has room for the first three, which are the most telling.
    shown = [{heading: value for heading, value in row.items() if heading != "Runs"} for row in table(rows, by)]
    _print("Mean and 95 % confidence interval over seeds", [dict(list(row.items())[:4]) for row in shown], by, console)
    _print("Clients' own test splits, and cost", details(rows, by), by, console)
    console.print(HOW, markup=False, highlight=False, soft_wrap=True)
    for said in filter(None, (personal(rows), compared(rows))):
        console.print(said, markup=False, highlight=False, soft_wrap=True)
    page = write_comparison(folder / "report.html", rows, by=by)
    for said in failures(rows):
        console.print(f"Failed: {said}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"Report: {page}", highlight=False, soft_wrap=True)
    if errors:
        runs = f"{len(errors)} of {plural(len(rows), 'run')}"
        raise RunError(f"{runs} failed and did not count; the first: {failures(rows)[0]}") from errors[0]
    return page


def _variants(lists: Mapping[str, list[Scalar]], others: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the settings of every variant by its name. An option goes to those of several strategies that have it.

    Raises `InputError` for one that none of them has.
    """
    strategies = lists.get("strategy", [])
    if len(strategies) > 1:
        for key in (*lists, *others):
            if not any(holds(key, str(strategy)) for strategy in strategies):
                raise InputError(f"{key} is an option of none of strategy={','.join(map(str, strategies))}; drop it.")
    found = {}
    for values in product(*lists.values()):
        varied = dict(zip(lists, values, strict=True))
        settings = {**others, **varied}
        if len(strategies) > 1:
            settings = {key: value for key, value in settings.items() if holds(key, str(varied["strategy"]))}
        found[", ".join(written(value) for key, value in varied.items() if key in settings)] = settings
    return found


def _run(config: RunConfig, errors: list[Exception], console: Console) -> dict[str, Any]:
    """Return a run's folder and summary; those of one that fails too, whose error is added to `errors`."""
    folders: list[Path] = []
    try:
        # On a terminal its rounds show below the line that names it, and go when it is done.
        with bar("round", console, transient=True) as shown:
            task = shown.add_task("run", total=config.rounds, numbers="")
            run = simulate(
                config,
                on_start=lambda path, *_: folders.append(path),
                on_round=lambda row: shown.update(task, completed=row["round"]),
                on_baseline=lambda done: shown.update(task, numbers=training_baselines(done, config.clients)),
            )
        return {"path": run.path, "summary": run.summary}
    except Exception as error:
        errors.append(error)
        if folders and (folders[0] / "summary.json").is_file():
            return {"path": folders[0], "summary": Run.open(folders[0]).summary}
        # It failed before it had a folder (no worker could start, say), or could not write into it.
        about = {"task": config.task, "status": "failed", "error": told(error)}
        return {"path": None, "summary": about}


def _lists(overrides: Mapping[str, Any]) -> tuple[dict[str, list[Scalar]], dict[str, Any]]:
    """Return the settings that are lists, values in order and each once, and the others."""
    lists: dict[str, list[Scalar]] = {}
    others: dict[str, Any] = {}
    for key, value in overrides.items():
        if isinstance(value, str) and "," in value and key not in COMMA_IS_TEXT:
            # Each value is read as it would be alone: 0.1 is a number, and so is 1e-3.
            found = [parse_override(f"{key}={part.strip()}")[1] for part in value.split(",")]
            lists[key] = list(dict.fromkeys(found))
        else:
            others[key] = value
    return lists, others


def _print(title: str, rows: Sequence[Mapping[str, Any]], by: str, console: Console) -> None:
    shown = Table(title=title, title_justify="left", box=None)
    for heading in rows[0] if rows else []:
        shown.add_column(heading, justify="left" if heading == by else "right", no_wrap=heading == by)
    for row in rows:
        shown.add_row(*map(str, row.values()))
    console.print(shown)
