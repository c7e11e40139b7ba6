"""Compressed updates: what they weigh, what they lose, and that every runtime decodes the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_personalisation import _round
from torch import nn

from core.compression import RESIDUAL, Compressor, packed, unpacked, uplink_bytes
from core.config import RunConfig
from core.records import to_arrays, to_numpy
from core.training import LocalRound, LocalUpdate
from simulations.run import Run, simulate

Smoke = Callable[..., RunConfig]
KINDS = [
    {"kind": "fp16"}, {"kind": "int8"}, {"kind": "int4"}, {"kind": "top-k", "fraction": 0.2},
    {"kind": "int8", "rotation": True}, {"kind": "int4", "rotation": True},
]  # fmt: skip


def _config(**own: Any) -> RunConfig:
    return RunConfig.of({f"compression.{key}": value for key, value in own.items()})


def _learnt(number: int = 1) -> tuple[LocalUpdate, LocalRound]:
    torch.manual_seed(0)
    r = _round(nn.Sequential(nn.Linear(3, 33), nn.Linear(33, 1), nn.Flatten(0)), sizes=(1, 1), batch_size=1, rate=0.1)
    generator = torch.Generator().manual_seed(number)
    params = {
        name: p + 0.01 * torch.randn(2, *p.shape, generator=generator) * (1 + torch.arange(2.0)).view(-1, *[1] * p.ndim)
        for name, p in r.global_params.items()
    }
    return LocalUpdate(params, torch.zeros(2)), replace(r, config={"server-round": number})


@pytest.mark.parametrize("own", KINDS)
def test_the_server_decodes_what_the_client_says_it_will(own: dict[str, Any]) -> None:
    config = _config(**own)
    update, r = _learnt()
    compressor = Compressor(config)
    kept = compressor.initial_state(r)
    r = replace(r, state={kind: {n: t.expand(2, *t.shape) for n, t in v.items()} for kind, v in kept.items()})
    seen, encoded = compressor(update, r)
    model = {name: p.numpy() for name, p in r.global_params.items()}
    for client in range(2):
        sent = packed(encoded, client)
        assert sum(len(a.data) for a in sent.values()) == encoded.bytes()
        assert sum(len(to_numpy(a).tobytes()) + 128 for a in sent.values()) == encoded.bytes()
        decoded = unpacked(sent, config, list(model), model, 1)
        for name in model:
            assert to_numpy(decoded[name]).tobytes() == seen.params[name][client].numpy().tobytes()
    size = sum(value.size for value in model.values())
    # Scales, filling up to a power of two, and each array's header of 128 bytes come on top.
    plain = encoded.bytes() - 128 * len(encoded.arrays)
    share = {"fp16": 1 / 2, "int8": 1 / 4, "int4": 1 / 8, "top-k": 2 * 0.2}[own["kind"]]
    assert 4 * size * share <= plain <= 4 * size * share * 1.7 + 40
    # Virtual time counts as much, before anything is encoded.
    assert uplink_bytes(config, list(model), to_arrays(model)) == encoded.bytes()


@pytest.mark.parametrize(("own", "most"), [(KINDS[0], 1e-3), (KINDS[1], 1e-2), (KINDS[2], 0.2), (KINDS[4], 0.02)])
def test_rounding_errors_are_small_against_the_update(own: dict[str, Any], most: float) -> None:
    update, r = _learnt()
    seen, _ = Compressor(_config(**own))(update, r)
    error, whole = (
        sum(float(((a[name] - b[name]) ** 2).sum()) for name in update.params) ** 0.5
        for a, b in ((seen.params, update.params), (update.params, r.global_params))
    )
    assert error < most * whole


@pytest.mark.parametrize("own", [KINDS[2], KINDS[5]])
def test_stochastic_rounding_has_no_bias(own: dict[str, Any]) -> None:
    update, r = _learnt()
    compressor = Compressor(_config(**own))
    total = {name: torch.zeros_like(p) for name, p in update.params.items()}
    times = 400
    for n in range(times):
        seen, _ = compressor(update, replace(r, seeds=(2 * n, 2 * n + 1)))
        for name in total:
            total[name] += (seen.params[name] - update.params[name]) / times
    largest = max(float((update.params[n] - r.global_params[n]).abs().max()) for n in total)
    # A step is a seventh of the largest number; its error of at most that shrinks with the square root of the draws.
    assert max(float(t.abs().max()) for t in total.values()) < 4 * 1.5 * largest / 7 / times**0.5


def test_what_top_k_does_not_send_is_not_lost() -> None:
    config = _config(kind="top-k", fraction=0.1)
    compressor = Compressor(config)
    update, r = _learnt()
    r = replace(r, state={RESIDUAL: {n: torch.zeros(2, *p.shape) for n, p in r.global_params.items()}})
    asked = {name: torch.zeros_like(p) for name, p in update.params.items()}
    sent = {name: torch.zeros_like(p) for name, p in update.params.items()}
    for number in range(1, 6):
        update, _ = _learnt(number)
        seen, _ = compressor(update, r)
        for name in asked:
            asked[name] += update.params[name] - r.global_params[name]
            sent[name] += seen.params[name] - r.global_params[name]
        r = replace(r, state=seen.state)
    for name in asked:
        assert torch.allclose(sent[name] + r.state[RESIDUAL][name], asked[name], atol=1e-6)


def _run(smoke: Smoke, own: dict[str, Any], **changes: Any) -> Run:
    flat = {f"compression.{key}": value for key, value in own.items()}
    return simulate(RunConfig.of({**smoke(**{"engine__cohort_size": 4, **changes}).flat(), **flat}))


@pytest.mark.parametrize("own", KINDS)
def test_bytes_are_counted_as_they_are_sent(own: dict[str, Any], smoke: Smoke) -> None:
    plain = _run(smoke, {}).summary["traffic"]
    for strategy in ("fedavg", "fedmedian"):
        run = _run(smoke, own, strategy=strategy)
        assert run.summary["traffic"]["downlink_bytes"] == plain["downlink_bytes"]
        share = run.summary["traffic"]["uplink_bytes"] / plain["uplink_bytes"]
        assert share < {"fp16": 0.6, "int8": 0.6, "int4": 0.4, "top-k": 0.6}[own["kind"]]
        assert run.metrics["accuracy"] > 0.85


@pytest.mark.parametrize("own", [KINDS[1], KINDS[3]])
def test_a_mean_in_the_cohort_is_the_mean_of_what_the_server_decodes(own: dict[str, Any], smoke: Smoke) -> None:
    # ditto is FedAvg on the server and takes partial means; multikrum that selects everybody decodes every answer.
    one = _run(smoke, own, strategy="fedavg")
    options = {"strategy-options.num-nodes-to-select": 99}
    config = smoke(strategy="multikrum", engine__cohort_size=4)
    flat = {f"compression.{key}": value for key, value in own.items()}
    other = simulate(RunConfig.of({**config.flat(), **flat, **options}))
    for a, b in zip(one.model().parameters(), other.model().parameters(), strict=True):
        assert np.allclose(a.detach(), b.detach(), atol=1e-5)


def test_scaffold_sends_its_controls_as_they_are(smoke: Smoke) -> None:
    run = _run(smoke, {"kind": "int8"}, strategy="scaffold")
    assert run.metrics["accuracy"] > 0.9


def test_rotation_without_rounding_is_refused(smoke: Smoke) -> None:
    from core.errors import InputError

    with pytest.raises(InputError, match=r"compression.rotation=true does nothing with compression.kind=top-k"):
        _run(smoke, {"kind": "top-k", "rotation": True})
