"""Which models have per-example gradients, the fastest way to them that is right, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from per_example_models import (
    CLASSES,
    LENGTH,
    TOKENS,
    Tied,
    assert_equal,
    attending,
    bag,
    case,
    clipped,
    cnn,
    each_alone,
    layer_norm,
    mlp,
    odd_cnn,
    transformer,
)
from torch import Tensor, nn

from core.errors import InputError
from privacy.per_example.clipped import ClippedGradients, ClippedObjective, ClippedSum
from privacy.per_example.fitness import check, clipped_gradients
from tasks.base import classification_loss


class _Sliced(nn.Module):
    """Whose positions, with a first axis of few examples, would seem to be right as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 8)
        self.positions = nn.Parameter(torch.zeros(LENGTH, 8))
        self.out = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((self.embedding(x) + self.positions[: x.shape[1]]).tanh().mean(1))


def way(gradients: ClippedSum) -> tuple[bool, list[str]]:
    """Return whether the model is mapped over examples, and the weights whose gradients are written out for that."""
    assert isinstance(gradients, ClippedGradients)
    return gradients.recording.alone, gradients.recording.bare


@pytest.mark.parametrize(
    ("make", "alone", "bare"),
    [
        (mlp, False, []), (layer_norm, False, []), (cnn, False, []), (odd_cnn, False, []), (bag, False, []),
        (transformer, False, ["positions"]),
        (attending, True, ["position.weight", *(f"attention.{part}" for part in
                            ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"))]),
        (Tied, True, ["scale", "embedding.weight", "again.weight", "again.bias"]),
        (_Sliced, True, ["positions"]),
    ],
)  # fmt: skip
def test_the_fastest_way_that_is_right_is_taken(make: Callable[[], nn.Module], alone: bool, bare: list[str]) -> None:
    torch.manual_seed(0)
    shape = (3, 10, 10) if make in (cnn, odd_cnn) else (5,)
    x = torch.randn(4, *shape) if make in (mlp, layer_norm, cnn, odd_cnn) else torch.randint(0, TOKENS, (4, LENGTH))
    assert way(clipped_gradients(make(), classification_loss, x, torch.zeros(4).long())) == (alone, bare)


@pytest.mark.slow
def test_a_recurrent_network_goes_example_by_example() -> None:
    model, params, x, y, real = case("recurrent", 2, batch=3)
    gradients = clipped_gradients(model, classification_loss, x[0], y[0])
    assert isinstance(gradients, ClippedObjective)
    assert_equal(gradients(params, x, y, real, 0.5), *clipped(each_alone(model, params, x, y), real, 0.5), real)


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
    model, _, x, y, _ = case("attending", 1, batch=4)
    before, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    check(model.eval(), classification_loss, x[0], y[0])
    assert not model.training
    assert all(t.equal(before[name]) for name, t in model.state_dict().items())
    assert torch.get_rng_state().equal(drawn)
    assert torch.backends.mha.get_fastpath_enabled()
