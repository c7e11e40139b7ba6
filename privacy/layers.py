"""The layers whose per-example gradients need not be written out: norms and weighted sums from what the layer saw.

A gradient of one example's loss at a linear layer is sum_t g_t a_t^T, of the layer's inputs a (T, d) and the gradients
g (T, p) at its outputs. Its norm is |a| |g| where T = 1 (Goodfellow, 2015, "Efficient per-example gradient
computations"), and in general the root of sum_ts (a a^T)_ts (g g^T)_ts (Li et al., ICLR 2022, "ghost norm"), which
takes less than the gradient itself where T is small beside p and d: a layer goes the cheaper way ("mixed ghost norm").
A weighted sum over examples is one product of matrices with g scaled ("book-keeping": Bu, Wang, Zha and Karypis, ICML
2023, "Differentially private optimization on large model at small cost").

Here C clients have weights of their own, (C, ...), and N = C * B examples stand client after client.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

Weights = Mapping[str, Tensor]
VECTOR_CHANNELS = 8
"""From as many input channels a convolution with a group for each example is faster than patches (oneDNN, measured)."""
GHOST_PIXELS = 16
"""A convolution's ghost norm pays where GHOST_PIXELS L^2 < p d: patches take time beside the products."""


@dataclass(frozen=True)
class PerExample:
    """One parameter's gradient of each of N examples."""

    squared_norms: Tensor
    """(N,)."""
    total: Callable[[Tensor], Tensor]
    """Factors (C, B) -> every client's sum of its examples' gradients times their factors, (C, ...)."""


class Output(NamedTuple):
    """What a layer makes of all clients' examples."""

    values: Tensor
    """(N, ...)."""
    anchor: Tensor
    """The tensor whose gradient is asked for: `values`, or what they are a view of.

    An activation in place takes a view out of autograd's graph, never what the view is of.
    """
    seen: Tensor
    """(N, ...): what the gradients are made of beside the anchor's."""


class Layer(Protocol):
    """How a layer of one type computes for all clients, and its gradients."""

    by_place: bool
    """Whether an example may have any number of axes before the last, all of them places with the same weights."""

    def forward(self, w: Weights, x: Tensor) -> Output:
        """Return the output for inputs x (N, ...) under weights w, (C, ...) by the layer's own names."""
        ...

    def gradients(self, seen: Tensor, g: Tensor) -> dict[str, PerExample]:
        """Return each weight's per-example gradients, given the gradient g at the anchor."""
        ...


def layer_of(module: nn.Module) -> Layer | None:
    """Return how to treat a module; None for one of another type, or with options or hooks that change its gradient."""
    kind = LAYERS.get(type(module))
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if kind is None or any(getattr(module, name) for name in hooks):
        return None
    # max_norm changes weights in the forward pass, scale_grad_by_freq divides by counts of the whole batch.
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
        return None
    return kind(module)


def written_out(gradients: Tensor, squared_norms: Tensor | None = None) -> PerExample:
    """Return per-example gradients (N, ...) that are there as such; their norms need not be known."""

    def total(factors: Tensor) -> Tensor:
        of_clients = gradients.reshape(*factors.shape, -1)
        return torch.bmm(factors.unsqueeze(1), of_clients).view(factors.shape[0], *gradients.shape[1:])

    return PerExample(_squares(gradients) if squared_norms is None else squared_norms, total)


def _squares(t: Tensor) -> Tensor:
    """Return each example's sum of squares, (N,)."""
    return torch.linalg.vector_norm(t.reshape(t.shape[0], -1), dim=1).square()


def _ghost(a: Tensor, g: Tensor, of_a: Tensor, of_g: Tensor) -> Tensor:
    """Return sum_ts (a a^T)_ts (g g^T)_ts, (N,), from the two products (N, T, T) and the squares of a and g.

    Terms may cancel, and rounding could then make a long gradient short: what it can have taken away is added.
    """
    return torch.linalg.vecdot(of_a.flatten(1), of_g.flatten(1)).clamp_min(0) + torch.finfo(g.dtype).eps * a * g


