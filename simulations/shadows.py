"""Shadow models: the run's own training on random halves of the data, all of them at once as one cohort.

Shadow k of a client starts from shadow k's global model: the kernel trains the same client in K federations at a time,
and K means make K new global models. Clipping and noise are the run's; a strategy's own rule is not: the shadows
average. Nothing of what they learn leaves the audit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from client.setting import epochs_of
from core.batches import Batches
from core.config import RunConfig
from core.optimizers import learning_rate, make_optimizer
from core.records import Tensors, travelling
from core.seeding import derive, rng, seeds
from core.training import assemble, can_vectorise, everybody, local_sgd
from privacy.client_level import ClientLevel
from privacy.dpsgd import PrivateSteps
from privacy.example_level import ExampleLevel, poisson_batches
from privacy.noise import Simulated
from tasks.base import Task, build_model


@dataclass(frozen=True)
class Examples:
    """Standardised examples of all clients: x (n, ...), y (n,), and whose each is, owner (n,)."""

    x: np.ndarray
    y: np.ndarray
    owner: np.ndarray


def train_shadows(
    config: RunConfig,
    task: Task,
    examples: Examples,
    inside: np.ndarray,
    norms: Sequence[float],
    done: Callable[[int], None],
) -> Tensors:
    """Return the global models (K, ...) by name of K federations; shadow k's clients hold the examples inside[k] (n,).

    They train as many rounds as there are `norms`, the run's clipping norms. `done` hears of every round.
    """
    model = build_model(task, config.seed)
    shadows = everybody(travelling(model), len(inside))
    rows = [np.flatnonzero(examples.owner == client) for client in range(config.clients)]
    for number, norm in enumerate(norms, start=1):
        drawn = rng(config.seed, "shadows", number).permutation(config.clients)[: config.count(config.sampled)]
        total = _Mean(config, shadows, norm, number)
        for client in sorted(drawn.tolist()):
            held = [rows[client][own[rows[client]]] for own in inside]
            who = [k for k, own in enumerate(held) if len(own)]
            if who:
                start = {name: t[who] for name, t in shadows.items()}
                own = [held[k] for k in who]
                learnt = _train(config, task, model, examples, client, number, start, own)
                total.add(who, start, learnt, [len(mine) for mine in own])
        shadows = total.mean()
        done(number)
    return shadows


def _train(
    config: RunConfig,
    task: Task,
    model: torch.nn.Module,
    examples: Examples,
    client: int,
    number: int,
    start: Tensors,
    held: Sequence[np.ndarray],
) -> Tensors:
    """Return what one client learns in a round in several federations, in each from the examples that it holds."""
    sizes, shadows = [len(own) for own in held], range(len(held))
    sources = [Simulated(config.seed, "shadows", number, client, k) for k in shadows]
    private: PrivateSteps | None = None
    if config.privacy.level == "example":
        level = ExampleLevel(config)
        z = level.noise_multiplier(int((examples.owner == client).sum()))
        expected = [level.rate(size) * size for size in sizes]
        norm = config.privacy.clipping_norm
        private = PrivateSteps.begin(norm, [z] * len(held), expected, sources)
        batches = poisson_batches(level, sizes, sources)
    else:
        batches = _batches(config, number, client, sizes)
    # Rows of the clients one after the other become rows of all examples.
    places = torch.from_numpy(np.concatenate(held))
    r = assemble(
        config, model, task.loss, examples.x, examples.y,
        Batches(places[batches.rows], batches.weights, batches.steps),
        make_optimizer(config, learning_rate(config, number)),
        seed=derive(config.seed, "shadows", "model", number, client),
        seeds=seeds(config.seed, "shadows", "model", number, client, clients=list(shadows)),
        sizes=tuple(sizes),
        private=private,
        # Federations alike are always faster together, whatever was measured of clients.
        vectorised=can_vectorise(model),
    )  # fmt: skip
    return local_sgd(r, start=start).params


def _batches(config: RunConfig, number: int, client: int, sizes: Sequence[int]) -> Batches:
    path, shadows = ("shadows", number, client), range(len(sizes))
    if not config.local_steps:
        return epochs_of(config, path, shadows, sizes, config.local_epochs)
    epochs = -(-config.local_steps * config.batch_size // min(sizes))
    return epochs_of(config, path, shadows, sizes, epochs).cut(np.full(len(sizes), config.local_steps))


class _Mean:
    """The new global models of all federations from their clients' updates, one client at a time."""

    def __init__(self, config: RunConfig, shadows: Tensors, norm: float, number: int) -> None:
        self._shadows, self._norm, self._number, self._seed = shadows, norm, number, config.seed
        self._total = {name: torch.zeros_like(t) for name, t in shadows.items()}
        self._weight = torch.zeros(len(next(iter(shadows.values()))))
        self._level = ClientLevel.of(config) if config.privacy.level == "client" else None
        self._local = config.privacy.noise == "local"

    def add(self, who: Sequence[int], start: Tensors, params: Tensors, sizes: Sequence[int]) -> None:
        """Take in what a client has learnt in the federations `who`, from `start` on; and from how many examples."""
        away = {name: p - start[name] for name, p in params.items()}
        weight = torch.tensor(sizes, dtype=torch.float32)
        factor = weight
        if self._level is not None:
            weight = torch.ones_like(weight)
            norms = torch.stack([t.reshape(len(t), -1).square().sum(1) for t in away.values()]).sum(0).sqrt()
            factor = (self._norm / norms).clamp(max=1.0)
        for name, t in away.items():
            self._total[name][who] += t * _like(factor, t)
        self._weight[who] += weight

    def mean(self) -> Tensors:
        """Return the new global models; where the run's clients or server add noise, so does this."""
        count = self._weight.clamp_min(1e-12)
        if self._level is None:
            divisor, deviation = count, torch.zeros_like(count)
        elif self._local:
            # The noise of all clients together.
            divisor, deviation = count, self._level.noise_multiplier * self._norm * count.sqrt()
        else:
            divisor = torch.full_like(count, self._level.expected)
            deviation = torch.full_like(count, self._level.sum_multiplier * self._norm)
        noise = Simulated(self._seed, "shadows", "noise", self._number)
        return {
            name: t + (total + noise.normal(*total.shape) * _like(deviation, t)) / _like(divisor, t)
            for (name, t), total in zip(self._shadows.items(), self._total.values(), strict=True)
        }


def _like(values: Tensor, t: Tensor) -> Tensor:
    return values.view(-1, *[1] * (t.ndim - 1))
