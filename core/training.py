"""The cohort kernel: local training written once, for C clients at a time.

Parameters, optimiser state and batches carry a leading client axis (C, ...); gradients come from
`torch.func.vmap(grad_and_value(...))` over it, or from matrix products of the stacked weights where a model is made of
plain layers (stacked.py); torch.optim's element-wise optimisers step the stacked parameters as
they are. A deployed client is a cohort of one. A model that cannot be mapped (running statistics, data-dependent
control flow) takes the same path one client at a time through autograd.

Clients of a cohort may need different numbers of steps. One that has finished is copied out after its last step; what
its slot computes afterwards reaches nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from core.batches import Batches
from core.config import RunConfig
from core.device import to_device
from core.one_by_one import one_by_one
from core.records import Tensors, load_into, travelling
from core.steps import Correction, Objective, Penalty, Private, Terms, cohort_gradients, make_step


@dataclass(frozen=True)
class LocalRound:
    """What a cohort has in hand in one round. Shapes: C clients, n rows in all, S steps, B examples a batch."""

    model: nn.Module
    """The architecture; `global_params` are its weights."""
    loss: Callable[[Tensor, Tensor], Tensor]
    """(logits, y) -> each example's loss (B,)."""
    global_params: Tensors
    """The global model, one copy for all: what a hook for one client compares its own weights with."""
    x: Tensor
    """(n, ...) inputs of all the cohort's clients."""
    y: Tensor
    """(n,) labels."""
    batches: Batches
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]
    config: Mapping[str, Any] = field(default_factory=dict)
    """The round's config as the strategy sent it ("server-round", "proximal-mu", ...)."""
    gradient_clip: float = 0.0
    seed: int = 0
    """Of dropout and whatever else the model draws."""
    vectorised: bool = True
    """False trains one client after the other through autograd."""
    bf16: bool = False
    """Whether the forward pass runs under torch's autocast."""
    compiled: bool = False
    """Whether torch.compile makes the cohort's gradient."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The strategy's options as the run has them, with hyphens ("proximal-mu")."""
    sizes: tuple[int, ...] = ()
    """Each client's examples: x and y hold them client after client."""
    seeds: tuple[int, ...] = ()
    """Each client's own, for what is trained or drawn one client after the other."""
    state: Mapping[str, Tensors] = field(default_factory=dict)
    """What each client has kept: tensors (C, ...) by kind and name."""
    sent: Mapping[str, Tensors] = field(default_factory=dict)
    """What the strategy sent beside the model, one copy for all, by kind and name."""
    private: Private | None = None
    """Hides each example in every step; None trains on plain gradients."""

    def mean_loss(self, weights: Tensors, x: Tensor, y: Tensor, share: Tensor, *, aside: bool = False) -> Tensor:
        """Return the mean loss of one client's batch x (B, ...), y (B,) under its weights, for an objective.

        `share` (B,) adds up to 1: places that only fill a batch up have none. What is computed `aside` leaves the
        model's running statistics as they are: they belong to the weights that travel.
        """
        weights = self.aside(weights) if aside else weights
        return (self.loss(functional_call(self.model, weights, (x,)), y) * share).sum()

    def aside(self, weights: Tensors) -> Tensors:
        """Return the weights with copies of the model's buffers, for a pass that must not change them."""
        return {**{name: buffer.clone() for name, buffer in self.model.named_buffers()}, **weights}

    def each(self) -> Iterator[LocalRound]:
        """Yield the round of each client alone: a cohort of one."""
        ends = np.cumsum(self.sizes)
        for i, (end, size, seed) in enumerate(zip(ends.tolist(), self.sizes, self.seeds, strict=True)):
            own, steps = slice(end - size, end), int(self.batches.steps[i])
            batches = Batches(
                self.batches.rows[:steps, i : i + 1] - own.start,
                self.batches.weights[:steps, i : i + 1],
                self.batches.steps[i : i + 1],
            )
            state = {kind: {name: t[i : i + 1] for name, t in kept.items()} for kind, kept in self.state.items()}
            private = self.private.only(i) if self.private else None
            alone = {"sizes": (size,), "seeds": (seed,), "seed": seed, "state": state, "batches": batches}
            alone["private"] = private
            yield replace(self, x=self.x[own], y=self.y[own], **alone)  # type: ignore[arg-type]


