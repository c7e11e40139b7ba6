"""The audit by membership inference: attacks on the model that a run kept, with shadow models of the same making."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from flwr.app import Context, RecordDict
from torch import Tensor, nn
from torch.func import functional_call

from client.setting import Setting, inputs, open_setting
from core import records
from core.config import RunConfig
from core.data import Ragged, Split
from core.errors import InputError
from core.seeding import rng
from privacy.audit import membership
from reports.load import nested, read_rounds
from server.recorder import RunFolder
from simulations.audit_canaries import Progress
from simulations.run import Run, check_run
from simulations.shadows import Examples, train_shadows
from tasks import load, standardise
from tasks.base import build_model

CHUNK = 4096


def audit_membership(run: Run, folder: RunFolder, shadows: int, progress: Progress) -> dict[str, Any]:
    """Return what each attack achieves on the run's training examples against those that it never saw."""
    config = folder.config
    check_run(config)
    examples, member, central = _examples(config, folder)
    task = load(config)
    odds = _odds(run.model(), examples)
    norms = _clipping_norms(run, folder)
    others: np.ndarray | None = None
    inside: np.ndarray | None = None
    if shadows:
        inside = membership.balanced_halves(len(member), shadows, rng(config.seed, "shadows", "halves"))
        with progress("membership: round", len(norms)) as done:
            models = train_shadows(config, task, examples, inside, norms, done)
        empty = build_model(task, config.seed)
        others = np.stack([_odds(empty, examples, {n: t[k] for n, t in models.items()}) for k in range(shadows)])
    found = membership.attacks(odds, others, inside)
    return {
        "members": int(member.sum()),
        "others": int((~member).sum()),
        "of_central_test_set": central,
        "shadows": shadows,
        "rounds": len(norms),
        "confidence": membership.CONFIDENCE,
        "attacks": {name: membership.measure(scores, member) for name, scores in found.items()},
    }


def setting_of(config: RunConfig) -> Setting:
    """Return what a client's process makes of the configuration."""
    flat: Any = config.flat()
    return open_setting([Context(run_id=0, node_id=0, node_config={}, state=RecordDict(), run_config=flat)])


def constants_of(folder: RunFolder) -> dict[str, Any]:
    """Return the constants by which the run scaled its inputs, as clients hear of them; nothing where it did not."""
    file = folder.path / "constants.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {records.CONSTANTS + name: values for name, values in found.items()}


def _examples(config: RunConfig, folder: RunFolder) -> tuple[Examples, np.ndarray, int]:
    """Return the examples, which of them are members (n,) bool, and how many are of the central test set.

    Those have no owner: shadow federations deal them to clients, by their numbers of training examples.
    """
    setting, constants, clients = setting_of(config), constants_of(folder), list(range(config.clients))
    train, test = (inputs(setting, split, clients, constants) for split in ("train", "test"))
    central = _new(setting.data.central, setting.data.test)
    x = central.x
    if constants:
        x = standardise.apply(x, {name: constants[records.CONSTANTS + name] for name in ("mean", "std")})
    sizes = np.array(train[2])
    dealt = rng(config.seed, "shadows", "central").choice(config.clients, len(central), p=sizes / sizes.sum())
    owner = np.concatenate([np.repeat(clients, sizes), np.repeat(clients, test[2]), dealt])
    found = Examples(
        np.concatenate([train[0], test[0], x]), np.concatenate([train[1], test[1], central.y]), owner.astype(np.int64)
    )
    if len(owner) == sizes.sum():
        raise InputError("membership inference needs test examples, and this run's data have none.")
    return found, np.arange(len(owner)) < sizes.sum(), len(central)


def _new(central: Split, test: Ragged) -> Split:
    """Return the central test set without what stands in clients' test splits: it may be all of them together."""
    seen = {row.tobytes() for row in test.x}
    keep = [i for i, row in enumerate(central.x) if row.tobytes() not in seen]
    return Split(central.x[keep], central.y[keep])


def _clipping_norms(run: Run, folder: RunFolder) -> list[float]:
    """Return the clipping norm of each round up to the one whose model was kept."""
    rounds = read_rounds(folder.path)[: run.summary["metrics_round"] or run.summary["rounds"]]
    own = folder.config.privacy.clipping_norm
    return [nested(row, "privacy", "clipping_norm") or own for row in rounds]


def _odds(model: nn.Module, examples: Examples, weights: dict[str, Tensor] | None = None) -> np.ndarray:
    """Return the log-odds of each example's label, (n,)."""
    model.eval()
    x, y = torch.from_numpy(examples.x), torch.from_numpy(examples.y)
    with torch.no_grad():
        parts = [
            membership.log_odds(functional_call(model, weights or {}, (x[i : i + CHUNK],)), y[i : i + CHUNK])
            for i in range(0, len(x), CHUNK)
        ]
    return np.nan_to_num(np.concatenate(parts))
