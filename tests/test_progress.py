"""What the terminal shows while a command works."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO

from rich.console import Console

from core.config import RunConfig
from simulations.progress import Progress
from simulations.run import simulate


def test_baselines_say_how_many_clients_have_trained_alone(smoke: Callable[..., RunConfig]) -> None:
    heard: list[int] = []
    simulate(smoke(rounds=1, baselines=True), on_baseline=heard.append)
    assert heard == [0, 1, 2, 3, 4]


def test_baselines_of_many_clients_are_a_line_each_tenth(smoke: Callable[..., RunConfig]) -> None:
    console = Console(file=StringIO(), width=120)
    for clients in (4, 60):
        progress = Progress(smoke(clients=clients), console)
        for done in range(13):
            progress.baseline(done)
    assert isinstance(console.file, StringIO)
    assert console.file.getvalue().splitlines() == [
        "training baselines: pooled data, then 60 clients alone; baselines=false leaves them out",
        "training baselines: client 6/60",
        "training baselines: client 12/60",
    ]
