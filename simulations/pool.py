"""Who works: Ray actors (data in shared memory once per machine), or this process when there are no workers."""

from __future__ import annotations

import itertools
import math
import os
import socket
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

from flwr.app import Error, RecordDict
from flwr.common.constant import ErrorCode

from core.errors import InputError, RunError
from core.records import array_bytes
from simulations.worker import Job, Result, Worker

OBJECT_STORE_BYTES = 256 * 2**20
ATTEMPTS = 3
CONNECT_SECONDS = 3.0
START_SECONDS = 120.0
# What is smaller travels with its message: the way through the object store takes 4 ms, whatever the size.
INLINE_BYTES = 2 * 2**20
SMALL_BYTES = 64 * 2**10


class Pool(Protocol):
    """Takes jobs and gives results back in any order; the grid puts them in theirs."""

    workers: int
    """How many work side by side."""
    window: int
    """How many jobs to have submitted at once: enough that no worker ever waits for the server."""

    def put(self, content: RecordDict) -> Any:
        """Return a reference to a round's content, for `submit`."""
        ...

    def submit(self, job: Job, content: Any) -> int:
        """Return a ticket for the job's result."""
        ...

    def cancel(self, tickets: Collection[int]) -> None:
        """Forget the jobs that have not begun."""
        ...

    def wait(self, timeout_seconds: float | None) -> dict[int, Result]:
        """Return the results that are ready, at least one unless the time runs out or nothing is under way."""
        ...

    def close(self) -> None:
        """End every process that the pool started."""
        ...


class LocalPool:
    """One worker in this process: the same code under a debugger."""

    workers = 1
    window = 1

    def __init__(self, make_worker: Callable[[], Worker]) -> None:
        self._worker = make_worker()
        self._queue: deque[tuple[int, Job, RecordDict]] = deque()
        self._tickets = itertools.count()

    def put(self, content: RecordDict) -> Any:
        return content

    def cancel(self, tickets: Collection[int]) -> None:
        self._queue = deque(entry for entry in self._queue if entry[0] not in tickets)

    def submit(self, job: Job, content: Any) -> int:
        ticket = next(self._tickets)
        self._queue.append((ticket, job, content))
        return ticket

    def wait(self, timeout_seconds: float | None) -> dict[int, Result]:
        if not self._queue:
            return {}
        ticket, job, content = self._queue.popleft()
        return {ticket: self._worker.answer(job, content)}

    def close(self) -> None:
        self._queue.clear()


@dataclass
class _Task:
    ticket: int
    job: Job
    content: Any
    attempts: int = 0


class RayWorker(Worker):
    """A worker in a process of its own, which fetches a round's content once for all its jobs."""

    _fetched: tuple[Any, RecordDict | None] = (None, None)

    def answer(self, job: Job, content: RecordDict | list[Any]) -> Result:
        """Return the answers of the job's clients to the content, or to what a list of one reference holds."""
        if isinstance(content, list):
            import ray

            [reference] = content
            if self._fetched[0] != reference:
                self._fetched = (reference, ray.get(reference))
            content = cast(RecordDict, self._fetched[1])
        return super().answer(job, content)


