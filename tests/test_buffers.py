"""What happens to normalisation statistics and integer buffers, strategy by strategy, on a network that has both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file

from core.config import RunConfig
from simulations.run import simulate
from strategies import STRATEGIES

SETTINGS = {
    "fedasync": {"devices.kind": "lognormal"},
    "fedbuff": {"devices.kind": "lognormal", "strategy-options.buffer-size": 2},
    "fltrust": {"server-examples": 60},
    "feddf": {"server-examples": 60},
}


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_every_strategy_aggregates_a_batch_normalised_network(strategy: str, smoke: Callable[..., RunConfig]) -> None:
    config = smoke(task="foreign_plugins:NormalisedMedical", strategy=strategy, engine__cohort_size=1, rounds=2)
    run = simulate(RunConfig.of({**config.flat(), **SETTINGS.get(strategy, {})}))
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
