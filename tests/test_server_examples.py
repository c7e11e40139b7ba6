"""Strategies with examples of the server's own: FLTrust's trust by hand, FedDF's student and its ensemble."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lines import Scanners, run_lines, shared
from test_robust import _reply
from torch import nn

from core.config import RunConfig
from core.data import Federation, Ragged, Split
from core.errors import InputError
from core.records import to_numpy, travelling
from core.server_side import ServerSide
from server.build import build_strategy
from simulations.run import simulate
from tasks.base import classification_loss

Smoke = Callable[..., RunConfig]


class _Powers(nn.Module):
    """Logits x_1 w_1^p + x_2 w_2^p + ..., linear for p = 1."""

    def __init__(self, size: int, power: int) -> None:
        super().__init__()
        self.w, self.power = nn.Parameter(torch.zeros(size)), power

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w**self.power


def _half_square(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return 0.5 * (logits - y) ** 2


def _made(
    strategy: str, models: np.ndarray, data: Split, loss: Callable[..., torch.Tensor], power: int = 1, **changes: Any
) -> list[float]:
    """Return the w that a strategy makes, whose server has the data, of clients' models (n, size); w was 0."""
    config = RunConfig.of({"strategy": strategy, "clients": len(models), "learning-rate": 0.1, **changes})
    model = _Powers(models.shape[1], power)
    chosen: Any = build_strategy(config)
    chosen.set_up(
        ServerSide(
            config=config, fresh_model=lambda seed: _Powers(models.shape[1], power), initial=travelling(model),
            loss=loss, data=data, devices=None, sizes=np.full(len(models), 10), client_of=lambda node: node,
            sends=["w"],
        )
    )  # fmt: skip
    chosen.current = {"w": np.zeros(models.shape[1], np.float32)}
    arrays, _ = chosen.aggregate_train(1, [_reply(k, w) for k, w in enumerate(models)])
    found: list[float] = to_numpy(arrays["w"]).tolist()
    return found


def test_fltrust_by_hand() -> None:
    """The server's own step is 0.1 * 10 along the first axis: its update is (1, 0).

    (3, 4) has the cosine 0.6 and counts as (0.6, 0.8), (2, 0) has 1 and counts as (1, 0); the other two have none or
    less. The mean is (0.6 (0.6, 0.8) + (1, 0)) / 1.6.
    """
    own = Split(np.array([[1.0, 0.0]], np.float32), np.array([10]))
    models = np.array([[3.0, 4.0], [2.0, 0.0], [0.0, 5.0], [-1.0, 0.0]])
    found = _made("fltrust", models, own, _half_square, **{"local-epochs": 1})
    assert found == pytest.approx([1.36 / 1.6, 0.48 / 1.6], abs=1e-5)
    # Where nobody is trusted the model stays.
    assert _made("fltrust", models[2:], own, _half_square, **{"local-epochs": 1}) == [0, 0]


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_two_rounds_of_fltrust_by_hand(decay: float, smoke: Smoke) -> None:
    """Three lines of slopes 2, -2 and 4 go with, against and with the server's of slope 1, as far as it goes.

    The server's rate falls as the clients' does.
    """
    settings = {"clients": 3, "rounds": 2, "local_epochs": 1, "server_examples": 1}
    schedule = {"learning_rate_schedule": "exponential", "learning_rate_decay": decay} if decay < 1 else {}
    run = run_lines(smoke, "fltrust", "1,2,1;-1,2,1;1,4,1;1,1,1", **settings, **schedule)
    assert shared(run) == pytest.approx(0.1 + decay * 0.1 * (1 - 0.1), abs=1e-6)


@pytest.mark.parametrize(
    ("power", "wanted"),
    [
        # Models 1 and 3 say x and 3 x, on average 2 x: so does their mean, which has nothing to learn.
        (1, 2.0),
        # x and 9 x, on average 5 x, where their mean says 4 x. The mean of probabilities would be that of 1.86.
        (2, 5**0.5),
    ],
)
def test_feddfs_student_says_what_its_ensemble_says_on_average(power: int, wanted: float) -> None:
    own = Split(np.array([[1.0], [0.5], [-1.0]], np.float32), np.array([0, 0, 0]))
    options = {"strategy-options.distillation-steps": 400, "strategy-options.distillation-learning-rate": 0.01}
    models = np.array([[1.0], [3.0]])
    found = _made("feddf", models, own, classification_loss, power, **options)
    assert found == pytest.approx([wanted], abs=1e-3)


@pytest.mark.parametrize("strategy", ["fltrust", "feddf"])
def test_a_strategy_that_trains_on_the_servers_examples_asks_for_some(strategy: str, smoke: Smoke) -> None:
    with pytest.raises(InputError, match=f"{strategy} trains on examples of the server's own; set server-examples="):
        simulate(smoke(strategy=strategy, server_examples=0))


def test_the_servers_examples_are_no_clients(smoke: Smoke) -> None:
    from server.build import check

    without, with_ = check(smoke()), check(smoke(server_examples=50))
    assert with_.server is not None
    assert len(with_.server) == 50

    def count(federation: Any) -> int:
        return sum(len(split.y) for split in (federation.train, federation.validation, federation.test))

    assert count(with_) == count(without) - 50
    assert len(with_.central) == len(without.central)
    rows = {row.tobytes() for split in (with_.train, with_.validation, with_.test) for row in split.x}
    assert not rows & {row.tobytes() for row in with_.server.x}


def test_fltrust_does_not_trust_those_who_go_the_other_way(smoke: Smoke) -> None:
    attacked = smoke(strategy="fltrust", server_examples=60, clients=5, rounds=4)
    attacked = RunConfig.of({**attacked.flat(), "attack.kind": "sign-flip", "attack.fraction": 0.4})
    run = simulate(attacked)
    assert run.summary["attack"]["selected"] == 0
    assert run.metrics["accuracy"] > 0.9


def test_feddf_comes_nearer_to_its_ensemble_than_the_mean_of_models_is(smoke: Smoke) -> None:
    settings = {"clients": 4, "rounds": 1, "local_epochs": 20, "server_examples": 120, "partition__kind": "shards"}
    mean, distilled = (simulate(smoke(strategy=name, **settings)).metrics["loss"] for name in ("fedavg", "feddf"))
    assert distilled < mean


class Faint(Scanners):
    """Clients take one step on inputs that hardly differ, the server fifty on as many times the examples."""

    def federation(self) -> Federation:
        """Return x = -0.1, 0.1, -0.1, 0.1 for both clients."""

        def split(copies: int) -> Split:
            x = np.array([-0.1, 0.1] * 2 * copies, np.float32)
            return Split(x[:, None], (x > 0).astype(np.int64))

        clients = Ragged.stack([split(1), split(1)])
        return Federation(clients, Ragged.stack([split(0), split(0)]), clients, split(1), server=split(50))


def test_fltrust_stretches_steps_and_never_a_variance(smoke: Smoke) -> None:
    """The clients' steps are made as long as the server's fifty; their variance is theirs: 0.9 + 0.1 * 0.01 * 4 / 3."""
    settings = {"clients": 2, "rounds": 1, "local_epochs": 1, "batch_size": 4, "learning_rate": 1.0}
    run = run_lines(smoke, "fltrust", task="test_server_examples:Faint", server_examples=200, **settings)
    assert float(run.model().state_dict()["0.running_var"]) == pytest.approx(0.9 + 0.1 * 0.01 * 4 / 3, abs=1e-5)
