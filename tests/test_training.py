"""The cohort kernel equals a plain per-client torch loop, which is written out here without any of its code."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from core.batches import Batches, plan, stream
from core.config import RunConfig
from core.one_by_one import takes_channels_last
from core.optimizers import learning_rate, make_optimizer
from core.records import to_arrays, to_tensors, travelling
from core.seeding import permutations
from core.stacked import stack
from core.steps import plain_rate
from core.training import (
    LocalRound,
    can_vectorise,
    global_loss,
    local_sgd,
    squared_distance,
)
from tasks.base import classification_loss
from tasks.text_models import TextTransformer

SIZES = [7, 12, 5]  # ragged: 2, 3 and 2 batches of 5 an epoch
BATCH = 5


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1), nn.Flatten(0))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)
    )


def _transformer() -> nn.Module:
    return TextTransformer(buckets=50, classes=3, length=8, dropout=0.0)


def _batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1), nn.Flatten(0))


def _inputs(model: str, n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = {
        "cnn": lambda: torch.randn(n, 1, 6, 6, generator=generator),
        "transformer": lambda: torch.randint(0, 50, (n, 8), generator=generator),
    }.get(model, lambda: torch.randn(n, 6, generator=generator))()
    return x, torch.randint(0, 3 if model in ("cnn", "transformer") else 2, (n,), generator=generator)


def _deep() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh()),
        nn.Linear(8, 1), nn.Flatten(0),
    )  # fmt: skip


def _shared() -> nn.Module:
    activation = nn.Tanh()
    return nn.Sequential(
        nn.Linear(6, 8), activation, nn.Linear(8, 8), activation, nn.Linear(8, 1), activation, nn.Flatten(0)
    )


MODELS = {
    "mlp": _mlp,
    "shared": _shared,
    "deep": _deep,
    "cnn": _cnn,
    "transformer": _transformer,
    "batch_norm": _batch_norm,
}


def _round(name: str, optimizer: str = "sgd", epochs: int = 2, **changes: object) -> LocalRound:
    torch.manual_seed(0)
    model = MODELS[name]()
    x, y = _inputs(name, sum(SIZES))
    rng = np.random.default_rng(0)
    batches = plan(SIZES, BATCH, lambda at, n: np.stack([[rng.permutation(n) for _ in range(epochs)] for _ in at]))
    weights = {key: tensor.clone() for key, tensor in travelling(model).items()}
    made = make_optimizer(
        RunConfig(optimizer=optimizer, momentum=0.9, weight_decay=0.01), 0.1 if optimizer == "sgd" else 0.01
    )
    return replace(LocalRound(model, classification_loss, weights, x, y, batches, made), **changes)  # type: ignore[arg-type]


def _plain(r: LocalRound, mu: float = 0.0) -> list[nn.Module]:
    """Train each client by the book: its own model, its own optimiser, loss.backward(), step()."""
    trained = []
    for client in range(len(SIZES)):
        model = copy.deepcopy(r.model).train()
        optimizer = r.optimizer(list(model.parameters()))
        for s in range(int(r.batches.steps[client])):
            rows = r.batches.rows[s, client][r.batches.weights[s, client] > 0]
            loss = r.loss(model(r.x[rows]), r.y[rows]).mean()
            for name, p in model.named_parameters():
                loss = loss + mu / 2 * ((p - r.global_params[name]) ** 2).sum()
            optimizer.zero_grad()
            loss.backward()
            if r.gradient_clip:
                nn.utils.clip_grad_norm_(model.parameters(), r.gradient_clip)
            optimizer.step()
        trained.append(model)
    return trained


def _assert_equal(r: LocalRound, mu: float = 0.0) -> None:
    update = local_sgd(r, penalty=(lambda w: mu / 2 * squared_distance(w, r.global_params)) if mu else None)
    for client, model in enumerate(_plain(r, mu)):
        for name, p in model.named_parameters():
            moved = (p - r.global_params[name]).abs().max()
            assert moved > 1e-4, "the plain loop did not train"
            torch.testing.assert_close(update.params[name][client], p.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("vectorised", [True, False])
@pytest.mark.parametrize("model", ["mlp", "cnn", "transformer"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_round_equals_the_plain_loop(model: str, optimizer: str, vectorised: bool) -> None:
    _assert_equal(_round(model, optimizer, vectorised=vectorised))


@pytest.mark.parametrize("vectorised", [True, False])
def test_clipping_and_penalty_equal_the_plain_loop(vectorised: bool) -> None:
    _assert_equal(_round("mlp", gradient_clip=0.05, vectorised=vectorised))
    _assert_equal(_round("mlp", vectorised=vectorised), mu=0.5)


class _Viewing(nn.Module):
    """A network of images that relies on how they lie in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).view(len(x), 64))


