"""What a run's privacy is worth, in words: the terminal and the page say the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from reports.words import rate

SIMULATED = "simulated noise: not a guarantee"
WHOM = {"example": "each example of a client", "client": "a client whole"}


def bound(privacy: Mapping[str, Any]) -> str:
    """Return epsilon with its delta and level, and whether it is one."""
    said = f"epsilon {rate(privacy['epsilon'])} at delta {privacy['delta']:g}, {privacy['level']} level"
    return f"{said} ({SIMULATED})" if privacy.get("simulated") else said


def lines(privacy: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the terminal says at the end of a run."""
    if privacy["level"] == "none":
        yield "Privacy: none; updates leave clients in clear."
        return
    worst = ", the worst of all clients" if "clients" in privacy else ""
    yield f"Privacy: {bound(privacy)}{worst}, by {privacy['accountant']}."
    if canaries := privacy.get("canaries"):
        yield (
            f"Canaries: {canaries['number']:,} in this run, {canaries['included']:,} of them in: its model is for "
            "auditing, not for use."
        )
    if privacy["not_covered"]:
        yield f"Not covered: {'; '.join(privacy['not_covered'])}."
