"""What a private run's epsilon says nothing about: allowed, and listed wherever epsilon is shown."""

from __future__ import annotations

from core.adversary import COLLUDING
from core.config import RunConfig


def covered(level: str, standardise: str) -> bool:
    """Return whether epsilon covers the constants that scale the inputs: a client's own are its own business."""
    return standardise in ("server", "none") or (level == "client" and standardise == "local")


def _held(config: RunConfig, standardise: str) -> str:
    """Return what becomes of the server's own examples, without noise."""
    means = ["whose means scale all inputs"] if standardise == "server" else []
    learns = ["from which the model learns"] if config.strategy in ("fltrust", "feddf") else []
    return " and ".join([*means, *learns]) or "which the strategy sees as they are"


def uncovered(config: RunConfig, standardise: str, tuned: bool) -> list[str]:
    """Return what a private run's epsilon says nothing about, a phrase each.

    `standardise` says whose constants scale the inputs, `tuned` whether a decision threshold is chosen on validation.
    """
    own, found = config.privacy, []
    if own.population:
        found.append(f"the {config.clients:,} clients of this run, whose noise is that of {own.population:,}")
    if not covered(own.level, standardise):
        found.append("the means and deviations that scale the inputs")
    elif standardise == "local":
        found.append("the means and deviations that scale the central test set")
    if config.server_examples:
        found.append(f"the {config.server_examples} examples that the server holds, {_held(config, standardise)}")
    if own.level == "example":
        found.append("other examples of the same person: one who has k of them may spend k times that epsilon")
    if own.level == "client" and own.noise == "central" and config.count(config.sampled) < config.clients:
        found.append("who took part in which round, which must stay secret (clients.parquet)")
    if config.secure_aggregation.profile == "none":
        found.append("each client's numbers of examples and labels, stated at the start")
        found.append("clients' training losses and evaluation metrics, for the operator's eyes")
    else:
        found.append("the sums of clients' numbers of examples and labels, stated at the start")
        losses = "" if own.noise == "distributed" else "the means of clients' training losses, and "
        found.append(f"{losses}clients' evaluation metrics, for the operator's eyes")
    if config.attack.kind in COLLUDING and not (own.level == "client" and own.noise == "central"):
        found.append(f"malicious clients' own data, which they share without noise (attack.kind={config.attack.kind})")
    if config.baselines:
        found.append("the baselines, trained on clients' examples without noise")
    if tuned:
        found.append("the decision threshold, chosen on the clients' validation splits")
    if config.keep == "best" or config.early_stopping.metric:
        found.append("which round's model is kept, chosen by the clients' validation metrics")
    return found
