"""fedra tune: hyper-parameter search with Optuna. A trial is a run; its value, the validation metric of its model.

Trials follow one another, each drawn by a tree-structured Parzen estimator (Bergstra et al. 2011) from those before it.
One whose validation metric is below the median of the others at the same round is stopped there. Test data choose
nothing: they are looked at once, for the best trial, when the search is complete.
"""

from __future__ import annotations

import math
import shutil
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal

import optuna
from filelock import FileLock, Timeout
from optuna.trial import FrozenTrial, Trial, TrialState
from rich.console import Console

from core.config import RunConfig, Scalar
from core.errors import InputError, unknown
from core.idle import refuse_idle, without_idle
from core.metrics import HIGHER_IS_BETTER
from core.seeding import derive
from simulations.run import PRESETS, check_run, preset, quiet, simulate
from simulations.search_space import Space
from simulations.tune_progress import TuneProgress
from simulations.tune_results import status_of, write_results
from tasks import load

TRIALS = 20
DATABASE = "study.db"
LOCK = "study.lock"
STATES = {"completed": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
# A median needs a few trials, and the first rounds favour whatever is fast at the start.
COMPARED, WARMUP_ROUNDS, WARMUP_SHARE = 5, 2, 0.25


def tune(
    name: str,
    settings: Mapping[str, Any],
    *,
    trials: int = TRIALS,
    metric: str = "",
    console: Console | None = None,
) -> Path:
    """Search `settings`, of which some are ranges or choices, over a preset; return the folder of the search.

    Whatever a setting refuses at an end of its range is refused before the first trial.
    """
    quiet()
    space = Space.of(settings)
    configs = []
    for params in space.examples():
        with _named(params, settings):
            configs.append(preset(name, space.settings(params)))
            metric = metric or configs[0].early_stopping.metric or load(configs[0]).metrics[0]
            _check(without_idle(configs[-1]), metric)
    with _named(dict.fromkeys(space.searched, 0), settings):
        # What acts in some trials may stand beside the others.
        refuse_idle(configs)
    first = configs[0]
    folder = _make_folder(Path(first.out).absolute() / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-tune-{first.preset}")
    source = Path(name) if name.endswith(".toml") else PRESETS / f"{name}.toml"
    for file in (source, source.with_suffix(".strategies.toml")):
        if file.is_file():
            # The search goes on as it began, whatever becomes of the preset.
            shutil.copy(file, folder / "preset")
    place = {"data-dir": str(Path(first.data_dir).absolute())} if first.data_dir else {}
    direction: Literal["maximize", "minimize"] = "maximize" if HIGHER_IS_BETTER.get(metric, True) else "minimize"
    with _alone(folder):
        study = optuna.create_study(study_name="tune", storage=_storage(folder), direction=direction)
        about = {"preset": source.name, "settings": {**settings, **place}, "metric": metric, "trials": trials}
        for key, value in about.items():
            study.set_user_attr(key, value)
        return Search(folder, study, console).run()


def resume_tune(folder: Path, *, trials: int | None = None, console: Console | None = None) -> Path:
    """Go on with the search in a folder, to `trials` in all where given, and return the folder."""
    quiet()
    folder = folder.absolute()
    if not (folder / DATABASE).is_file():
        raise InputError(f"{folder} is not the folder of a search: it has no {DATABASE}; `fedra tune` makes one.")
    with _alone(folder):
        study = optuna.load_study(study_name="tune", storage=_storage(folder))
        search = Search(folder, study, console)
        done, wanted = len(search.records()), trials or search.trials
        if wanted < done or (wanted == done and status_of(folder) == "completed"):
            raise InputError(
                f"{folder} has {done} trials already, and --trials counts these too; "
                f"give more, for example --trials {done + 10}."
            )
        study.set_user_attr("trials", wanted)
        search.trials = wanted
        return search.run()


class Search:
    """A search in its folder: `run` makes the trials that are left and writes what came out."""

    def __init__(self, folder: Path, study: optuna.Study, console: Console | None) -> None:
        self.folder, self.study = folder, study
        self.console = console or Console(quiet=True)
        about = study.user_attrs
        self.preset = str(folder / "preset" / about["preset"])
        self.metric, self.trials = about["metric"], about["trials"]
        self.space = Space.of(about["settings"])
        self.first = self.config(next(self.space.examples()))
        warmup = max(WARMUP_ROUNDS, math.ceil(WARMUP_SHARE * self.first.rounds))
        study.pruner = optuna.pruners.MedianPruner(n_startup_trials=COMPARED, n_warmup_steps=warmup)

    def run(self) -> Path:
        """Make the trials that are left, write tune.json, best.toml and tune.html, and return the folder."""
        with TuneProgress(self, self.console) as progress:
            try:
                self._drop_unfinished()
                while (number := len(self.records()) + 1) <= self.trials:
                    progress.start(number)
                    progress.end(self._trial(number, progress))
            finally:
                self._drop_unfinished()
                results = write_results(self)
        if results["best"] is None:
            raise RuntimeError(f"no trial was completed; the first: {results['trials'][0]['error']}")
        progress.summarise(results)
        return self.folder

    def records(self) -> list[dict[str, Any]]:
        """Return the trials that ended by themselves, in order: params, value, state, rounds, seconds, run, error."""
        return [
            {"trial": number, "params": trial.params, "value": trial.value, **trial.user_attrs["record"]}
            for number, trial in enumerate(self._ended(), start=1)
        ]

    def best(self) -> dict[str, Any] | None:
        """Return the completed trial with the best value, the first of equals, None while there is none."""
        sign = -1 if HIGHER_IS_BETTER.get(self.metric, True) else 1
        completed = [record for record in self.records() if record["state"] == "completed"]
        return min(completed, key=lambda record: sign * record["value"], default=None)

    def _ended(self) -> list[FrozenTrial]:
        def ended(trial: FrozenTrial) -> bool:
            record = trial.user_attrs.get("record")
            return record is not None and trial.state == STATES[record["state"]]

        return [trial for trial in self.study.get_trials(deepcopy=False) if ended(trial)]

    def _drop_unfinished(self) -> None:
        """Mark a trial that was interrupted or killed as failed; without a record it does not count."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self.study.tell(trial.number, state=TrialState.FAIL)

    def _trial(self, number: int, progress: TuneProgress) -> dict[str, Any]:
        """Make one trial and return its record."""
        # Anew for each: a resumed search draws what an uninterrupted one would have drawn.
        self.study.sampler = optuna.samplers.TPESampler(seed=derive(self.first.seed, "tune", number) % 2**32)
        trial = self.study.ask()
        params = self.space.suggest(trial)
        began = time.perf_counter()
        same = next((old for old in enumerate(self._ended(), start=1) if old[1].params == params), None)
        if same is not None:
            # Equal runs are equal: nothing would be learnt from another one.
            record, final = {**same[1].user_attrs["record"], "same_as": same[0]}, same[1].value
            for step, value in same[1].intermediate_values.items():
                trial.report(value, step)
        else:
            record, final = self._train(trial, params, progress)
        record["seconds"] = round(time.perf_counter() - began, 3)
        trial.set_user_attr("record", record)
        # A pruned trial's value is the last one that it reported.
        self.study.tell(trial, final if record["state"] == "completed" else None, STATES[record["state"]])
        return self.records()[-1]

    def _train(
        self, trial: Trial, params: Mapping[str, Scalar], progress: TuneProgress
    ) -> tuple[dict[str, Any], float | None]:
        """Run the trial's federation and return its record and the validation metric of the model that it kept."""
        folders: list[Path] = []
        done, stopped = 0, ""

        def on_round(row: dict[str, Any]) -> str | None:
            nonlocal done, stopped
            done, value = row["round"], row.get("validation", {}).get(self.metric)
            progress.round(done, config.rounds, value)
            if value is None or done == config.rounds:
                return None
            trial.report(value, done)
            if trial.should_prune():
                stopped = f"pruned: validation {self.metric} is not as good as the median of the trials before"
            return stopped or None

        def record(state: str, error: str | None = None) -> dict[str, Any]:
            run = f"runs/{folders[0].name}" if folders else None
            return {"state": state, "rounds": done, "run": run, "error": error}

        try:
            # Baselines are no part of the value.
            config = without_idle(self.config(params).with_(out=str(self.folder / "runs"), baselines=False))
            run = simulate(config, on_start=lambda path, *_: folders.append(path), on_round=on_round)
        except Exception as error:
            kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
            return record("failed", f"{kind}{error}"), None
        finally:
            for folder in folders:
                # It takes megabytes and shows the test set, which is to be looked at for the best trial only.
                (folder / "report.html").unlink(missing_ok=True)
        if stopped:
            return record("pruned"), None
        value = run.summary["validation_metrics"].get(self.metric, math.nan)
        if not math.isfinite(value):
            return record("failed", f"validation {self.metric} is {value}"), None
        return record("completed"), value

    def config(self, params: Mapping[str, Scalar]) -> RunConfig:
        """Return the configuration of a trial."""
        return preset(self.preset, self.space.settings(params))


@contextmanager
def _named(params: Mapping[str, Scalar], settings: Mapping[str, Any]) -> Iterator[None]:
    """Add to an `InputError` which of the searched settings it speaks of, as they were written.

    The sentence itself names the value that was tried, which nobody wrote.
    """
    try:
        yield
    except InputError as error:
        said = str(error)
        meant = [key for key, value in params.items() if key in said or (isinstance(value, str) and value in said)]
        if not meant:
            raise
        searched = " ".join(f"{key}={settings[key]}" for key in meant)
        raise InputError(f"{said} This comes of searching {searched}; narrow that.") from None


def _check(config: RunConfig, metric: str) -> None:
    """Refuse a configuration that a trial could have and that cannot run, or that lacks the metric."""
    federation, metrics = check_run(config), load(config).metrics
    if metric not in metrics:
        raise unknown("metric", metric, metrics)
    if not federation.validation.sizes.any():
        raise InputError("fedra tune needs validation splits, and these partitions have none; make partitions larger.")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes out of the search: two would each take the other's running trial for a broken one.

    The system lets go of the lock when a process ends, however it ends.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"{folder} is being searched by another process; wait until it ends, or end it.") from None
    try:
        yield
    finally:
        lock.release()


def _make_folder(base: Path) -> Path:
    """Return a new folder of that name, or of that name with a number."""
    folder = next(path for n in count(1) if not (path := base.with_name(base.name + f"-{n}" * (n > 1))).exists())
    (folder / "preset").mkdir(parents=True)
    return folder


def _storage(folder: Path) -> optuna.storages.RDBStorage:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Connected by path: in a URL a folder's ? or # would mean something else.
    connect = partial(sqlite3.connect, folder / DATABASE, check_same_thread=False)
    return optuna.storages.RDBStorage(f"sqlite:///{DATABASE}", engine_kwargs={"creator": connect})
