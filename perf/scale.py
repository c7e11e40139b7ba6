"""How Fedra scales: a million clients, many clients a round, thousands of rounds; memory of all processes together.

    python perf/scale.py clients     1,000,000 registered clients against 10,000, 10,000 a round
    python perf/scale.py cohort      memory of the server with 1,000 to 20,000 clients a round
    python perf/scale.py rounds      2,000 rounds: memory and Ray's object store over time
    python perf/scale.py startup     seconds from `fedra run` to the end of round 1

Workload (a) on two Ray workers. Memory is the proportional set size: shared pages count once. Each writes its numbers
and, but for the first and the last, a plot into perf/results/.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
RESULTS = Path(__file__).parent / "results"


def family() -> list[int]:
    """Return this process and everything it started, Ray's processes included."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [os.getpid()]
    for parent in found:
        found += [child for child, of in parents.items() if of == parent]
    return found


def memory_bytes(process: int) -> int:
    """Return a process's proportional set size."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


class Watch:
    """Samples the memory of all processes, and of this one, every half second."""

    def __init__(self) -> None:
        self.all: list[tuple[float, int]] = []
        self.server: list[tuple[float, int]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            now, own = time.perf_counter(), memory_bytes(os.getpid())
            self.server.append((now, own))
            self.all.append((now, own + sum(map(memory_bytes, family()[1:]))))


def run(rounds: int, **changes: object) -> dict[str, Any]:
    """Run workload (a) and return round seconds and the largest memory, in bytes."""
    from perf.workloads import config
    from simulations.run import simulate

    ends: list[float] = []
    store: list[tuple[int, float]] = []

    def on_round(row: dict[str, Any]) -> None:
        ends.append(time.perf_counter())
        if len(ends) % 25 == 0:
            import ray

            # Ray's own count; it reports about once a second.
            room, free = ray.cluster_resources(), ray.available_resources()
            store.append((len(ends), room["object_store_memory"] - free.get("object_store_memory", 0.0)))

    with tempfile.TemporaryDirectory() as out, Watch() as watch:
        settings = config("a", rounds, out=out, engine__workers=2, engine__cohort_size=128, **changes)
        simulate(settings, on_round=on_round)
    every = max(1, len(watch.all) // 200)
    began = watch.all[0][0]
    return {
        "round_seconds": [round(b - a, 4) for a, b in itertools.pairwise(ends)],
        "peak_bytes": max(size for _, size in watch.all),
        "server_peak_bytes": max(size for _, size in watch.server),
        "object_store_bytes": store,
        "over_time": [(round(at - began, 1), size) for at, size in watch.all[::every]],
        "server_over_time": [(round(at - began, 1), size) for at, size in watch.server[::every]],
    }


def clients() -> dict[str, Any]:
    """Compare rounds of 10,000 clients of a million with those of ten thousand, taking turns."""
    found: dict[str, list[dict[str, Any]]] = {"1000000": [], "10000": []}
    for _ in range(3):
        for registered in (1_000_000, 10_000):
            result = run(6, clients=registered, sampled=10_000, evaluated=100)
            found[str(registered)].append(result)
            middle, peak = statistics.median(result["round_seconds"][:-1]), result["peak_bytes"] / 2**30
            print(f"{registered:>9,} clients: round {middle:.2f} s, peak {peak:.2f} GiB", flush=True)
    return dict(found)


def cohort() -> dict[str, Any]:
    """Return the server's memory for growing numbers of clients a round."""
    found = {}
    for sampled in (1_000, 5_000, 20_000):
        found[str(sampled)] = result = run(4, clients=100_000, sampled=sampled, evaluated=100)
        print(f"{sampled:>6,} a round: server {result['server_peak_bytes'] / 2**20:.0f} MiB", flush=True)
    points = {"server": "server_peak_bytes", "all processes": "peak_bytes"}
    lines = {name: [(int(sampled), result[key]) for sampled, result in found.items()] for name, key in points.items()}
    plot(lines, "clients a round", "scale_cohort.png")
    return dict(found)


def rounds() -> dict[str, Any]:
    """Return memory over 2,000 rounds."""
    found = run(2000)
    sizes = [size for _, size in found["over_time"]]
    fifth = len(sizes) // 5
    early, late = statistics.median(sizes[fifth : 2 * fifth]), statistics.median(sizes[-fifth:])
    print(f"memory after a fifth of the time {early / 2**20:.0f} MiB, at the end {late / 2**20:.0f} MiB", flush=True)
    lines = {"all processes": found["over_time"], "server": found["server_over_time"]}
    plot(lines, "seconds", "scale_rounds.png", store=found["object_store_bytes"])
    return found


def startup() -> dict[str, Any]:
    """Return seconds from the command to the end of round 1 and of the run, in process and with two Ray workers."""
    command = [str(Path(sys.executable).parent / "fedra"), "run", "medical", "baselines=false", "rounds=2"]
    found: dict[str, list[tuple[float, float]]] = {"0": [], "2": []}
    # The first turn measures the cohort size, which is then remembered.
    for _ in range(4):
        for workers, seconds in found.items():
            with tempfile.TemporaryDirectory() as out:
                began = time.perf_counter()
                run = subprocess.Popen(
                    [*command, f"engine.workers={workers}", "--out", out], stdout=subprocess.PIPE, text=True
                )
                assert run.stdout is not None
                lines = iter(run.stdout)
                next(line for line in lines if line.startswith("round 1/"))
                first = time.perf_counter() - began
                list(lines)
                run.wait()
            seconds.append((round(first, 2), round(time.perf_counter() - began, 2)))
            print(f"{workers} workers: round 1 after {first:.1f} s, all {seconds[-1][1]:.1f} s", flush=True)
    return dict(found)


def plot(
    lines: dict[str, list[tuple[float, int]]], what: str, name: str, store: list[tuple[int, float]] | None = None
) -> None:
    """Draw memory in MiB over something; beside it Ray's object store over rounds."""
    figure, axes = plt.subplots(
        1, 2 if store else 1, figsize=(8 if store else 5, 3), layout="constrained", squeeze=False
    )
    for label, points in lines.items():
        axes[0, 0].plot([at for at, _ in points], [size / 2**20 for _, size in points], label=label, marker=".", ms=3)
    axes[0, 0].set(xlabel=what, ylabel="memory, MiB", ylim=(0, None))
    axes[0, 0].legend(frameon=False)
    if store:
        axes[0, 1].plot([at for at, _ in store], [size / 2**20 for _, size in store])
        axes[0, 1].set(xlabel="rounds", ylabel="Ray's object store, MiB", ylim=(0, None))
    figure.savefig(RESULTS / name, dpi=100)


if __name__ == "__main__":
    measures = {"clients": clients, "cohort": cohort, "rounds": rounds, "startup": startup}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=measures)
    what = parser.parse_args().what
    RESULTS.mkdir(exist_ok=True)
    outcome = measures[what]()
    (RESULTS / f"scale_{what}.json").write_text(json.dumps(outcome) + "\n")
