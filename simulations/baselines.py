"""What federation is compared with: the same model on pooled data, and on each client alone.

Both need rows that a real federation could not gather, so they exist only in a simulation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from core import records
from core.batches import plan
from core.config import RunConfig
from core.data import Federation, Split
from core.metrics import best_threshold, score, score_counts, spread
from core.optimizers import make_optimizer
from core.seeding import derive, permutations
from core.training import assemble, local_sgd
from tasks import load, standardise
from tasks.base import Task, build_model, predict

COHORT = 32


def train_baselines(
    config: RunConfig, federation: Federation, on_client: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """Return {"central": metrics of pooled training, "local": means over clients that train alone}.

    `local.own_test` is each client's model on its own test split, the rest on the central test set. `on_client` hears
    how many clients are done: 0 at the start, which is the pooled data's, and then after each.
    """
    on_client(0)
    task = load(config)
    pooled = Split(federation.train.x, federation.train.y)
    validation = Split(federation.validation.x, federation.validation.y)
    constants = _constants([pooled]) if task.standardise != "none" else None
    base = config.baseline
    [central] = _train(task, config, [_scaled(pooled, constants)], "pooled", base.epochs)
    threshold = _threshold(task, central, _scaled(validation, constants))
    test = _scaled(federation.central, constants)
    rows, own = [], []
    locals_ = [_own(task, federation, client, constants) for client in range(len(federation))]
    models = _train(task, config, [splits["train"] for splits in locals_], "alone", base.alone_epochs or base.epochs)
    for model, splits in zip(models, locals_, strict=True):
        cut = _threshold(task, model, splits["validation"])
        rows.append(score(predict(model, torch.from_numpy(splits["central"].x)), test.y, task.metrics, cut))
        x = torch.from_numpy(splits["test"].x)
        own.append(score(predict(model, x), splits["test"].y, task.metrics, cut))
        on_client(len(own))
    local = {name: values["mean"] for name, values in spread(_columns(rows)).items()}
    return {
        "central": score(predict(central, torch.from_numpy(test.x)), test.y, task.metrics, threshold),
        "local": {**local, "own_test": spread(_columns(own)), "each": rows},
    }


def _train(task: Task, config: RunConfig, splits: Sequence[Split], name: str, epochs: int) -> Iterator[torch.nn.Module]:
    """Yield one model per split, a cohort after the other, all from the same initial weights.

    epochs=0 trains as long as a federated client.
    """
    model = build_model(task, config.seed)
    base = config.baseline
    rate = base.learning_rate or config.learning_rate
    optimizer = make_optimizer(config, rate, base.optimizer)
    for start in range(0, len(splits), COHORT):
        cohort = splits[start : start + COHORT]
        sizes = [len(split) for split in cohort]

        def shuffled(at: np.ndarray, size: int, start: int = start) -> np.ndarray:
            times = epochs or _federated_epochs(config, size)
            return permutations(config.seed, "baseline", name, clients=start + at, size=size, times=times)

        together = assemble(
            config, model, task.loss,
            np.concatenate([split.x for split in cohort]),
            np.concatenate([split.y for split in cohort]),
            plan(sizes, config.batch_size, shuffled),
            optimizer,
            seed=derive(config.seed, "baseline-model", name, start),
        )  # fmt: skip
        update = local_sgd(together)
        for i in range(len(cohort)):
            weights = {key: tensor[i] for key, tensor in update.params.items()}
            yield records.load_into(build_model(task, config.seed), weights)


def _federated_epochs(config: RunConfig, examples: int) -> int:
    if config.local_steps:
        return max(1, round(config.rounds * config.local_steps * config.batch_size / examples))
    return config.rounds * config.local_epochs


def _columns(rows: Sequence[Mapping[str, float]]) -> dict[str, np.ndarray]:
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _threshold(task: Task, model: torch.nn.Module, validation: Split) -> float:
    if not task.tuned_threshold:
        return 0.5
    return best_threshold(score_counts(predict(model, torch.from_numpy(validation.x)), validation.y))


def _own(task: Task, federation: Federation, client: int, pooled: standardise.Constants | None) -> dict[str, Split]:
    """Return a client's splits and the central test set as a client alone sees them: scaled by its own training rows.

    Where clients scale by their own constants anyway (heart), the central test set keeps the pooled ones, as FLamby's.
    """
    splits = federation.client(client)
    own = None if pooled is None else _constants([splits["train"]])
    scaled = {name: _scaled(split, own) for name, split in splits.items()}
    return scaled | {"central": _scaled(federation.central, own if task.standardise == "federated" else pooled)}


def _constants(splits: Sequence[Split]) -> standardise.Constants:
    return standardise.combine([standardise.statistics(split.x) for split in splits])


def _scaled(split: Split, constants: standardise.Constants | None) -> Split:
    return split if constants is None else Split(standardise.apply(split.x, constants), split.y)