def test_images_are_stored_channels_last_where_the_model_allows_it() -> None:
    images = torch.Size([1, 6, 6])
    assert takes_channels_last(_cnn(), images)
    assert not takes_channels_last(_Viewing(), images)
    assert not takes_channels_last(_mlp(), torch.Size([6]))
    torch.manual_seed(0)
    viewing = _Viewing()
    weights = {key: tensor.clone() for key, tensor in travelling(viewing).items()}
    _assert_equal(replace(_round("cnn"), model=viewing, global_params=weights, vectorised=False))


def test_batch_norm_takes_the_loop_and_its_statistics_travel() -> None:
    r = _round("batch_norm", vectorised=False)
    assert not can_vectorise(r.model)
    assert can_vectorise(_mlp())
    update = local_sgd(r)
    for client, model in enumerate(_plain(r)):
        torch.testing.assert_close(update.params["1.running_mean"][client], model.get_buffer("1.running_mean"))
    assert "1.num_batches_tracked" not in update.params


def test_what_mixes_examples_or_shares_weights_is_not_mapped_wrongly() -> None:
    untracked = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 1))
    assert not can_vectorise(untracked)
    tied = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 1), nn.Flatten(0))
    tied[2].weight = tied[0].weight
    _assert_equal(replace(_round("mlp"), model=tied, global_params={k: v.clone() for k, v in travelling(tied).items()}))


def test_a_client_that_finished_is_untouched_by_the_others_steps() -> None:
    r = _round("mlp", epochs=3)
    assert r.batches.steps.tolist() == [6, 9, 3]
    together = local_sgd(r)
    alone = local_sgd(replace(r, vectorised=False))
    for name in together.params:
        torch.testing.assert_close(together.params[name], alone.params[name], atol=1e-5, rtol=0)
    torch.testing.assert_close(together.loss, alone.loss, atol=1e-5, rtol=0)


def test_plan_keeps_the_last_short_batch_and_pads_with_weight_zero() -> None:
    batches = plan([3, 5], 2, lambda at, n: np.array([[{3: [2, 0, 1], 5: [4, 3, 2, 1, 0]}[n]]]))
    assert batches.steps.tolist() == [2, 3]
    assert batches.weights[:, 0].tolist() == [[1, 1], [1, 0], [0, 0]]
    # The second client's rows come after the first's three.
    assert batches.rows[:, 1].tolist() == [[7, 6], [5, 4], [3, 3]]


def test_stream_carries_the_shuffle_on_across_rounds() -> None:
    shuffles = [lambda epoch: np.array([[0, 1, 2], [2, 1, 0], [1, 0, 2]][epoch])]
    rows = []
    for start in (0, 3):
        batches = stream([3], 2, [start], 3, shuffles)
        rows += [batches.rows[s, 0][batches.weights[s, 0] > 0].tolist() for s in range(3)]
    assert rows == [[0, 1], [2], [2, 1], [0], [1, 0], [2]]


def test_global_loss_is_the_untrained_models_mean_over_each_clients_examples() -> None:
    r = _round("mlp", epochs=1)
    ends = np.cumsum(SIZES)
    losses = classification_loss(r.model(r.x), r.y).detach()
    wanted = [float(losses[end - n : end].mean()) for end, n in zip(ends, SIZES, strict=True)]
    assert global_loss(r).tolist() == pytest.approx(wanted, abs=1e-6)


def test_positive_weight_scales_the_loss_of_positives_only() -> None:
    losses = classification_loss(torch.zeros(2), torch.tensor([0, 1]), positive_weight=3.0)
    assert losses.tolist() == pytest.approx([0.6931472, 3 * 0.6931472])


