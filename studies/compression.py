"""What compressed updates cost in accuracy and save in bytes, on handwritten digits: docs/compression.md, its figure.

    python studies/compression.py [--seeds 3] [--rounds 30] [--out runs/compression] [--page docs/compression.md]

The preset `digits` as it is: 20 clients who each know a few digits (dirichlet, alpha 0.3), a convolutional network of
9,930 parameters. Runs that --out has are not made again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
import numpy as np
from pages import DOCS, Runs, fill, table

from simulations.run import Run, preset

mpl.use("Agg")
import matplotlib.pyplot as plt

SCHEMES: dict[str, dict[str, Any]] = {
    "none": {},
    "fp16": {"kind": "fp16"},
    "int8": {"kind": "int8"},
    "int8, rotation": {"kind": "int8", "rotation": True},
    "int4": {"kind": "int4"},
    "int4, rotation": {"kind": "int4", "rotation": True},
    "top-k 0.1": {"kind": "top-k", "fraction": 0.1},
    "top-k 0.01": {"kind": "top-k", "fraction": 0.01},
}
CLIENTS, REACHED = 20, 0.9


def curves(runs: list[Run]) -> tuple[np.ndarray, np.ndarray]:
    """Return the MB that all clients have sent by the end of each round (rounds,), and accuracies (seeds, rounds)."""
    rows = [[json.loads(line) for line in (run.path / "rounds.jsonl").read_text().splitlines()] for run in runs]
    sent = np.cumsum([[row["uplink_bytes"] for row in own] for own in rows], axis=1) / 1e6
    return sent.mean(0), np.array([[row["central"]["accuracy"] for row in own] for own in rows])


def row(name: str, runs: list[Run], plain: list[Run]) -> list[str]:
    """Return a line of the table: accuracy, bytes a message, how many times fewer, rounds and MB until learnt."""
    final = [100 * run.metrics["accuracy"] for run in runs]
    sent, accuracies = curves(runs)
    size, whole = (fmean(run.summary["traffic"]["uplink_bytes"] for run in own) for own in (runs, plain))
    reached = np.flatnonzero(accuracies.mean(0) >= REACHED)
    return [
        name,
        f"{fmean(final):.1f} ({min(final):.1f}-{max(final):.1f})",
        f"{size / accuracies.shape[1] / CLIENTS:,.0f}",
        f"{whole / size:.1f}",
        f"{reached[0] + 1}" if len(reached) else "-",
        f"{sent[reached[0]]:.2f}" if len(reached) else "-",
    ]


def draw(found: dict[str, list[Run]], path: Path) -> None:
    """Draw accuracy against what all clients have sent."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, runs in found.items():
        sent, accuracies = curves(runs)
        axes.plot(sent, 100 * accuracies.mean(0), marker=".", markersize=4, linewidth=1.2, label=name)
    axes.set(xscale="log", xlabel="uplink of all clients, MB", ylabel="accuracy on the central test set, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})


def main() -> None:
    """Make what runs are missing and write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", default="/".join(SCHEMES), help="names with / between them")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("runs/compression"))
    parser.add_argument("--page", type=Path, default=DOCS / "compression.md")
    given = parser.parse_args()
    made, found = Runs(given.out), {}
    for name in ["none", *(name for name in given.schemes.split("/") if name != "none")]:
        settings = {
            "clients": CLIENTS, "rounds": given.rounds, "baselines": False, "engine.workers": 0,
            "engine.cohort-size": 4, **{f"compression.{key}": value for key, value in SCHEMES[name].items()},
        }  # fmt: skip
        found[name] = [made(preset("digits", {**settings, "seed": seed})) for seed in range(given.seeds)]
        print(*row(name, found[name], found["none"]), sep="\t", flush=True)
    head = [
        "compression", f"accuracy, % ({given.seeds} seeds: least-largest)", "bytes a message", "times fewer",
        f"rounds to {REACHED:.0%}", f"uplink MB to {REACHED:.0%}",
    ]  # fmt: skip
    fill(given.page, "compression", table(head, [row(name, runs, found["none"]) for name, runs in found.items()]))
    draw(found, given.page.parent / "figures" / "compression.png")


if __name__ == "__main__":
    main()
