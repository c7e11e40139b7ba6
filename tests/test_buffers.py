"""What happens to normalisation statistics and integer buffers, strategy by strategy, on a network that has both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file
from shelf import with_needs
from test_selection import Elsewhere

from core.config import RunConfig
from server.app import train
from server.build import check
from server.recorder import RunFolder
from simulations.run import engine, simulate
from strategies import STRATEGIES


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_every_strategy_aggregates_a_batch_normalised_network(strategy: str, smoke: Callable[..., RunConfig]) -> None:
    config = smoke(task="foreign_plugins:NormalisedMedical", strategy=strategy, engine__cohort_size=1, rounds=2)
    run = simulate(with_needs(config))
    assert run.summary["status"] == "completed"
    assert run.summary["answers"]["rejected"] == 0
    saved = load_file(run.path / "model.safetensors")
    # Integer buffers stay with their clients: a mean of counters is no counter.
    assert "1.num_batches_tracked" not in saved
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    assert (saved["1.running_var"] > 0).all()
    moved = not torch.equal(saved["1.running_mean"], torch.zeros(8))
    # FedBN keeps statistics on its clients, and the global model those it began with.
    assert moved == (strategy != "fedbn")
    assert all(tensor.isfinite().all() for tensor in saved.values())


FAST = ("fedavg", "scaffold", "fedbn")


@pytest.mark.parametrize(
    "strategy", [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in sorted(STRATEGIES)]
)
def test_weights_and_statistics_are_the_same_where_cohorts_answer_and_where_every_client_does(
    strategy: str, smoke: Callable[..., RunConfig]
) -> None:
    settings = {"clients": 6, "sampled": 4, "rounds": 3, "partition__kind": "quantity", "engine__cohort_size": 1}
    config = with_needs(smoke(task="foreign_plugins:NormalisedMedical", strategy=strategy, **settings))
    with engine(config, check(config)) as grid:
        vars(elsewhere := Elsewhere.__new__(Elsewhere)).update(vars(grid))
        train(elsewhere, config, folder := RunFolder.create(config))
    alone, together = (load_file(path / "model.safetensors") for path in (folder.path, simulate(config).path))
    for name, tensor in together.items():
        assert torch.allclose(alone[name], tensor, rtol=1e-4, atol=1e-5), name
