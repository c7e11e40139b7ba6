"""The one error that means "the user's input is wrong": a sentence with the value, the choices and the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

# More choices than this are no help to somebody who has mistyped one.
MANY = 40


class InputError(ValueError):
    """The user's input cannot be used. The command line prints the message alone and exits with code 2."""


class RunError(RuntimeError):
    """A run cannot go on, for a reason that the sentence says; the command line exits with code 1."""


def told(error: BaseException) -> str:
    """Return what a user is told of an error: the sentence where it is one of ours, else its kind beside it."""
    return str(error) if isinstance(error, (InputError, RunError)) else f"{type(error).__name__}: {error}"


def unknown(kind: str, value: str, choices: Iterable[str]) -> InputError:
    """Return the error for a name that is not among `choices`, with the nearest one as a suggestion."""
    names = sorted(choices)
    # alpha is partition.alpha, learning_rate is learning-rate: what people leave out or write as in Python. And AUROC,
    # as tables write it, is auroc.
    near = [name for name in names if name.endswith(f".{value}")] or get_close_matches(value, names, n=1)
    if not near:
        lower = {name.lower(): name for name in names}
        near = [lower[match] for match in get_close_matches(value.lower(), lower, n=1)]
    hint = f"did you mean '{near[0]}'? " if near else ""
    if near and len(names) > MANY:
        return InputError(f"unknown {kind} '{value}'; {hint}`fedra list` shows all.")
    return InputError(f"unknown {kind} '{value}'; {hint}Choices: {', '.join(names) or 'none'}.")
