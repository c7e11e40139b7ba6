"""fedra audit: what a finished run's privacy withstands, by attacks on it; results in audit.json and on the page."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from core.errors import InputError, unknown
from reports import audit_words as words
from reports.load import AUDIT, load
from reports.page import write_report
from server.recorder import RunFolder
from simulations.audit_canaries import audit_canaries
from simulations.audit_inversion import audit_inversion
from simulations.audit_membership import audit_membership
from simulations.progress import bar
from simulations.run import Run, one_thread, quiet

SHADOWS = 16


@dataclass(frozen=True)
class Order:
    """What is audited and how."""

    run: Run
    folder: RunFolder
    canaries: int | None
    """As many as asked for; None takes what is usual and fits."""
    shadows: int
    console: Console

    @contextmanager
    def progress(self, what: str, steps: int) -> Iterator[Callable[[int], None]]:
        """Show, on a terminal, how many of the steps are done; the block calls what it gets with their number."""
        with bar(what, self.console) as shown:
            task = shown.add_task("audit", total=steps, numbers="")
            yield lambda count: shown.update(task, completed=count)


PARTS: dict[str, Callable[[Order], dict[str, Any]]] = {
    "canaries": lambda order: audit_canaries(order.run, order.folder, order.canaries, order.progress),
    "membership": lambda order: audit_membership(order.run, order.folder, order.shadows, order.progress),
    "inversion": lambda order: audit_inversion(order.folder, order.progress),
}


def audit(
    path: Path, *, canaries: int | None, shadows: int = SHADOWS, only: Sequence[str] = (), console: Console
) -> dict[str, Any]:
    """Audit the run in a folder, print what is found and return it; parts that are not asked for keep what they said.

    The run's own files stay as they are: what is new stands in audit.json and audit/, and report.html is made again.
    """
    quiet()
    if shadows == 1:
        raise InputError("--shadows 1: each example needs a model with it and one without; give 2 or more, or 0.")
    for name in only:
        if name not in PARTS:
            raise unknown("part of an audit", name, PARTS)
    run, folder = Run.open(path), RunFolder.open(path)
    if not run.summary["rounds"]:
        raise InputError(f"{path} has not finished a round; there is nothing to audit.")
    order = Order(run, folder, canaries, shadows, console)
    found = load(folder.path).audit
    wanted, done = list(dict.fromkeys(only or PARTS)), 0
    try:
        for name in wanted:
            console.print(f"[{done + 1}/{len(wanted)}] {name}", markup=False, highlight=False)
            began = time.perf_counter()
            with one_thread():
                part = PARTS[name](order)
            found[name] = {**part, "seconds": round(time.perf_counter() - began, 1)}
            # Part by part: what an interruption leaves behind is whole.
            folder.write_json(AUDIT, found)
            done += 1
            for line in words.lines({name: found[name]}):
                console.print(line, markup=False, highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        _say_what_is_left(folder.path, wanted[:done], wanted[done:], console)
        raise
    console.print(f"Report: {write_report(folder.path)}", highlight=False, soft_wrap=True)
    return found


def _say_what_is_left(path: Path, done: Sequence[str], left: Sequence[str], console: Console) -> None:
    """Say how to go on with an audit that was interrupted; what is done goes on the page."""
    if done:
        write_report(path)
        kept = f"Saved: {', '.join(done)}. "
    else:
        kept = "No part was finished. "
    again = f"Go on with: fedra audit {path} --only {','.join(left)}" if left else f"Its page: fedra report {path}"
    console.print(f"{kept}{again}", markup=False, highlight=False, soft_wrap=True)
