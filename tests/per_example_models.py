"""Models of many kinds for tests of per-example gradients, and what those are: a loop of autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from core.steps import Loss
from privacy.per_example.clipped import Clipped
from tasks.base import classification_loss
from tasks.text_models import BagOfEmbeddings, TextTransformer

TOKENS, LENGTH, CLASSES = 30, 6, 3


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, CLASSES, bias=False))


def layer_norm() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (5, 1)), nn.Linear(1, 4), nn.LayerNorm((5, 4)), nn.Flatten(), nn.Linear(20, CLASSES)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 64, 3, bias=False), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64, CLASSES),
    )  # fmt: skip


def odd_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, (3, 2), stride=(1, 2), padding="valid", groups=3), nn.Tanh(),
        nn.Conv2d(6, 6, 3, padding=2, dilation=2, padding_mode="reflect"), nn.Tanh(),
        nn.Conv2d(6, 16, 2, padding="same"), nn.Tanh(), nn.Conv2d(16, 32, 3, groups=2),
        nn.GroupNorm(4, 32), nn.Flatten(), nn.Linear(32 * 6 * 3, CLASSES),
    )  # fmt: skip


def transformer() -> nn.Module:
    return TextTransformer(TOKENS, CLASSES, LENGTH, dim=8, dropout=0.0)


def bag() -> nn.Module:
    return BagOfEmbeddings(TOKENS, CLASSES, dim=8, dropout=0.0)


class Attending(nn.Module):
    """Its positions belong to no example, unless they are handed over for each."""

    def __init__(self, attention: nn.Module, for_each: bool = False) -> None:
        super().__init__()
        self.for_each = for_each
        self.embedding = nn.Embedding(TOKENS, 8, padding_idx=0)
        self.position = nn.Embedding(LENGTH, 8)
        self.attention = attention
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(LENGTH)
        states = self.embedding(x) + self.position(places.expand_as(x) if self.for_each else places)
        return self.out(self.norm(states + self.attention(states, states, states, need_weights=False)[0]).mean(1))


def attending() -> nn.Module:
    return Attending(nn.MultiheadAttention(8, 2, batch_first=True))


class Tied(nn.Module):
    """A bare parameter, one that two layers share, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 8)
        self.again = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.out = nn.Linear(8, TOKENS, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.again(torch.relu(self.again(self.embedding(x).mean(1)))) * self.scale)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 8)
        self.recurrent = nn.LSTM(8, 8, batch_first=True)
        self.out = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.recurrent(self.embedding(x))[0][:, -1])


IMAGES = ("cnn", "odd-cnn")
TABLES = ("mlp", "layer-norm")
MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp, "layer-norm": layer_norm, "cnn": cnn, "odd-cnn": odd_cnn, "transformer": transformer,
    "bag": bag, "attending": attending, "tied": Tied,
}  # fmt: skip


def case(name: str, clients: int, batch: int) -> tuple[nn.Module, dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Return the model, weights (C, ...) that differ between clients, x, y and which places are real (not all)."""
    torch.manual_seed(0)
    model = {**MODELS, "recurrent": Recurrent}[name]()
    params = {
        n: torch.stack([p.detach() + 0.1 * torch.randn(p.shape) for _ in range(clients)])
        for n, p in model.named_parameters()
    }
    shape = (3, 10, 10) if name in IMAGES else (5,)
    x = torch.randn(clients, batch, *shape)
    if name not in IMAGES + TABLES:
        x = torch.randint(0, TOKENS, (clients, batch, LENGTH))
    return model, params, x, torch.randint(0, CLASSES, (clients, batch)), torch.rand(clients, batch) < 0.8


def each_alone(
    model: nn.Module, params: dict[str, Tensor], x: Tensor, y: Tensor, loss: Loss = classification_loss
) -> dict[str, Tensor]:
    """Return every example's gradient (C, B, ...) by a plain loop."""
    found: dict[str, list[Tensor]] = {name: [] for name in params}
    for client in range(len(x)):
        own = {name: p[client].clone().requires_grad_() for name, p in params.items()}
        for i in range(x.shape[1]):
            loss(functional_call(model, own, (x[client, i : i + 1],)), y[client, i : i + 1]).sum().backward()
            for name, p in own.items():
                found[name].append(torch.zeros_like(p) if p.grad is None else p.grad)
                p.grad = None
    return {name: torch.stack(g).view(*x.shape[:2], *params[name].shape[1:]) for name, g in found.items()}


def clipped(each: dict[str, Tensor], real: Tensor, clipping_norm: float) -> tuple[dict[str, Tensor], Tensor]:
    """Return the clipped sums (C, ...) and the norms (C, B), as the formula has them."""
    norms = sum(g.flatten(2).square().sum(2) if g.ndim > 2 else g.square() for g in each.values()).sqrt()
    factors = (clipping_norm / norms).clamp(max=1) * real
    return {name: (g * factors.view(*factors.shape, *[1] * (g.ndim - 2))).sum(1) for name, g in each.items()}, norms


def assert_equal(found: Clipped, sums: dict[str, Tensor], norms: Tensor, real: Tensor) -> None:
    torch.testing.assert_close(found.norms, norms * real, rtol=1e-5, atol=1e-6)
    assert found.sums.keys() == sums.keys()
    scale = torch.cat([total.flatten() for total in sums.values()]).norm()
    for name, total in sums.items():
        assert (found.sums[name] - total).norm() <= 1e-5 * scale, name
