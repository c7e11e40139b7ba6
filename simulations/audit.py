"""fedra audit: what a finished run's privacy withstands, by attacks on it; results in audit.json and on the page."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from core.errors import InputError, unknown
from reports import audit as words
from reports.page import write_report
from server.recorder import RunFolder
from simulations.audit_canaries import audit_canaries
from simulations.audit_inversion import audit_inversion
from simulations.audit_membership import audit_membership
from simulations.progress import bar
from simulations.run import Run, one_thread, quiet

FILE = "audit.json"
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

    def progress(self, what: str, steps: int) -> Callable[[int], None]:
        """Return what shows how many of the steps are done; on a terminal alone, until all of them are."""
        shown = bar(what, self.console)
        task = shown.add_task("audit", total=steps, numbers="")
        shown.start()

        def done(count: int) -> None:
            shown.update(task, completed=count)
            if count >= steps:
                shown.stop()

        return done


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
    found = read(folder.path)
    for name in only or PARTS:
        began = time.perf_counter()
        with one_thread():
            part = PARTS[name](order)
        found[name] = {**part, "seconds": round(time.perf_counter() - began, 1)}
        # Part by part: what an interruption leaves behind is whole.
        folder.write_json(FILE, found)
        for line in words.lines({name: found[name]}):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"Report: {write_report(folder.path)}", highlight=False, soft_wrap=True)
    return found


def read(path: Path) -> dict[str, Any]:
    """Return what earlier audits of the run in a folder found, nothing where there were none."""
    file = path / FILE
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found
