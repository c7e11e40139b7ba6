"""Accuracy against virtual seconds: rounds, over-selection, deadlines and runs without rounds, on the same devices.

.venv/bin/python studies/virtual_time.py        docs/figures/virtual_time.png and the table of docs/virtual-time.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from pages import fill

from simulations.run import preset, simulate

ROOT = Path(__file__).parents[1]
TARGET = 0.9
COMMON: dict[str, Any] = {
    "model": "mlp", "clients": 40, "sampled": 10, "baselines": False, "engine.workers": 0, "engine.cohort-size": 10,
    "devices.kind": "lognormal", "devices.compute-spread": 1.0, "devices.seconds-per-example": 0.01,
}  # fmt: skip
# Each gets enough rounds for about the same virtual time.
WAYS: dict[str, dict[str, Any]] = {
    "rounds": {"rounds": 60},
    "over-selection 1.5": {"rounds": 110, "sampling.over-selection": 1.5},
    "deadline, partial work": {"rounds": 160, "devices.deadline-seconds": 1.0, "faults.late": "partial"},
    "oort": {"rounds": 110, "sampling.kind": "oort"},
    "fedbuff": {"strategy": "fedbuff", "rounds": 300, "strategy-options.buffer-size": 5, "evaluate-every": 5},
    "fedasync": {"strategy": "fedasync", "rounds": 1500, "evaluate-every": 25},
}


def main() -> None:
    """Run every way, or read it where it is complete; draw, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/virtual-time", help="Folder for run folders.")
    parser.add_argument("--rounds", type=float, default=1.0, help="Factor on all rounds.")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="Where figure and table go.")
    given = parser.parse_args()
    curves = {name: curve(name, own, Path(given.out), given.rounds) for name, own in WAYS.items()}
    draw(curves, given.docs / "figures" / "virtual_time.png")
    rows = ["| way | seconds to 90 % accuracy | answers trained for it | accuracy at the end |", "|---|---|---|---|"]
    for name, rounds in curves.items():
        reached = next((row for row in rounds if row["central"]["accuracy"] >= TARGET), None)
        trained = sum(row["sampled"] for row in rounds if reached and row["round"] <= reached["round"])
        to = f"{reached['virtual_seconds']:.0f} | {trained}" if reached else "not reached |"
        rows.append(f"| {name} | {to} | {rounds[-1]['central']['accuracy']:.3f} |")
    print("\n".join(rows))
    page = given.docs / "virtual-time.md"
    if page.is_file():
        fill(page, "virtual-time", "\n".join(rows))


def curve(name: str, own: dict[str, Any], out: Path, factor: float) -> list[dict[str, Any]]:
    """Return the run's evaluated rounds, with every round's sampled clients added up."""
    settings = {**COMMON, **own, "rounds": max(5, round(own["rounds"] * factor))}
    folder = out / f"{name.replace(' ', '-').replace(',', '')}-{settings['rounds']}"
    done = [path for path in folder.glob("*/summary.json") if json.loads(path.read_text())["status"] == "completed"]
    path = done[0].parent if done else simulate(preset("digits", {**settings, "out": str(folder)})).path
    rows, sampled = [], 0
    for line in (path / "rounds.jsonl").read_text().splitlines():
        row = json.loads(line)
        sampled += row["sampled"]
        if "central" in row:
            rows.append({**row, "sampled": sampled})
            sampled = 0
    return rows


def draw(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw accuracy against virtual seconds."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    shortest = min(rows[-1]["virtual_seconds"] for rows in curves.values())
    for name, rows in curves.items():
        axis.plot([r["virtual_seconds"] for r in rows], [r["central"]["accuracy"] for r in rows], label=name, lw=1.2)
    axis.set(xlabel="virtual seconds", ylabel="accuracy on the central test set", xlim=(0, shortest), ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
