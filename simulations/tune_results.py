"""What a search leaves in its folder: tune.json, best.toml and tune.html, beside study.db and the trials' runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna

from core.config import RunConfig
from core.metrics import HIGHER_IS_BETTER
from reports.page import write_report
from reports.protection import compared
from reports.tune_page import write_tune_page
from server.recorder import RunFolder, clean, versions
from simulations.run import Run, preset

if TYPE_CHECKING:
    from simulations.tune import Search


def write_results(search: Search) -> dict[str, Any]:
    """Write the search's files and return what tune.json holds; the best trial's test metrics once none is left."""
    trials, best, folder = search.records(), search.best(), search.folder
    completed = len(trials) >= search.trials
    before = preset(search.preset).flat()
    if best is not None:
        run = folder / best["run"]
        # Trials make no baselines; the preset's run does, as it was set up.
        own = {k: v for k, v in search.first.flat().items() if k.startswith("baseline") or k == "out"}
        config = RunConfig.of({**RunFolder.open(run).config.flat(), **own})
        (folder / "best.toml").write_text(config.toml(), encoding="utf-8")
        if completed:
            best = {**best, "test_metrics": Run.open(run).metrics}
            write_report(run)
    space = {key: {"says": str(d), **vars(d), "preset": before.get(key)} for key, d in search.space.searched.items()}
    results: dict[str, Any] = clean(
        {
            "status": "completed" if completed else "interrupted",
            "preset": search.first.preset,
            "task": search.first.task,
            "metric": search.metric,
            "higher_is_better": HIGHER_IS_BETTER.get(search.metric, True),
            "seed": search.first.seed,
            "planned": search.trials,
            "space": space,
            "fixed": search.space.fixed,
            "seconds": round(sum(record["seconds"] for record in trials), 3),
            "best": best,
            "privacy": compared(_private(folder, trials)),
            "trials": trials,
            "versions": {**versions(), "optuna": optuna.__version__},
        }
    )
    (folder / "tune.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_tune_page(folder / "tune.html", results, search.study)
    return results


def _private(folder: Path, trials: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the summaries of the trials that trained: each has looked at the data, whatever became of it."""
    own = [folder / record["run"] for record in trials if record["run"] and "same_as" not in record]
    return [{"summary": Run.open(run).summary} for run in own if (run / "summary.json").is_file()]


def status_of(folder: Path) -> str | None:
    """Return what tune.json says of a search, None where there is none."""
    try:
        status: str = json.loads((folder / "tune.json").read_text(encoding="utf-8"))["status"]
    except (OSError, ValueError):
        return None
    return status
