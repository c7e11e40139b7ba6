"""What a run remembers between its rounds, to a checkpoint and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from server import checkpoint as checkpoints
from server.recorder import Clock

if TYPE_CHECKING:
    from server.session import Session


def save(session: Session) -> None:
    """Hand the run as it stands after a round to the writer of checkpoints."""
    state, unsaved = checkpoints.strategy_state(session.strategy)
    progress = {
        "best": session.best,
        "last": session.last,
        "steady": session.steady,
        "seconds": session.clock.seconds,
        "traffic": session.traffic,
        "answers": session.answers.state,
        "virtual_seconds": session.virtual.seconds if session.virtual else None,
        "malice": session.malice.totals,
        "selection": session.selection.state(),
        "privacy": session.privacy.state(),
        "secure_aggregation": session.grid.secure.state() if session.grid.secure else None,
    }
    states = session.grid.client_states
    saved = checkpoints.Checkpoint(session.done, session.arrays, state, unsaved, states, progress)
    session.checkpoints.save(saved, session.grid.take_changed_states())


def restore(session: Session, saved: checkpoints.Checkpoint) -> None:
    """Let a run that has not begun stand where the checkpoint was made; `InputError` where it cannot."""
    checkpoints.refuse_unsaved(saved)
    progress = saved.progress
    session.done, session.arrays = saved.round, saved.arrays
    session.best, session.last = progress["best"], progress["last"]
    session.steady, session.traffic = progress["steady"], progress["traffic"]
    session.clock = Clock(progress["seconds"])
    session.answers.state, session.virtual_before = progress["answers"], progress["virtual_seconds"]
    session.malice.totals = progress["malice"]
    session.selection.restore(progress["selection"])
    session.grid.client_states.update(saved.client_states)
    session.privacy.restore(progress["privacy"], session.done)
    if session.grid.secure is not None:
        session.grid.secure.restore(progress["secure_aggregation"])