def test_learning_rate_schedules() -> None:
    config = RunConfig.of({"learning-rate": 1.0, "rounds": 4, "learning-rate-schedule": "cosine"})
    assert [learning_rate(config, r) for r in (1, 3)] == pytest.approx([1.0, 0.5])
    config = RunConfig.of({"learning-rate": 1.0, "learning-rate-schedule": "exponential", "learning-rate-decay": 0.5})
    assert [learning_rate(config, r) for r in (1, 2, 3)] == [1.0, 0.5, 0.25]


def test_dropout_is_a_function_of_the_seed_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    r = replace(_round("mlp"), model=nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 1), nn.Flatten(0)))
    r = replace(r, global_params={k: v.clone() for k, v in travelling(r.model).items()}, seed=3)
    before = torch.get_rng_state()
    first, again, other = local_sgd(r), local_sgd(r), local_sgd(replace(r, seed=4))
    assert torch.equal(first.params["0.weight"], again.params["0.weight"])
    assert not torch.equal(first.params["0.weight"], other.params["0.weight"])
    assert torch.equal(before, torch.get_rng_state())


class _Scalar(nn.Module):
    """A model with a parameter that has no dimension at all."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.slope * x[:, 0]


@pytest.mark.parametrize("vectorised", [True, False])
def test_a_scalar_parameter_keeps_its_shape_on_the_way(vectorised: bool) -> None:
    model = _Scalar()
    weights = to_tensors(to_arrays(travelling(model)))
    assert weights["slope"].shape == ()
    r = replace(_round("mlp"), model=model, global_params=weights, vectorised=vectorised, gradient_clip=0.5)
    _assert_equal(r)


def test_dropout_differs_between_clients_and_rounds_and_not_between_runs() -> None:
    def trained(seed: int) -> torch.Tensor:
        r = _round("mlp", epochs=1)
        dropping = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 1), nn.Flatten(0))
        rows = torch.arange(7).repeat(r.batches.rows.shape[1], 1).unsqueeze(0)
        # Every client has the same seven examples in one batch: only the masks can tell them apart.
        batches = Batches(rows, torch.ones(rows.shape), torch.ones(rows.shape[1], dtype=torch.int64))
        weights = {name: torch.full_like(p, 0.1) for name, p in dropping.named_parameters()}
        changed = replace(r, model=dropping, global_params=weights, batches=batches, seed=seed)
        return torch.stack([p.flatten(1).sum(1) for p in local_sgd(changed).params.values()]).sum(0)

    first, again, other = trained(1), trained(1), trained(2)
    assert torch.equal(first, again)
    assert len(first.unique()) == len(first)
    assert not torch.isin(first, other).any()


def test_a_clients_permutations_do_not_depend_on_who_is_with_it() -> None:
    together = permutations(3, "batches", 1, clients=[4, 9], size=8, times=2)
    [alone] = permutations(3, "batches", 1, clients=[9], size=8, times=2)
    assert alone.tolist() == together[1].tolist()
    assert sorted(alone[0]) == list(range(8))
    assert alone[0].tolist() != alone[1].tolist()
    others = [
        permutations(seed, "batches", r, clients=[c], size=8)[0][0].tolist()
        for seed, r, c in ((4, 1, 9), (3, 2, 9), (3, 1, 8))
    ]
    assert alone[0].tolist() not in others


def test_every_permutation_is_as_likely_as_the_others() -> None:
    drawn = permutations(0, "batches", clients=range(6000), size=3)[:, 0]
    _, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(counts) == 6
    # Chi-square with 5 degrees of freedom: above 20.5 in one of a thousand fair draws.
    assert ((counts - 1000) ** 2 / 1000).sum() < 20.5


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("name", ["mlp", "deep", "shared"])
def test_plain_sgd_in_place_equals_the_plain_loop(name: str, alike: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    r = replace(_round(name), optimizer=make_optimizer(RunConfig(), 0.1))
    if alike:
        r = replace(r, batches=plan([8, 8, 8], BATCH, lambda at, n: np.tile(np.arange(n)[::-1], (len(at), 2, 1))))
    before = {key: p.clone() for key, p in r.global_params.items()}
    monkeypatch.setattr("core.steps.plain_rate", lambda _: None)
    by_gradient = local_sgd(r)
    monkeypatch.undo()
    # No gradient is computed any more: what trains now is the step in place.
    monkeypatch.setattr("core.steps._gradients", None)
    _assert_equal(r)
    in_place = local_sgd(r)
    torch.testing.assert_close(by_gradient.loss, in_place.loss)
    for key, p in r.global_params.items():
        torch.testing.assert_close(by_gradient.params[key], in_place.params[key], atol=1e-6, rtol=1e-5)
        assert torch.equal(p, before[key])


@pytest.mark.parametrize("name", ["deep", "transformer", "cnn"])
@pytest.mark.parametrize("vectorised", [True, False])
def test_bf16_moves_weights_almost_as_float32_does(name: str, vectorised: bool) -> None:
    r = replace(_round(name, vectorised=vectorised), optimizer=make_optimizer(RunConfig(), 0.1))
    full, half = local_sgd(r), local_sgd(replace(r, bf16=True))
    steps = {n: torch.stack([u.params[n] - r.global_params[n] for u in (full, half)]) for n in r.global_params}
    moved = torch.cat([full_step.flatten() for full_step, _ in steps.values()]).norm()
    off = torch.cat([(full_step - half_step).flatten() for full_step, half_step in steps.values()]).norm()
    assert 0 < off < 0.1 * moved
    assert all(p.dtype == torch.float32 for p in half.params.values())


@pytest.mark.parametrize("name", ["deep", "cnn"])
def test_a_compiled_gradient_is_made_once_and_equals_the_plain_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    compile_ = torch.compile
    monkeypatch.setattr("core.steps.torch.compile", lambda f: compiled.append(f) or compile_(f, backend="aot_eager"))
    r = _round(name)
    plain = local_sgd(r)
    for _ in range(2):
        update = local_sgd(replace(r, compiled=True))
    assert len(compiled) == 1
    for key, p in plain.params.items():
        torch.testing.assert_close(update.params[key], p, atol=1e-5, rtol=1e-4)


def test_sgd_with_momentum_or_decay_and_other_optimisers_are_not_plain() -> None:
    assert plain_rate(make_optimizer(RunConfig(momentum=0.9), 0.1)) is None
    assert plain_rate(make_optimizer(RunConfig(weight_decay=0.1), 0.1)) is None
    assert plain_rate(make_optimizer(RunConfig(optimizer="adam"), 0.1)) is None
    assert plain_rate(lambda params: torch.optim.SGD(params, lr=0.1)) is None


@pytest.mark.parametrize("penalised", [False, True])
def test_plain_layers_written_out_equal_the_mapped_model(penalised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    r = _round("deep", gradient_clip=0.1)
    penalty = (lambda w: sum(p.pow(2).sum() for p in w.values())) if penalised else None
    assert stack(r.model) is not None
    written_out = local_sgd(r, penalty)
    monkeypatch.setattr("core.steps.stack", lambda *_: None)
    mapped = local_sgd(r, penalty)
    torch.testing.assert_close(written_out.loss, mapped.loss)
    for name, p in mapped.params.items():
        torch.testing.assert_close(written_out.params[name], p, atol=1e-6, rtol=1e-5)


def test_a_layer_works_on_inputs_of_several_dimensions() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm((5, 3)), nn.Flatten(1), nn.Linear(15, 2))
    own = {n: torch.stack([p.detach(), 2 * p.detach()]) for n, p in model.named_parameters()}
    x = torch.randn(2, 7, 5, 4, generator=torch.Generator().manual_seed(0))
    forward = stack(model)
    assert forward is not None
    for client, scale in enumerate((1, 2)):
        alone = torch.func.functional_call(model, {n: scale * p for n, p in model.named_parameters()}, (x[client],))
        torch.testing.assert_close(forward(own, x)[client], alone, atol=1e-5, rtol=1e-5)


def test_what_is_not_plain_is_left_to_vmap() -> None:
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    frozen = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    frozen[0].weight.requires_grad_(False)
    hooked = nn.Sequential(nn.Linear(4, 4))
    hooked[0].register_forward_hook(lambda *_: None)

    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    for model in (tied, frozen, hooked, Doubled(4, 4), nn.Sequential(nn.Conv2d(1, 1, 1))):
        assert stack(model) is None
