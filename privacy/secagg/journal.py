"""What a client has answered, in a file beside its key: no stage twice, whatever becomes of its other state.

Flower's SuperNode works on the messages of a run side by side, each from a copy of `Context.state`, and keeps the copy
that comes back last. A server that sends two lists of survivors at once, and the requests for shares after the one and
the other, could have both kinds of shares. So each answer is claimed here before it leaves, under a lock, and steps
only go up. That also holds where a state was lost, or was put back from an old copy.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

from privacy.secagg.errors import OutOfTurnError, RefusedError

ENDING = ".answered"


class Journal:
    """The file of one client; it holds the last step of each run, and whether the client has described its data."""

    def __init__(self, identity: str) -> None:
        self._file = Path(identity + ENDING)

    def claim(self, run: str, server_round: int, stage: int, *, once: bool = False) -> None:
        """Write down that a stage of a round is answered; `once` marks an answer that is given once a run.

        Raises `OutOfTurnError` for what is not later than all that was answered, and for a second answer of one that is
        given once; `RefusedError` where the file cannot be read or written.
        """
        try:
            with os.fdopen(os.open(self._file, os.O_RDWR | os.O_CREAT, 0o600), "r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                said = json.loads(file.read() or "{}")
                *last, described = said.get(run, [0, 0, False])
                if [server_round, stage] <= last:
                    raise OutOfTurnError(f"stage {stage} of round {server_round} is not later than what was answered")
                if once and described:
                    raise OutOfTurnError("it has described its data in this run, and does not in another sum")
                said[run] = [server_round, stage, described or once]
                file.seek(0)
                file.write(json.dumps(said))
                file.truncate()
                file.flush()
                os.fsync(file.fileno())
        except (OSError, ValueError, TypeError) as error:
            raise RefusedError(
                f"what the client has answered cannot be kept in {self._file} ({type(error).__name__}), and without it "
                "somebody could have two answers; let its node write there"
            ) from None
