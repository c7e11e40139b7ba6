"""Central noise: the clients' clipped updates become one answer, their noisy sum, before any strategy sees them.

The strategy gets one ordinary reply with the mean of `privacy/client_level.py`. It may do with it what it likes: what
is computed from something private costs nothing more. What it asks of clients is looked at before it is sent: the sum
is that of updates of one model, clipped to one norm, by every client that was drawn, once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.constants import DEFAULT_TTL
from flwr.app.metadata import Metadata
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from core import records
from core.errors import RunError
from core.records import to_arrays, to_numpy
from privacy.accounting import Ledger
from privacy.banded import BandedNoise
from privacy.client_level import ClientLevel
from privacy.noise import Source, noised
from server.canaries import CanaryClients

Vectors = dict[str, np.ndarray]
# Of a cohort's mean in float32, against the sum of its clients' clipping norms.
TOLERANCE = 1e-3


class PrivateSum:
    """Stands between the round's replies and the strategy."""

    def __init__(
        self, level: ClientLevel, ledger: Ledger, noise: Source, canaries: CanaryClients | None = None
    ) -> None:
        self._level, self._ledger, self._noise, self._canaries = level, ledger, noise, canaries
        self.clipping_norm = level.config.privacy.clipping_norm
        """Of the next round."""
        self.used_norm = self.clipping_norm
        """Of the last round."""
        self.within: float | None = None
        """Noisy share of the last round's updates that were no longer than its clipping norm."""
        self._banded = BandedNoise(level.bands) if level.banded else None
        self._drawn = 0
        """Rounds whose noise the banded one knows of."""
        self.released = 0
        """The last round whose sum was released."""
        self._sent: Vectors = {}
        self._names: Sequence[str] = ()

    def stand_before(self, strategy: Strategy, names: Sequence[str]) -> None:
        """Let the strategy see one private answer a round in place of the clients' own: tensors `names`."""
        self._names = names
        outgoing: Callable[[ArrayRecord], ArrayRecord] = getattr(strategy, "outgoing", lambda arrays: arrays)
        configure_train, aggregate_train = strategy.configure_train, strategy.aggregate_train

        def configure(server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
            config[records.CLIPPING_NORM] = self.clipping_norm
            sent, offered = outgoing(arrays), list(grid.get_node_ids())
            self._sent = {name: to_numpy(array) for name, array in sent.items()}
            messages = list(configure_train(server_round, arrays, config, grid))
            if odd := self._odd(messages, sent, offered):
                raise RunError(f"round {server_round}: the strategy {odd}, which no epsilon is known for")
            return messages

        def aggregate(server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
            answers = [reply.content for reply in replies if reply.has_content()]
            return aggregate_train(server_round, [_message(self._released(server_round, answers))])

        strategy.configure_train = configure  # type: ignore[method-assign]
        strategy.aggregate_train = aggregate  # type: ignore[method-assign]

    def _odd(self, messages: Sequence[Message], sent: ArrayRecord, offered: Sequence[int]) -> str:
        """Return what is wrong with the messages of a round for which the nodes `offered` were drawn; else nothing."""
        nodes = {message.metadata.dst_node_id for message in messages}
        if self._level.rate < 1 and nodes != set(offered):
            return f"asks {len(nodes)} clients where {len(offered)} were drawn"
        for content in {id(message.content): message.content for message in messages}.values():
            [own] = content.array_records.values()
            if own.keys() != sent.keys() or any(own[name].data != array.data for name, array in sent.items()):
                return "sends clients another model than its `outgoing` says"
            if records.config_of(content).get(records.CLIPPING_NORM) != self.clipping_norm:
                return "sends clients another clipping norm than the round's"
        return ""

    def state(self) -> dict[str, Any]:
        """Return what the next round needs of this one: not the banded noise, which must never be read by anybody.

        Going on with new bands costs nothing more: what clients do in different rounds stays apart.
        """
        return {"clipping_norm": self.clipping_norm}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Remember what `state` returned."""
        self.clipping_norm = state["clipping_norm"]

    def _released(self, server_round: int, answers: Sequence[RecordDict]) -> RecordDict:
        """Return the round's one private answer. What it costs is in the ledger before."""
        covered = [client for answer in answers for client in _clients(answer)]
        if len(set(covered)) < len(covered):
            raise RunError(f"a client answered round {server_round} twice, and nothing is released")
        self.released = server_round
        honest = self._sum(answers)
        total = self._with_canaries(server_round, honest)
        self._ledger.spend(server_round, self._level.costs(server_round, repeated=self._ledger.knows(server_round)))
        norm, expected = self.clipping_norm, self._level.expected
        flat = np.concatenate([values.ravel() for values in total.values()])
        noise = self._normal(server_round, len(flat))
        noisy = noised(torch.from_numpy(flat), noise, self._level.sum_multiplier * norm).numpy() / expected
        parts = np.split(noisy, np.cumsum([values.size for values in total.values()])[:-1])
        mean: Vectors = {
            name: ((0.0 if "/" in name else self._sent[name]) + part.reshape(values.shape)).astype(np.float32)
            for (name, values), part in zip(total.items(), parts, strict=True)
        }
        if self._canaries is not None:
            away = {name: value if "/" in name else value - self._sent[name] for name, value in mean.items()}
            self._canaries.watch({name: value * expected for name, value in away.items()}, honest, total, norm)
        self.used_norm = norm
        if self._level.adaptive:
            count = torch.tensor([sum(map(_within, answers))], dtype=torch.float64)
            noise = self._noise.at("count", server_round).normal(1, dtype=torch.float64)
            self.within = float(noised(count, noise, self._level.count_noise)) / expected + 0.5
            self.clipping_norm = self._level.next_norm(norm, self.within)
        metrics = MetricRecord({records.NUM_EXAMPLES: max(1, round(expected)), records.WEIGHT: expected})
        return RecordDict({records.ARRAYS: to_arrays(mean), records.METRICS: metrics})

    def _normal(self, server_round: int, size: int) -> torch.Tensor:
        """Return the round's noise, (size,) float64 of standard deviation 1, or the row that bands make of it."""
        drawn = self._noise.at("sum", server_round).normal(size, dtype=torch.float64)
        if self._banded is None:
            return drawn
        if not self._noise.guaranteed:
            # A run that repeats draws again what an interruption made it forget.
            for earlier in range(self._drawn + 1, server_round):
                self._banded.noise(self._noise.at("sum", earlier).normal(size, dtype=torch.float64))
        self._drawn = server_round
        return self._banded.noise(drawn)

    def _with_canaries(self, server_round: int, total: Vectors) -> Vectors:
        """Return the sum with that of an audited run's canaries, which are clipped and checked as everybody is."""
        if self._canaries is None:
            return total
        answer = self._canaries.answer(server_round, self._sent, tuple(total), self.clipping_norm)
        hidden = self._sum([answer] if answer else [])
        return {name: value + hidden[name] for name, value in total.items()}

    def _sum(self, answers: Sequence[RecordDict]) -> Vectors:
        """Return the sum of w_k clip(update_k) by name, float64, over answers that may each speak for many clients."""
        total = {name: np.zeros(self._sent[name].shape) for name in self._names}
        for answer in answers:
            [arrays] = answer.array_records.values()
            own = {name: to_numpy(arrays[name]).astype(np.float64) for name in self._names}
            away = {name: value if "/" in name else value - self._sent[name] for name, value in own.items()}
            weight, clients = _weight(answer), len(_clients(answer))
            length = weight * float(np.sqrt(sum(float((value * value).sum()) for value in away.values())))
            most = clients * self.clipping_norm
            if clients == 1:
                # A hostile client may not have clipped, nor weighed itself as it should.
                weight *= min(1.0, most / max(length, 1e-300))
            elif not length <= most * (1 + TOLERANCE):
                raise RunError(
                    f"the updates of {clients} clients add up to a norm of {length:g}, more than {clients} times the "
                    f"clipping norm {self.clipping_norm:g}: they were not clipped, and nothing is released"
                )
            for name in self._names:
                total[name] += weight * away[name]
        return total


def _weight(answer: RecordDict) -> float:
    return float(records.metrics_of(answer)[records.WEIGHT])


def _within(answer: RecordDict) -> float:
    """Return the sum over an answer's clients of 1/2 for those within the clipping norm and -1/2 for the others."""
    half = len(_clients(answer)) / 2
    return min(max(_weight(answer) * float(records.metrics_of(answer)[records.WITHIN]), -half), half)


def _clients(answer: RecordDict) -> list[int]:
    """Return for which clients an answer of the local engine speaks."""
    return answer.config_records[records.CLIENTS][records.CLIENT]  # type: ignore[return-value]


def _message(content: RecordDict) -> Message:
    """Return the content as a reply, which nobody in particular sent."""
    metadata = Metadata(1, "", 0, 0, "", "", time.time(), DEFAULT_TTL, "train")
    return Message(metadata=metadata, content=content)  # type: ignore[call-overload]
