"""An update processor: what every client does to its update before it leaves."""

from __future__ import annotations

from dataclasses import replace

from core.training import LocalRound, LocalUpdate


def rounded(update: LocalUpdate, r: LocalRound) -> LocalUpdate:
    """Weights rounded to three decimals."""
    return replace(update, params={name: (p * 1000).round() / 1000 for name, p in update.params.items()})
