"""FedProx's experiment: stragglers dropped, taken with what they did, and held near. Li et al., MLSys 2020, figure 1.

    python studies/fedprox.py [--rounds 200] [--seeds 2,7,9] [--out runs/fedprox] [--docs docs]

Draws docs/figures/fedprox.png and writes the table of docs/strategies.md. Runs that `--out` has are not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from itertools import product
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
SEEDS = (2, 7, 9)
"""Three of the four from 0 to 9 whose largest client is smallest: in a round everybody waits for the largest."""
TARGETS = (1.0, 0.7)
LAST = 20
"""Rounds at the end over which the table takes means: from round to round the loss jumps."""
HEAD = (
    "synthetic", "answers a round", "test loss (least-most)", "least in seeds", "swing", "accuracy, % (least-most)",
    "training loss", "rounds to 1.0, 0.7",
)  # fmt: skip
Cells = dict[tuple[str, float, str], list[Run]]
"""A run for each seed, by data set, share of stragglers and method."""


def settings(dataset: str, stragglers: float, method: str, rounds: int, seed: int, **changes: Any) -> RunConfig:
    """Return the preset `synthetic`, which has the paper's settings, with one cell's data, stragglers and method."""
    # Five clients at a time are as fast as any number here, and need not be measured in every run.
    fixed = {"seed": seed, "baselines": False, "evaluate-every": 2, "engine.workers": 0, "engine.cohort-size": 5}
    own = {"dataset": dataset, "faults.stragglers": stragglers, "rounds": rounds}
    # Without stragglers nobody is late.
    return without_idle(preset("synthetic", {**fixed, **own, **METHODS[method]}, **changes))


def run_all(rounds: int, seeds: Sequence[int], out: Path, datasets: Sequence[str] = DATASETS, **changes: Any) -> Cells:
    """Return every run; those that `out` has already are not made again."""
    runs, cells = Runs(out), {}
    for dataset, stragglers, method in product(datasets, STRAGGLERS, METHODS):
        # Where nobody is late, nothing sets FedProx with mu = 0 apart from FedAvg.
        made = "FedAvg" if method == "FedProx, mu = 0" and not stragglers else method
        began = time.perf_counter()
        cells[dataset, stragglers, method] = [
            runs(settings(dataset, stragglers, made, rounds, seed, **changes)) for seed in seeds
        ]
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


def reached(run: Run, loss: float) -> float:
    """Return the first round evaluated at that loss or less, infinity where there is none."""
    rounds, values = curve(run, "loss")
    below = rounds[values <= loss]
    return float(below[0]) if len(below) else math.inf


def spread(values: Sequence[float], form: str) -> str:
    """Return the mean over seeds with the least and the most of them."""
    mean, least, most = (format(float(f(values)), form) for f in (np.mean, min, max))
    return f"{mean} ({least}-{most})" if len(values) > 1 else mean


def rows(cells: Cells) -> list[list[str]]:
    """Return the table: a row for each data set, share of stragglers and method."""
    losses = {cell: [float(at_the_end(run, "loss").mean()) for run in runs] for cell, runs in cells.items()}
    found = []
    for cell, runs in cells.items():
        dataset, stragglers, method = cell
        least = np.min([losses[dataset, stragglers, other] for other in METHODS], axis=0)
        answers = [np.mean([row["sampled"] - row["lost"] for row in rows_of(run)]) for run in runs]
        medians = [float(np.median([reached(run, loss) for run in runs])) for loss in TARGETS]
        found.append([
            f"({dataset}), {stragglers:.0%}, {method}",
            f"{np.mean(answers):.1f}",
            spread(losses[cell], ".2f"),
            f"{int((losses[cell] <= least).sum())} of {len(runs)}",
            f"{np.mean([np.ptp(at_the_end(run, 'loss')) for run in runs]):.2f}",
            spread([100 * at_the_end(run, "accuracy").mean() for run in runs], ".1f"),
            f"{np.mean([training_loss(run) for run in runs]):.2f}",
            ", ".join(f"{median:.0f}" if math.isfinite(median) else "never" for median in medians),
        ])  # fmt: skip
    return found


def draw(cells: Cells, path: Path) -> None:
    """Draw the loss over rounds, mean and least to most of seeds: a row a data set, a column a share of stragglers."""
    datasets, columns = list(dict.fromkeys(dataset for dataset, _, _ in cells)), len(STRAGGLERS)
    figure, axes = plt.subplots(
        len(datasets), columns, figsize=(3 * columns, 2.4 * len(datasets)), layout="constrained", squeeze=False,
        sharex=True, sharey="row",
    )  # fmt: skip
    for line, dataset in zip(axes, datasets, strict=True):
        for panel, stragglers in zip(line, STRAGGLERS, strict=True):
            for method, style in zip(METHODS, ("-", "--", "-"), strict=True):
                curves = [curve(run, "loss") for run in cells[dataset, stragglers, method]]
                rounds, values = curves[0][0], np.stack([values for _, values in curves])
                [drawn] = panel.plot(rounds, values.mean(0), style, label=method, lw=1.2)
                panel.fill_between(rounds, values.min(0), values.max(0), color=drawn.get_color(), alpha=0.15, lw=0)
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


def study(
    rounds: int, seeds: Sequence[int], out: Path, docs: Path, datasets: Sequence[str] = DATASETS, **changes: Any
) -> None:
    """Make the runs that are missing, the figure, and the table of docs/strategies.md."""
    cells = run_all(rounds, seeds, out, datasets, **changes)
    draw(cells, docs / "figures" / "fedprox.png")
    fill(docs / "strategies.md", "fedprox", f"\n{table(HEAD, rows(cells))}\n")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="Rounds of a run, as many as in the paper.")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="Seeds, with commas.")
    parser.add_argument("--out", type=Path, default=DOCS.parent / "runs" / "fedprox", help="Where the run folders are.")
    parser.add_argument("--docs", type=Path, default=DOCS, help="Where figures/fedprox.png and strategies.md are.")
    asked = parser.parse_args()
    study(asked.rounds, [int(seed) for seed in asked.seeds.split(",")], asked.out, asked.docs)


if __name__ == "__main__":
    main()
