"""Krum, Multi-Krum and Bulyan: updates among many like them. Blanchard et al., NeurIPS 2017; El Mhamdi et al., 2018.

A client's score is the sum of squared distances to its n - f - 2 nearest others, f = `num_malicious_nodes`. Krum takes
the update of least score, Multi-Krum the mean of the n - f of least scores (weighted by examples), Bulyan a trimmed
mean of those that Krum selects. Flower's classes do the work, on centred updates; here it is noted whom they select.
"""

from __future__ import annotations

from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import strategy
from flwr.serverapp.strategy.multikrum import select_multikrum

from strategies.robust import Aggregated, Robust, client_of


class MultiKrum(Robust, strategy.MultiKrum):
    """Flower's class; unless `num_nodes_to_select` is given it takes all replies but the malicious ones."""

    def __init__(self, *, num_nodes_to_select: int = 0, num_malicious_nodes: int = 0, **options: Any) -> None:
        super().__init__(num_nodes_to_select=num_nodes_to_select, num_malicious_nodes=num_malicious_nodes, **options)

    def rule(self, server_round: int, replies: list[Message]) -> Aggregated:
        """Return the mean of the selected updates."""
        contents = [reply.content for reply in replies]
        count = self.num_nodes_to_select or max(1, len(contents) - self.num_malicious_nodes)
        chosen = _Selection(select_multikrum)(contents, self.num_malicious_nodes, count)
        self.shares = _shares(contents, chosen)
        taken = {id(content) for content in chosen}
        # Flower's FedAvg does the rest of what its Multi-Krum does.
        return strategy.FedAvg.aggregate_train(
            self, server_round, [reply for reply in replies if id(reply.content) in taken]
        )


class Krum(MultiKrum):
    """Multi-Krum that selects one."""

    def __init__(self, *, num_malicious_nodes: int = 0, **options: Any) -> None:
        super().__init__(num_nodes_to_select=1, num_malicious_nodes=num_malicious_nodes, **options)


class Bulyan(Robust, strategy.Bulyan):
    """Flower's class, with Krum's selection noted."""

    def __init__(self, **options: Any) -> None:
        super().__init__(selection_rule=_Selection(select_multikrum), **options)

    def rule(self, server_round: int, replies: list[Message]) -> Aggregated:
        """Return the trimmed mean of the selected updates; nothing where too few clients answered."""
        contents = [reply.content for reply in replies]
        clients = [client_of(content) for content in contents]
        aggregated = super().rule(server_round, replies)
        last = self.selection_rule.last if isinstance(self.selection_rule, _Selection) else []
        self.shares = [float(client in last) / max(len(last), 1) for client in clients]
        return aggregated


class _Selection:
    """A selection rule that remembers whom it chose."""

    __name__ = "select_multikrum"

    def __init__(self, rule: Any) -> None:
        self._rule = rule
        self.last: list[int] = []

    def __call__(self, contents: list[RecordDict], num_malicious: int, count: int) -> list[RecordDict]:
        chosen: list[RecordDict] = self._rule(contents, num_malicious, count)
        self.last = [client_of(content) for content in chosen]
        return chosen


def _shares(contents: list[RecordDict], chosen: list[RecordDict]) -> list[float]:
    taken = {id(content) for content in chosen}
    return [float(id(content) in taken) / len(chosen) for content in contents]
