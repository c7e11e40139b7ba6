"""One run from its start (or its last checkpoint) to its summary: Flower's loop drives, the end of a round is here."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import Strategy

from core import records
from core.config import RunConfig
from core.data import Split
from core.devices import devices_of
from core.errors import RunError
from core.metrics import HIGHER_IS_BETTER
from core.seeding import seed_globals
from core.server_side import ServerSide
from reports.page import write_report
from server import checkpoint as checkpoints
from server.answers import Answers
from server.build import build_strategy
from server.collecting import few_to_collect
from server.evaluate import Description, Evaluation, Evaluator, describe
from server.malice import Malice
from server.observe import NAMED, Observed, ObservedGrid
from server.privacy import Privacy
from server.recorder import Clock, RunFolder
from server.saving import restore, save
from server.selection import Selection
from server.summary import summarise
from server.virtual import VirtualClock
from strategies import client_half, makes_partial_means
from tasks import load, standardise
from tasks.base import Task, build_model
from tasks.source import federation_of

# Hears of every finished round; a sentence that it returns ends the run there and says why.
OnRound = Callable[[dict[str, Any]], str | None]


class _StopEarly(Exception):  # noqa: N818 (it is not an error)
    """Ends Flower's loop before its last round."""


class Session:
    """The state of a run between its rounds."""

    def __init__(self, grid: ObservedGrid, config: RunConfig, folder: RunFolder, on_round: OnRound | None) -> None:
        self.grid, self.config, self.folder, self.on_round = grid, config, folder, on_round
        self.task: Task = load(config)
        self.strategy: Strategy = build_strategy(config)
        self.model = build_model(self.task, config.seed)
        self.arrays = records.to_arrays(records.travelling(self.model))
        self.grid.config = config
        self.grid.running = self.arrays.keys() - dict(self.model.named_parameters()).keys()
        self.best: dict[str, Any] | None = None
        self.last: dict[str, Any] = {}
        self.baselines: dict[str, Any] | None = None
        self.stopped_by = ""
        self.done = 0
        self.steady = {"clients": 0, "seconds": 0.0}
        self.traffic = {"uplink_bytes": 0, "downlink_bytes": 0}
        self.answers = Answers()
        self.virtual: VirtualClock | None = None
        self.virtual_before: float | None = None
        self.clock = Clock()
        self.evaluate: Evaluator | None = None
        self.malice = Malice(config)
        self.privacy = Privacy(config, self.task, folder.path)
        self.selection = Selection(config)
        self.checkpoints = checkpoints.Writer(folder.checkpoints)
        # A resume that is refused must leave the folder as it is, so it is refused here and not in `run`.
        self.saved = folder.last_checkpoint()
        if self.saved is not None:
            restore(self, self.saved)
        self.privacy.remind(self.grid)

    def run(self) -> None:
        """Train all remaining rounds; `NothingLearntError` where none of all rounds made a new model."""
        self._train()
        self.answers.check(self.done)
        self.privacy.check()

    def _train(self) -> None:
        about = self._describe()
        if self.done >= self.config.rounds or self._should_stop():
            return
        if reason := self.privacy.spent(self.done + 1):
            self.stopped_by = reason
            return
        # Elsewhere than in the engine every client answers for itself, and its update travels as it is encoded.
        whole = self.privacy.needs_each or self.grid.secure is not None
        partial = makes_partial_means(self.config) and self.grid.numbered and not whole
        config: dict[str, Any] = {records.PARTIAL_MEAN: partial, **about.config(), **self.privacy.config()}
        if self.saved is not None:
            checkpoints.continue_from(self.strategy, self.saved)
        seed_globals(self.config.seed, "round", self.done + 1)
        self.grid.take()
        self._round_began = time.perf_counter()
        with contextlib.suppress(_StopEarly), few_to_collect():
            self.strategy.start(
                self.grid,
                initial_arrays=self.arrays,
                num_rounds=self.config.rounds - self.done,
                timeout=self.config.timeout_seconds,
                train_config=ConfigRecord(config),
                evaluate_config=ConfigRecord(config),
                evaluate_fn=self._end_of_round,
            )

    def finish(self, status: str, error: str) -> dict[str, Any]:
        """Write the summary, the model and the report; return the summary."""
        self.checkpoints.close()
        kept = self.best if self.config.keep == "best" and self.best else {"arrays": self.arrays, **self.last}
        summary = summarise(self, kept, status, error)
        if self.privacy.canaries is not None:
            self.folder.write_json("canaries.json", self.privacy.canaries.findings())
        self.folder.finish(records.in_dtypes_of(kept["arrays"], records.travelling(self.model)), summary)
        try:
            write_report(self.folder.path)
        except Exception:
            # The page is made from the files; a fault in it must not hide how the run ended.
            logging.getLogger("fedra").exception(
                "report.html could not be written; try: fedra report %s", self.folder.path
            )
        return summary

    def _describe(self) -> Description:
        about = describe(self.grid, self.config, self.task)
        self.grid.order_by(about.order)
        self.folder.write_json("heterogeneity.json", about.heterogeneity(self.task))
        if about.constants:
            self.folder.write_json("constants.json", about.constants)
        central = federation_of(self.config).central
        half = client_half(self.config)
        server = ServerSide(
            config=self.config,
            fresh_model=lambda seed: build_model(self.task, seed),
            initial=records.travelling(build_model(self.task, self.config.seed)),
            loss=self.task.loss,
            data=self._own_examples(about),
            devices=devices_of(self.config),
            sizes=about.training_sizes(self.config.clients),
            client_of=self.grid.client_of,
            sends=half.sends(self.model, half.options),
        )
        if self.grid.secure is not None:
            self.grid.secure.sends = server.sends
        self.virtual = VirtualClock(self.config, server, self.virtual_before)
        self.grid.before_training = self.virtual.set_deadline
        self.grid.private = lambda taken: self.privacy.pay(self.done + 1, taken)
        if self.virtual.seconds is not None:
            self.grid.virtual_seconds = self.virtual.seconds_of
        if hasattr(self.strategy, "set_up"):
            self.strategy.set_up(server)
        for_evaluation = getattr(self.strategy, "for_evaluation", None)
        self.evaluate = Evaluator(self.grid, self.config, self.task, central, about, for_evaluation)
        # Privacy sees what the strategy asks of the clients that were drawn, and so stands nearer to it.
        self.privacy.stand_before(self.strategy, server)
        self.selection.stand_before(self.strategy, self.grid, server, self.evaluate)
        return about

    def _own_examples(self, about: Description) -> Split | None:
        """Return the server's own examples, standardised as the central test set is."""
        own = federation_of(self.config).server
        return Split(standardise.apply(own.x, about.constants), own.y) if own and about.constants else own

    def _end_of_round(self, counted: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Evaluate, record and checkpoint: Flower calls this before its first round and after each."""
        if counted == 0:
            return None
        seconds = time.perf_counter() - self._round_began
        observed = self.grid.take()
        number = self.done + 1
        self._check(observed, arrays, number)
        if self.grid.running and arrays is not self.arrays and makes_partial_means(self.config):
            # In place: Flower's loop goes on with this record. An adaptive server step on a variance may be negative.
            means = {name: torch.from_numpy(mean) for name, mean in observed.running.mean().items()}
            arrays.update(records.in_dtypes_of(records.to_arrays(means), {name: self.arrays[name] for name in means}))
        clients = len(observed.clients["client"])
        row: dict[str, Any] = {
            "round": number,
            "seconds": round(seconds, 6),
            "clients_per_second": round(clients / seconds, 3),
            "sampled": observed.sampled,
            "failed": len(observed.failures),
            "failures": observed.failures[:NAMED],
            "train_loss": observed.mean_loss,
            # False where the strategy made no new model, as Bulyan does when too few clients answered.
            "aggregated": arrays is not self.arrays,
            "lost": observed.lost,
            "rejected": observed.rejected,
        }
        if self.virtual and (virtual := self.virtual.advance(observed, self.strategy)) is not None:
            row |= {"virtual_round_seconds": virtual, "virtual_seconds": self.virtual.seconds}
        self.selection.observe(number, observed.clients)
        influence = getattr(self.strategy, "influence", None) if row["aggregated"] else None
        row |= self.malice.observe(observed.clients["client"], influence)
        row |= self.privacy.observe(number, observed, aggregated=row["aggregated"])
        row |= {"secure_aggregation": self.grid.secure.take()} if self.grid.secure else {}
        due = number % self.config.evaluate_every == 0 or number == self.config.rounds
        evaluation: Evaluation | None = None
        if due:
            assert self.evaluate is not None
            evaluation = self.evaluate(number, arrays, self.config.timeout_seconds)
            row |= {key: value for key, value in vars(evaluation).items() if key != "each"}
        evaluating = self.grid.take()
        row["failed_evaluations"] = len(evaluating.failures)
        row |= {key: getattr(observed, key) + getattr(evaluating, key) for key in self.traffic}
        each = evaluation.each if evaluation else {}
        tests = {name if name == "client" else f"test_{name}": values for name, values in each.items()}
        self.folder.append_round(row, observed.clients, tests)
        self._commit(number, arrays, evaluation, row, clients, seconds)
        save(self)
        if self.on_round is not None:
            self.stopped_by = self.on_round(row) or ""
        if not self.stopped_by and number < self.config.rounds:
            self.stopped_by = self.privacy.spent(number + 1)
        if self.stopped_by or (due and self._should_stop()):
            raise _StopEarly
        seed_globals(self.config.seed, "round", self.done + 1)
        self.grid.take()
        self._round_began = time.perf_counter()
        return None

    def _commit(
        self,
        number: int,
        arrays: ArrayRecord,
        evaluation: Evaluation | None,
        row: dict[str, Any],
        clients: int,
        seconds: float,
    ) -> None:
        """Make the round the last finished one: model, metrics, best model and totals change together."""
        self.done, self.arrays = number, arrays
        # The first round also starts workers and loads data: it says nothing about speed, unless it is the only one.
        if number == 2:
            self.steady = {"clients": 0, "seconds": 0.0}
        self.steady = {"clients": self.steady["clients"] + clients, "seconds": self.steady["seconds"] + seconds}
        self.traffic = {key: total + row[key] for key, total in self.traffic.items()}
        self.answers.observe(row, self.config.strategy)
        if evaluation is None:
            return
        self.last = {"round": number, **{key: value for key, value in vars(evaluation).items() if key != "each"}}
        metric = self.config.early_stopping.metric or self.task.metrics[0]
        value = evaluation.validation[metric]
        sign = 1 if HIGHER_IS_BETTER.get(metric, True) else -1
        if value == value and (self.best is None or sign * value > sign * self.best["value"]):
            self.best = {"arrays": arrays, "metric": metric, "value": value, **self.last}

    def _should_stop(self) -> bool:
        stopping = self.config.early_stopping
        if not stopping.metric or self.best is None:
            return False
        since = (self.done - self.best["round"]) // self.config.evaluate_every
        if since >= stopping.patience:
            self.stopped_by = f"no better {stopping.metric} for {since} evaluations"
        return bool(self.stopped_by)

    def _check(self, observed: Observed, arrays: ArrayRecord, number: int) -> None:
        """Raise where going on would be pointless: nobody trained, or the new arrays do not fit the model."""
        # That nobody was in reach, or only hostile clients were, is what faults and attacks may do, and not the end.
        if observed.sampled > observed.lost + observed.rejected and not observed.clients["client"]:
            reason = observed.failures[0]["reason"] if observed.failures else "none answered in timeout-seconds"
            raise RunError(f"all {observed.sampled} clients of round {number} failed; the first: {reason}")
        if set(arrays) != set(self.arrays):
            raise RunError(
                f"strategy '{self.config.strategy}' returned arrays {sorted(arrays)} in round {number}, "
                f"but the model has {sorted(self.arrays)}"
            )
