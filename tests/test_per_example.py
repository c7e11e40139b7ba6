"""The clipped sum of per-example gradients equals a loop of autograd and Opacus, for clients together and alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from per_example_models import CLASSES, LENGTH, MODELS, TOKENS, Attending, assert_equal, case, clipped, each_alone
from torch import Tensor, nn
from torch.func import functional_call

from core.steps import Loss
from privacy.per_example.clipped import ClippedGradients, ClippedObjective
from privacy.per_example.fitness import clipped_gradients
from privacy.per_example.recording import Recording
from tasks.base import classification_loss


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Compute as workers do; models this small are slower on two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_sums_are_those_of_a_loop(name: str, clients: int) -> None:
    model, params, x, y, real = case(name, clients, batch=5)
    sums, norms = clipped(each_alone(model, params, x, y), real, 0.5)
    gradients = clipped_gradients(model, classification_loss, x[0], y[0])
    assert_equal(gradients(params, x, y, real, 0.5), sums, norms, real)
    losses = classification_loss(functional_call(model, {n: p[0] for n, p in params.items()}, (x[0],)), y[0])
    found = gradients(params, x, y, real, 0.5)
    torch.testing.assert_close(found.losses[0], losses.detach() * real[0])
    assert found.dropped.tolist() == [0] * clients


def test_every_way_is_the_same() -> None:
    model, params, x, y, real = case("transformer", 2, batch=5)
    sums, norms = clipped(each_alone(model, params, x, y), real, 0.5)
    left = ["embedding", "block.qkv", "norm"]
    for recording in (Recording(model), Recording(model, alone=True), Recording(model, left, alone=True)):
        assert_equal(ClippedGradients(recording, classification_loss)(params, x, y, real, 0.5), sums, norms, real)


def _of_opacus(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Return Opacus's per-sample gradients of the model's own weights, (1, B, ...) by name."""
    from opacus.grad_sample import GradSampleModule

    wrapped = GradSampleModule(copy.deepcopy(model), loss_reduction="sum")
    classification_loss(wrapped(x), y).sum().backward()
    return {name.removeprefix("_module."): p.grad_sample[None] for name, p in wrapped.named_parameters()}


@pytest.mark.parametrize("name", ["mlp", "layer-norm", "cnn", "transformer", "bag"])
def test_sums_are_those_of_opacus(name: str) -> None:
    model, _, x, y, real = case(name, 1, batch=5)
    model = _without_inplace(model)
    own = {n: p.detach()[None] for n, p in model.named_parameters()}
    gradients = clipped_gradients(model, classification_loss, x[0], y[0])
    assert_equal(gradients(own, x, y, real, 0.5), *clipped(_of_opacus(model, x[0], y[0]), real, 0.5), real)


def _without_inplace(model: nn.Module) -> nn.Module:
    """Return the model as Opacus's backward hooks need it."""
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


def test_attention_is_that_of_opacus() -> None:
    """With Opacus's layer on both sides: batch first, that of 1.6 does not compute what nn.MultiheadAttention does."""
    from opacus.layers import DPMultiheadAttention

    torch.manual_seed(0)
    model = Attending(DPMultiheadAttention(8, 2, batch_first=True), for_each=True)
    # Opacus does not leave padding out.
    x, y, real = torch.randint(1, TOKENS, (1, 5, LENGTH)), torch.randint(0, CLASSES, (1, 5)), torch.ones(1, 5).bool()
    own = {n: p.detach()[None] for n, p in model.named_parameters()}
    gradients = clipped_gradients(model, classification_loss, x[0], y[0])
    assert_equal(gradients(own, x, y, real, 0.5), *clipped(_of_opacus(model, x[0], y[0]), real, 0.5), real)


def _half_square(logits: Tensor, y: Tensor) -> Tensor:
    return (logits[:, 0] - y) ** 2 / 2


def _one_weight() -> tuple[nn.Module, dict[str, Tensor], Tensor, Tensor]:
    """Return y = 2 x with targets 0: an example's gradient is 2 x * x; and clients with x = (1, 0.5) and (0.1, 3)."""
    model = nn.Linear(1, 1, bias=False)
    return (
        model,
        {"weight": torch.full((2, 1, 1), 2.0)},
        torch.tensor([[[1.0], [0.5]], [[0.1], [3.0]]]),
        torch.zeros(2, 2),
    )


