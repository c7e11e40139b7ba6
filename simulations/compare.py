"""fedra compare: strategies, or whatever else varies, times seeds: one table with means and intervals, one page."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from core.config import RunConfig, parse_override
from core.errors import InputError
from reports.compare import table, write_comparison
from simulations.run import check_run, preset, quiet, simulate

# Settings in which a comma has a meaning of its own.
LISTS = ("dataset", "data-dir", "out", "processors", "devices.trace")


def compare(name: str, overrides: Mapping[str, Any], console: Console) -> Path:
    """Run every combination with every seed, print the table and return the page's path.

    `strategy` and any other setting may be a comma-separated list; `seeds` says how many seeds follow `seed`. Every
    configuration is checked before the first run starts.
    """
    quiet()
    overrides = dict(overrides)
    varying = {
        key: [parse_override(f"{key}={part}")[1] for part in dict.fromkeys(value.split(","))]
        for key, value in overrides.items()
        if isinstance(value, str) and "," in value and key not in LISTS
    }
    seeds = overrides.pop("seeds", 3)
    if not isinstance(seeds, int) or seeds < 1:
        raise InputError(f"seeds={seeds} is not a whole number from 1; write for example seeds=3.")
    plain = preset(name, {key: value for key, value in overrides.items() if key not in (*varying, "seed")})
    first = RunConfig.of({"seed": overrides.pop("seed", plain.seed)}).seed
    choices = [dict(zip(varying, values, strict=True)) for values in itertools.product(*varying.values())]
    configs = [
        (_label(chosen, plain), preset(name, {**overrides, **chosen, "seed": seed}))
        for chosen in choices
        for seed in range(first, first + seeds)
    ]
    for _, config in configs:
        check_run(config)
    folder = Path(plain.out).absolute() / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-compare-{plain.preset}"
    rows: list[dict[str, Any]] = []
    for number, (label, config) in enumerate(configs, start=1):
        console.print(f"[{number}/{len(configs)}] {label}, seed {config.seed}", markup=False, highlight=False)
        run = simulate(config.with_(out=str(folder)))
        rows.append({"strategy": label, "seed": config.seed, "path": run.path, "summary": run.summary})
    _print(table(rows), console, any(row["summary"]["personal"] for row in rows))
    page = write_comparison(folder / "report.html", rows)
    console.print(f"Report: {page}", highlight=False, soft_wrap=True)
    return page


def _label(chosen: Mapping[str, Any], plain: RunConfig) -> str:
    """Return what a combination is called: its strategy, and the other settings that vary."""
    others = [f"{key}={value}" for key, value in chosen.items() if key != "strategy"]
    return ", ".join([str(chosen["strategy"])] * ("strategy" in chosen) + others) or plain.strategy


def _print(rows: Sequence[Mapping[str, Any]], console: Console, personal: bool) -> None:
    shown = Table(title="Mean and 95 % confidence interval over seeds", title_justify="left", box=None)
    # The page has every metric; a terminal has room for the first three, which are the most telling.
    headings = [heading for heading in rows[0] if heading != "Runs"] if rows else []
    if personal:
        # Where clients have models of their own, what these are worth to them is what tells.
        headings = headings[:2] + [heading for heading in headings if "lient" in heading and "/" not in heading]
    headings = headings[:4]
    for heading in headings:
        shown.add_column(heading, justify="left" if heading == "Strategy" else "right", no_wrap=True)
    for row in rows:
        shown.add_row(*(str(row[heading]) for heading in headings))
    console.print(shown)
