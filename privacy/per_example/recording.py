"""A copy of a model that runs all clients' examples as one batch and notes what passes through its layers.

Under example-level privacy no example may depend on another, so the examples of C clients are one batch for whatever
has no weights, and the layers of layers.py know whose weights an example meets. A weight that no such layer owns (a
bare parameter, a tied one, those of nn.MultiheadAttention) is copied for every example and autograd gives the gradient
of each copy; where the model cannot take such copies as they are, it is mapped over examples.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from core.records import Tensors
from privacy.per_example.gradients import Layer, PerExample, written_out
from privacy.per_example.layers import layer_of


class UnsuitableError(Exception):
    """A layer was not given every example exactly once, at the place where examples are expected."""


class Note(NamedTuple):
    """What is kept of one layer, or of one weight that no layer owns, between the passes."""

    at: GradientEdge | Tensor
    """Where the backward pass takes the gradient."""
    seen: Tensor
    """(N, ...): what the layer's gradients are made of beside that."""
    gradients: Callable[[Tensor, Tensor], dict[str, PerExample]]
    """(seen, gradient at `at`) -> each weight's per-example gradients by the model's names."""


class _Noted:
    """A layer of the copy: it computes for all clients and writes down a note."""

    def __init__(self, prefix: str, module: nn.Module, layer: Layer) -> None:
        self.layer = layer
        self.names = {own: f"{prefix}{own}" for own, _ in module.named_parameters(recurse=False)}
        self.weights: Tensors = {}
        self.notes: list[Note] = []
        self.calls = self.examples = 0
        self.refused = False

    def expect(self, params: Mapping[str, Tensor], examples: int, notes: list[Note]) -> None:
        """Take the clients' weights (C, ...) for a run of as many examples, and where to write."""
        # With weights that require none, a first layer's output would have no gradient. Theirs is never computed.
        self.weights = {own: params[name].detach().requires_grad_() for own, name in self.names.items()}
        self.examples, self.notes, self.calls = examples, notes, 0

    def __call__(self, x: Tensor) -> Tensor:
        """Return the output for all examples x (N, ...)."""
        if not x.ndim or x.shape[0] != self.examples:
            self.refuse()
        self.calls += 1
        values, anchor, seen = self.layer.forward(self.weights, x)
        self.notes.append(Note(get_gradient_edge(anchor), seen.detach(), self._gradients))
        return values

    def refuse(self) -> NoReturn:
        """Raise `UnsuitableError` and remember it."""
        self.refused = True
        raise UnsuitableError

    def _gradients(self, seen: Tensor, g: Tensor) -> dict[str, PerExample]:
        found = self.layer.gradients(seen, g)
        return {name: found[own] for own, name in self.names.items()}


class _OutOfMap(torch.autograd.Function):
    """Within a model that is mapped over examples, gives a layer all examples at once."""

    @staticmethod
    def forward(x: Tensor, noted: _Noted) -> Tensor:
        """Refuse an input that is the same for all examples: only that comes here."""
        noted.refuse()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep nothing: autograd sees the layer's own operations."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, noted: _Noted) -> tuple[Tensor, int]:
        """Return the layer's output for each example as a batch of one, and the axis of the examples."""
        x = x.movedim(in_dims[0] or 0, 0)
        if noted.layer.by_place:
            return noted(x), 0
        if x.ndim < 2 or x.shape[1] != 1:
            noted.refuse()
        return noted(x.squeeze(1)).unsqueeze(1), 0


class Recording:
    """The copy of a model, in training mode. C clients, B examples of each, N = C * B."""

    def __init__(self, model: nn.Module, leave: Collection[str] = (), *, alone: bool = False) -> None:
        """Copy the model. The weights of the layers called as in `leave` are treated like bare parameters.

        `alone` maps the model over its examples, so that whatever it does with a bare parameter is right. Without, that
        has a first axis of examples: right where it is added to what has the same, which has to be tried.
        """
        self.twin = copy.deepcopy(model).train()
        modules = dict(self.twin.named_modules())
        owners = Counter(id(p) for module in modules.values() for p in _own(module).values())
        self._noted = {
            name: _Noted(f"{name}." if name else "", module, layer)
            for name, module in modules.items()
            if name not in leave
            and (layer := layer_of(module))
            and all(p.requires_grad and owners[id(p)] == 1 for p in _own(module).values())
            and _own(module)
        }
        owned = {name for noted in self._noted.values() for name in noted.names.values()}
        self.bare = [name for name, p in self.twin.named_parameters() if p.requires_grad and name not in owned]
        self.alone = alone
        for name, noted in self._noted.items():
            modules[name].forward = self._instead(noted)

    def _instead(self, noted: _Noted) -> Callable[[Tensor], Tensor]:
        def forward(input: Tensor) -> Tensor:
            return _OutOfMap.apply(input, noted) if self.alone else noted(input)

        return forward

    def __call__(self, params: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, list[Note]]:
        """Return the logits (N, ...) for params (C, ...) by name and inputs x (C, B, ...), and the notes."""
        examples = x.flatten(0, 1)
        notes: list[Note] = []
        for noted in self._noted.values():
            noted.expect(params, examples.shape[0], notes)
        bare = {name: _for_each(params[name], x.shape[1]) for name in self.bare}
        for name, p in bare.items():
            notes.append(Note(p, p.new_empty(len(p), 0), functools.partial(_bare, name)))
        if self.alone:
            logits = self._mapped(bare, examples)
        else:
            # To exchange no parameter at all takes as long as a small layer.
            logits = functional_call(self.twin, bare, (examples,)) if bare else self.twin(examples)
        if self.unsuitable():
            raise UnsuitableError
        for noted in self._noted.values():
            # The batch and autograd's graph are the caller's to keep.
            noted.weights, noted.notes = {}, []
        return logits, notes

    def _mapped(self, bare: Tensors, examples: Tensor) -> Tensor:
        def one(own: Tensors, x: Tensor) -> Tensor:
            return functional_call(self.twin, own, (x.unsqueeze(0),))

        # Fused attention cannot be mapped.
        with sdpa_kernel(SDPBackend.MATH):
            return vmap(one, randomness="different")(bare, examples).flatten(0, 1)

    def unsuitable(self) -> list[str]:
        """Return the names of the layers that refused their input or, if none did, were not called exactly once."""
        refused = [name for name, noted in self._noted.items() if noted.refused]
        return refused or [name for name, noted in self._noted.items() if noted.calls != 1]


def _bare(name: str, seen: Tensor, g: Tensor) -> dict[str, PerExample]:
    return {name: written_out(g)}


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))


def _for_each(p: Tensor, batch: int) -> Tensor:
    """Return a client's weight (C, ...) for each of its examples, (N, ...), as a leaf of autograd's graph."""
    return p.unsqueeze(1).expand(len(p), batch, *p.shape[1:]).flatten(0, 1).detach().requires_grad_()
