"""What a DP-SGD step costs: CPU time over that of the same model's plain SGD step, interleaved, on one thread.

python perf/dpsgd.py steps      models and batches: ours, Opacus's default hooks, Opacus's ghost clipping, vmap(grad)
python perf/dpsgd.py cohort     32 clients of a 2,049-parameter network at once, a client against a plain client

Everybody clips at 1 and adds Gaussian noise of torch's default generator to every gradient, as Opacus does by default.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import torch
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from privacy.per_example.fitness import clipped_gradients
from tasks.base import classification_loss
from tasks.text_models import BagOfEmbeddings, TextTransformer

TOKENS = 2000
TURNS = 9
TURN_SECONDS = 0.3
RATE, CLIPPING_NORM, NOISE = 0.05, 1.0, 1.0

Step = Callable[[], object]


def mlp() -> nn.Module:
    """Return 784-200-10, 159,010 parameters."""
    return nn.Sequential(nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 10))


def cnn28() -> nn.Module:
    """Return the network of Opacus's MNIST example, 26,010 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, 2, padding=3), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, 2), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


def cnn32() -> nn.Module:
    """Return three 3 x 3 convolutions with group normalisation and a linear layer, 66,922 parameters."""
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(8, after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, 10))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP b32": (mlp, (32, 784)),
    "MLP b256": (mlp, (256, 784)),
    "CNN28 b32": (cnn28, (32, 1, 28, 28)),
    "CNN28 b128": (cnn28, (128, 1, 28, 28)),
    "CNN32+GN b32": (cnn32, (32, 3, 32, 32)),
    "transformer b32": (lambda: TextTransformer(TOKENS, 10, 64, dropout=0.0), (32, 64)),
    "embeddings b32": (lambda: BagOfEmbeddings(TOKENS, 10, dropout=0.0), (32, 64)),
}


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Return a step of the ordinary torch loop."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    def step() -> None:
        optimizer.zero_grad()
        classification_loss(model(x), y).mean().backward()
        optimizer.step()

    return step


def ours(model: nn.Module, x: Tensor, y: Tensor, clients: int = 1) -> Step:
    """Return a step of `clients` clients, each with a batch as large as x."""
    gradients = clipped_gradients(model, classification_loss, x, y)
    params = {name: p.detach().expand(clients, *p.shape).clone() for name, p in model.named_parameters()}
    xs, ys = (values.expand(clients, *values.shape).contiguous() for values in (x, y))
    real = torch.ones(ys.shape, dtype=torch.bool)

    def step() -> None:
        sums = gradients(params, xs, ys, real, CLIPPING_NORM).sums
        for name, p in params.items():
            noisy = sums[name].add_(torch.randn_like(p), alpha=NOISE * CLIPPING_NORM)
            p.sub_(noisy, alpha=RATE / len(x))

    return step


def opacus_hooks(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Return a step of Opacus as its documentation sets it up: gradients of all examples, then the mean."""
    wrapped = GradSampleModule(model)
    optimizer = DPOptimizer(
        torch.optim.SGD(wrapped.parameters(), lr=RATE),
        noise_multiplier=NOISE, max_grad_norm=CLIPPING_NORM, expected_batch_size=len(x),
    )  # fmt: skip

    def step() -> None:
        optimizer.zero_grad()
        classification_loss(wrapped(x), y).mean().backward()
        optimizer.step()

    return step


def opacus_ghost(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Return a step of Opacus's ghost clipping: norms first, then a second backward pass of the weighted loss."""
    wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=CLIPPING_NORM, use_ghost_clipping=True)
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(wrapped.parameters(), lr=RATE),
        noise_multiplier=NOISE, max_grad_norm=CLIPPING_NORM, expected_batch_size=len(x),
    )  # fmt: skip
    loss = DPLossFastGradientClipping(wrapped, optimizer, nn.CrossEntropyLoss(), loss_reduction="mean")

    def step() -> None:
        optimizer.zero_grad()
        loss(wrapped(x), y).backward()
        optimizer.step()

    return step