class RayPool:
    """Ray actors. One that dies is replaced and its jobs run again; a job that kills three is answered with errors."""

    # Two jobs an actor: the next one's input is there when the first ends.
    IN_FLIGHT = 2

    def __init__(
        self,
        workers: int,
        address: str,
        worker_arguments: tuple[Any, ...],
        gpus: float | Literal["auto"] = 0.0,
        data_bytes: int = 0,
    ) -> None:
        """Start `workers` actors, each with a CPU and `gpus` GPUs (`auto` divides those there are), and their data."""
        import ray

        self._ray = ray
        self.workers, self.window = workers, 4 * self.IN_FLIGHT * workers
        self._started = not ray.is_initialized()
        if self._started:
            start_ray(ray, workers, address, data_bytes)
        # Large arguments (the federation) go into shared memory once and are read there by every actor.
        self._arguments = tuple(ray.put(argument) for argument in worker_arguments)
        self._gpus = _share(ray.cluster_resources().get("GPU", 0.0), workers) if gpus == "auto" else gpus
        self._actor_class = ray.remote(num_cpus=1, num_gpus=self._gpus, max_restarts=0, scheduling_strategy="SPREAD")(
            RayWorker
        )
        self._actors = [self._actor_class.remote(*self._arguments) for _ in range(workers)]
        self._busy: dict[Any, tuple[Any, _Task]] = {}
        self._queue: deque[_Task] = deque()
        self._tickets = itertools.count()
        try:
            ray.get([actor.ready.remote() for actor in self._actors], timeout=START_SECONDS)
        except ray.exceptions.GetTimeoutError:
            self.close()
            raise RunError(
                f"{workers} workers did not start in {START_SECONDS:.0f} s on a cluster with "
                f"{ray.cluster_resources().get('CPU', 0):.0f} CPUs and {ray.cluster_resources().get('GPU', 0):.0f} "
                f"GPUs; each needs 1 CPU and {self._gpus:g} GPUs; lower engine.workers"
            ) from None
        except ray.exceptions.RayActorError as error:
            # Said once and at once, instead of as the failure of every client of round 1.
            self.close()
            raise RunError(f"a worker cannot start: {_cause(error)}") from None

    def put(self, content: RecordDict) -> Any:
        # What is small travels faster with the job; inside a list Ray leaves a reference for the worker to fetch.
        return content if array_bytes(content) <= SMALL_BYTES else [self._ray.put(content)]

    def cancel(self, tickets: Collection[int]) -> None:
        self._queue = deque(task for task in self._queue if task.ticket not in tickets)

    def submit(self, job: Job, content: Any) -> int:
        task = _Task(next(self._tickets), job, content)
        self._queue.append(task)
        self._dispatch()
        return task.ticket

    def wait(self, timeout_seconds: float | None) -> dict[int, Result]:
        if not self._busy:
            return {}
        ready, _ = self._ray.wait(list(self._busy), num_returns=1, timeout=timeout_seconds)
        results: dict[int, Result] = {}
        for reference in ready:
            actor, task = self._busy[reference]
            try:
                results[task.ticket] = self._ray.get(reference)
                del self._busy[reference]
            except self._ray.exceptions.RayActorError:
                results |= self._replace(actor)
        self._dispatch()
        return results

    def close(self) -> None:
        self._busy.clear()
        self._queue.clear()
        for actor in self._actors:
            self._ray.kill(actor)
        if self._started:
            self._ray.shutdown()

    def _dispatch(self) -> None:
        load = dict.fromkeys(self._actors, 0)
        for actor, _ in self._busy.values():
            load[actor] += 1
        while self._queue and min(load.values()) < self.IN_FLIGHT:
            actor = min(load, key=load.__getitem__)
            task = self._queue.popleft()
            self._busy[actor.answer.remote(task.job, task.content)] = (actor, task)
            load[actor] += 1

    def _replace(self, dead: Any) -> dict[int, Result]:
        """Put a new actor in place of a dead one and its jobs back in the queue; give up on a job after ATTEMPTS."""
        if self._gpus and len(self._actors) > 1:
            # Where its GPU went with it, a new one would wait for ever: the others share the work.
            self._actors.remove(dead)
        else:
            # It asks for no CPU: where a whole machine went, there may be none left for it, and it would never start.
            self._actors[self._actors.index(dead)] = self._actor_class.options(num_cpus=0).remote(*self._arguments)
        results: dict[int, Result] = {}
        lost: list[_Task] = []
        # In the order in which it had them: it was at work on the first that it did not finish.
        for reference in [reference for reference, (actor, _) in self._busy.items() if actor is dead]:
            _, task = self._busy.pop(reference)
            try:
                results[task.ticket] = self._ray.get(reference)
            except self._ray.exceptions.RayActorError:
                lost.append(task)
        if lost:
            lost[0].attempts += 1
            if lost[0].attempts == ATTEMPTS:
                task = lost.pop(0)
                error = Error(ErrorCode.CLIENT_APP_CRASHED, f"the worker process died {ATTEMPTS} times on this cohort")
                results[task.ticket] = Result([([i], error) for i in range(len(task.job.nodes))], {})
        self._queue.extendleft(reversed(lost))
        return results


def _share(gpus: float, workers: int) -> float:
    """Return the share of the GPUs for each worker as Ray counts it: a fraction below 1, or whole ones."""
    if not gpus:
        raise InputError("engine.device=cuda, but Ray finds no GPU; set engine.device=cpu.")
    if workers <= gpus:
        return float(gpus // workers)
    # As many on each GPU as the fullest has, rounded down: together they must not ask for more than one.
    return math.floor(1000 / math.ceil(workers / gpus)) / 1000


def _cause(error: Exception) -> str:
    """Return the last line of a Ray error: what was raised in the actor, without the way there."""
    return str(error).strip().splitlines()[-1].strip()


def start_ray(ray: Any, workers: int, address: str, data_bytes: int = 0) -> None:
    """Start a small Ray on the loopback address without a dashboard, or join the cluster at `address`.

    The Ray that is started has room for `data_bytes` of the federation beside a round's models.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    common: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address:
        try:
            if address != "auto":
                # Ray itself would try for minutes.
                host, _, port = address.removeprefix("ray://").rpartition(":")
                socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
            ray.init(address=address, **common)
        except (OSError, ValueError) as error:
            raise InputError(
                f"engine.address={address}: no Ray cluster answers there ({error}); start one with "
                "`ray start --head` and give its HOST:PORT, or auto for one on this machine."
            ) from None
        return
    ray.init(
        # Not one that happens to run on this machine: Ray would join that, and refuse num_cpus.
        "local",
        num_cpus=workers,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES + data_bytes,
        _system_config={"max_direct_call_object_size": INLINE_BYTES},
        _node_ip_address="127.0.0.1",
        **common,
    )
