"""What `fedra list` says of tasks and data sets."""

from __future__ import annotations

from core.plugins import installed, load
from tasks import GROUP, TASKS


def tasks() -> dict[str, str]:
    """Return each task's sentence, the first line of its class; installed plug-ins too."""
    ours = {name: (load("task", name, TASKS, GROUP).__doc__ or "").splitlines()[0] for name in TASKS}
    return ours | installed(GROUP)


def datasets() -> dict[str, str]:
    """Return each built-in task's data sets with a sentence, the offline default first."""
    found: dict[str, str] = {}
    for name, target in TASKS.items():
        module = target.partition(":")[0]
        table = load("data sets of", name, {name: f"{module}:DATASETS"}, GROUP)
        found |= {f"{name}: {key}": dataset.sentence for key, dataset in table.items()}
    return found
