"""A checkpoint after every round: everything a run needs to end with the same bits as one that was never stopped.

It is written while the next round trains; a run that is killed meanwhile continues one round earlier.

Nothing random has to be kept: every draw is a function of (seed, round, client). Of what clients keep only that which
has changed is written, into a file of its own for each round (`clients/`), and all of it once in a while: to write the
states of a thousand clients takes longer than to train a hundred of them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp.strategy import Strategy
from safetensors import SafetensorError

from core import tree
from core.errors import InputError
from core.server_side import ServerSide

CLIENTS = "clients"


@dataclass
class Checkpoint:
    """The state of a run after its last finished round."""

    round: int
    arrays: ArrayRecord
    strategy: dict[str, Any]
    unsaved: list[str]
    """Attributes of the strategy that could not be saved; resuming with any is refused."""
    client_states: dict[int, RecordDict]
    progress: dict[str, Any]
    """The recorder's running totals and the best model so far."""


class Writer:
    """Writes checkpoints beside the training: a round's is on disk before that of the next is begun."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._last: Future[None] | None = None
        self._written: int | None = None
        """States in the files since all were written; None before that."""

    def save(self, checkpoint: Checkpoint, changed: Collection[int] | None = None) -> None:
        """Take the checkpoint as it is now and return while it is written; raises what the last writing raised.

        `changed` are the nodes whose state is another than at the last call; None writes all.
        """
        everybody = checkpoint.client_states
        nodes = everybody.keys() if changed is None else changed
        # As much again as there is, at most: what resuming reads stays small, and so does what is written.
        whole = self._written is None or self._written + len(nodes) > 2 * len(everybody)
        if whole:
            nodes = everybody.keys()
        states = tree.dump({node: everybody[node] for node in nodes}, f"round-{checkpoint.round:06d}") if nodes else {}
        self._written = len(nodes) + (0 if whole else self._written or 0)
        files = tree.dump({k: v for k, v in vars(checkpoint).items() if k != "client_states"}, "state")
        self.wait()
        self._last = self._thread.submit(write, files, checkpoint.round, self._folder, states, whole)

    def wait(self) -> None:
        """Return when everything is on disk."""
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        """End the thread once everything is on disk."""
        self._thread.shutdown()
        self.wait()


def write(
    files: Mapping[str, bytes], server_round: int, folder: Path, states: Mapping[str, bytes], whole: bool
) -> None:
    """Write a checkpoint under `folder` so that a kill at any moment leaves the previous or the new one whole.

    Clients' states go first: those of a round that has no checkpoint yet are not read. Where they are all clients'
    (`whole`) the older files go last.
    """
    fresh = folder / f"round-{server_round:06d}"
    part = folder / "part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    if states:
        (folder / CLIENTS).mkdir(exist_ok=True)
    for name, content in [*((folder / CLIENTS / n, c) for n, c in states.items()),
                          *((part / n, c) for n, c in files.items())]:  # fmt: skip
        with name.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    shutil.rmtree(fresh, ignore_errors=True)
    os.replace(part, fresh)
    for old in folder.glob("round-*"):
        if old != fresh:
            shutil.rmtree(old)
    for old in (folder / CLIENTS).glob("round-*") if whole else ():
        if old.name not in states:
            old.unlink()


def last_round(folder: Path) -> int:
    """Return the round of the newest checkpoint under `folder`, 0 where there is none."""
    return max((int(saved.name.removeprefix("round-")) for saved in folder.glob("round-*")), default=0)


def load(folder: Path) -> Checkpoint | None:
    """Return the newest whole checkpoint under `folder`, or None where there is none."""
    saved = sorted(folder.glob("round-*"))
    if not saved:
        return None
    try:
        states: dict[int, RecordDict] = {}
        for file in sorted((folder / CLIENTS).glob("round-*.json")):
            if file.stem <= saved[-1].name:
                states |= tree.load(file.parent, file.stem)
        return Checkpoint(**tree.load(saved[-1], "state"), client_states=states)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(
            f"the checkpoint {saved[-1]} cannot be read ({error}); "
            f"start anew with: fedra run {folder.parent / 'config.toml'}."
        ) from None


def strategy_state(strategy: Strategy) -> tuple[dict[str, Any], list[str]]:
    """Return what the strategy has to remember, and the names of attributes that cannot be saved.

    A strategy with `state_dict()` says so itself. Else it is every attribute but functions and the server's side of
    the run, which are rebuilt from the configuration.
    """
    if hasattr(strategy, "state_dict"):
        return {"state_dict": strategy.state_dict()}, []
    own = vars(strategy).items()
    attributes = {name: value for name, value in own if not (callable(value) or isinstance(value, ServerSide))}
    saved = {name: value for name, value in attributes.items() if tree.packable(value)}
    return saved, sorted(attributes.keys() - saved.keys())


def refuse_unsaved(checkpoint: Checkpoint) -> None:
    """Raise `InputError` when the strategy had something to remember that could not be saved."""
    if checkpoint.unsaved:
        raise InputError(
            f"this run cannot be resumed: its strategy keeps {', '.join(checkpoint.unsaved)}, which a checkpoint "
            "cannot hold; give the strategy state_dict() and load_state_dict()."
        )


def restore_strategy(strategy: Strategy, checkpoint: Checkpoint) -> None:
    """Give the strategy back what it remembered."""
    if "state_dict" in checkpoint.strategy:
        strategy.load_state_dict(checkpoint.strategy["state_dict"])  # type: ignore[attr-defined]
    else:
        vars(strategy).update(checkpoint.strategy)


def continue_from(strategy: Strategy, checkpoint: Checkpoint) -> None:
    """Let a strategy whose `start` counts from round 1 see the true rounds, and remember what it knew.

    It remembers at the first `configure_train`: a `start` of its own may set things up anew before that.
    """

    def shifted(method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda server_round, *arguments, **named: method(server_round + checkpoint.round, *arguments, **named)

    first = [checkpoint]
    configure_train = strategy.configure_train

    def configure(*arguments: Any, **named: Any) -> Iterable[Message]:
        while first:
            restore_strategy(strategy, first.pop())
        return configure_train(*arguments, **named)

    strategy.configure_train = shifted(configure)  # type: ignore[method-assign]
    for name in ("aggregate_train", "configure_evaluate", "aggregate_evaluate"):
        setattr(strategy, name, shifted(getattr(strategy, name)))