class Linear:
    """y = W x + b at T places of an example, (N, T, d) -> (N, T, p)."""

    by_place = True

    def __init__(self, module: nn.Linear) -> None:
        self.shape = module.weight.shape

    def forward(self, w: Weights, x: Tensor) -> Output:
        """Return the output; all of a client's examples are one factor of a batched product."""
        weight = w["weight"].transpose(1, 2)
        rows = x.reshape(len(weight), -1, x.shape[-1])
        out = torch.baddbmm(w["bias"].unsqueeze(1), rows, weight) if "bias" in w else torch.bmm(rows, weight)
        return Output(out.view(*x.shape[:-1], -1), out, x)

    def gradients(self, seen: Tensor, g: Tensor) -> dict[str, PerExample]:
        """Return sum_t g_t a_t^T for the matrix and sum_t g_t for the bias."""
        examples = seen.shape[0]
        a, g = seen.reshape(examples, -1, seen.shape[-1]), g.reshape(examples, -1, g.shape[-1])
        places = a.shape[1]

        def total(factors: Tensor) -> Tensor:
            clients = factors.shape[0]
            scaled = (g * factors.view(-1, 1, 1)).view(clients, -1, g.shape[2])
            return torch.bmm(scaled.transpose(1, 2), a.reshape(clients, -1, a.shape[2]))

        if places == 1:
            squares = _squares(g)
            return {"weight": PerExample(_squares(a) * squares, total), "bias": written_out(g[:, 0], squares)}
        if 2 * places**2 < self.shape.numel():
            of_a, of_g = torch.bmm(a, a.transpose(1, 2)), torch.bmm(g, g.transpose(1, 2))
            weight = PerExample(_ghost(_squares(a), _squares(g), of_a, of_g), total)
        else:
            weight = written_out(torch.bmm(g.transpose(1, 2), a))
        return {"weight": weight, "bias": written_out(g.sum(1))}


class Conv2d:
    """A convolution of images (N, channels, height, width)."""

    by_place = False

    def __init__(self, module: nn.Conv2d) -> None:
        self.shape = module.weight.shape
        self.geometry: Any = {name: getattr(module, name) for name in ("stride", "padding", "dilation", "groups")}
        self.mode, self.around = "", module._reversed_padding_repeated_twice
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            # Not what a convolution's own argument can say: the image is padded before it.
            self.mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            self.geometry["padding"] = (0, 0)

    def forward(self, w: Weights, x: Tensor) -> Output:
        """Return the output, client by client: on a CPU convolutions with many groups are slower than many of them."""
        x = F.pad(x, self.around, mode=self.mode) if self.mode else x
        biases = w.get("bias", [None] * len(w["weight"]))
        of_clients = zip(x.chunk(len(w["weight"])), w["weight"], biases, strict=True)
        outs = [F.conv2d(images, weight, bias, **self.geometry) for images, weight, bias in of_clients]
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return Output(out, out, x)

    def gradients(self, seen: Tensor, g: Tensor) -> dict[str, PerExample]:
        """Return the kernel's and the bias's gradients; L output pixels are an example's places."""
        pixels = g[0, 0].numel()
        if self.geometry["groups"] == 1 and GHOST_PIXELS * pixels**2 < self.shape.numel():
            a, flat = self._patches(seen, g).squeeze(1), g.flatten(2)
            of_a, of_g = torch.bmm(a.transpose(1, 2), a), torch.bmm(flat.transpose(1, 2), flat)
            weight = PerExample(_ghost(_squares(a), _squares(g), of_a, of_g), lambda f: self._total(seen, g, f))
        elif self.shape[1] >= VECTOR_CHANNELS:
            weight = written_out(self._grouped(seen, g))
        else:
            # The short side of the product first: twice as fast as the other way round.
            of_groups = g.view(len(g), self.geometry["groups"], -1, pixels)
            found = self._patches(seen, g) @ of_groups.transpose(2, 3)
            weight = written_out(found.transpose(2, 3).reshape(len(g), *self.shape))
        return {"weight": weight, "bias": written_out(g.sum((2, 3)))}

    def _grouped(self, seen: Tensor, g: Tensor) -> Tensor:
        """Return the gradients (N, ...) as that of one image that has every example as a group of its channels."""
        shape = torch.Size((len(g) * self.shape[0], *self.shape[1:]))
        geometry = {**self.geometry, "groups": len(g) * self.geometry["groups"]}
        found = conv2d_weight(seen.reshape(1, -1, *seen.shape[2:]), shape, g.reshape(1, -1, *g.shape[2:]), **geometry)
        return found.view(len(g), *self.shape)

    def _total(self, seen: Tensor, g: Tensor, factors: Tensor) -> Tensor:
        scaled = g * factors.view(-1, 1, 1, 1)
        of_clients = zip(seen.chunk(len(factors)), scaled.chunk(len(factors)), strict=True)
        return torch.stack([conv2d_weight(x, self.shape, part, **self.geometry) for x, part in of_clients])

    def _patches(self, x: Tensor, g: Tensor) -> Tensor:
        """Return what the kernel lies upon at each output pixel, (N, groups, d, L).

        A copy of a strided view: three times as fast as F.unfold.
        """
        (ph, pw), (sh, sw), (dh, dw) = (self.geometry[name] for name in ("padding", "stride", "dilation"))
        x = F.pad(x, (pw, pw, ph, ph)) if ph or pw else x
        image, channel, row, column = x.stride()
        size = (*x.shape[:2], *self.shape[2:], *g.shape[2:])
        view = x.as_strided(size, (image, channel, row * dh, column * dw, row * sh, column * sw))
        return view.reshape(len(x), self.geometry["groups"], -1, g[0, 0].numel())


