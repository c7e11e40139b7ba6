"""Multi-Krum: the mean of the models that Krum ranks first. Blanchard et al., NeurIPS 2017, section 4."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp import strategy


class MultiKrum(strategy.MultiKrum):
    """Flower's class; unless `num_nodes_to_select` is given it takes all replies but the malicious ones.

    Flower's own default of 1 is plain Krum.
    """

    def __init__(self, *, num_nodes_to_select: int = 0, **multikrum: Any) -> None:
        super().__init__(num_nodes_to_select=num_nodes_to_select, **multikrum)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the new global arrays and the aggregated metrics."""
        replies = list(replies)
        given = self.num_nodes_to_select
        answered = sum(reply.has_content() for reply in replies)
        self.num_nodes_to_select = given or max(1, answered - self.num_malicious_nodes)
        try:
            return super().aggregate_train(server_round, replies)
        finally:
            self.num_nodes_to_select = given
