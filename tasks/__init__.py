"""What is learned: data, model, loss and metrics. `load(config)` returns the task that a configuration names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from core.config import RunConfig
from core.errors import InputError
from core.plugins import load as load_plugin
from tasks.base import Standardise, Task

GROUP = "fedra.tasks"
TASKS = {
    "medical": "tasks.medical:Medical",
    "fraud": "tasks.fraud:Fraud",
    "nlp": "tasks.nlp:Nlp",
    "digits": "tasks.digits:Digits",
    "synthetic": "tasks.synthetic:Synthetic",
}
# What core and server read of a task (tasks/base.py: Task).
_ATTRIBUTES = ("labels", "metrics", "standardise", "tuned_threshold", "federation", "model", "loss")


def load(config: RunConfig) -> Task:
    """Return the configured task; a third party's comes from the entry-point group `fedra.tasks` or module:attr."""
    task: Task = checked(config.task, load_plugin("task", config.task, TASKS, GROUP))(config)
    if missing := [name for name in _ATTRIBUTES if not hasattr(task, name)]:
        raise InputError(f"task '{config.task}' lacks {', '.join(missing)}; tasks/base.py says what a task has.")
    task.standardise = _standardise(config, task.standardise)
    return task


def _standardise(config: RunConfig, usual: Standardise) -> Standardise:
    """Return whose constants scale a run's inputs: as configured, or the task's own as far as privacy covers it."""
    if config.standardise == "server" and not config.server_examples:
        raise InputError(
            "standardise=server takes the server's own examples, of which it has none; set server-examples=50."
        )
    if config.standardise != "auto":
        return config.standardise
    if usual != "none" and config.privacy.level == "example" and config.server_examples:
        return "server"
    return "local" if usual == "federated" and config.privacy.level == "client" else usual


def checked(name: str, found: object) -> Callable[[RunConfig], Any]:
    """Return what was found under the name if it makes tasks."""
    if not callable(found):
        raise InputError(f"task '{name}' is {found!r}; name a class made from a RunConfig (tasks/base.py: Task).")
    return found
