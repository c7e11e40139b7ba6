"""Whether a model's examples have gradients of their own, and the fastest way to their clipped sum that is right.

Guarantees fail closed: a layer that mixes the examples of a batch makes clipping meaningless, and a way that misses
part of a gradient makes the noise too small. Both are looked for by running a few examples: what an example comes to
must not change with the others, and per-example gradients must be those of autograd for each example alone.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from core.errors import InputError
from core.records import Tensors
from core.seeding import rng
from core.steps import Loss
from privacy.per_example.clipped import Clipped, ClippedGradients, ClippedObjective, ClippedSum
from privacy.per_example.recording import Recording

EXAMPLES = 3
MOST_EXAMPLES = 1000
"""What is to be tried with more is mapped instead, which is right whatever the sizes."""
AGREEMENT = 1e-4
"""How far a per-example gradient may be from autograd's, relative to its norm."""
INSTEAD = "or choose privacy.level=client, where no example needs a gradient of its own"


class Way(NamedTuple):
    """A way to the clipped sum that is to be tried."""

    sum: ClippedSum
    twin: nn.Module
    """The copy of the model that it runs."""
    many: int = EXAMPLES
    """As many examples must be right too: more than a bare parameter has places, which with fewer may look alike."""


def check(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> None:
    """Raise `InputError` where example-level privacy cannot be had for a model; x (n, ...), y (n,) show its data."""
    # Two seconds of imports, for who checks and not for every worker.
    from opacus.validators import ModuleValidator

    refuse_layers(model)
    for name, module in model.named_modules():
        validate = ModuleValidator.VALIDATORS.get(type(module))
        # What only opacus's own hooks do not reach is no reason.
        if validate and not isinstance(module, nn.RNNBase | nn.MultiheadAttention):
            for error in validate(module):
                raise InputError(f"{_called(name, model)}: {str(error).split('. ')[0]}; replace it, {INSTEAD}.")
    clipped_gradients(model, loss, x, y)


def clipped_gradients(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> ClippedSum:
    """Return the fastest way to a model's clipped sum that is right on examples like x (n, ...), y (n,).

    It works on a copy of the model, in training mode. Raises `InputError` where the model mixes examples or no way
    agrees with autograd.
    """
    refuse_layers(model)
    model = copy.deepcopy(model)
    params = _jittered(model)
    with torch.random.fork_rng([x.device] if x.is_cuda else []), _plain_attention():
        x, y, wanted = _examples(model, loss, params, x, y)
        model.train()
        _refuse_mixing(model, params, x)
        modes = [(False, wanted)]
        if _deterministic(model, params, x):
            modes.append((True, _one_by_one(model, loss, params, x, y)))
        reasons = []
        for way in _ways(model, loss):
            reason = _disagreement(way, params, x, y, modes)
            if not reason:
                return way.sum
            reasons.append(reason)
    raise InputError(f"per-example gradients cannot be had: {reasons[-1]}; replace it, {INSTEAD}.")


def refuse_layers(model: nn.Module) -> None:
    """Raise `InputError` for layers whose type alone says that examples have no gradients of their own."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            remedy = "use nn.GroupNorm in its place"
            raise InputError(f"{_called(name, model)} normalises over the examples of a batch; {remedy}, {INSTEAD}.")
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            remedy = "set track_running_stats=False"
            raise InputError(f"{_called(name, model)} keeps statistics of its examples; {remedy}, {INSTEAD}.")
    for name, p in model.named_parameters():
        if p.requires_grad and not p.is_floating_point():
            raise InputError(f"parameter '{name}' is of type {p.dtype}; only real floating-point ones can be clipped.")


def _ways(model: nn.Module, loss: Loss) -> Iterator[Way]:
    """Yield ways to the clipped sum and the models that they run, fastest first."""
    plain = Recording(model)
    places = [size for name in plain.bare for size in plain.twin.get_parameter(name).shape]
    many = max([EXAMPLES, *places]) + 1
    if many <= MOST_EXAMPLES:
        yield Way(ClippedGradients(plain, loss), plain.twin, many)
    left: list[str] = []
    while True:
        mapped = Recording(model, left, alone=True)
        yield Way(ClippedGradients(mapped, loss), mapped.twin)
        # It has been tried by now: layers that are called twice, or with something that belongs to no example.
        unsuitable = mapped.unsuitable()
        if not unsuitable:
            break
        left += unsuitable
    twin = copy.deepcopy(model).train()

    def objective(w: Tensors, _: Tensors, x: Tensor, y: Tensor, share: Tensor) -> Tensor:
        return (loss(functional_call(twin, w, (x,)), y) * share).sum()

    yield Way(ClippedObjective(objective), twin)


def _disagreement(way: Way, params: Tensors, x: Tensor, y: Tensor, modes: list[tuple[bool, Tensors]]) -> str:
    """Return where and why a way is wrong; empty where it gives the wanted gradients (n, ...) in each mode."""
    entered = [""]
    named = way.twin.named_modules()
    hooks = [module.register_forward_pre_hook(lambda _, a, name=name: entered.append(name)) for name, module in named]
    try:
        # Where dropout hides what the gradients should be in training mode, it must run all the same.
        _run(way, params, x, y, clients=1)
        for training, wanted in modes:
            way.twin.train(training)
            # One example for each of n clients: the sums are the gradients.
            found = _run(way, params, x, y, clients=len(x))
            norms = torch.stack([_norms(g) for g in wanted.values()]).norm(dim=0)
            for name, g in wanted.items():
                if not (_norms(found.sums[name] - g) <= AGREEMENT * norms).all():
                    return f"the gradient of '{name}' is not that of each example alone"
            rows = torch.arange(way.many, device=x.device) % len(x)
            found = _run(way, params, x[rows], y[rows], clients=1)
            measured = [(found.norms[0], norms[rows])]
            measured += [(found.sums[name][0], g[rows].sum(0)) for name, g in wanted.items()]
            if not all((a - b).norm() <= AGREEMENT * norms[rows].sum() for a, b in measured):
                return "the sum of the gradients of many examples is not that of each example alone"
        return ""
    # Whatever somebody's forward pass raises when it is mapped, another way may do without.
    except Exception as error:
        layer = _called(entered[-1], way.twin)
        return f"{layer} cannot be mapped over examples ({str(error).split(chr(10))[0] or type(error).__name__})"
    finally:
        way.twin.train()
        for hook in hooks:
            hook.remove()


def _run(way: Way, params: Tensors, x: Tensor, y: Tensor, clients: int) -> Clipped:
    """Return what a way makes of examples x (n, ...) that are dealt to as many clients of the same weights."""
    everyone = {name: p.expand(clients, *p.shape) for name, p in params.items()}
    x, y = (values.view(clients, -1, *values.shape[1:]) for values in (x, y))
    return way.sum(everyone, x, y, torch.ones(y.shape[:2], dtype=torch.bool, device=x.device), float("inf"))


def _norms(gradients: Tensor) -> Tensor:
    return gradients.reshape(len(gradients), -1).norm(dim=1)


def _refuse_mixing(model: nn.Module, params: Tensors, x: Tensor) -> None:
    """Raise `InputError` where an example's output depends on other examples, or examples are kept in a buffer."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    before = _outputs(model, params, x)
    for i in range(len(x)):
        others = x.roll(1, 0)
        others[i] = x[i]
        after = _outputs(model, params, others)
        if not torch.allclose(before[""][i], after[""][i], 1e-5, 1e-6, equal_nan=True):
            # Modules finish from the inside out: the first that differs is the one to name, the model itself the last.
            name = next(name for name in after if not before[name][i].equal(after[name][i]))
            raise InputError(f"{_called(name, model)} mixes the examples of a batch; replace it, {INSTEAD}.")
    for name, buffer in model.named_buffers():
        if not buffer.equal(buffers[name]):
            raise InputError(f"buffer '{name}' keeps something of the examples; leave it as it is, {INSTEAD}.")


def _outputs(model: nn.Module, params: Tensors, x: Tensor) -> Tensors:
    """Return the outputs (n, ...) of the model and of its modules with one per example, as they finish."""
    found: Tensors = {}

    def keep(name: str, out: object) -> None:
        if isinstance(out, Tensor) and out.ndim and len(out) == len(x):
            found[name] = out.clone()

    hooks = [m.register_forward_hook(lambda _, a, out, n=n: keep(n, out)) for n, m in model.named_modules()]
    # The same draws in every run: what differs comes from the examples.
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            found[""] = functional_call(model, params, (x,))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _deterministic(model: nn.Module, params: Tensors, x: Tensor) -> bool:
    with torch.no_grad():
        return functional_call(model, params, (x,)).equal(functional_call(model, params, (x,)))


def _examples(model: nn.Module, loss: Loss, params: Tensors, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensors]:
    """Return the examples x, y that are tried, of which no two are alike, and their gradients in evaluation mode."""
    rows = torch.arange(EXAMPLES, device=x.device) % max(len(y), 1)
    x, y = (values[rows] if len(values) else values.new_zeros(EXAMPLES, *values.shape[1:]) for values in (x, y))
    drawn = torch.from_numpy(rng(0, "fitness", "examples").standard_normal(x.shape)).to(x.device)
    # Tokens cannot be drawn: nobody knows of how many. Turned, rows differ even where the given ones do not.
    turned = torch.stack([row.roll(i, -1) if row.ndim else row for i, row in enumerate(x)])
    for tried in [drawn.to(x.dtype), x] if x.is_floating_point() else [turned]:
        try:
            wanted = _one_by_one(model.eval(), loss, params, tried, y)
        except (RuntimeError, ValueError, IndexError) as error:
            raise InputError(f"the model cannot take a batch of one example: {error}; see to its shapes.") from error
        if all(g.isfinite().all() for g in wanted.values()):
            return tried, y, wanted
    raise InputError("the model's gradients at its start are not finite; see to its layers and its inputs.")


def _one_by_one(model: nn.Module, loss: Loss, params: Tensors, x: Tensor, y: Tensor) -> Tensors:
    """Return the gradient of each example alone by autograd, (n, ...) by name."""
    own = {name: p.clone().requires_grad_() for name, p in params.items()}
    of_examples = []
    for i in range(len(x)):
        value = loss(functional_call(model, own, (x[i : i + 1],)), y[i : i + 1]).sum()
        of_examples.append(torch.autograd.grad(value, list(own.values()), allow_unused=True, materialize_grads=True))
    return {name: torch.stack(gradients) for name, gradients in zip(own, zip(*of_examples, strict=True), strict=True)}


def _jittered(model: nn.Module) -> Tensors:
    """Return trainable weights near the model's: zeros, as in many a last layer, would hide what is before them."""
    draws = rng(0, "fitness", "weights")
    jittered = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            # Relative to the weights, so that no depth makes it explode.
            scale = max(0.1 * float(p.detach().square().mean().sqrt()), 0.02)
            jittered[name] = p.detach() + scale * torch.from_numpy(np.asarray(draws.standard_normal(p.shape))).to(p)
    return jittered


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Keep nn.MultiheadAttention from the fused kernel of evaluation mode, which has no gradient."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _called(name: str, model: nn.Module) -> str:
    kind = type(model.get_submodule(name)).__name__
    return f"layer '{name}' ({kind})" if name else f"the model itself ({kind})"
