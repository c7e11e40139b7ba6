"""Krum, Multi-Krum and Bulyan: updates among many like them. Blanchard et al., NeurIPS 2017; El Mhamdi et al., 2018.

A client's score is the sum of squared distances to its n - f - 2 nearest others, f = `num_malicious_nodes` (Blanchard
et al., section 4). Krum takes the update of least score, Multi-Krum the mean of the n - f of least scores (weighted by
examples), Bulyan of the n - 2f of least scores each number's mean of the n - 4f nearest to their median. Flower's
classes and its selection do the work, on centred updates; here it is noted whom they select. They rank once for Bulyan,
whose paper ranks anew after every one it selects. Running statistics pass through the rules like everything else.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp import strategy
from flwr.serverapp.strategy.multikrum import select_multikrum

from strategies.robust import Robust


class _Selection:
    """Flower's selection, which remembers whom it chose."""

    __name__ = "select_multikrum"

    def __init__(self) -> None:
        self.chosen: set[int] = set()

    def __call__(self, contents: list[RecordDict], num_malicious: int, count: int) -> list[RecordDict]:
        chosen: list[RecordDict] = select_multikrum(contents, num_malicious, count)
        self.chosen = {id(content) for content in chosen}
        return chosen

    def shares(self, replies: list[Message]) -> list[float]:
        """Return each reply's share among those chosen last."""
        return [float(id(reply.content) in self.chosen) / max(len(self.chosen), 1) for reply in replies]


class Bulyan(Robust, strategy.Bulyan):
    """Flower's class, with Krum's selection noted."""

    def __init__(self, **options: Any) -> None:
        super().__init__(selection_rule=_Selection(), **options)

    def rule(
        self, server_round: int, updates: np.ndarray, replies: list[Message]
    ) -> tuple[np.ndarray | None, MetricRecord | None]:
        """Return the trimmed mean of the selected updates; nothing where too few clients answered."""
        given = self.num_malicious_nodes
        if len(replies) < 4 * given + 3:
            # Malicious clients whose answers were refused are not among the rest. Else they could stop all learning.
            self.num_malicious_nodes = max(0, given - self.refused)
        try:
            made = super().rule(server_round, updates, replies)
        finally:
            self.num_malicious_nodes = given
        if made[0] is not None and isinstance(self.selection_rule, _Selection):
            self.shares = self.selection_rule.shares(replies)
        return made


class MultiKrum(Robust, strategy.MultiKrum):
    """Flower's class; unless `num_nodes_to_select` is given it takes all replies but the malicious ones.

    Flower's own default of 1 is plain Krum.
    """

    def __init__(self, *, num_nodes_to_select: int = 0, **options: Any) -> None:
        super().__init__(num_nodes_to_select=num_nodes_to_select, **options)

    def rule(
        self, server_round: int, updates: np.ndarray, replies: list[Message]
    ) -> tuple[np.ndarray | None, MetricRecord | None]:
        """Return the mean of the selected updates."""
        given, selection = self.num_nodes_to_select, _Selection()
        self.num_nodes_to_select = given or max(1, len(replies) - self.num_malicious_nodes)
        try:
            made = super().rule(server_round, updates, replies)
            # Flower's class does not say whom it selected: once more, on the same updates.
            selection([reply.content for reply in replies], self.num_malicious_nodes, self.num_nodes_to_select)
        finally:
            self.num_nodes_to_select = given
        self.shares = selection.shares(replies)
        return made


class Krum(Robust, strategy.Krum):
    """Flower's class, which selects one."""

    def rule(
        self, server_round: int, updates: np.ndarray, replies: list[Message]
    ) -> tuple[np.ndarray | None, MetricRecord | None]:
        """Return the selected update."""
        made, selection = super().rule(server_round, updates, replies), _Selection()
        selection([reply.content for reply in replies], self.num_malicious_nodes, 1)
        self.shares = selection.shares(replies)
        return made