def test_clipping_by_hand() -> None:
    model, params, x, y = _one_weight()
    gradients = clipped_gradients(model, _half_square, x[0], y[0])
    found = gradients(params, x, y, torch.ones(2, 2).bool(), 1.0)
    torch.testing.assert_close(found.norms, torch.tensor([[2.0, 0.5], [0.02, 18.0]]))
    torch.testing.assert_close(found.sums["weight"].flatten(), torch.tensor([1.5, 1.02]))
    torch.testing.assert_close(found.losses, torch.tensor([[2.0, 0.5], [0.02, 18.0]]))


def test_places_that_pad_and_empty_batches_add_nothing() -> None:
    model, params, x, y = _one_weight()
    gradients = clipped_gradients(model, _half_square, x[0], y[0])
    # What stands in a place that pads must not matter, whatever it is.
    x[1] = torch.tensor([[float("nan")], [float("inf")]])
    found = gradients(params, x, y, torch.tensor([[True, False], [False, False]]), 1.0)
    assert found.sums["weight"].flatten().tolist() == [1.0, 0.0]
    assert found.norms.tolist() == [[2.0, 0.0], [0.0, 0.0]]
    assert found.losses.tolist() == [[2.0, 0.0], [0.0, 0.0]]
    assert found.dropped.tolist() == [0, 0]
    nothing = gradients(params, x[:, :0], y[:, :0], torch.ones(2, 0).bool(), 1.0)
    assert nothing.sums["weight"].tolist() == [[[0.0]], [[0.0]]]
    assert nothing.norms.shape == nothing.losses.shape == (2, 0)


@pytest.mark.parametrize("name", MODELS)
def test_an_example_without_a_finite_gradient_is_dropped_and_counted(name: str) -> None:
    model, params, x, y, _ = case(name, 2, batch=4)

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        # Label 9 stands for an example that overflows.
        return classification_loss(logits, y.clamp(max=CLASSES - 1)) * torch.where(y == 9, torch.inf, 1.0)

    gradients = clipped_gradients(model, loss, x[0], y[0])
    real = torch.ones(2, 4, dtype=torch.bool)
    y[1, 2] = 9
    found = gradients(params, x, y, real, 0.5)
    assert found.dropped.tolist() == [0, 1]
    assert found.norms[1, 2] == found.losses[1, 2] == 0
    real[1, 2] = False
    y[1, 2] = 0
    without = gradients(params, x, y, real, 0.5)
    for key, total in found.sums.items():
        torch.testing.assert_close(total, without.sums[key])


def test_a_token_beyond_the_table_is_no_token_of_another_client() -> None:
    model, params, x, y, real = case("bag", 2, batch=4)
    gradients = clipped_gradients(model, classification_loss, x[0], y[0])
    for token in (TOKENS, -1):
        x[0, 0, 0] = token
        with pytest.raises(IndexError, match="30 rows"):
            gradients(params, x, y, real, 0.5)


def test_clients_together_are_clients_alone() -> None:
    model, params, x, y, real = case("cnn", 3, batch=5)
    gradients = clipped_gradients(model, classification_loss, x[0], y[0])
    together = gradients(params, x, y, real, 0.5)
    for i in range(3):
        alone = gradients(
            {n: p[i : i + 1] for n, p in params.items()}, x[i : i + 1], y[i : i + 1], real[i : i + 1], 0.5
        )
        torch.testing.assert_close(together.norms[i], alone.norms[0])
        for name, total in alone.sums.items():
            torch.testing.assert_close(together.sums[name][i], total[0], rtol=1e-5, atol=1e-6)


def test_only_what_moves_counts() -> None:
    model, params, x, y, real = case("cnn", 2, batch=5)
    only = ("1.weight", "8.weight", "8.bias")
    each = {name: g for name, g in each_alone(model, params, x, y).items() if name in only}
    gradients = clipped_gradients(model, classification_loss, x[0], y[0])
    assert_equal(gradients(params, x, y, real, 0.5, only=only), *clipped(each, real, 0.5), real)


def test_frozen_layers_stay_as_they_are() -> None:
    model, params, x, y, real = case("cnn", 2, batch=5)
    model[0].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    moving = {name: params[name] for name, p in model.named_parameters() if p.requires_grad}
    gradients = clipped_gradients(model, classification_loss, x[0], y[0])
    assert_equal(gradients(moving, x, y, real, 0.5), *clipped(each_alone(model, moving, x, y), real, 0.5), real)