@dataclass(frozen=True)
class LocalUpdate:
    """What a cohort learnt: params (C, ...) per name and each client's mean training loss (C,) over its examples."""

    params: Tensors
    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Further numbers for the server, (C,) each."""
    state: dict[str, Tensors] = field(default_factory=dict)
    """What each client keeps for its next round: tensors (C, ...) by kind and name."""
    beside: dict[str, Tensors] = field(default_factory=dict)
    """What travels to the server beside the model: tensors (C, ...) by kind and name."""
    weight: Tensor | None = None
    """Each client's weight (C,) in the mean that the server takes; by default its number of examples."""

    @staticmethod
    def join(updates: list[LocalUpdate]) -> LocalUpdate:
        """Return several cohorts' updates as one."""

        def kinds(key: str) -> dict[str, Tensors]:
            of_each = [getattr(update, key) for update in updates]
            return {kind: _cat([kept[kind] for kept in of_each]) for kind in of_each[0]}

        weights = [update.weight for update in updates if update.weight is not None]
        return LocalUpdate(
            _cat([update.params for update in updates]),
            torch.cat([update.loss for update in updates]),
            _cat([update.metrics for update in updates]),
            kinds("state"),
            kinds("beside"),
            torch.cat(weights) if weights else None,
        )


def _cat(tensors: list[Tensors]) -> Tensors:
    return {name: torch.cat([each[name] for each in tensors]) for name in tensors[0]}


def assemble(
    run: RunConfig,
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    x: np.ndarray,
    y: np.ndarray,
    batches: Batches,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    **given: Any,
) -> LocalRound:
    """Return a cohort's round as the run is configured, on the device where the model is; `given` are further fields.

    `global_params` among them are moved there too.
    """
    device = next(model.parameters()).device
    fields: dict[str, Any] = {
        "gradient_clip": run.gradient_clip,
        "vectorised": len(batches.steps) > 1 and run.engine.cohort_size != 1 and can_vectorise(model),
        "bf16": run.engine.precision == "bf16",
        "compiled": run.engine.compile,
        **given,
    }
    weights = fields["global_params"] if "global_params" in fields else travelling(model)
    fields["global_params"] = {name: to_device(tensor, device) for name, tensor in weights.items()}
    sent = fields.get("sent", {})
    fields["sent"] = {kind: {n: to_device(t, device) for n, t in own.items()} for kind, own in sent.items()}
    x_, y_ = (to_device(torch.from_numpy(values), device) for values in (x, y))
    return LocalRound(model=model, loss=loss, x=x_, y=y_, batches=batches.to(device), optimizer=optimizer, **fields)


LocalUpdateFn = Callable[[LocalRound], LocalUpdate]


def squared_distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """Return the squared Euclidean distance between two sets of parameters, a scalar."""
    return sum(((a[name] - b[name]) ** 2).sum() for name in a)  # type: ignore[return-value]


def train_each(local_update: LocalUpdateFn, r: LocalRound) -> LocalUpdate:
    """Return local_update(r); where the model cannot be mapped, client after client in cohorts of one."""
    if r.vectorised or len(r.sizes) == 1:
        return local_update(r)
    return LocalUpdate.join([local_update(alone) for alone in r.each()])


def local_sgd(
    r: LocalRound,
    penalty: Penalty | None = None,
    *,
    correction: Correction | None = None,
    objective: Objective | None = None,
    beside: Tensors | None = None,
    only: Collection[str] | None = None,
    start: Tensors | None = None,
) -> LocalUpdate:
    """Return the cohort after its local steps on loss + penalty(own weights); a hook is written for one client.

    `penalty` takes one client's trainable parameters and returns a scalar; the kernel maps it over the cohort. The
    other hooks are those of `core.steps.Terms`. `start` (C, ...) by name is where clients begin, in place of the
    global model; under an `objective` it may have names that the model does not.
    """
    terms = Terms(penalty, correction, objective, beside or {}, only)
    generators = [torch.default_generator]
    if r.x.is_cuda:
        generators.append(torch.cuda.default_generators[r.x.device.index])
    before = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(r.seed)
    try:
        if r.private:
            # Whatever the cohort: examples are mapped, so a client alone is a cohort of one.
            r.private.count(r.batches.steps)
            return _vectorised(r, terms, start)
        return _vectorised(r, terms, start) if r.vectorised else LocalUpdate(*one_by_one(r, terms, start))
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)


