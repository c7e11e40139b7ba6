"""What a strategy's round costs against FedAvg's, and the median against Flower's: interleaved, as ratios.

python perf/shelf.py rounds         a round of all 1000 clients of workload (a), and its kernel, strategy by strategy
python perf/shelf.py rounds 100     a round of 100 of them: what the server does weighs more
python perf/shelf.py median         20 clients' updates of 1,000,000 numbers
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.supercore.task_identity import TaskIdentity

sys.path.insert(0, str(Path(__file__).parents[1]))

from client import train
from core.records import CLIENTS, to_arrays, to_numpy
from perf.workloads import config
from server.session import Session
from simulations.run import simulate
from strategies.median import FedMedian

TURNS, ROUNDS = 7, 6
STRATEGIES = ("fedavg", "fedprox", "scaffold", "feddyn", "fednova", "mimelite", "ditto", "apfl", "qfedavg")


def rounds(sampled: str = "1000") -> None:
    """Print each strategy's time a round, and in the cohort kernel, over FedAvg's: median, least and most of the turns.

    The kernel is the clients' local updates, a cohort of 100 at a time; a round is all that happens in it. All of it
    takes place in one thread, whose CPU time is counted: what else a machine does moves that little.
    """
    out, clock = tempfile.mkdtemp(), _Clock()
    found: dict[str, dict[str, list[float]]] = {what: {name: [] for name in STRATEGIES} for what in ("round", "kernel")}
    for _ in range(TURNS):
        for name in STRATEGIES:
            changes = {"strategy": name, "sampled": int(sampled), "out": out}
            simulate(config("a", ROUNDS, **changes, engine__workers=0, engine__cohort_size=100))
            for what, own in clock.take().items():
                # The first round loads data and imports.
                found[what][name].append(statistics.median(own[1:]))
    for name in STRATEGIES:
        said = []
        for what, own in found.items():
            ratios = sorted(a / b for a, b in zip(own[name], own["fedavg"], strict=True))
            said.append(
                f"{what} {statistics.median(own[name]) * 1000:7.1f} ms, {statistics.median(ratios):5.2f}x FedAvg's "
                f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
            )
        print(f"{name:10s} {'   '.join(said)}", flush=True)


class _Clock:
    """The CPU seconds of each round of a run in this process, and those of them in clients' local updates."""

    def __init__(self) -> None:
        self._began, self._kernel = 0.0, 0.0
        self._rounds: dict[str, list[float]] = {"round": [], "kernel": []}
        self._train_each, self._end_of_round = train.train_each, Session._end_of_round
        train.train_each = self._local_update  # type: ignore[assignment]
        Session._end_of_round = lambda *given: self._end(*given)  # type: ignore[method-assign]

    def take(self) -> dict[str, list[float]]:
        """Return the seconds since the last call."""
        taken, self._rounds = self._rounds, {"round": [], "kernel": []}
        return taken

    def _local_update(self, *given: Any) -> Any:
        began = time.thread_time()
        try:
            return self._train_each(*given)
        finally:
            self._kernel += time.thread_time() - began

    def _end(self, session: Session, counted: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Count a round; evaluating and saving it are no part of it."""
        if counted:
            self._rounds["round"].append(time.thread_time() - self._began)
            self._rounds["kernel"].append(self._kernel)
        try:
            return self._end_of_round(session, counted, arrays)
        finally:
            self._began, self._kernel = time.thread_time(), 0.0


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
    if len(sys.argv) < 2 or sys.argv[1] not in ("rounds", "median"):
        raise SystemExit(__doc__)
    {"rounds": rounds, "median": median}[sys.argv[1]](*sys.argv[2:])
