"""FedProx's experiment: stragglers dropped, taken with what they did, and held near. Li et al., MLSys 2020, figure 1.

    python studies/fedprox.py [--rounds 100] [--out runs/fedprox] [--docs docs]

Draws docs/figures/fedprox.png and writes the table of docs/strategies.md. Runs that `--out` has are not made again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from pages import DOCS, Runs, fill, table

from core.config import RunConfig
from core.idle import without_idle
from server.recorder import RunFolder
from simulations.run import Run, preset
from tasks import load

DATASETS = ("0,0", "0.5,0.5", "1,1")
STRAGGLERS = (0.0, 0.5, 0.9)
METHODS: dict[str, dict[str, Any]] = {
    "FedAvg": {"strategy": "fedavg", "faults.late": "lost"},
    "FedProx, mu = 0": {"strategy": "fedprox", "strategy-options.proximal-mu": 0.0, "faults.late": "partial"},
    "FedProx, mu = 1": {"strategy": "fedprox", "strategy-options.proximal-mu": 1.0, "faults.late": "partial"},
}
SEED = 2
"""Its largest client has 2,000 examples; with one of 5,000, as the preset's seed has, a round takes twice as long."""
TARGETS = (1.0, 0.7)
LAST = 20
"""Rounds at the end over which the table takes means: from round to round the loss jumps."""
HEAD = ("synthetic", "answers a round", "test loss (least-most)", "accuracy", "training loss", "rounds to 1.0, 0.7")
Cells = dict[tuple[str, float, str], Run]
"""By data set, share of stragglers and method."""


def settings(dataset: str, stragglers: float, method: str, rounds: int, **changes: Any) -> RunConfig:
    """Return the preset `synthetic`, which has the paper's settings, with one cell's data, stragglers and method."""
    # Five clients at a time are as fast as any number here, and need not be measured in every run.
    fixed = {"seed": SEED, "baselines": False, "evaluate-every": 2, "engine.workers": 0, "engine.cohort-size": 5}
    own = {"dataset": dataset, "faults.stragglers": stragglers, "rounds": rounds}
    # Without stragglers nobody is late.
    return without_idle(preset("synthetic", {**fixed, **own, **METHODS[method]}, **changes))


def run_all(rounds: int, out: Path, datasets: Sequence[str] = DATASETS, **changes: Any) -> Cells:
    """Return every run; those that `out` has already are not made again."""
    runs, cells = Runs(out), {}
    for dataset in datasets:
        for stragglers in STRAGGLERS:
            for method in METHODS:
                # Where nobody is late, nothing sets FedProx with mu = 0 apart from FedAvg.
                made = "FedAvg" if method == "FedProx, mu = 0" and not stragglers else method
                began = time.perf_counter()
                cells[dataset, stragglers, method] = runs(settings(dataset, stragglers, made, rounds, **changes))
                seconds = time.perf_counter() - began
                print(f"synthetic({dataset}), {stragglers:.0%} stragglers, {method}: {seconds:.0f} s", flush=True)
    return cells


def rows_of(run: Run) -> list[dict[str, Any]]:
    """Return the lines of rounds.jsonl."""
    return [json.loads(line) for line in (run.path / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]


def curve(run: Run, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the rounds that were evaluated (n,) and the global model's metric on the central test set (n,)."""
    rows = [row for row in rows_of(run) if "central" in row]
    return np.array([row["round"] for row in rows]), np.array([row["central"][metric] for row in rows])


def at_the_end(run: Run, metric: str) -> np.ndarray:
    """Return the metric at the evaluations of the last `LAST` rounds."""
    rounds, values = curve(run, metric)
    last: np.ndarray = values[rounds > rounds[-1] - LAST]
    return last


def training_loss(run: Run) -> float:
    """Return the last model's mean loss over the training examples of all clients: the paper's objective."""
    task = load(RunFolder.open(run.path).config)
    train = task.federation().train
    with torch.no_grad():
        return float(task.loss(run.model()(torch.from_numpy(train.x)), torch.from_numpy(train.y)).mean())


def reached(run: Run, loss: float) -> str:
    """Return the first round evaluated at that loss or less, `never` where there is none."""
    rounds, values = curve(run, "loss")
    below = rounds[values <= loss]
    return str(below[0]) if len(below) else "never"


def rows(cells: Cells) -> list[list[str]]:
    """Return the table: a row for each data set, share of stragglers and method."""
    found = []
    for (dataset, stragglers, method), run in cells.items():
        losses = at_the_end(run, "loss")
        found.append([
            f"({dataset}), {stragglers:.0%}, {method}",
            f"{np.mean([row['sampled'] - row['lost'] for row in rows_of(run)]):.1f}",
            f"{losses.mean():.2f} ({losses.min():.2f}-{losses.max():.2f})",
            f"{at_the_end(run, 'accuracy').mean():.1%}",
            f"{training_loss(run):.2f}",
            ", ".join(reached(run, loss) for loss in TARGETS),
        ])  # fmt: skip
    return found


def draw(cells: Cells, path: Path) -> None:
    """Draw the loss over rounds: a row for each data set, a column for each share of stragglers."""
    datasets, columns = list(dict.fromkeys(dataset for dataset, _, _ in cells)), len(STRAGGLERS)
    figure, axes = plt.subplots(
        len(datasets), columns, figsize=(3 * columns, 2.4 * len(datasets)), layout="constrained", squeeze=False,
        sharex=True, sharey="row",
    )  # fmt: skip
    for line, dataset in zip(axes, datasets, strict=True):
        for panel, stragglers in zip(line, STRAGGLERS, strict=True):
            for method, style in zip(METHODS, ("-", "--", "-"), strict=True):
                panel.plot(*curve(cells[dataset, stragglers, method], "loss"), style, label=method, lw=1.2)
            panel.set_title(f"synthetic({dataset}), {stragglers:.0%} stragglers", fontsize=9)
        line[0].set_ylabel("loss, central test set")
    for panel in axes[-1]:
        panel.set_xlabel("rounds")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), frameon=False, ncols=len(METHODS), loc="outside upper center"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def study(rounds: int, out: Path, docs: Path, datasets: Sequence[str] = DATASETS, **changes: Any) -> None:
    """Make the runs that are missing, the figure, and the table of docs/strategies.md."""
    cells = run_all(rounds, out, datasets, **changes)
    draw(cells, docs / "figures" / "fedprox.png")
    fill(docs / "strategies.md", "fedprox", f"\n{table(HEAD, rows(cells))}\n")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="Rounds of a run; the paper has 200.")
    parser.add_argument("--out", type=Path, default=DOCS.parent / "runs" / "fedprox", help="Where the run folders are.")
    parser.add_argument("--docs", type=Path, default=DOCS, help="Where figures/fedprox.png and strategies.md are.")
    asked = parser.parse_args()
    study(asked.rounds, asked.out, asked.docs)


if __name__ == "__main__":
    main()
