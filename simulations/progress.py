"""The live display of a run: round, loss, the task's main metrics, clients per second, time left."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from core.config import RunConfig
from reports import protection, secure
from reports.load import nested, read_rounds
from reports.words import duration, metric, number, plural, size
from server.answers import NothingLearntError
from server.malice import warnings
from server.recorder import RunFolder
from simulations.run import Run, worker_count
from tasks import load

# Fewer clients train alone before anybody wonders.
MANY = 50


def training_baselines(done: int, clients: int) -> str:
    """Return what is shown while baselines train: 0 clients are done as long as it is the pooled data."""
    return f"training baselines: client {done}/{clients}" if done else "training baselines: pooled data"


def bar(unit: str, console: Console, *, transient: bool = False) -> Bar:
    """Return a bar that counts rounds or trials with their last `numbers`; nothing where there is no terminal.

    A transient one leaves nothing behind.
    """
    return Bar(
        SpinnerColumn(),
        TextColumn(unit),
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[numbers]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=transient,
        disable=not console.is_terminal,
    )


class Progress:
    """A bar on a terminal, a line a round elsewhere; in both the same numbers."""

    def __init__(self, config: RunConfig, console: Console) -> None:
        self.config, self.console = config, console
        self.metrics = load(config).metrics[:3]
        self.folder: Path | None = None
        self._first: tuple[int, float] | None = None
        self._values: dict[str, float] = {}
        self._bar = bar("round", console)
        self._task = self._bar.add_task("run", total=config.rounds, numbers="starting")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if kind is None or self.folder is None or not RunFolder.open(self.folder).rounds_done():
            return
        if issubclass(kind, NothingLearntError):
            self.print(f"Run folder: {self.folder}")
        else:
            self.print(f"Saved up to the last finished round. Continue with: fedra run --resume {self.folder}")

    def start(self, folder: Path, config: RunConfig, done: int) -> None:
        """Say what starts where."""
        self.folder = folder
        self.config = config
        workers = worker_count(config)
        where = plural(workers, "Ray worker") if workers else "this process"
        gpu = " on the GPU" if config.engine.device == "cuda" else ""
        sampled = config.count(config.sampled)
        assert isinstance(config.engine.cohort_size, int)
        self.print(
            f"{config.task} with {config.strategy}: {plural(config.clients, 'client')}, {sampled} a round, "
            f"{plural(config.rounds, 'round')}, seed {config.seed}; "
            f"cohorts of {min(config.engine.cohort_size, sampled)} in {where}{gpu}."
        )
        for sentence in warnings(config):
            self.print(f"Warning: {sentence}")
        if done:
            self.print(f"Resumed after round {done}.")
        self._bar.update(self._task, completed=done)

    def round(self, row: dict[str, Any]) -> None:
        """Show a finished round."""
        self._values |= row.get("central", {})
        numbers = [
            f"{metric(name).title} {number(self._values[name], 4)}" for name in self.metrics if name in self._values
        ]
        line = "  ".join([*numbers, f"{row['clients_per_second']:.0f} clients/s"])
        self._bar.update(self._task, completed=row["round"], numbers=line)
        if not self.console.is_terminal:
            self.print(f"round {row['round']}/{self.config.rounds}  {line}  {self._left(row['round'])}")
        for reason in (row.get("secure_aggregation") or {}).get("failed", ()) if row["sampled"] else ():
            self.print(f"round {row['round']}: no secure sum: {reason}")
        if not row["sampled"]:
            moved = "the model moves by noise alone" if row["aggregated"] else "the model stays"
            self.print(f"round {row['round']}: no client was drawn; {moved}")
        elif not row["aggregated"]:
            self.print(f"round {row['round']}: {self.config.strategy} made no new model from the replies it got")
        # What was lost as configured is no failure; the summary counts it.
        if failed := row["failed"] - row["lost"]:
            reason = row["failures"][0]["reason"]
            self.print(f"round {row['round']}: {failed} of {row['sampled']} clients failed: {reason}")
        if dropped := row.get("privacy", {}).get("dropped_examples"):
            self.print(f"round {row['round']}: {dropped:,} examples' gradients were not finite and added nothing")

    def baseline(self, done: int) -> None:
        """Show how many of the clients have trained alone; elsewhere than on a terminal at the start and each tenth."""
        clients = self.config.clients
        said = training_baselines(done, clients)
        self._bar.update(self._task, numbers=f"{said} (baselines=false leaves them out)")
        many = clients >= MANY and (not done or done * 10 // clients > (done - 1) * 10 // clients)
        if many and not self.console.is_terminal:
            self.print(said if done else f"{said}, then {clients} clients alone; baselines=false leaves them out")

    def _left(self, done: int) -> str:
        """Return the time left from the rounds after the first, which also starts the workers."""
        now = time.perf_counter()
        if self._first is None:
            self._first = (done, now)
            return ""
        rounds, since = self._first
        return f"left {(now - since) / (done - rounds) * (self.config.rounds - done):.0f} s"

    def summarise(self, run: Run) -> None:
        """Show the final metrics beside the baselines, and where the report is."""
        summary = run.summary
        baselines = summary["baselines"] or {}
        rows = {f"federated ({summary['strategy']})": summary["metrics"]}
        if baselines:
            rows |= {"pooled data": baselines["central"], "clients alone (mean)": baselines["local"]}
        self._table("Central test set", rows)
        if summary["personal"]:
            whose = {"clients' own models": summary["clients_metrics"]}
            if own := baselines.get("local", {}).get("own_test"):
                whose["clients alone"] = own
            self._table("Clients' own test splits", {
                f"{who} ({part})": {name: nested(spread, name, part) for name in self.metrics}
                for who, spread in whose.items() for part in ("mean", "worst")
            })  # fmt: skip
        stopped = f" (stopped: {summary['stopped_by']})" if summary["stopped_by"] else ""
        self.print(f"{summary['status']} {plural(summary['rounds'], 'round')} in {summary['seconds']:.1f} s{stopped}")
        # Those of the configuration stand at the start.
        for sentence in summary["warnings"][len(warnings(self.config)) :]:
            self.print(f"Warning: {sentence}")
        for line in _remarks(summary, self.config.compression.kind):
            self.print(line)
        masked = summary["secure_aggregation"]
        for line in secure.lines(masked, read_rounds(run.path) if masked else [], self.config.flat()):
            self.print(line)
        for line in protection.lines(summary["privacy"], masked):
            self.print(line)
        self.print(f"Run folder: {run.path}")
        self.print(f"Report:     {run.path / 'report.html'}")

    def _table(self, title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
        table = Table(title=title, title_justify="left", box=None, padding=(0, 3, 0, 0))
        table.add_column("")
        for name in self.metrics:
            table.add_column(metric(name).title, justify="right")
        for row, metrics in rows.items():
            table.add_row(row, *(number(metrics.get(name), 4) for name in self.metrics))
        self.console.print(table)

    def print(self, text: str) -> None:
        """Print a line above the bar without wrapping: paths must stay whole."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)


def _remarks(summary: Mapping[str, Any], compression: str) -> Iterator[str]:
    """Yield a line each on virtual time, compressed updates, missing answers and attackers, where there are such."""
    if (seconds := summary["virtual_seconds"]) is not None:
        yield f"Virtual time: {duration(seconds)} on the clients' devices."
    if compression != "none":
        yield f"Uplink: {size(summary['traffic']['uplink_bytes'])} from all clients, updates as {compression}."
    lost, rejected = summary["answers"]["lost"], summary["answers"]["rejected"]
    if lost or rejected:
        yield f"Answers that did not count: {lost:,} lost, {rejected:,} rejected."
    if attack := summary["attack"]:
        said = [f"{attack['kind']} by {attack['malicious']:,} of {plural(summary['clients'], 'client')}"]
        if attack["selected"] is not None:
            said.append(f"{attack['selected']:.0%} of their answers let in, weight {attack['weight']:.0%}")
        if attack["backdoor_success"] is not None:
            said.append(f"backdoor success {attack['backdoor_success']:.0%}")
        yield f"Attack: {'; '.join(said)}."
