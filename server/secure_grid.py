"""A Grid under which the server learns sums alone: it runs secure aggregation and answers as one client would.

It stands between Flower's grid and everybody who asks clients to train. A round's training messages become the stages
of `privacy/secagg`; what comes back is one reply for each sum (one, or as many as there are groups), with the mean of
all who are in it, as the local engine answers for a cohort. Strategies, noise and tables see nothing else, and nothing
of a single client reaches this process but under masks.

A sum that cannot be had is no answer of anybody: each of its clients is lost in this round, and the run goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import nn

from core import records
from core.config import RunConfig
from core.errors import InputError, RunError
from core.records import to_arrays, to_numpy
from core.seeding import rng
from privacy.accounting import STATE as SPENT
from privacy.secagg import exact, identities
from privacy.secagg.checks import enough
from privacy.secagg.distributed import NoisyPayload
from privacy.secagg.errors import SecAggError
from privacy.secagg.exposure import Exposure
from privacy.secagg.graph import malicious_threshold
from privacy.secagg.keys import Roster
from privacy.secagg.payload import Payload, Sum
from privacy.secagg.quantise import Layout
from privacy.secagg.rounds import hash_of, payload_of, plan_of, terms_of
from privacy.secagg.rules import uncovered
from privacy.secagg.server import Server
from server.secure_round import Party, SecureRound
from server.wrapped import WrappedGrid
from strategies import client_half

# What there is to say of a round without sums.
_NOTHING: dict[str, Any] = {
    "sums": [], "failed": [], "dropped": {}, "recovered": 0, "clipped": None, "worst_error": None, "solvable": 0,
}  # fmt: skip


class SecureGrid(WrappedGrid):
    """Flower's Grid around another, for one run."""

    def __init__(self, grid: Grid, config: RunConfig) -> None:
        super().__init__(grid)
        self._config, self._own = config, config.secure_aggregation
        self._engine = hasattr(grid, "client_of")
        self._numbers = client_half(config).numbers
        self._client_of: Mapping[int, int] = {}
        self._private = config.privacy.level == "client"
        self._number = 0
        self.sends: Sequence[str] = ()
        """Names of what clients send back."""
        self.largest_weight = 0
        """Examples of a client at most: more count as so many."""
        self.exposure = Exposure(config.clients)
        self.totals: Counter[str] = Counter()
        """Over the run: sums, those that failed, clients that dropped out and those whose masks were recovered."""
        self.traffic: Counter[str] = Counter()
        """Bytes of the protocol that no reply says: those `down`, and those `up` of who is in no sum."""
        self._last: dict[str, Any] = dict(_NOTHING)
        if self._own.roster:
            self._roster: Roster = identities.read_roster(self._own.roster)
            if missing := sorted(set(range(config.clients)) - self._roster.keys()):
                raise InputError(
                    f"secure-aggregation.roster={self._own.roster} has no key of client {missing[0]}; make one for "
                    f"clients={config.clients}."
                )
        else:
            self._roster = identities.simulated_roster(config.seed, config.clients)

    def __getattr__(self, name: str) -> Any:
        # What only the local engine's grid has.
        return getattr(self.__dict__["inner"], name)

    def order_by(self, clients: Mapping[int, int]) -> None:
        """Learn the clients' numbers by node id."""
        self._client_of = clients

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push messages that are not of training: a sum needs all of a round together."""
        found = list(messages)
        if any(message.metadata.message_type == "train" for message in found):
            raise RunError("the strategy trains clients one by one, and secure aggregation sums whole rounds")
        return super().push_messages(found)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Return one reply with the mean for each sum of a round of training, and an error for who is in none.

        Other messages pass as they are.
        """
        found = list(messages)
        if not found or found[0].metadata.message_type != "train":
            return super().send_and_receive(found, timeout=timeout)
        return self._trained(found, timeout)

    def add_up(self, content: RecordDict, nodes: Mapping[int, int], numbers: int, timeout: float) -> list[float]:
        """Return the exact sums of `numbers` numbers that clients have to say before training.

        `nodes` are their nodes by client. Raises `RunError` where one of them is not in the sum.
        """
        party = Party(None, dict(nodes))
        self._run_round([party], records.QUERY_STATISTICS, content, exact.length(numbers), timeout)
        if party.error or len(party.counted) < len(nodes):
            why = [party.error] * bool(party.error) + list(party.reasons.values())[:1]
            raise RunError(f"clients did not describe their data: {'; '.join(why) or 'they did not answer in time'}")
        assert party.total is not None
        self.traffic["up"] += party.sent.total()
        return exact.decode(party.total, len(nodes))

    def take(self) -> dict[str, Any]:
        """Return what rounds.jsonl says of the round since the last call: nothing of one in which nobody was drawn."""
        found, self._last = self._last, {**_NOTHING, "solvable": len(self.exposure.solvable)}
        return found

    def summary(self, model: nn.Module) -> dict[str, Any]:
        """Return what `summary.json` holds of the run's sums."""
        plan = plan_of(self._config, self._planned)
        return {
            "protocol": "secagg+" if plan.neighbours else "secagg",
            "profile": plan.profile,
            "clients": plan.clients,
            "neighbours": plan.neighbours or plan.clients - 1,
            "threshold": plan.threshold or malicious_threshold(plan.clients),
            "corrupt": plan.corrupt,
            "dropouts": plan.dropouts,
            "privacy_bits": plan.privacy_bits,
            "correctness_bits": plan.correctness_bits,
            "ring_bits": self._own.bits,
            "clip": self._own.clip,
            "groups": self._own.groups,
            "identities": "roster" if self._own.roster else "simulated",
            **{name: self.totals[name] for name in ("sums", "failed", "dropped", "recovered")},
            "smallest_sum": self.exposure.smallest,
            "solvable": [{"client": c, "round": r} for c, r in sorted(self.exposure.solvable.items())],
            "not_covered": uncovered(self._config, model),
        }

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        own = {"number": self._number, "largest_weight": self.largest_weight, "totals": dict(self.totals)}
        return {**own, "exposure": self.exposure.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Remember what `state` returned."""
        self._number, self.largest_weight = state["number"], state["largest_weight"]
        self.totals = Counter(state["totals"])
        self.exposure.restore(state["exposure"])

    def _trained(self, asked: list[Message], timeout: float | None) -> list[Message]:
        content = asked[0].content
        if any(message.content is not content for message in asked):
            raise RunError("the strategy sends clients different models, whose updates have no common sum")
        arrays, config = content.array_records[records.ARRAYS], records.config_of(content)
        number = records.server_round(content) or 0
        by_client = {self._number_of(message.metadata.dst_node_id): message for message in asked}
        parties = [Party(None, nodes) for nodes in self._grouped(number, by_client)]
        config[records.COHORT] = max(len(party.nodes) for party in parties)
        config[records.LARGEST_WEIGHT] = self.largest_weight
        origin = {name: to_numpy(array) for name, array in arrays.items()}
        layout = Layout.of({name: origin[name.rpartition("/")[2]] for name in self.sends})
        payload = self._payload(parties, layout.size, config)
        if payload is not None:
            sent = RecordDict({records.ARRAYS: arrays, records.CONFIG: ConfigRecord(config)})
            self._run_round(parties, "train", sent, payload.length, timeout)
        replies, sums = [], []
        for party in parties:
            try:
                if payload is not None and party.total is not None:
                    found = payload.decode(party.total, len(party.counted))
                    sums.append((party.counted, found))
                    first = by_client[party.counted[0]]
                    replies.append(Message(self._mean(party, found, origin, layout), reply_to=first))
            except ValueError as error:
                party.error, party.total = str(error), None
            out = party.nodes.keys() - set(party.counted)
            replies += [
                Message(error=Error(records.LOST, party.reasons.get(c) or party.error), reply_to=by_client[c])
                for c in sorted(out)
            ]
        self._observe(number, parties, sums)
        return replies

    def _payload(self, parties: Sequence[Party], size: int, config: Mapping[str, Any]) -> Payload | NoisyPayload | None:
        """Return how a round's vectors are made; None, and the parties say why, where too few or too many were drawn.

        Raises `InputError` where there would be no sum of as many as planned either.
        """
        cohort = config[records.COHORT]
        try:
            enough(cohort, self._own.min_cohort, "were drawn")
            return payload_of(self._config, size, config, self._numbers)
        except (SecAggError, InputError) as error:
            if isinstance(error, InputError) and cohort <= self._planned:
                raise
            for party in parties:
                party.error = f"{type(error).__name__}: {error}"
            return None

    @property
    def _planned(self) -> int:
        """Return how many clients a sum has as planned."""
        return -(-self._config.count(self._config.sampled) // self._own.groups)

    def _number_of(self, node: int) -> int:
        client: int = self.inner.client_of(node) if self._engine else self._client_of[node]  # type: ignore[attr-defined]
        return client

    def _grouped(self, server_round: int, by_client: Mapping[int, Message]) -> Iterator[dict[int, int]]:
        """Yield the nodes by client of each of the round's random groups, as equal in size as can be."""
        clients = np.array(sorted(by_client))
        if self._own.groups > 1:
            clients = rng(self._config.seed, "secure groups", server_round).permutation(clients)
        for part in np.array_split(clients, min(self._own.groups, len(clients))):
            yield {client: by_client[client].metadata.dst_node_id for client in sorted(part.tolist())}

    def _mean(self, party: Party, found: Sum, origin: Mapping[str, np.ndarray], layout: Layout) -> RecordDict:
        """Return the mean of a sum as the answer of all who are in it."""
        away = layout.restore(found.update)
        mean = {name: part if "/" in name else origin[name] + part for name, part in away.items()}
        metrics: dict[str, Any] = {records.NUM_EXAMPLES: found.examples, **found.metrics}
        if found.weight is not None:
            metrics[records.WEIGHT] = found.weight
        rows: dict[str, Any] = {records.CLIENT: list(party.counted), records.SECURE: True}
        rows[records.UPLINK_BYTES] = [party.sent[client] for client in party.counted]
        if self._config.privacy.level == "client" and self._config.privacy.noise != "central":
            rows[records.PRIVATE_STEPS] = [1] * len(party.counted)
        return RecordDict({
            records.ARRAYS: to_arrays(mean), records.METRICS: MetricRecord(metrics),
            records.CLIENTS: ConfigRecord(rows),
        })  # fmt: skip

    def _observe(self, number: int, parties: Sequence[Party], sums: Sequence[tuple[tuple[int, ...], Sum]]) -> None:
        self.exposure.observe(number, [members for members, _ in sums])
        dropped = sum((party.dropped for party in parties), Counter[str]())
        failed = [party.error for party in parties if party.error]
        recovered = sum(party.recovered for party in parties)
        self.totals.update(sums=len(sums), failed=len(failed), dropped=dropped.total(), recovered=recovered)
        self._last = {
            "sums": [len(members) for members, _ in sums],
            "failed": failed,
            "dropped": {stage: count for stage, count in dropped.items() if count},
            "recovered": recovered,
            # Where differential privacy has clipped before, nobody has counted.
            "clipped": float(np.mean([found.clipped for _, found in sums])) if sums and not self._private else None,
            "worst_error": max((found.worst_error for _, found in sums), default=None),
            "solvable": len(self.exposure.solvable),
        }

    def _states(self, parties: Sequence[Party]) -> dict[int, RecordDict]:
        """Return what clients keep, as it is before a round, where the engine keeps it for them."""
        states: dict[int, RecordDict] = self.inner.client_states if self._engine else {}  # type: ignore[attr-defined]
        nodes = (node for party in parties for node in party.nodes.values() if node in states)
        return {node: RecordDict({name: record.copy() for name, record in states[node].items()}) for node in nodes}

    def _settle(self, node: int, before: RecordDict | None, *, counted: bool) -> None:
        """Let a client of the engine keep what it learnt only if it was counted, and no secret of the round.

        Controls that no server knows of would pull at every later model. What privacy has cost it stays spent, and what
        clients who dropped out have not forgotten must not end up in a checkpoint.
        """
        states: dict[int, RecordDict] = self.inner.client_states if self._engine else {}  # type: ignore[attr-defined]
        if (state := states.get(node)) is None:
            return
        state.pop(records.SECURE, None)
        if not counted:
            spent = {SPENT: state[SPENT]} if SPENT in state else {}
            states[node] = RecordDict({**(before or {}), **spent})

    def _run_round(
        self, parties: Sequence[Party], message_type: str, content: RecordDict, length: int, timeout: float | None
    ) -> None:
        """Run the protocol for all parties side by side; each ends with a total or with an error."""
        server_round = records.server_round(content) or 0
        # Rounds of the protocol only go up, and the first of them comes before training.
        self._number = max(self._number, server_round) + 1
        hashed, run_id = hash_of(message_type, content, self._config), self.inner.run.run_id
        for party in parties:
            try:
                enough(len(party.nodes), self._own.min_cohort, "were drawn")
                terms = terms_of(self._config, run_id, self._number, hashed, length, len(party.nodes))
                party.server = Server(terms, list(party.nodes), self._roster)
            except (SecAggError, InputError) as error:
                party.error = f"{type(error).__name__}: {error}"
        seconds = None if self._engine else self._own.stage_seconds
        rounds = SecureRound(
            self.inner, self._number_of, together=self._engine, seconds=seconds, server_round=server_round
        )
        before = self._states(parties)
        rounds.run(parties, message_type, content, timeout)
        for party in parties:
            for client, node in party.nodes.items():
                self._settle(node, before.get(node), counted=client in party.counted)
        self.traffic["down"] += sum(party.received for party in parties)
        self.traffic["up"] += sum(party.sent.total() for party in parties)
        self.traffic["up"] -= sum(party.sent[client] for party in parties for client in party.counted)
