"""When privacy's noise begins to cost accuracy: the table of docs/guides/privacy-plan.md.

    python studies/noise.py [--seeds 3] [--out runs/noise]     three minutes on two quiet cores

The noise on the mean update is as long as so many clipping norms. Clipping is adaptive, so that the norm stays the
median of the updates'. A run stands for the population that has this noise (privacy.population).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from statistics import fmean
from typing import Any

from pages import DOCS, Runs, fill, table

from core.config import RunConfig
from simulations.run import preset
from tasks import load
from tasks.base import build_model

LENGTHS = (0.1, 1.0, 3.0, 5.0, 10.0, 20.0)
# The noise multiplier of a population ten times as large as the run's.
TENFOLD = 10
RUNS: dict[str, dict[str, Any]] = {
    "medical": {"rounds": 20, "partition.alpha": 2.0, "partition.min-examples": 5, "standardise": "local"},
    "digits": {"rounds": 30},
}
COMMON = {"clients": 20, "sampled": 10, "sampling.kind": "poisson", "baselines": False, "engine.workers": 0}


def parameters(config: RunConfig) -> int:
    """Return how many numbers the model has."""
    return sum(p.numel() for p in build_model(load(config), 0).parameters())


def noisy(config: RunConfig, length: float) -> RunConfig:
    """Return the configuration with noise of this length: z sqrt(parameters) / (q population) clipping norms."""
    z = length * TENFOLD * config.count(config.sampled) / math.sqrt(parameters(config))
    private = {
        "privacy.level": "client", "privacy.clipping": "adaptive", "privacy.noise-multiplier": z,
        "privacy.population": TENFOLD * config.clients, "privacy.noise-seed": config.seed, "privacy.delta": 1e-5,
    }  # fmt: skip
    return RunConfig.of({**config.flat(), **private})


def main() -> None:
    """Make what runs are missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/noise"))
    given = parser.parse_args()
    made, rows = Runs(given.out), []
    for name, settings in RUNS.items():
        plain = [preset(name, {**COMMON, **settings, "seed": seed}) for seed in range(given.seeds)]
        columns = [plain, *([noisy(config, length) for config in plain] for length in LENGTHS)]
        accuracies = [fmean(made(config).metrics["accuracy"] for config in own) for own in columns]
        rows.append([f"{name}, {parameters(plain[0]):,} numbers", *(f"{100 * value:.1f}" for value in accuracies)])
        print(*rows[-1], sep="\t", flush=True)
    head = ["accuracy, %", "no privacy", *(f"{length:g}" for length in LENGTHS)]
    fill(DOCS / "guides" / "privacy-plan.md", "noise", table(head, rows))


if __name__ == "__main__":
    main()
