"""What a run owes to differential privacy: its ledger, the noise of its server, when it must stop, and what it says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import RecordDict
from flwr.serverapp.strategy import Strategy

from core import records
from core.config import RunConfig
from core.errors import InputError, RunError
from core.server_side import ServerSide
from privacy.accounting import EVERYBODY, Event, Ledger, accountant, epsilon, keep_spent, spent_by
from privacy.client_level import ClientLevel
from privacy.coverage import uncovered
from privacy.example_level import ExampleLevel
from privacy.noise import source
from server.answers import NothingLearntError
from server.canaries import CanaryClients, CanaryExamples
from server.observe import Observed, ObservedGrid, Taken
from server.private_sum import PrivateSum
from tasks.base import Task

LEDGER = "ledger.jsonl"
SPENT = "privacy budget"
# From this share on nothing but noise has moved the model.
TOO_MANY_DROPPED = 0.9
NOTHING = {"level": "none", "epsilon": None, "delta": None, "accountant": None}


class Privacy:
    """One run's account; without a level it says that there is none."""

    def __init__(self, config: RunConfig, task: Task, folder: Path) -> None:
        self._config, self._own, self._task = config, config.privacy, task
        self._sizes = np.zeros(0, dtype=np.int64)
        self.ledger = Ledger(self._own.delta, folder / LEDGER if self._own.level != "none" else None)
        self._sum: PrivateSum | None = None
        self._level: ClientLevel | None = None
        self._examples = {"dropped": 0, "expected": 0.0}
        """At level example: how many gradients were not finite and added nothing, and how many batches should have."""
        self.canaries: CanaryClients | CanaryExamples | None = None
        """Of an audited run."""
        if self._own.level == "example" and config.audit.canaries:
            self.canaries = CanaryExamples(config)
        if self._own.level == "client":
            self._level = ClientLevel.of(config)
            if self._own.noise == "central":
                noise = source(self._own.noise_seed)
                watched = CanaryClients(self._level, noise) if config.audit.canaries else None
                self._sum, self.canaries = PrivateSum(self._level, self.ledger, noise, watched), watched

    @property
    def needs_each(self) -> bool:
        """Return whether the server must clip every answer itself, because clients may not have."""
        return self._sum is not None and (self._config.attack.kind != "none" or self._config.compression.kind != "none")

    def config(self) -> dict[str, float]:
        """Return what clients have to know in every round."""
        return {records.CLIPPING_NORM: self._own.clipping_norm} if self._level is not None else {}

    def stand_before(self, strategy: Strategy, server: ServerSide) -> None:
        """Let the strategy see sums with noise alone, where the server adds it."""
        self._sizes = server.sizes
        if self._sum is not None:
            self._sum.stand_before(strategy, server.sends)

    def observe(self, server_round: int, observed: Observed, *, aggregated: bool) -> dict[str, Any]:
        """Return a round's part in rounds.jsonl.

        Raises `RuntimeError` for a new model that was not made of the clients' noisy sum.
        """
        if self._own.level == "none":
            return {}
        if aggregated and self._sum is not None and self._sum.released != server_round:
            raise RunError(
                f"strategy '{self._config.strategy}' made the model of round {server_round} without its own "
                "aggregate_train, before which clients' noisy sum is taken: no epsilon covers it"
            )
        self._examples["dropped"] += observed.dropped
        if isinstance(self.canaries, CanaryExamples):
            self.canaries.take(observed.canaries)
        if self._sum is None and not self.ledger.knows(server_round):
            self.ledger.spend(server_round, [])
        row: dict[str, Any] = {
            "epsilon": self.ledger.worst(),
            "simulated": self._own.noise_seed >= 0,
            "dropped_examples": observed.dropped,
        }
        if self._level is not None:
            row["noise_multiplier"] = self._level.noise_multiplier
        if self._sum is not None:
            row |= {"sampling_rate": self._level.rate, "clipping_norm": self._sum.used_norm}  # type: ignore[union-attr]
            row |= {"population": self._own.population} if self._own.population else {}
            if self._sum.within is not None:
                row["within_clipping_norm"] = self._sum.within
        return {"privacy": row}

    def pay(self, server_round: int, taken: Sequence[Taken]) -> None:
        """Write down what answers that are private by themselves have cost: no more than one answer could."""
        if self._own.level == "none" or self._sum is not None:
            # Who says so all the same has nothing to say here.
            return
        events = [
            (client, event, min(max(said, 0), most))
            for client, size, said in taken
            for event, most in self._own_cost(size).items()
        ]
        self.ledger.spend(server_round, events)
        if self._own.level == "example":
            sizes = {client: size for client, size, _ in taken}
            self._examples["expected"] += sum(event.rate * sizes[client] * steps for client, event, steps in events)

    def warnings(self) -> list[str]:
        """Return a sentence where examples' gradients were not finite, which clipping leaves out; else nothing."""
        dropped, expected = self._examples["dropped"], self._examples["expected"]
        if not dropped:
            return []
        return [
            f"{dropped:,} of about {expected:,.0f} examples' gradients were not finite and added nothing: look for "
            "extreme values in the inputs, or lower learning-rate."
        ]

    def check(self) -> None:
        """Raise `NothingLearntError` where nearly all examples added nothing, so that noise alone moved the model."""
        if self._examples["dropped"] > TOO_MANY_DROPPED * self._examples["expected"]:
            [said] = self.warnings()
            raise NothingLearntError(f"the model is made of noise alone: {said.removesuffix('.')}")

    def _own_cost(self, size: int) -> Mapping[Event, int]:
        """Return what a round costs a client that adds noise itself; nothing where it has no examples."""
        if self._level is not None:
            return {event: 1} if (event := self._level.own_event) else {}
        return ExampleLevel(self._config).cost(size) if size else {}

    def spent(self, server_round: int) -> str:
        """Return why this round may not begin; empty where it may.

        Where clients have budgets of their own each refuses for itself, and the run ends when nobody is left.
        """
        own, spent = self._own, self.ledger.spent
        if own.level == "none" or not own.epsilon:
            return ""
        costs: Iterable[tuple[int, Mapping[Event, int]]]
        if self._level is not None and self._sum is not None:
            again = self.ledger.knows(server_round)
            costs = [(o, {event: count}) for o, event, count in self._level.costs(server_round, repeated=again)]
            if not costs:
                return ""
        else:
            each = enumerate(map(self._own_cost, self._sizes.tolist()))
            costs = ((client, cost) for client, cost in each if cost)
        affordable = (
            epsilon(spent.get(owner, Counter()) + Counter(cost), own.delta) <= own.epsilon for owner, cost in costs
        )
        return "" if any(affordable) else SPENT

    def summary(self) -> dict[str, Any]:
        """Return what `summary.json` holds under `privacy`."""
        if self._own.level == "none":
            return dict(NOTHING)
        worst = self.ledger.worst()
        about: dict[str, Any] = {
            "level": self._own.level,
            "epsilon": worst,
            "delta": self._own.delta,
            "accountant": accountant(worst, self.ledger.spent.values()),
            "neighbours": "replace" if self._own.noise == "local" and self._level else "add or remove",
            "noise": self._own.noise if self._own.level == "client" else "at every client, in every step",
            "clipping_norm": self._own.clipping_norm,
            "simulated": self._own.noise_seed >= 0,
            "not_covered": uncovered(self._config, self._task.standardise, self._task.tuned_threshold),
        }
        if self._level is not None:
            about |= {"noise_multiplier": self._level.noise_multiplier, "sampling_rate": self._level.rate}
        if self._own.population:
            about["population"] = self._own.population
        if self.canaries is not None:
            included = self.canaries.included
            about["canaries"] = {"number": included.size, "included": int(included.sum())}
        if EVERYBODY not in self.ledger.spent:
            about["clients"] = {str(client): self.ledger.of(client) for client in sorted(self.ledger.spent)}
        return about

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps beside the ledger's own file."""
        own: dict[str, Any] = {"examples": dict(self._examples)}
        own |= {"canaries": self.canaries.state()} if self.canaries is not None else {}
        return self._sum.state() | own if self._sum is not None else own

    def restore(self, state: Mapping[str, Any], rounds: int) -> None:
        """Remember what `state` returned after so many rounds; `InputError` where the ledger does not have them all."""
        if self._own.level != "none" and (missing := self.ledger.missing(rounds)):
            raise InputError(
                f"{self.ledger.file} does not say what round {missing[0]} has spent, of {rounds} that are done; put "
                "the file back, or start a new run: epsilon would be too small."
            )
        self._examples = dict(state["examples"])
        if self._sum is not None:
            self._sum.restore(state)
        if self.canaries is not None:
            self.canaries.restore(state["canaries"])

    def remind(self, grid: ObservedGrid) -> None:
        """Let clients know what the ledger says that they have spent.

        What they did after the last checkpoint they have forgotten, and it has cost all the same. What they know of
        that never arrived here has cost as well.
        """
        if self._sum is not None or not self.ledger.spent or not grid.numbered:
            return
        for node in grid.get_node_ids():
            if spent := self.ledger.spent.get(grid.client_of(node)):
                state = grid.client_states.setdefault(node, RecordDict())
                keep_spent(state, spent_by(state) | spent)
