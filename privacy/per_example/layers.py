"""The layers that compute for all clients at once and know their per-example gradients (gradients.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privacy.per_example.convolution import Conv2d
from privacy.per_example.gradients import Layer, Output, PerExample, Weights, ghost, squares, written_out


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
            of_g = squares(g)
            return {"weight": PerExample(squares(a) * of_g, total), "bias": written_out(g[:, 0], of_g)}
        if 2 * places**2 < self.shape.numel():
            products = (torch.bmm(t, t.transpose(1, 2)) for t in (a, g))
            weight = PerExample(ghost(squares(a), squares(g), *products), total)
        else:
            weight = written_out(torch.bmm(g.transpose(1, 2), a))
        return {"weight": weight, "bias": written_out(g.sum(1))}


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

        return {"weight": PerExample(g.new_zeros(len(seen)).index_add_(0, examples, squares(rows)), total)}


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
