"""The benchmark: contestants take turns in one run, and what counts is the ratio of their round times in each turn.

    python perf/bench.py [--only a,b] [--against bare,pfl,flower] [--turns 5] [--short] [--out perf/results]

A contestant is a process of its own (contestants.py). Start-up is not counted: a round's time is taken in steady state,
the first one apart. Fedra runs in this process on one core (`fedra 1`) and with two Ray workers (`fedra 2`); the bare
loop and pfl-research use one core, Flower's simulation two.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
# Flower's launcher does not always come up on a busy machine.
ATTEMPTS = 3
CORES = {"fedra 1": 1, "fedra 2": 2, "bare": 1, "pfl": 1, "flower": 2}
# Rounds that take some seconds each turn: (Fedra, bare and pfl, Flower); 0 leaves Flower out.
ROUNDS = {
    "a": (120, 10, 4), "b": (30, 8, 3), "c": (5, 4, 3), "d": (120, 60, 6), "e": (8, 5, 3), "g": (4, 3, 0),
    "medical": (120, 60, 8), "fraud": (12, 6, 3), "nlp": (6, 4, 3), "app": (15, 0, 4),
}  # fmt: skip
# pfl-research has the networks of a to g only, and the app is Flower's: there is no loop to compare it with.
NO_PFL = ("medical", "fraud", "nlp", "app")
SHORT = {"a": (60, 6, 0), "b": (12, 4, 0), "c": (4, 3, 0)}


def timed(contestant: str, workload: str, rounds: int) -> dict[str, float]:
    """Return a contestant's clients per second in a process of its own."""
    name, _, workers = contestant.partition(" ")
    arguments = [name, workload, str(rounds), *([str(int(workers) if int(workers) > 1 else 0)] if workers else [])]
    command = [sys.executable, str(HERE / "contestants.py"), *arguments]
    for attempt in range(ATTEMPTS):
        done = subprocess.run(command, cwd=HERE.parent, check=attempt == ATTEMPTS - 1, capture_output=True, text=True)
        if not done.returncode:
            break
        print(f"{workload} {contestant} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}", flush=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return {"rate": found["clients"] / statistics.median(found["seconds"]), "cohort": found.get("cohort")}


def compare(workload: str, rounds: tuple[int, int, int], against: list[str], turns: int) -> dict[str, list[float]]:
    """Return every contestant's clients per second, turn by turn."""
    ours, theirs, flowers = rounds
    peers = 0 if workload in NO_PFL else theirs
    contestants = {"fedra 1": ours, "fedra 2": ours, "bare": theirs, "pfl": peers, "flower": flowers}
    rates: dict[str, list[float]] = {}
    for turn in range(turns):
        for name, count in contestants.items():
            # Flower takes minutes and is far away: three turns tell enough.
            if count and (name.startswith("fedra") or name in against) and (name != "flower" or turn < 3):
                result = timed(name, workload, count)
                rates.setdefault(name, []).append(result["rate"])
                print(f"{workload} turn {turn + 1} {name:8} {result['rate']:10.1f} clients/s", flush=True)
    return rates


def ratios(rates: dict[str, list[float]], ours: str, theirs: str, per_core: bool) -> tuple[float, float, float]:
    """Return median, least and largest ratio over the turns."""
    scale = CORES[theirs] / CORES[ours] if per_core else 1.0
    found = [scale * a / b for a, b in zip(rates[ours], rates[theirs], strict=False)]
    return statistics.median(found), min(found), max(found)


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """Return the results as a Markdown table."""
    lines = ["| workload | comparison | median | least | largest |", "|---|---|---|---|---|"]
    for workload, rates in results.items():
        rows = [("fedra 1", peer, True) for peer in ("bare", "pfl")] + [
            ("fedra 2", "bare", True), ("fedra 2", "fedra 1", False), ("fedra 1", "flower", False),
            ("fedra 2", "flower", False),
        ]  # fmt: skip
        for ours, theirs, per_core in rows:
            if ours in rates and theirs in rates:
                words = f"{ours} / {theirs}{' per core' if per_core else ''}"
                shown = " | ".join(f"{value:.2f}x" for value in ratios(rates, ours, theirs, per_core))
                lines.append(f"| {workload} | {words} | {shown} |")
        best = ", ".join(f"{name} {statistics.median(values):,.0f}" for name, values in rates.items())
        lines.append(f"| {workload} | clients per second: {best} | | | |")
    return "\n".join(lines)


def plot(results: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draw clients per second of everyone on every workload, on a logarithmic scale."""
    names = [name for name in CORES if any(name in rates for rates in results.values())]
    figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
    for i, name in enumerate(names):
        points = [(at, rates[name]) for at, rates in enumerate(results.values()) if name in rates]
        offset = (i - (len(names) - 1) / 2) * 0.8 / len(names)
        heights = [statistics.median(values) for _, values in points]
        axes.bar([at + offset for at, _ in points], heights, 0.75 / len(names), label=name)
    axes.set_yscale("log")
    axes.set_xticks(range(len(results)), list(results))
    axes.set_ylabel("clients per second")
    axes.legend(frameon=False, ncols=len(names), loc="upper center", bbox_to_anchor=(0.5, 1.15))
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run the benchmark and write results.json, table.md and plot.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="workloads, by comma")
    parser.add_argument("--against", default="bare,pfl,flower")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="three workloads against the bare loop, about two minutes")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    chosen = parser.parse_args()
    rounds = SHORT if chosen.short else ROUNDS
    wanted = chosen.only.split(",") if chosen.only else list(rounds)
    if unknown := set(wanted) - rounds.keys():
        parser.error(f"no workload {', '.join(sorted(unknown))}; there are {', '.join(rounds)}")
    against = ["bare"] if chosen.short else chosen.against.split(",")
    chosen.out.mkdir(parents=True, exist_ok=True)
    file = chosen.out / "results.json"
    results = json.loads(file.read_text()) if file.exists() and not chosen.short else {}
    for workload in wanted:
        results[workload] = compare(workload, rounds[workload], against, chosen.turns)
        file.write_text(json.dumps(results, indent=1) + "\n")
    (chosen.out / "table.md").write_text(table(results) + "\n")
    plot(results, chosen.out / "plot.png")
    print(table(results))


if __name__ == "__main__":
    main()