def global_loss(r: LocalRound) -> Tensor:
    """Return each client's mean loss under the global model on the examples of this round, (C,)."""
    with torch.no_grad():
        losses = r.loss(functional_call(r.model.eval(), r.global_params, (r.x,)), r.y)
    weights = r.batches.weights
    return (losses[r.batches.rows] * weights).sum((0, 2)) / weights.sum((0, 2)).clamp_min(1e-12)


def global_gradient(r: LocalRound) -> Tensors:
    """Return the gradient of each client's mean loss at the global model, (C, ...) by name, over this round's batches.

    Every example counts as often as it is drawn in the round: with whole epochs this is the full-batch gradient.
    """
    cohort, weights = len(r.batches.steps), r.batches.weights
    model = load_into(r.model, dict(r.global_params)).eval()
    params = everybody({name: p.detach() for name, p in model.named_parameters() if p.requires_grad}, cohort)
    gradients = cohort_gradients(r)
    whole = weights / weights.sum((0, 2)).clamp_min(1e-12).view(1, -1, 1)
    total = {name: torch.zeros_like(p) for name, p in params.items()}
    for rows, weight in zip(r.batches.rows, whole, strict=True):
        found, _ = gradients(params, r.x[rows], r.y[rows], weight)
        for name, gradient in found.items():
            total[name] += gradient
    return total


def everybody(params: Mapping[str, Tensor], cohort: int) -> Tensors:
    """Return one set of tensors for each of C clients, (C, ...), each with memory of its own."""
    return {name: p.expand(cohort, *p.shape).clone() for name, p in params.items()}


def _vectorised(r: LocalRound, terms: Terms, start: Tensors | None) -> LocalUpdate:
    cohort, batches = len(r.batches.steps), r.batches
    if start is None:
        trainable = [name for name, p in r.model.named_parameters() if p.requires_grad]
        params = everybody({name: r.global_params[name] for name in trainable}, cohort)
    else:
        params = {name: p.clone() for name, p in start.items()}
    names = list(params)
    alike = bool((batches.steps == len(batches.rows)).all())
    # Clients that all take the last step need no copies of earlier ones.
    final = params if alike else {name: torch.empty_like(p) for name, p in params.items()}
    step = make_step(r, params, terms)
    counts = batches.weights.sum(2)
    # A finished client's batch has no weight at all: 0 / tiny is 0, where 0 / 0 would poison the cohort.
    shares = batches.weights / counts.clamp_min(1e-12).unsqueeze(2)
    losses = torch.zeros_like(counts)

    r.model.train()
    for s, rows in enumerate(batches.rows):
        flat = rows.flatten()
        x, y = (values.index_select(0, flat).view(*rows.shape, *values.shape[1:]) for values in (r.x, r.y))
        losses[s] = step(x, y, shares[s])
        done = batches.steps == s + 1
        if not alike and done.any():
            for name in names:
                final[name][done] = params[name][done].detach()
    # Not a product: what a finished client's slot computes may be nan, and nan * 0 is nan.
    total = torch.where(counts > 0, losses * counts, 0.0).sum(0)
    return LocalUpdate({name: p.detach() for name, p in final.items()}, total / counts.sum(0).clamp_min(1e-12))


def can_vectorise(model: nn.Module) -> bool:
    """Return whether the model may be mapped over clients: nothing in it mixes examples or changes a buffer.

    Batch normalisation does both: the places that pad a short batch would enter its statistics.
    """
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        return False
    return travelling(model).keys() == {name for name, p in model.named_parameters() if p.requires_grad}
