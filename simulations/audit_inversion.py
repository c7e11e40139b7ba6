"""The audit by gradient inversion: one client's update of round 1, as it leaves, bare, and protected."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from flwr.app import Context, RecordDict
from torch import Tensor

from client.privacy import ClientPrivacy
from client.setting import batches_of, inputs
from core import records
from core.config import RunConfig
from core.optimizers import learning_rate, make_optimizer
from core.records import Tensors, travelling
from core.seeding import derive
from core.training import assemble, local_sgd
from privacy.audit import inversion
from privacy.client_level import ClientLevel
from privacy.example_level import ExampleLevel
from privacy.noise import Source, source
from privacy.secagg.rounds import survivors_of
from server.recorder import RunFolder
from simulations.audit_canaries import Progress
from simulations.audit_membership import constants_of, setting_of
from simulations.run import check_run
from tasks.base import build_model

# More unknown inputs than these are not tried by gradient matching.
MOST = 64
# Nor are sums of more clients: an update in one is hidden no better than it says.
MOST_SUMMED = 10
PICTURES, SIDE = 4, 64
# Recognisable, or close: where an example counts as recovered.
CLEAR_DECIBELS, CLOSE = 20.0, 0.1
WHOLE = ", the whole round"
STANDARD = {"privacy.level": "client", "privacy.noise": "local", "privacy.noise-multiplier": 1.0}


@dataclass(frozen=True)
class Protection:
    """What becomes of an update before it is seen."""

    name: str
    config: RunConfig
    released: bool = False
    """Whether the noise of the sum is on it: where it is of one client, that of a round without anybody else."""
    others: int = 0
    """How many other clients' updates are added to it under secure aggregation."""


def audit_inversion(folder: RunFolder, progress: Progress) -> dict[str, Any]:
    """Return what one client's update shows of its examples, for one of them, a batch, and a whole round."""
    config = folder.config
    federation = check_run(config)
    sizes = federation.train.sizes
    enough = np.flatnonzero(sizes >= config.batch_size)
    client = int(enough[0] if len(enough) else sizes.argmax())
    x, y, _ = inputs(setting_of(config), "train", [client], constants_of(folder))
    batch = min(config.batch_size, len(y))
    amounts = {"one example": 1, f"a batch of {batch}": batch, f"all {len(y)} examples{WHOLE}": len(y)}
    ways = list(protections(config, len(y)))
    others = [int(other) for other in np.argsort(-sizes, kind="stable") if other != client]
    attack = _Attack(config, torch.from_numpy(x), float(federation.central.x.mean()))
    cases = []
    with progress("inversion: update", len(amounts) * len(ways)) as done:
        for (amount, count), way in product(amounts.items(), ways):
            away = _sent(way, client, x[:count], y[:count], amount)
            for other in others[: way.others]:
                own_x, own_y, _ = inputs(setting_of(config), "train", [other], constants_of(folder))
                more = _sent(replace(way, released=False), other, own_x[:count], own_y[:count], amount)
                away = {name: t + more[name] for name, t in away.items()}
            found = attack(away, torch.from_numpy(x[:count]), torch.from_numpy(y[:count]))
            cases.append({"amount": amount, "examples": count, "protection": way.name, **found})
            done(len(cases))
    return {
        "client": federation.name(client),
        "kind": attack.kind,
        "by": attack.by,
        "guess": attack.guess,
        "cases": cases,
    }


def protections(config: RunConfig, examples: int) -> Iterator[Protection]:
    """Yield how an update of a client with so many examples is seen: bare, and with the run's clipping and noise.

    A run that has none is shown with a usual setting.
    """
    own = config.privacy
    plain = {
        key: value
        for key, value in config.flat().items()
        if not key.startswith(("privacy.", "audit.", "secure-aggregation.", "faults."))
    }
    if config.secure_aggregation.profile != "none":
        yield from _summed(config, RunConfig.of(plain))
        return
    if own.level == "none":
        yield Protection("as the run sends it", RunConfig.of(plain))
        yield Protection("clipped to 1 with noise multiplier 1", RunConfig.of({**plain, **STANDARD}))
        return
    yield Protection("bare", RunConfig.of(plain))
    # The noise is the run's also where an update is made of fewer examples.
    z = (
        ExampleLevel(config).noise_multiplier(examples)
        if own.level == "example"
        else ClientLevel.of(config).noise_multiplier
    )
    config = config.with_(audit__canaries=0, privacy__noise_multiplier=z, privacy__epsilon=0.0)
    if own.level == "client" and own.noise == "central":
        yield Protection("as the server gets it: clipped", config)
        yield Protection("as the server releases it: clipped, noised", config, released=True)
    else:
        yield Protection("as the run sends it: clipped, noised", config)


def _summed(config: RunConfig, bare: RunConfig) -> Iterator[Protection]:
    """Yield how an update is seen under secure aggregation: with as few others as there may be."""
    cohort = config.count(config.sampled) // config.secure_aggregation.groups
    others = min(max(config.secure_aggregation.min_cohort, survivors_of(config, cohort)), MOST_SUMMED) - 1
    yield Protection("bare, which nobody sees", bare)
    if config.privacy.level == "none":
        yield Protection(f"in a sum of {others + 1} clients", bare, others=others)
        return
    level = ClientLevel.of(config)
    private = config.with_(audit__canaries=0, privacy__noise_multiplier=level.noise_multiplier, privacy__epsilon=0.0)
    noise = "with its noise" if config.privacy.noise != "central" else "before the server's noise"
    released = config.privacy.noise == "distributed"
    yield Protection(f"clipped, in a sum of {others + 1} clients {noise}", private, released=released, others=others)


