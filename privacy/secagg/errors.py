"""What ends a round of secure aggregation: whoever runs it catches `SecAggError`, or one kind of it."""

from __future__ import annotations


class SecAggError(RuntimeError):
    """The round cannot go on. A client that raises it has forgotten the round's keys unless it says otherwise."""


class MalformedError(SecAggError):
    """Bytes that are not the message they should be."""


class OutOfTurnError(SecAggError):
    """A message of another round, of another stage, or of one that was answered before."""


class RefusedError(SecAggError):
    """Terms that this client does not accept: another run or version, a weaker profile, too small a cohort."""


class TooFewError(SecAggError):
    """Fewer clients than the threshold or the minimum cohort: going on would show too much, or nothing."""


class BadKeyError(SecAggError):
    """A public key with which no secret can be agreed, or one that somebody else has too."""


class ForgedError(SecAggError):
    """A signature, a ciphertext, a share or a key that is not what its sender made."""


class InconsistentError(SecAggError):
    """Lists, keys or models that contradict what was said before, or each other."""
