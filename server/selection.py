"""Who trains in a round (`sampling.kind`), for any strategy: while it configures a round it sees nobody else.

- poisson: every client for itself, with probability sampled / clients. What accountants of differential privacy assume.
- cyclic: groups drawn once take turns, as the banded noise of `privacy.mechanism` needs it.
- power-of-choice (Cho, Wang and Joshi, 2020, "pi_pow-d"): d candidates drawn by their shares of all examples
  are asked for the loss of the global model on their training examples; the m with the highest train. What asking
  costs is traffic of the round, but takes no virtual time.
- oort (Lai, Zhu, Madhyastha and Chowdhury, OSDI 2021, algorithm 1): U = |B| sqrt(mean loss^2) of the last time that a
  client trained, in round L; its mean loss stands for all. Util = (U + sqrt(0.1 log R / L)) (T / t)^2 in round R, the
  last factor for clients slower than T. Those with at least 95 % of the Util of the last place are drawn by it. U is
  clipped at its 95th percentile and, much as in the authors' program, scaled to at most 1: else the second term would
  say nothing. T is the 80th percentile of the clients' virtual seconds, without a pacer; exploration does not decay.

Draws belong to (seed, round, client): not to node ids, nor to who else is connected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from core import records
from core.config import RunConfig
from core.seeding import rng, uniforms
from core.server_side import ServerSide
from privacy.noise import source
from server.build import asked
from server.evaluate import Evaluator
from server.observe import ObservedGrid

KINDS = {
    "uniform": "as many as `sampled` says, all clients alike",
    "poisson": "every client by itself, so that `sampled` is the mean; a round may be empty",
    "cyclic": "in fixed groups, one after the other; every client once in clients / sampled rounds",
    "power-of-choice": "drawn by examples, then those with the highest loss of sampling.candidates (Cho et al. 2020)",
    "oort": "high loss, many examples and a fast device, and sampling.exploration of new ones (Lai et al. 2021)",
}
SLOW_PERCENTILE, CLIPPED_PERCENTILE, CUT_OFF = 80, 95, 0.95
SLOWNESS_EXPONENT = 2
SMALLEST, LARGEST = 1e-300, 1e30


class Selection:
    """Chooses each round's clients, and remembers what it learnt of them."""

    def __init__(self, config: RunConfig) -> None:
        self._config, self._kind = config, config.sampling.kind
        # Who sees models must not know who was drawn: that is what sampling adds to privacy.
        private = config.privacy.level == "client" and config.privacy.noise == "central"
        self._source = source(config.privacy.noise_seed) if private else None
        self._order = rng(config.seed, "groups").permutation(config.clients) if self._kind == "cyclic" else np.zeros(0)
        clients = config.clients if self._kind == "oort" else 0
        self._utility, self._last = np.zeros(clients), np.zeros(clients, dtype=np.int64)

    def stand_before(self, strategy: Strategy, grid: ObservedGrid, server: ServerSide, evaluate: Evaluator) -> None:
        """Let the strategy, which takes everybody it sees, see the chosen clients alone while it configures a round."""
        if self._kind == "uniform":
            return
        self._server, self._evaluate = server, evaluate
        self._outgoing: Callable[[ArrayRecord], ArrayRecord] = getattr(strategy, "outgoing", lambda arrays: arrays)
        configure_train = strategy.configure_train

        def configure(server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid_: Grid) -> Iterable[Message]:
            nodes = list(grid.get_node_ids())
            clients = np.arange(len(nodes)) if grid.numbered else np.array([grid.client_of(node) for node in nodes])
            chosen = np.sort(self.choose(server_round, clients, nodes, arrays))
            with grid.offering([nodes[i] for i in chosen]):
                # A strategy may yield its messages one by one.
                return list(configure_train(server_round, arrays, config, grid_))

        strategy.configure_train = configure  # type: ignore[method-assign, assignment]

    def observe(self, server_round: int, trained: Mapping[str, Sequence[Any]]) -> None:
        """Remember the losses of the clients that trained: columns by name."""
        if self._kind != "oort":
            return
        clients = np.array(trained["client"], dtype=np.int64)
        own = np.abs(np.array(trained["num_examples"], dtype=np.float64) * np.array(trained["train_loss"]))
        self._utility[clients] = np.nan_to_num(own, posinf=LARGEST)
        self._last[clients] = server_round

    def state(self) -> dict[str, np.ndarray]:
        """Return what is remembered, a row for each client that trained."""
        clients = np.flatnonzero(self._last)
        return {"clients": clients, "utility": self._utility[clients], "last": self._last[clients]}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Remember what `state` returned."""
        self._utility[state["clients"]], self._last[state["clients"]] = state["utility"], state["last"]

    def choose(self, number: int, clients: np.ndarray, nodes: Sequence[int], arrays: ArrayRecord) -> np.ndarray:
        """Return positions of the chosen among connected clients (n,), whose nodes these are."""
        wanted = min(len(clients), asked(self._config))
        if self._kind == "poisson" and self._source is not None:
            rate = asked(self._config) / self._config.clients
            return np.flatnonzero(self._source.at("drawn", number).sampled(rate, len(clients)).numpy())
        uniform = uniforms(self._config.seed, "selection", number, clients=clients)
        if self._kind == "poisson":
            return np.flatnonzero(uniform < asked(self._config) / self._config.clients)
        if self._kind == "cyclic":
            groups = math.ceil(self._config.clients / asked(self._config))
            return np.flatnonzero(self._order[clients] % groups == (number - 1) % groups)
        if self._kind == "oort":
            return self._oort(number, clients, wanted, uniform, self._seconds(number, clients, arrays))
        count = min(len(clients), math.ceil(self._config.sampling.candidates * wanted))
        candidates = drawn(self._server.sizes[clients], count, uniform)
        if count <= wanted:
            return candidates
        asked_nodes = [nodes[i] for i in candidates]
        answers = self._evaluate.losses(number, arrays, asked_nodes, self._config.timeout_seconds)
        losses = dict(zip(answers[records.CLIENT], answers["loss"], strict=True))
        answered = np.array([i for i in candidates if clients[i] in losses], dtype=np.int64)
        return answered[highest(np.array([losses[client] for client in clients[answered]]), wanted)]

    def _seconds(self, number: int, clients: np.ndarray, arrays: ArrayRecord) -> np.ndarray | None:
        """Return the virtual seconds (n,) that clients would take for the round; None without virtual time."""
        if self._config.devices.kind == "none":
            return None
        return self._server.expected_seconds(number, clients, self._outgoing(arrays))

    def _oort(
        self, number: int, clients: np.ndarray, wanted: int, uniform: np.ndarray, seconds: np.ndarray | None
    ) -> np.ndarray:
        known, new = np.flatnonzero(self._last[clients]), np.flatnonzero(self._last[clients] == 0)
        # Part of a place is a place in that part of the rounds.
        share = self._config.sampling.exploration * wanted + rng(self._config.seed, "exploration", number).random()
        explore = min(len(new), max(math.floor(share), wanted - len(known)))
        speed = np.ones(len(new)) if seconds is None else 1 / np.maximum(seconds[new], SMALLEST)
        found = new[drawn(speed, explore, uniform[new])]
        own = clients[known]
        util = utility(self._utility[own], self._last[own], number)
        if seconds is not None and len(known):
            preferred = np.percentile(seconds, SLOW_PERCENTILE)
            util = util * np.minimum(1, preferred / np.maximum(seconds[known], SMALLEST)) ** SLOWNESS_EXPONENT
        return np.concatenate([found, known[among_best(util, wanted - explore, uniform[known])]])


def drawn(weights: np.ndarray, count: int, uniform: np.ndarray) -> np.ndarray:
    """Return positions of `count` of n, drawn one after the other with probabilities proportional to weights (n,).

    It is a race: the first arrivals of exponential clocks at these rates, which make of uniform numbers (n,) in [0, 1).
    """
    arrivals = -np.log1p(-uniform) / np.maximum(weights, SMALLEST)
    return np.argsort(arrivals, kind="stable")[:count]


def highest(values: np.ndarray, count: int) -> np.ndarray:
    """Return positions of the `count` highest values (n,); of equal ones the first, and nan last."""
    return np.argsort(-values, kind="stable")[:count]


def utility(own: np.ndarray, last: np.ndarray, server_round: int) -> np.ndarray:
    """Return U + sqrt(0.1 log R / L) for utilities (n,) that were learnt in rounds L (n,), U clipped and scaled."""
    most = max(float(np.percentile(own, CLIPPED_PERCENTILE)), SMALLEST) if len(own) else 1.0
    total: np.ndarray = np.minimum(own / most, 1) + np.sqrt(0.1 * math.log(server_round) / last)
    return total


def among_best(util: np.ndarray, count: int, uniform: np.ndarray) -> np.ndarray:
    """Return positions of `count` drawn by utility among those with at least `CUT_OFF` of the count-th highest."""
    if count == 0:
        return np.empty(0, dtype=np.int64)
    good = np.flatnonzero(util >= CUT_OFF * np.partition(util, -count)[-count])
    return good[drawn(util[good], count, uniform[good])]
