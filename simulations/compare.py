"""fedra compare: strategies times seeds, one table with means and confidence intervals, one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from core.config import RunConfig
from core.errors import InputError
from reports.compare import table, write_comparison
from simulations.run import check_run, preset, quiet, simulate


def compare(name: str, overrides: Mapping[str, Any], console: Console) -> Path:
    """Run every strategy with every seed, print the table and return the page's path.

    `strategy` may be a comma-separated list and `seeds` says how many seeds follow `seed`; other settings hold for all.
    Every configuration is checked before the first run starts.
    """
    quiet()
    overrides = dict(overrides)
    seeds = overrides.pop("seeds", 3)
    if not isinstance(seeds, int) or seeds < 1:
        raise InputError(f"seeds={seeds} is not a whole number from 1; write for example seeds=3.")
    plain = preset(name, {key: value for key, value in overrides.items() if key not in ("strategy", "seed")})
    strategies = list(dict.fromkeys(str(overrides.pop("strategy", plain.strategy)).split(",")))
    first = RunConfig.of({"seed": overrides.pop("seed", plain.seed)}).seed
    configs = [
        preset(name, {**overrides, "strategy": strategy, "seed": seed})
        for strategy in strategies
        for seed in range(first, first + seeds)
    ]
    for config in configs:
        check_run(config)
    folder = Path(plain.out).absolute() / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-compare-{plain.preset}"
    rows = []
    for number, config in enumerate(configs, start=1):
        console.print(f"[{number}/{len(configs)}] {config.strategy}, seed {config.seed}", markup=False, highlight=False)
        run = simulate(config.with_(out=str(folder)))
        rows.append({"strategy": config.strategy, "seed": config.seed, "path": run.path, "summary": run.summary})
    _print(table(rows), console)
    page = write_comparison(folder / "report.html", rows)
    console.print(f"Report: {page}", highlight=False, soft_wrap=True)
    return page


def _print(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    shown = Table(title="Mean and 95 % confidence interval over seeds", title_justify="left", box=None)
    # The page has every metric; a terminal has room for the first three, which are the most telling.
    headings = [heading for heading in rows[0] if heading != "Runs"][:4] if rows else []
    for heading in headings:
        shown.add_column(heading, justify="left" if heading == "Strategy" else "right", no_wrap=True)
    for row in rows:
        shown.add_row(*(str(row[heading]) for heading in headings))
    console.print(shown)
