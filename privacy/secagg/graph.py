"""Who masks with whom, and how many of them it takes to open a mask.

`malicious`: everybody with everybody and t = floor(2n/3) + 1 (Bonawitz et al., CCS 2017, theorem 6.5). A server that
names one client alive to some and dropped to others then needs 2t - c <= n of the n - c honest ones and c corrupt
clients to say so, which c < n/3 does not allow. `semi-honest`: everybody with k others, drawn at random after the keys
are known (Bell et al., CCS 2020; SecAgg+): a Harary graph on a random circle, where each is linked with the k/2 next
ones on either side. It costs n k masks instead of n^2, and rests on three events being rare:

- privacy: t of an honest client's k neighbours are corrupt and open its mask;
- privacy: those who are honest and stay fall apart into groups, of which the server would see each one's sum. On the
  circle that takes two gaps of k/2 places with nobody left, so k of those who are not;
- correctness: more than k - t of a client's neighbours drop out, and its mask cannot be removed.

With exactly c corrupt clients and d dropouts, whom the random circle places anywhere, the first and last are
hypergeometric tails, the second is below n (n - 1) / 2 times the probability that k given places are empty.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from core.errors import InputError, unknown
from privacy.secagg.masking import expand

MALICIOUS, SEMI_HONEST = "malicious", "semi-honest"
PROFILES = (MALICIOUS, SEMI_HONEST)
# Up to so many clients a round the complete graph is cheap enough.
MOST_MALICIOUS = 128
MINIMUM = 3
"""The smallest cohort: of the sum of two each knows the other's part."""


@dataclass(frozen=True)
class Graph:
    """Who is whose neighbour among `size` clients, by place in their list; complete where `neighbours` is size - 1."""

    size: int
    neighbours: int
    seed: bytes
    """Public, 32 bytes; nobody may have been able to choose it before the keys of all were known."""

    def of(self, place: int) -> np.ndarray:
        """Return the neighbours of one client, (neighbours,) int64, ascending."""
        if self.neighbours == self.size - 1:
            return np.delete(np.arange(self.size), place)
        circle = self._circle
        [at] = np.flatnonzero(circle == place)
        return np.sort(circle[(at + self._steps) % self.size])

    @functools.cached_property
    def all(self) -> np.ndarray:
        """Return the neighbours of every client, (size, neighbours) int64, each row ascending."""
        if self.neighbours == self.size - 1:
            places = np.arange(self.size)
            return (places[:-1] + (places[:-1] >= places[:, None])).astype(np.int64)
        out = np.empty((self.size, self.neighbours), dtype=np.int64)
        out[self._circle] = np.sort(self._circle[(np.arange(self.size)[:, None] + self._steps) % self.size], axis=1)
        return out

    @functools.cached_property
    def _circle(self) -> np.ndarray:
        """Return who stands where on the circle: the order of 64-bit words of the seed's stream."""
        return expand(self.seed, 2 * self.size).view("<u8").argsort(kind="stable")

    @property
    def _steps(self) -> np.ndarray:
        half = self.neighbours // 2
        return np.concatenate([np.arange(-half, 0), np.arange(1, half + 1)])


def graph(size: int, neighbours: int, seed: bytes) -> Graph:
    """Return the graph with `neighbours` (even, 0: everybody) a client; of fewer clients everybody has all others."""
    if neighbours % 2 or neighbours < 0:
        raise InputError(f"{neighbours} neighbours cannot stand on two sides of a circle; choose an even number.")
    return Graph(size, neighbours if 0 < neighbours < size - 1 else size - 1, seed)


def malicious_threshold(clients: int) -> int:
    """Return t = floor(2n/3) + 1."""
    return 2 * clients // 3 + 1


@dataclass(frozen=True)
class Plan:
    """A graph and a threshold, and what they buy; bits are -log2 of a probability a round, infinite where it is 0."""

    profile: str
    clients: int
    neighbours: int
    """0 where everybody masks with everybody."""
    threshold: int
    """0 where it is floor(2n/3) + 1 of those who take part."""
    corrupt: int
    """Of how many clients together with the server nothing is learnt beyond the sum of the others."""
    dropouts: int
    """How many clients may drop out."""
    privacy_bits: float
    correctness_bits: float


