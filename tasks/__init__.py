"""What is learned: data, model, loss and metrics. `load(config)` returns the task that a configuration names."""

from __future__ import annotations

from core.config import RunConfig
from core.plugins import load as load_plugin
from tasks.base import Task

GROUP = "fedra.tasks"
TASKS = {
    "medical": "tasks.medical:Medical",
    "fraud": "tasks.fraud:Fraud",
    "nlp": "tasks.nlp:Nlp",
    "digits": "tasks.digits:Digits",
    "synthetic": "tasks.synthetic:Synthetic",
}


def load(config: RunConfig) -> Task:
    """Return the configured task; a third party's comes from the entry-point group `fedra.tasks` or module:attr."""
    task: Task = load_plugin("task", config.task, TASKS, GROUP)(config)
    return task
