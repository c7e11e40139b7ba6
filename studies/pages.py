"""What the programs of this folder share: runs that are made once, and the marked places of a page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from core.config import RunConfig
from server.recorder import RunFolder
from simulations.run import Run, simulate

DOCS = Path(__file__).parents[1] / "docs"


class Runs:
    """The completed runs in a folder, found by their configuration; one that is missing is made.

    Where the runs are and how the engine made them is no part of a configuration. After a change of the code that
    changes results, the folder is to be deleted.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._done: dict[str, Run] = {}
        for file in sorted(out.glob("*/summary.json")):
            run = Run.open(file.parent)
            if run.summary["status"] == "completed":
                self._done[_key(RunFolder.open(file.parent).config)] = run

    def __call__(self, config: RunConfig) -> Run:
        """Return the configuration's run."""
        if (key := _key(config)) not in self._done:
            self._done[key] = simulate(config.with_(out=str(self.out)))
        return self._done[key]


def _key(config: RunConfig) -> str:
    # What is read back from a file is validated, defaults too: 0 is 0.0 where a number may be broken.
    flat = RunConfig.of(config.flat()).flat()
    own = {key: value for key, value in flat.items() if key != "out" and not key.startswith("engine.")}
    return json.dumps(own, sort_keys=True)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table whose first column is words and whose others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fill(page: Path, name: str, text: str) -> None:
    """Put the text between `<!-- name -->` and `<!-- /name -->` of a page."""
    marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    found, count = marked.subn(lambda m: f"{m[1]}{text}\n{m[2]}", page.read_text(encoding="utf-8"))
    if count != 1:
        raise ValueError(f"{page} has {count} places '<!-- {name} -->' ... '<!-- /{name} -->', not one")
    page.write_text(found, encoding="utf-8")
