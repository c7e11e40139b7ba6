"""The audit by canaries: those that a run carries, or those of the same run once more with canaries in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from core.config import RunConfig
from core.errors import InputError
from core.idle import without_idle
from core.records import travelling
from privacy.audit import canaries as hidden
from privacy.audit import one_run
from server.recorder import RunFolder
from simulations.run import Run, simulate
from tasks import load
from tasks.base import build_model

USUAL = 1000
FOLDER = "audit"
# Of the noise that the ledger counts: less is a fault, and not float32.
ENOUGH = 0.99
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""(what is counted, steps) -> a block in which one says how many of them are done."""


def audit_canaries(run: Run, folder: RunFolder, wanted: int | None, progress: Progress) -> dict[str, Any]:
    """Return what canaries say of a run's epsilon; under `skipped` why there is nothing to say."""
    config = folder.config
    carried = config.audit.canaries
    if carried and wanted not in (None, carried):
        raise InputError(f"this run carries {carried} canaries of its own; drop --canaries {wanted}.")
    if not carried and (why := _nothing(config)):
        if wanted is not None:
            raise InputError(f"--canaries {wanted} would prove nothing: {why}; drop it.")
        return {"skipped": why}
    audited = run if carried else _repeated(config, folder, wanted or _usual(config), progress)
    claim = audited.summary["privacy"]
    seen = json.loads((audited.path / "canaries.json").read_text(encoding="utf-8"))
    included = np.array(seen["included"])
    findings = {
        name: vars(one_run.audit(np.array(seen[name]), included, claim["epsilon"], claim["delta"]))
        for name in ("known", "released")
        if seen[name] is not None
    }
    out: dict[str, Any] = {
        "level": claim["level"],
        "epsilon": claim["epsilon"],
        "delta": claim["delta"],
        "simulated": claim["simulated"],
        "confidence": one_run.CONFIDENCE,
        "repeated": not carried,
        "canaries": len(included),
        "included": int(included.sum()),
        "observers": findings,
        "reach": one_run.reach(len(included), claim["delta"]),
        "noise": seen["noise"],
        "metrics": {"with": audited.metrics, "without": run.metrics if not carried else None},
    }
    return {**out, "verdict": verdict(out)}


def verdict(found: dict[str, Any]) -> str:
    """Return violated, too little noise, not refuted or consistent, by what the observer who knows most finds.

    One bound at 95 % decides: the better of two would be wrong more often.
    """
    if found["observers"]["known"]["bound"] > found["epsilon"]:
        return "violated"
    if found["noise"] and found["noise"][2] < ENOUGH:
        return "too little noise"
    return "not refuted" if found["reach"] < found["epsilon"] else "consistent"


def _nothing(config: RunConfig) -> str:
    """Return why canaries would have nothing to say about such a run, empty where they have."""
    own = config.privacy
    if own.level == "none":
        return "the run adds no noise and claims no epsilon"
    if own.level == "client" and own.noise != "central":
        return f"canaries are for noise of the server's or in every step, and this run's is {own.noise}"
    if own.level == "client" and own.mechanism != "gaussian":
        return f"canaries are for noise that is new in every round, and this run's is {own.mechanism}"
    if own.population:
        return f"the run stands for {own.population:,} clients and adds less noise than its own epsilon needs"
    return "" if _usual(config) else "the model is too small for canaries"


def _usual(config: RunConfig) -> int:
    """Return how many canaries such a run takes: the usual number, or as many as its model has room for."""
    size = sum(p.numel() for p in travelling(build_model(load(config), config.seed)).values())
    return min(USUAL, hidden.most(size) * (config.clients if config.privacy.level == "example" else 1))


def _repeated(config: RunConfig, folder: RunFolder, canaries: int, progress: Progress) -> Run:
    """Return the run again with canaries, in a folder of its own inside the run's; the last one's goes."""
    place = folder.path / FOLDER
    changes: dict[str, Any] = {"out": str(place), "audit__canaries": canaries, "baselines": False}
    if not config.early_stopping.metric and config.keep == "last":
        changes["evaluate_every"] = config.rounds
    before = list(place.glob("*")) if place.is_dir() else []
    begun: list[Path] = []
    try:
        with progress("canaries: round", config.rounds) as done:
            again = simulate(
                # A preset's settings of its baselines have nothing to do without them.
                without_idle(config.with_(**changes)),
                on_start=lambda path, *_: begun.append(path),
                on_round=lambda row: done(row["round"]),
            )
    except BaseException:
        # Half a run says nothing, and the run that is audited stays as it was.
        for path in begun:
            shutil.rmtree(path, ignore_errors=True)
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()
        raise
    for path in before:
        shutil.rmtree(path, ignore_errors=True)
    return again
