"""Models of the clients' own: what stays with a client, what it evaluates, and that the unlike one gains by it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from core.batches import plan
from core.config import RunConfig
from core.errors import InputError
from core.records import travelling
from core.training import LocalRound
from server.build import check
from simulations.run import Run, preset, simulate
from strategies import client_half
from strategies.apfl import ALPHA, MIXTURE, OWN
from strategies.personal_layers import PERSONAL, head
from tasks.base import classification_loss

Smoke = Callable[..., RunConfig]


def _worst(run: Run) -> float:
    return float(run.summary["clients_metrics"]["accuracy"]["worst"])


def _run(smoke: Smoke, strategy: str, task: str = "lines:Disagreeing", **changes: Any) -> Run:
    options = {key: changes.pop(key) for key in list(changes) if "." in key}
    config = smoke(task=task, strategy=strategy, **{"rounds": 8, "engine__cohort_size": 4, **changes})
    return simulate(RunConfig.of({**config.flat(), **options}))


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("ditto", {}), ("apfl", {}), ("fedper", {"strategy-options.personal-layers": 1}), ("fedrep", {}),
        ("ifca", {}), ("fedavg", {"fine-tune-epochs": 3}),
    ],
)  # fmt: skip
def test_the_client_that_disagrees_is_served_by_a_model_of_its_own(
    strategy: str, options: dict[str, Any], smoke: Smoke
) -> None:
    # One client of four has its labels turned around: the global model cannot serve it.
    run = _run(smoke, strategy, **options)
    assert run.summary["personal"] is True
    assert _worst(run) > 0.6


def test_a_global_model_fails_the_client_that_disagrees(smoke: Smoke) -> None:
    run = _run(smoke, "fedavg")
    assert run.summary["personal"] is False
    assert _worst(run) < 0.3


def test_fedbn_beats_fedavg_where_every_clients_inputs_are_on_a_scale_of_their_own(smoke: Smoke) -> None:
    settings = {"task": "lines:Shifted", "engine__cohort_size": 1, "rounds": 6}
    own, shared = (_run(smoke, strategy, **settings) for strategy in ("fedbn", "fedavg"))
    assert _worst(own) > 0.85
    assert _worst(own) > _worst(shared) + 0.1


def test_per_fedavg_gains_more_from_one_step_than_fedavg_does(smoke: Smoke) -> None:
    run = _run(smoke, "perfedavg", **{"strategy-options.inner-learning-rate": 0.5, "rounds": 12})
    assert run.summary["personal"] is True
    assert _worst(run) > _worst(_run(smoke, "fedavg", rounds=12)) + 0.2


@pytest.mark.parametrize("strategy", ["fedper", "fedrep", "fedbn"])
def test_personal_layers_never_leave_and_the_global_ones_stay_as_they_were(strategy: str, smoke: Smoke) -> None:
    task = "lines:Shifted" if strategy == "fedbn" else "medical"
    run = _run(smoke, strategy, task=task, rounds=1, engine__cohort_size=1)
    whole = _run(smoke, "fedavg", task=task, rounds=1, engine__cohort_size=1)
    assert run.summary["traffic"]["uplink_bytes"] < whole.summary["traffic"]["uplink_bytes"]
    assert run.summary["traffic"]["downlink_bytes"] == whole.summary["traffic"]["downlink_bytes"]
    from tasks import load
    from tasks.base import build_model

    fresh, kept = (m.state_dict() for m in (build_model(load(whole_config(smoke, task)), 0), run.model()))
    moved = {name for name in fresh if not torch.equal(fresh[name], kept[name]) and "num_batches" not in name}
    stays = {"fedbn": {"0", "2"}, "fedper": {"2"}, "fedrep": {"2"}}[strategy]
    assert moved
    assert not {name.partition(".")[0] for name in moved} & stays, moved


def whole_config(smoke: Smoke, task: str) -> RunConfig:
    """Return the smoke configuration with the task."""
    return smoke(task=task)


def test_a_model_without_normalisation_is_not_fedbns(smoke: Smoke) -> None:
    with pytest.raises(InputError, match=r"fedbn keeps normalisation layers, and task medical's model has none"):
        simulate(smoke(strategy="fedbn"))
    # Where the task has such a model it is named.
    with pytest.raises(InputError, match=r"task digits's model has none; .* fedbn takes model=cnn-batchnorm\.$"):
        check(preset("digits", strategy="fedbn"))
    with pytest.raises(InputError, match=r"fedbn takes model=transformer\.$"):
        check(preset("nlp", strategy="fedbn"))
    with pytest.raises(InputError, match=r"personal-layers=9 are all layers"):
        simulate(RunConfig.of({**smoke(strategy="fedper").flat(), "strategy-options.personal-layers": 9}))


def test_the_last_layers_are_found_in_the_models_own_order() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 1))
    assert head(model, 1) == ["3.weight", "3.bias"]
    assert head(model, 2) == ["1.weight", "1.bias", "3.weight", "3.bias", "1.running_mean", "1.running_var"]


def _round(model: nn.Module, *, sizes: tuple[int, ...], batch_size: int, rate: float) -> LocalRound:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(sum(sizes), 3, generator=generator)
    y = torch.randint(0, 2, (sum(sizes),), generator=generator)
    batches = plan(sizes, batch_size, lambda at, n: np.broadcast_to(np.arange(n), (len(at), 1, n)))
    weights = {name: tensor.clone() for name, tensor in travelling(model).items()}
    optimizer = functools.partial(torch.optim.SGD, lr=rate)
    seeds = tuple(range(len(sizes)))
    return LocalRound(model, classification_loss, weights, x, y, batches, optimizer, sizes=sizes, seeds=seeds)


def _half(strategy: str, r: LocalRound, **options: Any) -> tuple[Any, LocalRound]:
    flat = {f"strategy-options.{key.replace('_', '-')}": value for key, value in options.items()}
    half = client_half(RunConfig.of({"strategy": strategy, **flat}))
    r = replace(r, options=half.options)
    cohort = len(r.batches.steps)
    initial = half.initial_state(r)
    state = {k: {n: t.expand(cohort, *t.shape).clone() for n, t in own.items()} for k, own in initial.items()}
    return half, replace(r, state=state)


def _line() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))


@pytest.mark.parametrize("vectorised", [True, False])
def test_a_step_of_apfl_by_hand(vectorised: bool) -> None:
    r = _round(_line(), sizes=(4,), batch_size=4, rate=0.1)
    half, r = _half("apfl", replace(r, vectorised=vectorised), mixture=0.25)
    # v is not w: else alpha's gradient is 0 whatever it is.
    own = {name: t + 1 for name, t in r.state[OWN].items()}
    update = half.local_update(replace(r, state={**r.state, OWN: own}))
    x, y = r.x[r.batches.rows[0, 0]], r.y[r.batches.rows[0, 0]]
    w, v = ({n: t.clone().requires_grad_() for n, t in start.items()}
            for start in (r.global_params, {name: t[0] for name, t in own.items()}))  # fmt: skip
    alpha = torch.tensor(0.25, requires_grad=True)
    r.loss(torch.func.functional_call(r.model, w, (x,)), y).mean().backward()
    mixed = {name: alpha * v[name] + (1 - alpha) * w[name].detach() for name in v}
    r.loss(torch.func.functional_call(r.model, mixed, (x,)), y).mean().backward()
    for name in w:
        assert update.params[name][0] == pytest.approx((w[name] - 0.1 * w[name].grad).detach(), abs=1e-6)
        assert update.state[OWN][name][0] == pytest.approx((v[name] - 0.1 * v[name].grad).detach(), abs=1e-6)
    assert abs(float(alpha.grad)) > 0.1
    assert update.state[MIXTURE][ALPHA][0] == pytest.approx(float((alpha - 0.1 * alpha.grad).detach()), abs=1e-6)


@pytest.mark.parametrize(("mixture", "step"), [(1.0, -0.1), (0.0, 0.1)])
def test_apfls_mixture_stays_between_0_and_1(mixture: float, step: float) -> None:
    """Where v is better than w alpha would grow beyond 1, where it is worse fall below 0."""
    r = _round(_line(), sizes=(4,), batch_size=4, rate=10.0)
    half, r = _half("apfl", r, mixture=mixture)
    w = {n: t.clone().requires_grad_() for n, t in r.global_params.items()}
    r.loss(torch.func.functional_call(r.model, w, (r.x,)), r.y).mean().backward()
    own = {name: (p + step * p.grad).detach().unsqueeze(0) for name, p in w.items()}
    update = half.local_update(replace(r, state={**r.state, OWN: own}))
    assert float(update.state[MIXTURE][ALPHA][0]) == mixture


@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize("vectorised", [True, False])
def test_a_step_of_per_fedavg_by_hand(first_order: bool, vectorised: bool) -> None:
    r = _round(_line(), sizes=(4,), batch_size=4, rate=0.1)
    half, r = _half("perfedavg", replace(r, vectorised=vectorised), inner_learning_rate=0.5, first_order=first_order)
    x, y = r.x[r.batches.rows[0, 0]], r.y[r.batches.rows[0, 0]]

    def loss(weights: dict[str, torch.Tensor], rows: slice) -> torch.Tensor:
        return r.loss(torch.func.functional_call(r.model, weights, (x[rows],)), y[rows]).mean()

    w = {name: t.clone().requires_grad_() for name, t in r.global_params.items()}
    inner = torch.autograd.grad(loss(w, slice(0, None, 2)), list(w.values()), create_graph=not first_order)
    ahead = {name: w[name] - 0.5 * g for name, g in zip(w, inner, strict=True)}
    outer = torch.autograd.grad(loss(ahead, slice(1, None, 2)), list(w.values()))
    update = half.local_update(r)
    for (name, p), g in zip(w.items(), outer, strict=True):
        assert update.params[name][0] == pytest.approx((p - 0.1 * g).detach(), abs=1e-6)


@pytest.mark.parametrize("vectorised", [True, False])
def test_a_step_of_moon_by_hand(vectorised: bool) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1), nn.Flatten(0))
    r = _round(net, sizes=(4,), batch_size=4, rate=0.1)
    half, r = _half("moon", replace(r, vectorised=vectorised), mu=2.0)
    before = {name: t + 0.3 * torch.randn_like(t) for name, t in r.state["previous"].items()}
    r = replace(r, state={"previous": before})
    x, y = r.x[r.batches.rows[0, 0]], r.y[r.batches.rows[0, 0]]

    def features(w: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.relu(x @ w["0.weight"].T + w["0.bias"])

    w = {name: t.clone().requires_grad_() for name, t in r.global_params.items()}
    z = features(w)
    near = torch.cosine_similarity(z, features(r.global_params), dim=1) / 0.5
    far = torch.cosine_similarity(z, features({n: t[0] for n, t in before.items()}), dim=1) / 0.5
    contrast = -torch.log(near.exp() / (near.exp() + far.exp())).mean()
    (r.loss((z @ w["2.weight"].T + w["2.bias"]).flatten(), y).mean() + 2.0 * contrast).backward()
    update = half.local_update(r)
    for name, p in w.items():
        assert update.params[name][0] == pytest.approx((p - 0.1 * p.grad).detach(), abs=1e-5)
    assert update.state["previous"]["0.weight"] == pytest.approx(update.params["0.weight"])


@pytest.mark.parametrize("vectorised", [True, False])
def test_ditto_by_hand(vectorised: bool) -> None:
    r = _round(_line(), sizes=(4,), batch_size=4, rate=0.1)
    half, r = _half("ditto", replace(r, vectorised=vectorised), proximity=0.5)
    start = {name: t + 1 for name, t in r.state["personal"].items()}
    r = replace(r, state={"personal": start})
    v = {name: t[0].clone().requires_grad_() for name, t in start.items()}
    x, y = r.x[r.batches.rows[0, 0]], r.y[r.batches.rows[0, 0]]
    r.loss(torch.func.functional_call(r.model, v, (x,)), y).mean().backward()
    update = half.local_update(r)
    for name, p in v.items():
        wanted = p - 0.1 * (p.grad + 0.5 * (p - r.global_params[name]))
        assert update.state["personal"][name][0] == pytest.approx(wanted.detach(), abs=1e-6)


def test_fedrep_trains_the_head_first_and_then_the_body() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1), nn.Flatten(0))
    r = _round(net, sizes=(8, 2), batch_size=2, rate=0.1)
    half, r = _half("fedrep", r, head_share=0.5)
    update = half.local_update(r)
    assert set(update.params) == {"0.weight", "0.bias"}
    assert set(update.state[PERSONAL]) == {"2.weight", "2.bias"}
    # Client 0 has four steps, two for the head; client 1 has one, which is the head's and is repeated for the body.
    lone = replace(r, batches=r.batches.cut([2, 1]))
    from core.training import local_sgd

    heads = local_sgd(lone, start={**_spread(r), **r.state[PERSONAL]}, only=["2.weight", "2.bias"])
    assert update.state[PERSONAL]["2.weight"] == pytest.approx(heads.params["2.weight"], abs=1e-6)
    assert torch.equal(heads.params["0.weight"], _spread(r)["0.weight"])


def _spread(r: LocalRound) -> dict[str, torch.Tensor]:
    from core.training import everybody

    return everybody(r.global_params, len(r.batches.steps))
