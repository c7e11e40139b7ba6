"""Personal models on parabolas: what each client ends with, to the digit, and what it gains over the global model.

Clients A and B have losses 1/2 w^2 and 2 (w - 2)^2, as in test_heterogeneity.py. With one step a round FedAvg reaches
their mean's optimum, 1.6, which is far from A's own, 0, and near to B's, 2.
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import pytest
import torch
from lines import run_lines, shared, slopes
from torch import nn
from torch.nn import functional as F

from core.config import RunConfig
from simulations.run import Run

Runs = Callable[..., Run]


@pytest.fixture
def lines(smoke: Callable[..., RunConfig]) -> Runs:
    """Return a function from a strategy and settings to the run."""
    return lambda strategy, *given, **changes: run_lines(
        smoke, strategy, *given, **{"rounds": 100, "local_epochs": 1, **changes}
    )


def _loss(w: list[float]) -> tuple[float, float]:
    return w[0] ** 2 / 2, 2 * (w[1] - 2) ** 2


def test_one_model_for_all_is_what_every_client_has_under_fedavg(lines: Runs) -> None:
    run = lines("fedavg")
    assert slopes(run) == pytest.approx([1.6, 1.6], abs=1e-5)
    assert _loss(slopes(run)) == pytest.approx((1.28, 0.32), abs=1e-4)


def test_fine_tuning_takes_as_many_epochs_from_the_global_model_as_it_says(lines: Runs) -> None:
    run = lines("fedavg", fine_tune_epochs=3)
    assert shared(run) == pytest.approx(1.6, abs=1e-5)
    assert slopes(run) == pytest.approx([1.6 * 0.9**3, 2 - 0.4 * 0.6**3], abs=1e-5)


@pytest.mark.parametrize("proximity", [0.25, 1.0, 4.0])
def test_dittos_models_stand_between_their_own_optimum_and_the_global_model(proximity: float, lines: Runs) -> None:
    """v is least in a/2 (v - v*)^2 + lambda/2 (v - 1.6)^2, at (a v* + 1.6 lambda) / (a + lambda)."""
    run = lines("ditto", **{"strategy-options.proximity": proximity})
    wanted = [1.6 * proximity / (1 + proximity), (8 + 1.6 * proximity) / (4 + proximity)]
    assert slopes(run) == pytest.approx(wanted, abs=1e-4)
    # The worst client is A, whose loss falls from 1.28 to 0.32 with lambda = 1.
    assert max(_loss(slopes(run))) == pytest.approx(1.28 * (proximity / (1 + proximity)) ** 2, abs=1e-3)
    assert shared(run) == pytest.approx(1.6, abs=1e-5)


@pytest.mark.parametrize("adaptive", [False, True])
def test_apfls_mixtures_reach_each_clients_own_optimum(adaptive: bool, lines: Runs) -> None:
    """(v + w) / 2 is 0 and 2 where v is -1.6 and 2.4; a mixture that is learnt gets there all the same."""
    run = lines("apfl", learning_rate=0.4, **{"strategy-options.adaptive": adaptive})
    assert slopes(run) == pytest.approx([0, 2], abs=1e-3)
    assert shared(run) == pytest.approx(1.6, abs=1e-5)


@pytest.mark.parametrize(
    ("first_order", "wanted"),
    [
        # d/dw f(w - r f'(w)) = a (1 - r a)^2 (w - w*): 0.81 w + 1.44 (w - 2) is 0.
        (False, 2.88 / 2.25),
        # Past the inner step a (1 - r a) (w - w*) is left: 0.9 w + 2.4 (w - 2).
        (True, 4.8 / 3.3),
    ],
)
def test_per_fedavg_is_best_after_the_step_and_not_before(first_order: bool, wanted: float, lines: Runs) -> None:
    options = {"strategy-options.inner-learning-rate": 0.1, "strategy-options.first-order": first_order}
    run = lines("perfedavg", **options)
    assert shared(run) == pytest.approx(wanted, abs=1e-4)
    own = [0.9 * wanted, 2 + 0.6 * (wanted - 2)]
    assert slopes(run) == pytest.approx(own, abs=1e-4)
    # The step leads further from here than from FedAvg's model, which is the best one without it.
    assert sum(_loss(own)) < sum(_loss([0.9 * 1.6, 2 - 0.6 * 0.4])) - 0.05


def test_ifca_finds_the_two_groups_and_weighs_their_clients_by_examples(lines: Runs) -> None:
    """Two clients are best at 0, one at 2 and one with three times its examples at 4: (2 + 3 * 4) / 4 is 3.5."""
    groups = "1,0,1;1,0,1;1,2,1;1,4,3"
    run = lines("ifca", groups, task="lines:Begun", batch_size=4)
    assert slopes(run, groups) == pytest.approx([0, 0, 3.5, 3.5], abs=1e-3)
    # The model that is kept is that of the cluster with most examples.
    assert shared(run) == pytest.approx(3.5, abs=1e-3)
    assert shared(lines("fedavg", groups, task="lines:Begun", batch_size=4)) == pytest.approx(14 / 6, abs=1e-3)


# Slopes 2 and -2: v u x with v a client's own can be both. One slope for all, s, has losses (s - 2)^2 / 2 and
# (s + 2)^2 / 2, of which one is 2 or more.
OPPOSITE = "1,2,1;-1,2,1"


@pytest.mark.parametrize("strategy", ["fedper", "fedrep"])
def test_two_rounds_with_heads_of_their_own_by_hand(strategy: str, lines: Runs) -> None:
    """FedPer moves u and v in each of four steps, FedRep v in the first two and u in the others."""
    u, v = 1.0, [1.0, 1.0]
    for _ in range(2):
        bodies = []
        for k, x in enumerate((1.0, -1.0)):
            body, head = u, v[k]
            for step in range(4):
                error = head * body * x - 2
                up, down = error * body * x, error * head * x
                if strategy == "fedper" or step < 2:
                    head -= 0.1 * up
                if strategy == "fedper" or step >= 2:
                    body -= 0.1 * down
            bodies.append(body)
            v[k] = head
        u = sum(bodies) / 2
    run = lines(strategy, OPPOSITE, task="lines:Bent", rounds=2, local_epochs=4)
    assert shared(run) == pytest.approx(u, abs=1e-5)
    assert slopes(run, OPPOSITE) == pytest.approx([u * v[0], u * v[1]], abs=1e-5)


def test_heads_of_their_own_fit_clients_that_one_model_cannot(lines: Runs) -> None:
    for strategy in ("fedper", "fedrep"):
        run = lines(strategy, OPPOSITE, task="lines:Bent", rounds=60, local_epochs=4)
        assert slopes(run, OPPOSITE) == pytest.approx([2, -2], abs=1e-3), strategy
    a, b = slopes(lines("fedavg", OPPOSITE, task="lines:Bent", rounds=60, local_epochs=4), OPPOSITE)
    assert a == pytest.approx(b)


def _scanners(lines: Runs, strategy: str, rounds: int) -> Run:
    settings = {"batch_size": 4, "learning_rate": 1.0, "rounds": rounds}
    return lines(strategy, task="lines:Scanners", clients=2, **settings)


@pytest.mark.parametrize("strategy", ["fedbn", "fedavg"])
def test_three_rounds_of_normalisation_by_hand(strategy: str, lines: Runs) -> None:
    """A loop of its own: under FedBN a client's normalisation is the one that it had, under FedAvg the mean of all."""
    data = [
        (torch.tensor(x, dtype=torch.float32)[:, None], torch.tensor(y, dtype=torch.float32))
        for x, y in (([-1, 1, -1, 1], [0, 1, 0, 1]), ([9, 9, 9, 11], [0, 0, 0, 1]))
    ]
    models = [nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1)) for _ in data]
    for model in models:
        nn.init.ones_(model[1].weight)
        nn.init.zeros_(model[1].bias)
    for _ in range(3):
        for model, (x, y) in zip(models, data, strict=True):
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(model.train()(x).flatten(), y).backward()
            optimizer.step()
        states = [model.state_dict() for model in models]
        for name in states[0]:
            if "num_batches" not in name and not (strategy == "fedbn" and name.startswith("0.")):
                mean = sum(state[name] for state in states) / 2
                for state in states:
                    state[name].copy_(mean)
    run = _scanners(lines, strategy, 3)
    found = run.model().state_dict()
    assert found["1.weight"] == pytest.approx(models[0][1].weight.detach(), abs=1e-5)
    assert found["1.bias"] == pytest.approx(models[0][1].bias.detach(), abs=1e-5)
    # Normalisation that stays leaves the global model's as it was initialised.
    mean = 9.5 / 2 * (1 - 0.9**3) if strategy == "fedavg" else 0.0
    assert float(found["0.running_mean"]) == pytest.approx(mean, abs=1e-5)


def test_fedbn_reads_both_scanners_where_fedavgs_mean_brightness_fits_neither(lines: Runs) -> None:
    """Around FedAvg's mean, 4.75, A's shades are all dark and B's all bright: one half and a quarter are right."""
    right = {}
    for strategy in ("fedavg", "fedbn"):
        rows = pd.read_parquet(_scanners(lines, strategy, 40).path / "clients.parquet")
        right[strategy] = rows[rows["round"] == 40].sort_values("client")["test_accuracy"].tolist()
    assert right == {"fedavg": [0.5, 0.25], "fedbn": [1.0, 1.0]}
