"""The clipped sum of per-example gradients equals a loop of autograd and Opacus, for clients together and alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from core.errors import InputError
from core.steps import Loss
from privacy.per_example.clipped import Clipped, ClippedGradients, ClippedObjective, ClippedSum
from privacy.per_example.fitness import check, clipped_gradients
from privacy.per_example.recording import Recording
from tasks.base import classification_loss
from tasks.text_models import BagOfEmbeddings, TextTransformer

TOKENS, LENGTH, CLASSES = 30, 6, 3


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Compute as workers do; models this small are slower on two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, CLASSES, bias=False))


def _layer_norm() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (5, 1)), nn.Linear(1, 4), nn.LayerNorm((5, 4)), nn.Flatten(), nn.Linear(20, CLASSES)
    )


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 64, 3, bias=False), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64, CLASSES),
    )  # fmt: skip


def _odd_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, (3, 2), stride=(1, 2), padding="valid", groups=3), nn.Tanh(),
        nn.Conv2d(6, 6, 3, padding=2, dilation=2, padding_mode="reflect"), nn.Tanh(),
        nn.Conv2d(6, 16, 2, padding="same"), nn.Tanh(), nn.Conv2d(16, 32, 3, groups=2),
        nn.GroupNorm(4, 32), nn.Flatten(), nn.Linear(32 * 6 * 3, CLASSES),
    )  # fmt: skip


def _transformer() -> nn.Module:
    return TextTransformer(TOKENS, CLASSES, LENGTH, dim=8, dropout=0.0)


def _bag() -> nn.Module:
    return BagOfEmbeddings(TOKENS, CLASSES, dim=8, dropout=0.0)


class _Attending(nn.Module):
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


def _attending() -> nn.Module:
    return _Attending(nn.MultiheadAttention(8, 2, batch_first=True))


class _Tied(nn.Module):
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


class _Recurrent(nn.Module):
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
    "mlp": _mlp, "layer-norm": _layer_norm, "cnn": _cnn, "odd-cnn": _odd_cnn, "transformer": _transformer,
    "bag": _bag, "attending": _attending, "tied": _Tied,
}  # fmt: skip


def _case(name: str, clients: int, batch: int) -> tuple[nn.Module, dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Return the model, weights (C, ...) that differ between clients, x, y and which places are real (not all)."""
    torch.manual_seed(0)
    model = {**MODELS, "recurrent": _Recurrent}[name]()
    params = {
        n: torch.stack([p.detach() + 0.1 * torch.randn(p.shape) for _ in range(clients)])
        for n, p in model.named_parameters()
    }
    shape = (3, 10, 10) if name in IMAGES else (5,)
    x = torch.randn(clients, batch, *shape)
    if name not in IMAGES + TABLES:
        x = torch.randint(0, TOKENS, (clients, batch, LENGTH))
    return model, params, x, torch.randint(0, CLASSES, (clients, batch)), torch.rand(clients, batch) < 0.8


