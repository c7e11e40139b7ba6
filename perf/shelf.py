"""What a strategy's round costs against FedAvg's, and the median against Flower's: interleaved, as ratios.

python perf/shelf.py rounds     a round of 100 of 1000 clients of workload (a), strategy by strategy
python perf/shelf.py median     20 clients' updates of 1,000,000 numbers
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.supercore.task_identity import TaskIdentity

sys.path.insert(0, str(Path(__file__).parents[1]))

from core.records import CLIENTS, to_arrays, to_numpy
from perf.workloads import config
from simulations.run import simulate
from strategies.median import FedMedian

TURNS = 7
STRATEGIES = ("fedavg", "fedprox", "scaffold", "feddyn", "fednova", "mimelite", "ditto", "apfl", "qfedavg")


def rounds() -> None:
    """Print each strategy's seconds a round over FedAvg's: median, least and most of the turns."""
    out = tempfile.mkdtemp()
    seconds: dict[str, list[float]] = {name: [] for name in STRATEGIES}
    for _ in range(TURNS):
        for name in STRATEGIES:
            times: list[float] = []
            changes = {"strategy": name, "out": out, "engine__workers": 0, "engine__cohort_size": 100}
            simulate(config("a", 6, **changes), on_round=lambda row, times=times: times.append(row["seconds"]))
            # The first round loads data and imports.
            seconds[name].append(statistics.median(times[1:]))
    for name, own in seconds.items():
        ratios = sorted(a / b for a, b in zip(own, seconds["fedavg"], strict=True))
        print(f"{name:10s} {statistics.median(own) * 1000:7.1f} ms  {statistics.median(ratios):.2f}x FedAvg"
              f" ({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)  # fmt: skip


def median() -> None:
    """Print how many times as fast our FedMedian aggregates as Flower's, and whether the output is equal."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    values = np.random.default_rng(0).standard_normal((20, 1_000_000)).astype(np.float32)

    def replies() -> list[Message]:
        out = []
        for client, row in enumerate(values):
            content = RecordDict({
                "arrays": to_arrays({"w": row}), "metrics": MetricRecord({"num-examples": 1}),
                CLIENTS: ConfigRecord({"client": [client]}),
            })  # fmt: skip
            out.append(Message(content, reply_to=Message(RecordDict(), client + 2, "train")))
        return out

    def timed(rule: Any) -> tuple[float, np.ndarray]:
        given = replies()
        began = time.perf_counter()
        arrays, _ = rule.aggregate_train(1, given)
        return time.perf_counter() - began, to_numpy(arrays["w"])

    ratios = []
    for _ in range(TURNS):
        theirs, a = timed(flower.FedMedian())
        ours, b = timed(FedMedian())
        ratios.append(theirs / ours)
        print(
            f"Flower {theirs * 1000:.0f} ms, Fedra {ours * 1000:.0f} ms, equal: {a.tobytes() == b.tobytes()}",
            flush=True,
        )
    ratios.sort()
    print(f"median {statistics.median(ratios):.1f}x ({ratios[0]:.1f} to {ratios[-1]:.1f})")


if __name__ == "__main__":
    {"rounds": rounds, "median": median}[sys.argv[1]]()
