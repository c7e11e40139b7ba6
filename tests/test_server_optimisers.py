"""Server momentum and adaptive servers: whole runs on two parabolas against the recursions of the papers.

One local step of rate r from w changes the mean of both clients' models by d = -2.5 r (w - 1.6): curvatures are 1 and
4, and the optimum is 1.6. With r = 0.004 FedAvg takes a hundredth of what is left in a round.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from lines import OPTIMUM, run_lines, shared
from test_by_hand import _aggregate

from core.config import RunConfig

RATE, ROUNDS = 0.004, 40
Lines = Callable[..., float]


@pytest.fixture
def lines(smoke: Callable[..., RunConfig]) -> Lines:
    """Return a function from a strategy and its options to the w that the run ends with."""

    def run(strategy: str, **options: Any) -> float:
        changes = {f"strategy-options.{key.replace('_', '-')}": value for key, value in options.items()}
        return shared(run_lines(smoke, strategy, rounds=ROUNDS, local_epochs=1, learning_rate=RATE, **changes))

    return run


def _update(w: float) -> float:
    return -2.5 * RATE * (w - OPTIMUM)


def test_fedavg_is_gradient_descent(lines: Lines) -> None:
    assert lines("fedavg") == pytest.approx(OPTIMUM * (1 - 0.99**ROUNDS), abs=1e-5)


def test_server_momentum_comes_nearer_in_as_many_rounds(lines: Lines) -> None:
    w = v = 0.0
    for _ in range(ROUNDS):
        v = 0.9 * v + _update(w)
        w += v
    assert lines("fedavgm") == pytest.approx(w, abs=1e-5)
    assert abs(w - OPTIMUM) < 0.25 * OPTIMUM * 0.99**ROUNDS


@pytest.mark.parametrize("strategy", ["fedadam", "fedyogi", "fedadagrad"])
def test_adaptive_servers_do_not_crawl_where_updates_are_small(strategy: str, lines: Lines) -> None:
    """Reddi et al., algorithm 2, with eta = 0.1, tau = 0.001, b1 = 0.9 (Adagrad: 0) and b2 = 0.99."""
    w = m = v = 0.0
    for _ in range(ROUNDS):
        d = _update(w)
        m = d if strategy == "fedadagrad" else 0.9 * m + 0.1 * d
        if strategy == "fedadam":
            v = 0.99 * v + 0.01 * d**2
        elif strategy == "fedyogi":
            v += 0.01 * d**2 * (1 if d**2 > v else -1)
        else:
            v += d**2
        w += 0.1 * m / (v**0.5 + 0.001)
    options = {} if strategy == "fedadagrad" else {"beta_1": 0.9, "beta_2": 0.99}
    assert lines(strategy, eta=0.1, tau=0.001, **options) == pytest.approx(w, abs=1e-4)
    assert abs(w - OPTIMUM) < 0.7 * OPTIMUM * 0.99**ROUNDS


@pytest.mark.parametrize(("strategy", "large", "small"), [
    # m / (sqrt(v) + tau): b1 = 0.9 and b2 = 0.99 leave a tenth of d in both roots.
    ("fedadam", 0.1 / (0.1 + 0.001), 0.001 / (0.001 + 0.001)),
    ("fedyogi", 0.1 / (0.1 + 0.001), 0.001 / (0.001 + 0.001)),
    ("fedadagrad", 1 / (1 + 0.001), 0.01 / (0.01 + 0.001)),
])  # fmt: skip
def test_a_weight_that_few_clients_move_is_moved_like_the_others(strategy: str, large: float, small: float) -> None:
    """The mean update is (1, 0.01), a hundred to one; the step is less than two to one."""
    options = {"eta": 1.0, "tau": 0.001} | ({} if strategy == "fedadagrad" else {"beta-1": 0.9, "beta-2": 0.99})
    updates = [[1.0, 0.04]] + [[1.0, 0.0]] * 3
    assert _aggregate(strategy, updates, **options) == pytest.approx([large, small], rel=1e-5)
