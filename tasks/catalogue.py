"""What `fedra list` says of tasks and data sets."""

from __future__ import annotations

from core.plugins import first_line, foreign, load
from tasks import GROUP, TASKS, checked


def tasks() -> dict[str, str]:
    """Return each of our tasks' sentence, the first line of its class."""
    return {name: first_line(load("task", name, TASKS, GROUP)) for name in TASKS}


def plugins() -> dict[str, str]:
    """Return the tasks of other packages: where each comes from and the first line of its class."""
    return foreign("task", TASKS, GROUP, lambda name, found: first_line(checked(name, found)))


def datasets() -> dict[str, str]:
    """Return each built-in task's data sets with a sentence, the offline default first."""
    found: dict[str, str] = {}
    for name, target in TASKS.items():
        module = target.partition(":")[0]
        table = load("data sets of", name, {name: f"{module}:DATASETS"}, GROUP)
        found |= {f"{name}: {key}": dataset.sentence for key, dataset in table.items()}
    return found