def _each(
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


def _clipped(each: dict[str, Tensor], real: Tensor, clipping_norm: float) -> tuple[dict[str, Tensor], Tensor]:
    """Return the clipped sums (C, ...) and the norms (C, B), as the formula has them."""
    norms = sum(g.flatten(2).square().sum(2) if g.ndim > 2 else g.square() for g in each.values()).sqrt()
    factors = (clipping_norm / norms).clamp(max=1) * real
    return {name: (g * factors.view(*factors.shape, *[1] * (g.ndim - 2))).sum(1) for name, g in each.items()}, norms


def _assert_equal(found: Clipped, sums: dict[str, Tensor], norms: Tensor, real: Tensor) -> None:
    torch.testing.assert_close(found.norms, norms * real, rtol=1e-5, atol=1e-6)
    assert found.sums.keys() == sums.keys()
    scale = torch.cat([total.flatten() for total in sums.values()]).norm()
    for name, total in sums.items():
        assert (found.sums[name] - total).norm() <= 1e-5 * scale, name


@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_sums_are_those_of_a_loop(name: str, clients: int) -> None:
    model, params, x, y, real = _case(name, clients, batch=5)
    sums, norms = _clipped(_each(model, params, x, y), real, 0.5)
    gradients = clipped_gradients(model, classification_loss, x[0], y[0])
    _assert_equal(gradients(params, x, y, real, 0.5), sums, norms, real)
    losses = classification_loss(functional_call(model, {n: p[0] for n, p in params.items()}, (x[0],)), y[0])
    found = gradients(params, x, y, real, 0.5)
    torch.testing.assert_close(found.losses[0], losses.detach() * real[0])
    assert found.dropped.tolist() == [0] * clients


class _Sliced(nn.Module):
    """Whose positions, with a first axis of few examples, would seem to be right as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 8)
        self.positions = nn.Parameter(torch.zeros(LENGTH, 8))
        self.out = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((self.embedding(x) + self.positions[: x.shape[1]]).tanh().mean(1))


def _way(gradients: ClippedSum) -> tuple[bool, list[str]]:
    """Return whether the model is mapped over examples, and the weights whose gradients are written out for that."""
    assert isinstance(gradients, ClippedGradients)
    return gradients.recording.alone, gradients.recording.bare


@pytest.mark.parametrize(
    ("make", "alone", "bare"),
    [
        (_mlp, False, []), (_layer_norm, False, []), (_cnn, False, []), (_odd_cnn, False, []), (_bag, False, []),
        (_transformer, False, ["positions"]),
        (_attending, True, ["position.weight", *(f"attention.{part}" for part in
                            ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"))]),
        (_Tied, True, ["scale", "embedding.weight", "again.weight", "again.bias"]),
        (_Sliced, True, ["positions"]),
    ],
)  # fmt: skip
def test_the_fastest_way_that_is_right_is_taken(make: Callable[[], nn.Module], alone: bool, bare: list[str]) -> None:
    torch.manual_seed(0)
    shape = (3, 10, 10) if make in (_cnn, _odd_cnn) else (5,)
    x = torch.randn(4, *shape) if make in (_mlp, _layer_norm, _cnn, _odd_cnn) else torch.randint(0, TOKENS, (4, LENGTH))
    assert _way(clipped_gradients(make(), classification_loss, x, torch.zeros(4).long())) == (alone, bare)


@pytest.mark.slow
def test_a_recurrent_network_goes_example_by_example() -> None:
    model, params, x, y, real = _case("recurrent", 2, batch=3)
    gradients = clipped_gradients(model, classification_loss, x[0], y[0])
    assert isinstance(gradients, ClippedObjective)
    _assert_equal(gradients(params, x, y, real, 0.5), *_clipped(_each(model, params, x, y), real, 0.5), real)


def test_every_way_is_the_same() -> None:
    model, params, x, y, real = _case("transformer", 2, batch=5)
    sums, norms = _clipped(_each(model, params, x, y), real, 0.5)
    left = ["embedding", "block.qkv", "norm"]
    for recording in (Recording(model), Recording(model, alone=True), Recording(model, left, alone=True)):
        _assert_equal(ClippedGradients(recording, classification_loss)(params, x, y, real, 0.5), sums, norms, real)


def _of_opacus(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Return Opacus's per-sample gradients of the model's own weights, (1, B, ...) by name."""
    from opacus.grad_sample import GradSampleModule

    wrapped = GradSampleModule(copy.deepcopy(model), loss_reduction="sum")
    classification_loss(wrapped(x), y).sum().backward()
    return {name.removeprefix("_module."): p.grad_sample[None] for name, p in wrapped.named_parameters()}


@pytest.mark.parametrize("name", ["mlp", "layer-norm", "cnn", "transformer", "bag"])
def test_sums_are_those_of_opacus(name: str) -> None:
    model, _, x, y, real = _case(name, 1, batch=5)
    model = _without_inplace(model)
    own = {n: p.detach()[None] for n, p in model.named_parameters()}
    gradients = clipped_gradients(model, classification_loss, x[0], y[0])
    _assert_equal(gradients(own, x, y, real, 0.5), *_clipped(_of_opacus(model, x[0], y[0]), real, 0.5), real)


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
    model = _Attending(DPMultiheadAttention(8, 2, batch_first=True), for_each=True)
    # Opacus does not leave padding out.
    x, y, real = torch.randint(1, TOKENS, (1, 5, LENGTH)), torch.randint(0, CLASSES, (1, 5)), torch.ones(1, 5).bool()
    own = {n: p.detach()[None] for n, p in model.named_parameters()}
    gradients = clipped_gradients(model, classification_loss, x[0], y[0])
    _assert_equal(gradients(own, x, y, real, 0.5), *_clipped(_of_opacus(model, x[0], y[0]), real, 0.5), real)


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
    model, params, x, y, _ = _case(name, 2, batch=4)

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
    model, params, x, y, real = _case("bag", 2, batch=4)
    gradients = clipped_gradients(model, classification_loss, x[0], y[0])
    for token in (TOKENS, -1):
        x[0, 0, 0] = token
        with pytest.raises(IndexError, match="30 rows"):
            gradients(params, x, y, real, 0.5)


def test_clients_together_are_clients_alone() -> None:
    model, params, x, y, real = _case("cnn", 3, batch=5)
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
    model, params, x, y, real = _case("cnn", 2, batch=5)
    only = ("1.weight", "8.weight", "8.bias")
    each = {name: g for name, g in _each(model, params, x, y).items() if name in only}
    gradients = clipped_gradients(model, classification_loss, x[0], y[0])
    _assert_equal(gradients(params, x, y, real, 0.5, only=only), *_clipped(each, real, 0.5), real)


def test_frozen_layers_stay_as_they_are() -> None:
    model, params, x, y, real = _case("cnn", 2, batch=5)
    model[0].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    moving = {name: params[name] for name, p in model.named_parameters() if p.requires_grad}
    gradients = clipped_gradients(model, classification_loss, x[0], y[0])
    _assert_equal(gradients(moving, x, y, real, 0.5), *_clipped(_each(model, moving, x, y), real, 0.5), real)


def test_an_objective_is_differentiated_example_by_example() -> None:
    model, params, x, y, real = _case("transformer", 2, batch=3)
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
        for name, g in _each(model, one, x[client : client + 1], y[client : client + 1], loss).items():
            each[name][client] = g[0]
    found = ClippedObjective(objective, beside)(params, x, y, real, 0.5)
    _assert_equal(found, *_clipped(each, real, 0.5), real)
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


class _Centred(nn.Module):
    """Subtracts the batch's mean, in training mode at least."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.always = always

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0) if self.training or self.always else x


class _Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.sum(0)
        return x


class _Opaque(torch.autograd.Function):
    """The identity whose gradient is wrong by a factor of two for whoever maps it, and which cannot be mapped."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        return g


class _Unmapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(7, 5))

    def forward(self, x: Tensor) -> Tensor:
        return _Opaque.apply(x + self.shift[2])  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.BatchNorm1d(5), ["'0' (BatchNorm1d)", "nn.GroupNorm", "privacy.level=client"]),
        (nn.BatchNorm1d(5, affine=False), ["'0' (BatchNorm1d)", "nn.GroupNorm"]),
        (nn.Sequential(nn.Unflatten(1, (5, 1)), nn.InstanceNorm1d(5, track_running_stats=True), nn.Flatten()),
         ["'0.1' (InstanceNorm1d)", "track_running_stats=False"]),
        (_Centred(always=True), ["'0' (_Centred)", "mixes the examples"]),
        (_Centred(always=False), ["'0' (_Centred)", "mixes the examples"]),
        (_Counting(), ["'0.seen'", "examples"]),
        (_Unmapped(), ["'0' (_Unmapped)", "cannot be mapped"]),
        (nn.Linear(5, 5, dtype=torch.complex64), ["'0.weight'", "complex64"]),
    ],
)  # fmt: skip
def test_models_whose_examples_have_no_gradient_of_their_own_are_refused(layer: nn.Module, words: list[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(layer, nn.Linear(5, CLASSES))
    for find in (check, clipped_gradients):
        with pytest.raises(InputError) as refusal:
            find(model, classification_loss, torch.randn(4, 5), torch.zeros(4).long())
        assert all(word in str(refusal.value) for word in words), refusal.value


def test_a_model_that_cannot_take_one_example_is_refused() -> None:
    class Squeezing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).squeeze()

    with pytest.raises(InputError, match="batch of one example"):
        clipped_gradients(Squeezing(5, CLASSES), classification_loss, torch.randn(4, 5), torch.zeros(4).long())


def test_the_check_accepts_what_can_be_had_and_leaves_no_trace() -> None:
    model, _, x, y, _ = _case("attending", 1, batch=4)
    before, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    check(model.eval(), classification_loss, x[0], y[0])
    assert not model.training
    assert all(t.equal(before[name]) for name, t in model.state_dict().items())
    assert torch.get_rng_state().equal(drawn)
    assert torch.backends.mha.get_fastpath_enabled()


def test_cancelling_places_do_not_hide_a_gradient() -> None:
    """Rounding must not make a ghost norm short: of two places near 1e4 and -1e4 only the difference remains."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64, bias=False)
    a = torch.tensor([1e4, -1e4]).view(2, 1) + torch.randn(40, 2, 64)
    gradients = clipped_gradients(model, lambda out, y: out.sum((1, 2)), a, torch.zeros(40))
    assert _way(gradients) == (False, [])
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
        _assert_equal(found, *_clipped(_each(model, params, x, y, loss), real, clipping_norm), real)
    for i in range(batch):
        own = gradients(params, x[:, i : i + 1], y[:, i : i + 1], real[:, i : i + 1], clipping_norm)
        length = torch.cat([total.flatten(1) for total in own.sums.values()], 1).norm(dim=1)
        assert (length <= clipping_norm * (1 + 1e-5)).all()
        assert (length[~real[:, i]] == 0).all()
