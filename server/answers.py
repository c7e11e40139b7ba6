"""What became of the clients' answers over a run, and the end of a run that none of them reached."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.errors import RunError
from reports.words import plural


class NothingLearntError(RunError):
    """No round made a new model: the run would hand out the one it began with."""


class Answers:
    """Counts, over the rounds, answers that did not count and models that were made of the others."""

    def __init__(self) -> None:
        self.state = {"lost": 0, "rejected": 0, "aggregated": 0}
        """Answers, and rounds that made a new model."""
        self._last = ""
        """Why the last round that made none did not."""

    @property
    def uncounted(self) -> dict[str, int]:
        """Return how many answers were lost, and how many rejected."""
        return {key: self.state[key] for key in ("lost", "rejected")}

    def observe(self, row: Mapping[str, Any], strategy: str) -> None:
        """Count a finished round by its line of rounds.jsonl."""
        self.state = {key: total + row[key] for key, total in self.state.items()}
        if not row["aggregated"]:
            came = f"{strategy} made no model of those that came" if row["sampled"] else "no client was drawn"
            self._last = row["failures"][-1]["reason"] if row["failures"] else came

    def check(self, rounds: int) -> None:
        """Raise `NothingLearntError` where no round made a new model."""
        if self.state["aggregated"]:
            return
        why = f" (the last: {self._last})" if self._last else ""
        raise NothingLearntError(
            f"no answer of any client reached the model in {plural(rounds, 'round')}: {self.state['lost']} were lost "
            f"and {self.state['rejected']} rejected{why}; the model is the one the run began with. Give clients more "
            "time or fewer faults: devices.*, faults.*, attack.*, sampled."
        )