class Embedding:
    """Rows of a table (V, d) for tokens (N, T)."""

    by_place = True

    def __init__(self, module: nn.Embedding) -> None:
        self.shape, self.padding = module.weight.shape, module.padding_idx

    def forward(self, w: Weights, x: Tensor) -> Output:
        """Return the rows; all clients' tables are one, in which a client's tokens have numbers of their own."""
        if x.numel() and not 0 <= int(x.min()) <= int(x.max()) < self.shape[0]:
            # In the one table it would be a row of another client, and later a gradient of another example.
            raise IndexError(f"a token is not in the embedding's {self.shape[0]} rows")
        first = torch.arange(len(w["weight"]), device=x.device) * self.shape[0]
        rows = x.reshape(len(w["weight"]), -1) + first.view(-1, 1)
        out = F.embedding(rows.view(x.shape), w["weight"].flatten(0, 1))
        return Output(out, out, x)

    def gradients(self, seen: Tensor, g: Tensor) -> dict[str, PerExample]:
        """Return the table's gradients: the rows of the tokens that an example has, each the sum over its places."""
        entries, width = self.shape
        keys = seen.reshape(len(seen), -1) + torch.arange(len(seen), device=seen.device).view(-1, 1) * entries
        keys, row_of = torch.unique(keys, return_inverse=True)
        rows = g.new_zeros(len(keys), width).index_add_(0, row_of.flatten(), g.reshape(-1, width))
        examples, tokens = keys // entries, keys % entries
        if self.padding is not None:
            rows.masked_fill_((tokens == self.padding).unsqueeze(1), 0.0)

        def total(factors: Tensor) -> Tensor:
            clients, batch = factors.shape
            scaled = rows * factors.flatten()[examples].unsqueeze(1)
            table = g.new_zeros(clients * entries, width)
            return table.index_add_(0, examples // batch * entries + tokens, scaled).view(clients, entries, width)

        return {"weight": PerExample(g.new_zeros(len(seen)).index_add_(0, examples, _squares(rows)), total)}


class LayerNorm:
    """y = w x' + b of x' normalised over the last axes."""

    by_place = True

    def __init__(self, module: nn.LayerNorm) -> None:
        self.shape, self.eps = torch.Size(module.normalized_shape), module.eps

    def forward(self, w: Weights, x: Tensor) -> Output:
        """Return the output; what is seen is x'."""
        normal = F.layer_norm(x, self.shape, eps=self.eps)
        return _affine(w, normal, (*[1] * (x.ndim - 1 - len(self.shape)), *self.shape))

    def gradients(self, seen: Tensor, g: Tensor) -> dict[str, PerExample]:
        """Return the sums over places of g x' and of g."""
        g = g.reshape(seen.shape)
        places = tuple(range(1, seen.ndim - len(self.shape)))
        return {name: written_out(t.sum(places) if places else t) for name, t in (("weight", g * seen), ("bias", g))}


class GroupNorm:
    """y = w x' + b of x' normalised within groups of channels, (N, channels, ...)."""

    by_place = False

    def __init__(self, module: nn.GroupNorm) -> None:
        self.groups, self.eps = module.num_groups, module.eps

    def forward(self, w: Weights, x: Tensor) -> Output:
        """Return the output; what is seen is x'."""
        normal = F.group_norm(x, self.groups, eps=self.eps)
        return _affine(w, normal, (x.shape[1], *[1] * (x.ndim - 2)))

    def gradients(self, seen: Tensor, g: Tensor) -> dict[str, PerExample]:
        """Return the sums over pixels of g x' and of g."""
        g = g.reshape(seen.shape)
        # An example of channels alone has one pixel.
        return {
            name: written_out(t.reshape(*t.shape[:2], -1).sum(2)) for name, t in (("weight", g * seen), ("bias", g))
        }


def _affine(w: Weights, normal: Tensor, shape: tuple[int, ...]) -> Output:
    """Return w x' + b; each client's weights have this shape beside one of its examples."""
    out = normal.unflatten(0, (len(w["weight"]), -1)) * w["weight"].view(-1, 1, *shape)
    if "bias" in w:
        out = out + w["bias"].view(-1, 1, *shape)
    return Output(out.flatten(0, 1), out, normal)


LAYERS: dict[type[nn.Module], Callable[[Any], Layer]] = {
    nn.Linear: Linear,
    nn.Conv2d: Conv2d,
    nn.Embedding: Embedding,
    nn.LayerNorm: LayerNorm,
    nn.GroupNorm: GroupNorm,
}