def _sent(way: Protection, client: int, x: np.ndarray, y: np.ndarray, amount: str) -> Tensors:
    """Return the update by name that a client makes of its examples in round 1: in one step, or in a whole round."""
    config = way.config
    if not amount.endswith(WHOLE):
        config = config.with_(batch_size=len(y), local_epochs=1, local_steps=0)
    setting, sizes, blank = setting_of(config), [len(y)], _blank()
    privacy = ClientPrivacy.of(config)
    batches = privacy.batches(1, [client], sizes) if privacy else None
    own = derive(config.seed, "inversion", client)
    r = assemble(
        config, setting.model, setting.task.loss, x, y,
        batches or batches_of(config, 1, [client], sizes, [blank]),
        make_optimizer(config, learning_rate(config, 1)),
        global_params=travelling(build_model(setting.task, config.seed)),
        config={records.SERVER_ROUND: 1, records.CLIPPING_NORM: config.privacy.clipping_norm},
        seed=own, seeds=(own,), sizes=(len(y),),
        private=privacy.steps(1, [client], sizes) if privacy else None,
    )  # fmt: skip
    r = setting.with_past(r, [blank])
    update = local_sgd(r)
    if privacy:
        update = privacy.protect(update, r, 1, [client])
    if setting.compressor:
        update, _ = setting.compressor(update, r)
    away = {name: update.params[name][0] - r.global_params[name] for name in r.global_params}
    return _released(config, away, source(config.privacy.noise_seed)) if way.released else away


def _released(config: RunConfig, away: Tensors, noise: Source) -> Tensors:
    deviation = ClientLevel.of(config).sum_multiplier * config.privacy.clipping_norm
    return {name: t + deviation * noise.normal(*t.shape) for name, t in away.items()}


class _Attack:
    """The attack that fits the model, and how its success is told."""

    def __init__(self, config: RunConfig, x: Tensor, mean: float) -> None:
        setting = setting_of(config)
        self._seed, self._loss = config.seed, setting.task.loss
        self._model = build_model(setting.task, config.seed)
        self._weights = {name: p.detach() for name, p in self._model.named_parameters()}
        self._span = (float(x.min()), float(x.max()))
        self._table = inversion.embedding(self._model, x[:1])
        self._layer = "" if self._table else inversion.first_layer(self._model, x[:1])
        self.kind = "words" if self._table else "images" if x.ndim == 4 else "table"
        self.by = "embedding rows" if self._table else "first layer" if self._layer else "gradient matching"
        # By whom nothing but the mean brightness is known, or that inputs are standardised; of words the chance.
        grey = inversion.psnr((x.double() - mean).square().flatten(1).mean(1).numpy(), self._span)
        words = len(self._weights[f"{self._table}.weight"]) if self._table else 0
        self.guess = {"images": float(np.median(grey)), "table": 1.0, "words": words}[self.kind]

    def __call__(self, away: Tensors, x: Tensor, y: Tensor) -> dict[str, Any]:
        """Return what the update shows of the examples x (n, ...), y (n,) that it was made of."""
        if self._table:
            return self._words(away[f"{self._table}.weight"], x)
        if self._layer:
            flat = inversion.from_first_layer(away[f"{self._layer}.weight"], away[f"{self._layer}.bias"])
            candidates = flat.view(-1, *x.shape[1:])
            if self.kind == "images":
                candidates = candidates.clamp(*self._span)
        elif len(y) > MOST:
            return {"skipped": f"more than {MOST} inputs at once are not tried"}
        else:
            candidates = inversion.from_gradients(
                self._model, self._loss, self._weights, away, y, x.shape[1:], self._span, self._seed
            )
        errors, places = inversion.matched(x, candidates)
        if self.kind == "images":
            scores = inversion.psnr(errors, self._span)
            clear, order = scores >= CLEAR_DECIBELS, np.argsort(-np.nan_to_num(scores, nan=-np.inf))
        else:
            scores = inversion.relative(errors, x)
            clear, order = scores <= CLOSE, np.argsort(scores)
        found = {"best": float(scores[order[0]]), "median": float(np.nanmedian(scores)), "recovered": int(clear.sum())}
        best = [int(i) for i in order[:PICTURES] if places[i] >= 0]
        return {**found, "pictures": self._pictures(x[best], candidates[places[best]]) if best else []}

    def _words(self, rows: Tensor, x: Tensor) -> dict[str, Any]:
        true = np.unique(x.numpy())
        true = true[true > 0]
        told = set(inversion.words(rows, len(true)).tolist())
        right = len(told & set(true.tolist()))
        return {"words": len(true), "recovered": right, "best": right / max(len(true), 1)}

    def _pictures(self, true: Tensor, found: Tensor) -> list[list[str]]:
        """Return pairs of pictures, true and found, as addresses that hold a PNG file."""
        if self.kind != "images" or max(true.shape[2:]) > SIDE or true.shape[1] not in (1, 3):
            return []
        return [[_png(a, self._span), _png(b, self._span)] for a, b in zip(true, found, strict=True)]


def _png(image: Tensor, span: tuple[float, float]) -> str:
    from matplotlib.image import imsave

    file = io.BytesIO()
    values = ((image - span[0]) / max(span[1] - span[0], 1e-12)).clamp(0, 1).permute(1, 2, 0).numpy()
    imsave(file, values[..., 0] if values.shape[2] == 1 else values, cmap="gray", vmin=0, vmax=1, format="png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _blank() -> Context:
    return Context(run_id=0, node_id=0, node_config={}, state=RecordDict(), run_config={})
