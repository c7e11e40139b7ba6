"""What clients keep between rounds, and send: rows of a cohort's tensors, each client's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import Context, RecordDict
from lines import run_lines, shared

from core.bundle import CLIENT_STATE, read_state, write_state
from core.config import RunConfig


def contexts(count: int) -> list[Context]:
    return [Context(run_id=0, node_id=i, node_config={}, state=RecordDict(), run_config={}) for i in range(count)]


def test_each_client_reads_what_it_wrote_last_and_a_new_one_begins_with_the_initial() -> None:
    three = contexts(3)
    initial = {"own": {"w": torch.tensor([[7.0, 8.0]]), "b": torch.tensor(9.0)}}
    for round_ in (1.0, 2.0):
        kept = {
            "own": {"w": round_ * torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]), "b": round_ * torch.tensor([5.0, 6.0])}
        }
        write_state(three[:2], kept)
    found = read_state([three[1], three[2], three[0]], initial)
    assert found["own"]["w"].tolist() == [[[6.0, 8.0]], [[7.0, 8.0]], [[2.0, 4.0]]]
    assert found["own"]["b"].tolist() == [12.0, 9.0, 10.0]


def test_a_kind_that_is_kept_no_longer_is_gone() -> None:
    [client] = contexts(1)
    write_state([client], {"a": {"w": torch.ones(1, 2)}, "b": {"w": torch.ones(1, 2)}})
    write_state([client], {"b": {"w": torch.zeros(1, 2)}})
    assert client.state.config_records[CLIENT_STATE].keys() == {"b"}


def test_what_was_kept_for_another_model_is_refused() -> None:
    [client] = contexts(1)
    write_state([client], {"own": {"w": torch.ones(1, 2)}})
    with pytest.raises(ValueError, match="kept 'own' for another model"):
        read_state([client], {"own": {"w": torch.ones(3)}})


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "scaffold"},
        {"strategy": "fedavg", "compression.kind": "int8"},
        {"strategy": "fedavg", "attack.kind": "min-max", "attack.fraction": 0.4},
        {
            "strategy": "feddyn", "privacy.level": "example", "privacy.noise-multiplier": 1.0, "privacy.delta": 0.1,
            "privacy.noise-seed": 0,
        },
        {"strategy": "fedavg", "privacy.level": "client", "privacy.noise-multiplier": 1.0, "privacy.noise-seed": 0,
         "privacy.delta": 0.01, "privacy.preprocessing": "uncovered"},
        {"strategy": "scaffold", "secure-aggregation.profile": "malicious"},
    ],
    ids=["scaffold", "int8", "min-max", "example", "client", "secure"],
)  # fmt: skip
def test_a_parameter_without_a_dimension_is_a_matrix_of_one_number(
    settings: dict[str, Any], smoke: Callable[..., RunConfig]
) -> None:
    five = ";".join(f"1,{k},2" for k in range(5))
    matrix = run_lines(smoke, dataset=five, rounds=2, **settings)
    scalar = run_lines(smoke, dataset=five, task="lines:Slopes", rounds=2, **settings)
    assert shared(matrix) != 0
    assert float(scalar.model().get_parameter("slope").detach()) == shared(matrix)