def plan(
    clients: int, corrupt: float, dropout: float, profile: str = "", *, privacy_bits: float = 40,
    correctness_bits: float = 20,
) -> Plan:  # fmt: skip
    """Return the cheapest plan for `clients` a round of which these fractions are corrupt and drop out.

    Without a profile it is `malicious` up to 128 clients. Raises `InputError` where there is none.
    """
    if profile and profile not in PROFILES:
        raise unknown("profile", profile, PROFILES)
    for name, fraction in (("corrupt", corrupt), ("dropout", dropout)):
        if not 0 <= fraction < 1:
            raise InputError(f"a {name} fraction of {fraction} cannot be used; choose from 0 to below 1.")
    if clients < MINIMUM:
        raise InputError(f"{clients} clients a round hide nobody; choose {MINIMUM} or more.")
    bad, lost = math.floor(corrupt * clients), math.floor(dropout * clients)
    if (profile or (MALICIOUS if clients <= MOST_MALICIOUS else SEMI_HONEST)) == MALICIOUS:
        return _malicious(clients, bad, lost)
    for neighbours in (*range(2, clients - 1, 2), clients - 1):
        # Never fewer than half: no two parts of a client's neighbours shall open its two masks.
        thresholds = np.arange(max(2, -(-neighbours // 2)), neighbours + 1)
        privacy, correctness = _safety(clients, neighbours, thresholds, bad, lost)
        enough = np.flatnonzero((privacy >= privacy_bits) & (correctness >= correctness_bits))
        if len(enough):
            return safety(clients, neighbours, int(thresholds[enough[0]]), bad, lost)
    raise InputError(
        f"{bad} corrupt clients and {lost} dropouts of {clients} leave no threshold between them; expect fewer of "
        "either."
    )


def safety(clients: int, neighbours: int, threshold: int, corrupt: int, dropouts: int) -> Plan:
    """Return what a k-regular graph and a threshold buy against so many corrupt clients and dropouts."""
    privacy, correctness = _safety(clients, neighbours, np.array([threshold]), corrupt, dropouts)
    sides = neighbours if neighbours < clients - 1 else 0
    return Plan(SEMI_HONEST, clients, sides, threshold, corrupt, dropouts, float(privacy[0]), float(correctness[0]))


def _safety(
    clients: int, neighbours: int, thresholds: np.ndarray, corrupt: int, dropouts: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the bits of privacy and of correctness of each threshold, float64."""
    # Only who plans needs it: clients start without, and it takes half a second.
    from scipy.stats import hypergeom

    opened = (clients - corrupt) * hypergeom.sf(thresholds - 1, clients - 1, corrupt, neighbours)
    apart = 0.0 if neighbours >= clients - 1 else _gaps(clients, neighbours, corrupt + dropouts)
    failed = clients * hypergeom.sf(neighbours - thresholds, clients - 1, dropouts, neighbours)
    return _bits(opened + apart), _bits(failed)


def _malicious(clients: int, corrupt: int, dropouts: int) -> Plan:
    threshold = malicious_threshold(clients)
    if 3 * corrupt >= clients:
        raise InputError(f"{corrupt} corrupt clients of {clients} are a third or more, which no threshold withstands.")
    if clients - threshold < dropouts:
        raise InputError(
            f"{dropouts} dropouts of {clients} leave fewer than the {threshold} that profile={MALICIOUS} needs; set "
            f"profile={SEMI_HONEST}, or expect {clients - threshold} or fewer."
        )
    return Plan(MALICIOUS, clients, 0, 0, corrupt, dropouts, math.inf, math.inf)


def _gaps(clients: int, places: int, empty: int) -> float:
    """Return a bound for two gaps on the circle with `places` places in all, given how many places are empty."""
    from scipy.special import gammaln

    if empty < places:
        return 0.0
    # C(n - k, e - k) / C(n, e), the probability that k given places are among the e empty ones.
    logs = gammaln(np.array([clients - places + 1, empty + 1, empty - places + 1, clients + 1]))
    return float(math.comb(clients, 2) * np.exp(logs[0] + logs[1] - logs[2] - logs[3]))


def _bits(probability: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.abs(np.log2(np.clip(probability, 0.0, 1.0)))


def holders_of(client: int, neighbours: Iterable[int]) -> list[int]:
    """Return who holds shares of a client's secrets, ascending: its neighbours and itself."""
    return sorted([client, *neighbours])
