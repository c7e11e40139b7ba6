"""How Fedra scales: a million clients, many clients a round, thousands of rounds; memory of all processes together.

    python perf/scale.py clients     1,000,000 registered clients against 10,000, 10,000 a round
    python perf/scale.py cohort      memory of the server with 1,000 to 20,000 clients a round
    python perf/scale.py rounds      2,000 rounds: memory and Ray's object store over time

Workload (a) on two Ray workers. Memory is the proportional set size: shared pages count once.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

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
    with tempfile.TemporaryDirectory() as out, Watch() as watch:
        settings = config("a", rounds, out=out, engine__workers=2, engine__cohort_size=128, **changes)
        simulate(settings, on_round=lambda _: ends.append(time.perf_counter()))
    every = max(1, len(watch.all) // 200)
    began = watch.all[0][0]
    return {
        "round_seconds": [round(b - a, 4) for a, b in itertools.pairwise(ends)],
        "peak_bytes": max(size for _, size in watch.all),
        "server_peak_bytes": max(size for _, size in watch.server),
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
    return dict(found)


def rounds() -> dict[str, Any]:
    """Return memory over 2,000 rounds."""
    found = run(2000)
    sizes = [size for _, size in found["over_time"]]
    fifth = len(sizes) // 5
    early, late = statistics.median(sizes[fifth : 2 * fifth]), statistics.median(sizes[-fifth:])
    print(f"memory after a fifth of the time {early / 2**20:.0f} MiB, at the end {late / 2**20:.0f} MiB", flush=True)
    return found


if __name__ == "__main__":
    [what] = sys.argv[1:]
    RESULTS.mkdir(exist_ok=True)
    outcome = {"clients": clients, "cohort": cohort, "rounds": rounds}[what]()
    (RESULTS / f"scale_{what}.json").write_text(json.dumps(outcome) + "\n")