def test_an_objective_is_differentiated_example_by_example() -> None:
    model, params, x, y, real = case("transformer", 2, batch=3)
    beside = {"away": torch.tensor([1.0, 2.0])}

    def objective(
        w: dict[str, Tensor], own: dict[str, Tensor], x: Tensor, y: Tensor, share: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits = functional_call(model, w, (x,))
        mean = (classification_loss(logits, y) * share).sum()
        return mean + own["away"] * (logits**2 * share.unsqueeze(1)).sum(), mean

    each = {name: torch.empty(2, 3, *p.shape[1:]) for name, p in params.items()}
    for client, away in enumerate(beside["away"]):
        one = {name: p[client : client + 1] for name, p in params.items()}
        loss: Loss = lambda logits, y, away=away: classification_loss(logits, y) + away * (logits**2).sum(1)  # noqa: E731
        for name, g in each_alone(model, one, x[client : client + 1], y[client : client + 1], loss).items():
            each[name][client] = g[0]
    found = ClippedObjective(objective, beside)(params, x, y, real, 0.5)
    assert_equal(found, *clipped(each, real, 0.5), real)
    plain = clipped_gradients(model, classification_loss, x[0], y[0])(params, x, y, real, 0.5)
    torch.testing.assert_close(found.losses, plain.losses)
    nothing = ClippedObjective(objective, beside)(params, x[:, :0], y[:, :0], real[:, :0], 0.5)
    assert all(not total.any() for total in nothing.sums.values())


def test_dropout_draws_a_mask_for_each_example() -> None:
    """With y = d x and weights 1, the gradient at the bias behind the dropout layer is the mask."""
    model = nn.Sequential(nn.Linear(1, 50, bias=False), nn.Dropout(0.5), nn.Linear(50, 1, bias=False))
    params = {n: torch.ones(2, *p.shape) for n, p in model.named_parameters()}
    gradients = clipped_gradients(model, lambda logits, y: logits[:, 0], torch.ones(2, 1), torch.zeros(2))
    torch.manual_seed(0)
    found = gradients(params, torch.ones(2, 8, 1), torch.zeros(2, 8), torch.ones(2, 8).bool(), 1e9)
    # |gradient|^2 = 2 * sum of mask^2, where the mask is 0 or 2: as many different values as masks.
    assert len(set(found.norms.flatten().tolist())) > 8
    kept = found.sums["2.weight"].flatten() / 2
    torch.testing.assert_close(kept, kept.round())
    assert 0.4 < float(kept.mean()) / 8 < 0.6


def test_cancelling_places_do_not_hide_a_gradient() -> None:
    """Rounding must not make a ghost norm short: of two places near 1e4 and -1e4 only the difference remains."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64, bias=False)
    a = torch.tensor([1e4, -1e4]).view(2, 1) + torch.randn(40, 2, 64)
    gradients = clipped_gradients(model, lambda out, y: out.sum((1, 2)), a, torch.zeros(40))
    assert isinstance(gradients, ClippedGradients)
    assert (gradients.recording.alone, gradients.recording.bare) == (False, [])
    # 40 clients with an example each.
    params = {"weight": model.weight.detach().expand(40, 64, 64)}
    found = gradients(params, a[:, None], torch.zeros(40, 1), torch.ones(40, 1).bool(), 1.0)
    assert (found.sums["weight"].flatten(1).norm(dim=1) <= 1.0 + 1e-5).all()


@settings(max_examples=30, deadline=None)
@given(
    clients=st.integers(1, 3), batch=st.integers(0, 4), places=st.integers(0, 3),
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=3), seed=st.integers(0, 2**16),
    clipping_norm=st.sampled_from([0.01, 0.5, 100.0]),
)  # fmt: skip
def test_no_example_adds_more_than_the_clipping_norm(
    clients: int, batch: int, places: int, widths: list[int], seed: int, clipping_norm: float
) -> None:
    torch.manual_seed(seed)
    sizes = [4, *widths, CLASSES]
    layers = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in pairwise(sizes)]
    loss: Loss = lambda out, y: classification_loss(out.mean(1) if out.ndim == 3 else out, y)  # noqa: E731
    model = nn.Sequential(*layers)
    params = {n: torch.randn(clients, *p.shape) for n, p in model.named_parameters()}
    x = 3 * torch.randn(clients, batch, *([places] if places else []), 4)
    y, real = torch.randint(0, CLASSES, (clients, batch)), torch.rand(clients, batch) < 0.8
    gradients = clipped_gradients(model, loss, x[0], y[0])
    found = gradients(params, x, y, real, clipping_norm)
    if batch:
        assert_equal(found, *clipped(each_alone(model, params, x, y, loss), real, clipping_norm), real)
    for i in range(batch):
        own = gradients(params, x[:, i : i + 1], y[:, i : i + 1], real[:, i : i + 1], clipping_norm)
        length = torch.cat([total.flatten(1) for total in own.sums.values()], 1).norm(dim=1)
        assert (length <= clipping_norm * (1 + 1e-5)).all()
        assert (length[~real[:, i]] == 0).all()
