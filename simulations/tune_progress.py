"""The display of a search: trial, value, what it tried; at the end the best trials. Test data are seen once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from reports.words import duration, metric, number, ordered, plural, setting
from simulations.progress import bar

if TYPE_CHECKING:
    from simulations.tune import Search

BEST, HEADLINES = 5, 3
DIGITS = 4


class TuneProgress:
    """A line for every finished trial, and on a terminal a bar below them."""

    def __init__(self, search: Search, console: Console) -> None:
        self.search, self.console = search, console
        self.title = metric(search.metric).title
        self._bar = bar("trial", console)
        self._task = self._bar.add_task("tune", total=search.trials, numbers="")

    def __enter__(self) -> TuneProgress:
        first, better = self.search.first, "higher" if metric(self.search.metric).higher_is_better else "lower"
        self.print(
            f"Tuning {first.preset} for validation {self.title} ({better} is better): "
            f"{plural(self.search.trials, 'trial')}, seed {first.seed}."
        )
        for key, dimension in self.search.space.searched.items():
            self.print(f"  {key}: {dimension}")
        if done := len(self.search.records()):
            self.print(f"Resumed after trial {done}.")
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if kind is not None:
            self.print(f"Saved up to the last finished trial. Continue with: fedra tune --resume {self.search.folder}")

    def start(self, trial: int) -> None:
        """Show that a trial starts."""
        self._bar.update(self._task, completed=trial - 1, numbers="starting")

    def round(self, done: int, rounds: int, value: float | None) -> None:
        """Show a trial's finished round."""
        shown = f"  {self.title} {number(value, DIGITS)}" if value is not None else ""
        self._bar.update(self._task, numbers=f"round {done}/{rounds}{shown}")

    def end(self, record: Mapping[str, Any]) -> None:
        """Say how a trial ended."""
        how = f"{self.title} {number(record['value'], DIGITS)}"
        if record["state"] == "pruned":
            how += f"  pruned after round {record['rounds']}"
        if record["state"] == "failed":
            how = f"failed: {record['error']}"
        took = f"as trial {record['same_as']}" if "same_as" in record else duration(record["seconds"])
        params = " ".join(f"{key}={setting(value)}" for key, value in record["params"].items())
        self.print(f"trial {record['trial']}/{self.search.trials}  {how}  {params}  {took}")
        self._bar.update(self._task, completed=record["trial"])

    def summarise(self, results: Mapping[str, Any]) -> None:
        """Show the best trials by their validation metric, and the test metrics of the first of them."""
        sign = -1 if results["higher_is_better"] else 1
        own = [record for record in results["trials"] if record["state"] == "completed" and "same_as" not in record]
        table = Table(title="Best trials", title_justify="left", box=None, padding=(0, 3, 0, 0))
        # A terminal is narrow: proximal-mu is enough of strategy-options.proximal-mu.
        short = (key.rpartition(".")[2] for key in results["space"])
        for heading in ("Trial", f"Validation {self.title}", *short):
            table.add_column(heading, justify="right")
        for record in sorted(own, key=lambda record: sign * record["value"])[:BEST]:
            params = [setting(record["params"].get(key)) for key in results["space"]]
            table.add_row(str(record["trial"]), number(record["value"], DIGITS), *params)
        self.console.print(table)
        best = results["best"]
        tested = dict.fromkeys([results["metric"], *ordered(best["test_metrics"])])
        shown = [f"{metric(name).title} {number(best['test_metrics'][name], DIGITS)}" for name in tested][:HEADLINES]
        self.print(f"Test set, trial {best['trial']} only: {'  '.join(shown)}")
        states = Counter(record["state"] for record in results["trials"])
        counts = ", ".join(f"{amount} {state}" for state, amount in states.items())
        self.print(f"{plural(len(results['trials']), 'trial')} in {results['seconds']:.1f} s: {counts}")
        if results["privacy"]:
            self.print(results["privacy"])
        self.print(f"Best preset: {self.search.folder / 'best.toml'}")
        self.print(f"Report:      {self.search.folder / 'tune.html'}")

    def print(self, text: str) -> None:
        """Print a line above the bar without wrapping: paths must stay whole."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)
