"""The table of docs/strategies.md: strategies x tasks, three seeds, by `fedra compare`.

.venv/bin/python studies/shelf.py --out runs/shelf     twenty minutes of one core; what is complete is read
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pages import DOCS, fill, table
from rich.console import Console

from core.config import parse_override
from reports.load import nested
from reports.variants import interval
from simulations.compare import compare

ALL = (
    "fedavg,fedavgm,fedadam,fedyogi,fedadagrad,fedprox,scaffold,feddyn,fednova,mimelite,moon,qfedavg,agnostic,ditto,"
    "apfl,fedper,fedrep,perfedavg,ifca,fedmedian,fedtrimmedavg,krum,multikrum,bulyan,rfa,centredclipping,normclipping,"
    "fltrust,feddf,fedbuff"
)
PERSONAL = "fedavg,fedbn,ditto,apfl,fedper,fedrep,perfedavg,ifca"
ROTATED = "digits dataset=rotated model=cnn-batchnorm clients=8 partition.kind=natural"
COMMANDS = {
    "medical": f"medical strategy={ALL}",
    "digits": f"digits model=mlp rounds=15 evaluate-every=15 strategy={ALL}",
    "nlp": f"nlp optimizer=sgd learning-rate=0.3 rounds=30 evaluate-every=30 strategy={ALL}",
    "rotated": f"{ROTATED} strategy={PERSONAL}",
    "rotated-tuned": f"{ROTATED} strategy=fedavg fine-tune-epochs=3",
}
COLUMNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "medical: AUROC": ("medical", ("metrics", "auroc")),
    "digits: accuracy": ("digits", ("metrics", "accuracy")),
    "nlp: macro-F1": ("nlp", ("metrics", "macro_f1")),
    "nlp: worst client": ("nlp", ("clients_metrics", "accuracy", "worst")),
    "rotated: clients' accuracy": ("rotated", ("clients_metrics", "accuracy", "mean")),
    "rotated: worst client": ("rotated", ("clients_metrics", "accuracy", "worst")),
}


def main() -> None:
    """Run every comparison, or read it where it is complete, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/shelf"), help="Folder for comparisons.")
    given = parser.parse_args()
    found = {task: summaries(task, given.out / task) for task in COMMANDS}
    names = list(dict.fromkeys([*ALL.split(","), *PERSONAL.split(",")]))
    rows = [[name, *(cell(found[task], name, where) for task, where in COLUMNS.values())] for name in names]
    tuned = (cell(found.get(f"{task}-tuned", []), "fedavg", where) for task, where in COLUMNS.values())
    rows.append(["fedavg, `fine-tune-epochs=3`", *tuned])
    commands = "\n".join(f"fedra compare {command} seeds=3 baselines=false" for command in COMMANDS.values())
    text = f"{table(['strategy', *COLUMNS], rows)}\n\n```\n{commands}\n```"
    print(text)
    fill(DOCS / "strategies.md", "strategies", text)


def cell(summaries: list[dict[str, Any]], strategy: str, where: tuple[str, ...]) -> str:
    """Return mean and interval of a number over a strategy's runs, empty where there are none."""
    own = [summary for summary in summaries if summary["strategy"] == strategy]
    return str(interval(nested(summary, *where) for summary in own)) if own else ""


def summaries(task: str, out: Path) -> list[dict[str, Any]]:
    """Return the summaries of a comparison's runs."""
    preset, *settings = COMMANDS[task].split()
    if not any(out.glob("*-compare-*/report.html")):
        overrides = dict(parse_override(text) for text in [*settings, "seeds=3", "baselines=false"])
        compare(preset, {**overrides, "engine.workers": 0, "out": str(out)}, Console())
    [page] = out.glob("*-compare-*/report.html")
    return [json.loads(file.read_text()) for file in sorted(page.parent.glob("*/summary.json"))]


if __name__ == "__main__":
    main()
