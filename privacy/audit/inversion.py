"""Gradient inversion: what one client's update shows of its examples to whoever receives it.

- A first layer that is fully connected: where an example alone excites unit i, its input is dW_i / db_i, exactly
  (Phong et al., IEEE TIFS 2018; Zhu and Blaschko, R-GAP, ICLR 2021). Every unit gives a candidate.
- Any other layer: inputs whose gradient points the same way, 1 - cos(gradient, update) + tv TV(x), by Adam on signs of
  the gradient (Geiping et al., NeurIPS 2020). Labels are taken as known: clients state their numbers.
- Words: the rows of an embedding that moved are the words of the texts, in no order.

Candidates are matched with the examples as well as they can be: an attacker would have to choose without knowing them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.func import functional_call

from core.records import Tensors

STEPS, RATE, VARIATION = 300, 0.1, 1e-4
SMALLEST, HOPELESS = 1e-12, 1e30


def first_layer(model: nn.Module, x: Tensor) -> str:
    """Return the name of a linear layer with a bias that sees the inputs x (n, ...) as they are; empty for none."""
    return _sees(model, lambda module: isinstance(module, nn.Linear) and module.bias is not None, x, x.flatten(1))


def embedding(model: nn.Module, x: Tensor) -> str:
    """Return the name of the table in which the model looks the tokens x (n, length) up; empty for none."""
    return _sees(model, lambda module: isinstance(module, nn.Embedding), x, x)


def _sees(model: nn.Module, kind: Callable[[nn.Module], bool], x: Tensor, wanted: Tensor) -> str:
    """Return the first module of the kind to which the model hands `wanted` when it is given x; empty for none."""
    found: list[str] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0].shape == wanted.shape and torch.equal(inputs[0], wanted):
                found.append(name)

        return look

    hooks = [m.register_forward_pre_hook(hook(name)) for name, m in model.named_modules() if kind(m)]
    try:
        with torch.no_grad():
            model.eval()(x)
    finally:
        for handle in hooks:
            handle.remove()
    return found[0] if found else ""


def from_first_layer(weight: Tensor, bias: Tensor) -> Tensor:
    """Return the candidates dW_i / db_i (units, d) of the updates of a layer's weight (units, d) and bias (units,)."""
    told = bias.abs() > SMALLEST
    return weight[told] / bias[told].unsqueeze(1)


def from_gradients(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    weights: Tensors,
    update: Tensors,
    y: Tensor,
    shape: torch.Size,
    span: tuple[float, float],
    seed: int,
) -> Tensor:
    """Return inputs (n, *shape) with labels y (n,) whose gradient at the `weights` points as the update does.

    `span` holds the least and the largest value that an input has.
    """
    own = {name: p.detach().requires_grad_() for name, p in weights.items()}
    target = {name: -update[name] for name in own}
    length = _length(target)
    low, high = span
    x = low + (high - low) * torch.rand(len(y), *shape, generator=torch.Generator().manual_seed(seed))
    x.requires_grad_()
    optimizer = torch.optim.Adam([x], lr=RATE * (high - low))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    # As the client trained: normalised by the batch's own statistics. What it dropped nobody knows.
    for module in model.train().modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    for _ in range(STEPS):
        value = loss(functional_call(model, own, (x,)), y).mean()
        found = dict(zip(own, torch.autograd.grad(value, list(own.values()), create_graph=True), strict=True))
        along = sum(((found[name] * target[name]).sum() for name in own), start=torch.zeros(()))
        apart = 1 - along / (length * _length(found)).clamp_min(SMALLEST) + VARIATION * _variation(x) / (high - low)
        (gradient,) = torch.autograd.grad(apart, [x])
        x.grad = gradient.sign()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            x.clamp_(low, high)
    return x.detach()


def words(rows: Tensor, count: int) -> np.ndarray:
    """Return which `count` rows of an embedding's update (words, d) moved most, longest way first."""
    return rows.norm(dim=1).argsort(descending=True, stable=True)[:count].numpy()


def matched(truth: Tensor, candidates: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean squared error of each example (n, ...) to the candidate (m, ...) that is matched with it, nan for
    one that got none, and that candidate's place or -1."""
    errors, places = np.full(len(truth), np.nan), np.full(len(truth), -1)
    if len(candidates):
        # By differences: through products of long vectors an exact candidate would not look exact.
        far = torch.cdist(
            truth.flatten(1).double(), candidates.flatten(1).double(), compute_mode="donot_use_mm_for_euclid_dist"
        )
        costs = (far.square() / truth[0].numel()).nan_to_num(HOPELESS, posinf=HOPELESS).clamp_max(HOPELESS).numpy()
        rows, chosen = linear_sum_assignment(costs)
        errors[rows], places[rows] = costs[rows, chosen], chosen
    return errors, places


def psnr(errors: np.ndarray, span: tuple[float, float]) -> np.ndarray:
    """Return peak signal-to-noise ratios in decibels from mean squared errors, 100 at most."""
    return np.asarray(10 * np.log10((span[1] - span[0]) ** 2 / np.maximum(errors, 1e-10 * (span[1] - span[0]) ** 2)))


def relative(errors: np.ndarray, truth: Tensor) -> np.ndarray:
    """Return |x - guess| / |x| from mean squared errors (n,): 1 is what guessing zeros gives."""
    lengths = truth.flatten(1).double().square().mean(1).clamp_min(SMALLEST).numpy()
    return np.asarray(np.sqrt(errors / lengths))


def _length(tensors: Tensors) -> Tensor:
    return sum((t.square().sum() for t in tensors.values()), start=torch.zeros(())).sqrt()


def _variation(x: Tensor) -> Tensor:
    """Return the mean total variation of images (n, channels, height, width); tables have none."""
    if x.ndim != 4:
        return torch.zeros(())
    return (x[..., 1:] - x[..., :-1]).abs().mean() + (x[..., 1:, :] - x[..., :-1, :]).abs().mean()
