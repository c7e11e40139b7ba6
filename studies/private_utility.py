"""What example-level privacy costs in utility, on three tasks and on four real hospitals: docs/privacy.md, its figure.

    python studies/private_utility.py [--tasks medical,fraud,nlp] [--seeds 3] [--heart DIR] [--out runs/privacy]

Noise is simulated, so that the runs repeat. Runs that --out has are not made again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from pages import DOCS, Runs, fill, table

from core.config import RunConfig
from simulations.run import Run, preset

mpl.use("Agg")
import matplotlib.pyplot as plt

EPSILONS = (1.0, 2.0, 4.0, 8.0)
NONE = 0.0
METRICS = {"medical": "auroc", "fraud": "pr_auc", "nlp": "accuracy"}
# Chosen at epsilon 4 on seeds from 100 on, among eight or so each. Clipped gradients are shorter: rates are higher.
PRIVATE: dict[str, dict[str, Any]] = {
    "medical": {"server-examples": 60, "learning-rate": 0.3, "local-epochs": 1, "engine.cohort-size": 10},
    "fraud": {"server-examples": 500, "model": "logistic", "learning-rate": 0.3, "engine.cohort-size": 8},
    "nlp": {
        "optimizer": "sgd", "learning-rate": 4.0, "batch-size": 64, "privacy.clipping-norm": 0.5,
        "engine.cohort-size": 10,
    },
}  # fmt: skip
HEART = {"clients": 4, "privacy.clipping-norm": 1.1, "privacy.delta": 1e-4, "privacy.preprocessing": "uncovered"}
# A thousand authors of 34 notes each, a fifth of them in a round.
AUTHORS = {
    "clients": 1000, "sampled": 200, "rounds": 40, "local-epochs": 5, "optimizer": "sgd", "learning-rate": 2.0,
    "evaluated": 50, "evaluate-every": 40, "engine.cohort-size": 16, "partition.min-examples": 1,
}  # fmt: skip
HEART_SEEDS, HEART_RATES = range(42, 47), (0.001, 0.003)


def settings(task: str, epsilon: float) -> RunConfig:
    """Return a task's run at an epsilon; without privacy the preset's own, on the same data."""
    own = dict(PRIVATE[task])
    common = {"baselines": False, "engine.workers": 0}
    if epsilon == NONE:
        kept = {key: value for key, value in own.items() if key in ("server-examples", "engine.cohort-size")}
        return preset(task, {**common, **kept})
    level = {"privacy.level": "example", "privacy.epsilon": epsilon, "privacy.noise-seed": 0}
    return preset(task, {**common, **own, **level})


def heart(epsilon: float, rate: float, folder: Path) -> RunConfig:
    """Return a run of FLamby's four hospitals at an epsilon."""
    common = {"data-dir": str(folder), "baselines": False, "learning-rate": rate, "evaluate-every": 15}
    common |= {"engine.workers": 0, "engine.cohort-size": 4}
    if epsilon == NONE:
        return preset("heart", common)
    level = {"privacy.level": "example", "privacy.epsilon": epsilon, "privacy.noise-seed": 0}
    return preset("heart", {**common, **HEART, **level})


def authors(epsilon: float) -> RunConfig:
    """Return a run of many small clients that are hidden whole, at an epsilon."""
    common = {**AUTHORS, "baselines": False, "engine.workers": 0}
    if epsilon == NONE:
        # With updates that nothing clips the private rate diverges.
        return preset("nlp", {**common, "learning-rate": 0.5})
    level = {"privacy.level": "client", "privacy.epsilon": epsilon, "privacy.delta": 1e-4, "privacy.noise-seed": 0}
    return preset("nlp", {**common, **level})


def spread(values: list[float]) -> str:
    """Return a mean with the least and the largest."""
    return f"{fmean(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def draw(found: dict[str, dict[float, list[float]]], path: Path) -> None:
    """Draw each task's metric against epsilon, and as a line what it is without privacy."""
    figure, axes = plt.subplots(1, len(found), figsize=(3.6 * len(found), 3.2), squeeze=False)
    for panel, (task, by_epsilon) in zip(axes[0], found.items(), strict=True):
        epsilons = [epsilon for epsilon in by_epsilon if epsilon != NONE]
        means = [fmean(by_epsilon[epsilon]) for epsilon in epsilons]
        below = [m - min(by_epsilon[e]) for m, e in zip(means, epsilons, strict=True)]
        above = [max(by_epsilon[e]) - m for m, e in zip(means, epsilons, strict=True)]
        panel.errorbar(epsilons, means, [below, above], marker="o", capsize=3, label="example level")
        panel.axhline(fmean(by_epsilon[NONE]), color="0.5", linestyle="--", label="no privacy")
        panel.set(xscale="log", xticks=epsilons, xlabel="epsilon", title=f"{task}: {METRICS[task]}")
        panel.set_xticklabels([f"{epsilon:g}" for epsilon in epsilons])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def curves(runs: Runs, tasks: list[str], seeds: int) -> dict[str, dict[float, list[float]]]:
    """Return each task's metric by epsilon and seed."""
    found: dict[str, dict[float, list[float]]] = {}
    for task in tasks:
        for epsilon in (*EPSILONS, NONE):
            made: list[Run] = [runs(settings(task, epsilon).with_(seed=seed)) for seed in range(seeds)]
            values = [run.metrics[METRICS[task]] for run in made]
            found.setdefault(task, {})[epsilon] = values
            print(task, epsilon or "none", spread(values), sep="\t", flush=True)
    return found


def main() -> None:
    """Make what runs are missing and write the tables and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(PRIVATE))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--heart", type=Path, help="folder of the four hospitals' files; without it they are left out")
    parser.add_argument("--out", type=Path, default=Path("runs/privacy"))
    parser.add_argument("--page", type=Path, default=DOCS / "privacy.md")
    given = parser.parse_args()
    runs = Runs(given.out)
    found = curves(runs, given.tasks.split(","), given.seeds)
    head = ["task", *(f"epsilon {epsilon:g}" for epsilon in EPSILONS), "none"]
    rows = [[f"{task}, {METRICS[task]}", *map(spread, values.values())] for task, values in found.items()]
    fill(given.page, "privacy", table(head, rows))
    draw(found, given.page.parent / "figures" / "privacy.png")
    made = {e: [runs(authors(e).with_(seed=seed)) for seed in range(given.seeds)] for e in (*EPSILONS, NONE)}
    means = {e: spread([run.metrics["accuracy"] for run in own]) for e, own in made.items()}
    print("authors", *means.values(), sep="\t", flush=True)
    fill(given.page, "clients", table(head, [["nlp, 1000 clients, accuracy", *means.values()]]))
    if given.heart:
        lines = []
        for rate in HEART_RATES:
            made = {
                e: [runs(heart(e, rate, given.heart).with_(seed=s)) for s in HEART_SEEDS] for e in (*EPSILONS, NONE)
            }
            means = {e: [run.summary["clients_metrics"]["accuracy"]["mean"] for run in own] for e, own in made.items()}
            lines.append([f"learning rate {rate:g}", *map(spread, means.values())])
            print(*lines[-1], sep="\t", flush=True)
        fill(given.page, "heart", table(["mean accuracy of the hospitals", *head[1:]], lines))


if __name__ == "__main__":
    main()
