"""What `summary.json` holds of a run, finished or broken off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from server.malice import warnings
from server.recorder import versions
from strategies import is_personal

if TYPE_CHECKING:
    from server.session import Session


def summarise(session: Session, kept: Mapping[str, Any], status: str, error: str) -> dict[str, Any]:
    """Return the run's summary; `kept` is the evaluation of the model that is saved."""
    return {
        "task": session.config.task,
        "dataset": session.config.dataset,
        "preset": session.config.preset,
        "strategy": session.config.strategy,
        "seed": session.config.seed,
        "rounds": session.done,
        "clients": session.config.clients,
        "seconds": round(session.clock.seconds, 3),
        "clients_per_second": _clients_per_second(session),
        "metrics": kept.get("central", {}),
        "metrics_round": kept.get("round"),
        "clients_metrics": kept.get("clients", {}),
        "validation_metrics": kept.get("validation", {}),
        "threshold": kept.get("threshold"),
        "kept": session.config.keep,
        "best": {key: session.best[key] for key in ("round", "metric", "value")} if session.best else None,
        "baselines": session.baselines,
        "privacy": session.privacy.summary(),
        "secure_aggregation": session.grid.secure.summary(session.model) if session.grid.secure else None,
        "traffic": session.traffic,
        "virtual_seconds": session.virtual.seconds if session.virtual else session.virtual_before,
        "answers": session.answers.uncounted,
        "personal": is_personal(session.config),
        "attack": session.malice.summary(kept.get("attack_success")),
        "warnings": [*warnings(session.config), *session.privacy.warnings()],
        "versions": versions(),
        "status": status,
        "stopped_by": session.stopped_by or None,
        "error": error or None,
    }


def _clients_per_second(session: Session) -> float | None:
    """Return the clients trained per second of training, the first round apart."""
    steady = session.steady
    return round(steady["clients"] / steady["seconds"], 3) if steady["seconds"] else None
