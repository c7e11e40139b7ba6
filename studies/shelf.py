"""The table of docs/strategies.md: strategies x tasks, three seeds, by `fedra compare`.

.venv/bin/python studies/shelf.py        about half an hour on two quiet cores; what is complete is read
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from virtual_time import replace_block

from core.config import parse_override
from reports.compare import table
from simulations.compare import compare

ROOT = Path(__file__).parents[1]
ALL = (
    "fedavg,fedavgm,fedadam,fedyogi,fedadagrad,fedprox,scaffold,feddyn,fednova,mimelite,moon,qfedavg,agnostic,ditto,"
    "apfl,fedper,fedrep,perfedavg,ifca,fedmedian,fedtrimmedavg,krum,multikrum,bulyan,rfa,centredclipping,normclipping,"
    "fltrust,feddf,fedbuff"
)
PERSONAL = "fedavg,fedbn,ditto,apfl,fedper,fedrep,perfedavg,ifca"
COMMANDS = {
    "medical": f"medical strategy={ALL}",
    "digits": f"digits model=mlp rounds=15 evaluate-every=15 strategy={ALL}",
    "rotated": f"digits dataset=rotated model=cnn-batchnorm clients=8 partition.kind=natural strategy={PERSONAL}",
}
COLUMNS = {"medical": ("AUROC", "Worst client AUROC"), "digits": ("Accuracy", "Clients Accuracy"),
           "rotated": ("Clients Accuracy", "Worst client Accuracy")}  # fmt: skip


def main() -> None:
    """Run every comparison, or read it where it is complete, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("/tmp/fedra-strategies"), help="Folder for comparisons.")
    given = parser.parse_args()
    found = {task: {row["Strategy"]: row for row in rows(task, given.out / task)} for task in COMMANDS}
    names = list(dict.fromkeys(name for task in found.values() for name in task))
    head = [f"{task}: {column[0].lower()}{column[1:]}" for task, own in COLUMNS.items() for column in own]
    lines = [f"| strategy | {' | '.join(head)} |", f"|---|{'---|' * len(head)}"]
    for name in names:
        cells = [str(found[t][name][c]) if name in found[t] else "" for t, own in COLUMNS.items() for c in own]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    commands = "\n".join(f"fedra compare {command} seeds=3 baselines=false" for command in COMMANDS.values())
    text = "\n".join([*lines, "", "```", commands, "```"])
    print(text)
    replace_block(ROOT / "docs" / "strategies.md", "strategies", text)


def rows(task: str, out: Path) -> list[dict[str, Any]]:
    """Return the comparison's table: a row for each strategy."""
    preset, *settings = COMMANDS[task].split()
    if not any(out.glob("*-compare-*/report.html")):
        overrides = dict(parse_override(text) for text in [*settings, "seeds=3", "baselines=false"])
        compare(preset, {**overrides, "engine.workers": 0, "out": str(out)}, Console())
    [page] = out.glob("*-compare-*/report.html")
    runs = []
    for file in sorted(page.parent.glob("*/summary.json")):
        summary = json.loads(file.read_text())
        runs.append({"strategy": summary["strategy"], "seed": summary["seed"], "path": file.parent, "summary": summary})
    return table(runs)


if __name__ == "__main__":
    main()
