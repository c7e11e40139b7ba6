"""Per-example gradients of convolutions: one with as many groups as examples, products with patches, or ghost norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from privacy.per_example.gradients import Output, PerExample, Weights, ghost, squares, written_out

VECTOR_CHANNELS = 8
"""From as many input channels a convolution with a group for each example is faster than patches (oneDNN, measured)."""
GHOST_PIXELS = 16
"""A convolution's ghost norm pays where GHOST_PIXELS L^2 < p d: patches take time beside the products."""


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
            products = (torch.bmm(t.transpose(1, 2), t) for t in (a, flat))
            weight = PerExample(ghost(squares(a), squares(g), *products), lambda f: self._total(seen, g, f))
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