def mapped(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Return a step by torch.func's vmap(grad)."""
    params = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss(w: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, w, (x[None],)), y[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))

    def step() -> None:
        found = each(params, x, y)
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in found.values()]).norm(dim=0)
        factors = (CLIPPING_NORM / (norms + 1e-6)).clamp(max=1)
        for name, p in params.items():
            total = (factors @ found[name].flatten(1)).view_as(p)
            noisy = total.add_(torch.randn_like(p), alpha=NOISE * CLIPPING_NORM)
            p.sub_(noisy, alpha=RATE / len(x))

    return step


WAYS: dict[str, Callable[[nn.Module, Tensor, Tensor], Step]] = {
    "plain": plain, "ours": ours, "opacus hooks": opacus_hooks, "opacus ghost": opacus_ghost, "vmap(grad)": mapped,
}  # fmt: skip


def _timed(steps: dict[str, Step]) -> dict[str, list[float]]:
    """Return every step's CPU seconds turn by turn; in a turn each takes about the same time."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    times: dict[str, int] = {}
    for name, step in steps.items():
        step()
        began = time.process_time()
        step(), step()
        times[name] = max(1, round(TURN_SECONDS / ((time.process_time() - began) / 2)))
    for _ in range(TURNS):
        for name, step in steps.items():
            began = time.process_time()
            for _ in range(times[name]):
                step()
            seconds[name].append((time.process_time() - began) / times[name])
    return seconds


def _ratio(own: list[float], other: list[float], factor: float = 1.0) -> str:
    ratios = sorted(factor * a / b for a, b in zip(own, other, strict=True))
    return f"{statistics.median(ratios):.2f}x ({ratios[0]:.2f}-{ratios[-1]:.2f})"


def _data(model: Callable[[], nn.Module], shape: tuple[int, ...], classes: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    network = model()
    takes_tokens = any(isinstance(module, nn.Embedding) for module in network.modules())
    x = torch.randint(0, TOKENS, shape) if takes_tokens else torch.randn(shape)
    return network, x, torch.randint(0, classes, shape[:1])


def steps() -> None:
    """Print each way's multiple of plain SGD's CPU time on every model: median, least and most of the turns."""
    print(f"| | plain, ms | {' | '.join(list(WAYS)[1:])} | Opacus's better / ours |\n|{'---|' * (len(WAYS) + 2)}")
    for case, (make, shape) in CASES.items():
        model, x, y = _data(make, shape, 10)
        seconds = _timed({name: way(copy.deepcopy(model), x, y) for name, way in WAYS.items()})
        cells = [_ratio(seconds[name], seconds["plain"]) for name in list(WAYS)[1:]]
        better = min(seconds["opacus hooks"], seconds["opacus ghost"], key=statistics.median)
        cells.append(_ratio(better, seconds["ours"]))
        print(f"| {case} | {statistics.median(seconds['plain']) * 1e3:.2f} | {' | '.join(cells)} |", flush=True)


def cohort() -> None:
    """Print what a client of a cohort costs against a plain client."""
    model, x, y = _data(
        lambda: nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 1), nn.Flatten(0)), (20, 30), 2
    )
    for clients in (1, 4, 32):
        seconds = _timed({"plain": plain(copy.deepcopy(model), x, y), "ours": ours(model, x, y, clients)})
        each = statistics.median(seconds["ours"]) / clients * 1e6
        plainly = statistics.median(seconds["plain"]) * 1e6
        ratio = _ratio(seconds["ours"], seconds["plain"], 1 / clients)
        print(f"{clients} clients: {each:.0f} us a client and step, plain {plainly:.0f} us, {ratio}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Opacus's hooks on a first layer, whose input needs no gradient.
    warnings.filterwarnings("ignore")
    {"steps": steps, "cohort": cohort}[sys.argv[1]]()
