"""The distributed mechanism: clients add integer noise inside secure aggregation, and only the noisy sum is ever seen.

A client clips its update to norm c, scales it to norm at most r, rotates it by H D (public random signs), rounds every
number up or down at random so that the mean is right, again and again until the norm is at most Delta_2 (Kairouz, Liu
and Steinke, ICML 2021, "The distributed discrete Gaussian mechanism", algorithm 1), adds a share of Skellam noise, and
sends the result modulo 2^bits. The sum modulo 2^bits is rotated and scaled back. In units of rounding, d numbers,

    Delta_2^2 = r^2 + d/4 + sqrt(2 ln(1/beta)) (r + sqrt(d)/2),    Delta_1 <= min{sqrt(d) Delta_2, Delta_2^2}

(their bound with granularity 1; a rounding is accepted with probability 1 - beta at least, and those accepted are
shorter in the mean, by less than a step). Skellam noise, the difference of two Poisson numbers, stays Skellam when it
is added up: each client's has variance mu / survivors, so that the fewest survivors together still have
mu = (noise_multiplier r)^2. With more the noise grows and epsilon does not.

Accounting (Agarwal, Kairouz and Liu, NeurIPS 2021, "The Skellam mechanism"), for integer orders alpha > 1:

    eps(alpha) = alpha Delta_2^2 / (2 mu) + min{((2 alpha - 1) Delta_2^2 + 6 Delta_1) / (4 mu^2), 3 Delta_1 / (2 mu)}.

Neighbours differ in one client's update being zero: it still adds its share. The server that draws a sample knows who
is in it, so that sampling hides nobody from it, and others can tell from the variance of a long sum how many shares of
noise it holds. Clients that pool what they know can take
their own shares away, so `survivors` must count those that do not. What a client rounds to, its norm and the sum are
exact integers, whatever the rotation is: no floating-point number enters the argument but in `draw`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import ive, ndtri
from torch import Tensor

from core import hadamard
from core.errors import InputError
from privacy.noise import Source

ORDERS = np.arange(2, 513)
OVERFLOW = 1e-9
"""The probability per round that any number of the sum leaves the ring: the sum is then wrong, not less private."""
# Greater norms would not be exact in float64, and rounding's share is 10^-10 there.
_LARGEST = 2.0**26
_TABLE = 2.0**20


@dataclass(frozen=True)
class Skellam:
    """One round's mechanism for updates of `size` numbers from at most `clients` clients, `survivors` at least.

    `noise_multiplier` is the standard deviation of the noise of `survivors` clients over the clipping norm, as in the
    central Gaussian mechanism. Raises `InputError` for values that make no sense, and where the ring is too small.
    """

    clipping_norm: float
    noise_multiplier: float
    size: int
    clients: int
    survivors: int
    bits: int = 32

    def __post_init__(self) -> None:
        for name, value in (("clipping norm", self.clipping_norm), ("noise multiplier", self.noise_multiplier)):
            if not 0 < value < math.inf:
                raise InputError(f"a {name} of {value} cannot be used; choose a positive number.")
        if not 1 <= self.survivors <= self.clients:
            raise InputError(f"of {self.clients} clients {self.survivors} cannot survive; choose 1 to {self.clients}.")
        if not 1 <= self.bits <= 32:
            raise InputError(f"a ring of {self.bits} bits cannot be used; choose from 1 to 32.")
        if not self._fits(self.bits):
            enough = [bits for bits in range(self.bits, 33) if self._fits(bits)]
            remedy = f"choose {enough[0]} bits or more, or fewer clients." if enough else "choose fewer clients."
            raise InputError(
                f"{self.bits} bits are too few for {self.clients} clients and {self.size} numbers: rounding alone "
                f"would more than double what a client can change; {remedy}"
            )

    @property
    def padded(self) -> int:
        """Return d, how many integers a client sends."""
        return hadamard.power_of_two(self.size)

    @property
    def radius(self) -> float:
        """Return r, the norm of a clipped update in units of rounding."""
        return self._radius(self.bits)

    @property
    def sensitivity(self) -> float:
        """Return Delta_2, the greatest norm of what a client rounds to."""
        return rounded_norm(self.radius, self.padded)

    @property
    def variance(self) -> float:
        """Return mu, the variance of each integer's noise when as few as `survivors` have answered."""
        return (self.noise_multiplier * self.radius) ** 2

    def _radius(self, bits: int) -> float:
        """Return the greatest r with which a sum stays inside (-2^(bits-1), 2^(bits-1)), or nearly so; may be negative.

        The worst sum has norm n r; a coordinate of its rotation exceeds n r sqrt(2 L / d) (Hoeffding), and the noise of
        all n clients, of variance V, exceeds sqrt(2 L V) + L / 3 (Bernstein), with probability 2 exp(-L) at most: one
        of the two does in any of d coordinates with OVERFLOW if L = ln(4 d / OVERFLOW). Roundings add less than n.
        """
        log = math.log(4 * self.padded / OVERFLOW)
        signal = self.clients * min(1.0, math.sqrt(2 * log / self.padded))
        noise = self.noise_multiplier * math.sqrt(2 * log * self.clients / self.survivors)
        room = 2.0 ** (bits - 1) - 1 - self.clients - log / 3
        return min(room / (signal + noise), _LARGEST)

    def _fits(self, bits: int) -> bool:
        radius = self._radius(bits)
        return radius > 0 and rounded_norm(radius, self.padded) <= 2 * radius

    def encode(self, update: Tensor, rotation: int, source: Source) -> np.ndarray:
        """Return what a client adds to the sum, (d,) uint32 below 2^bits, for its update (D,).

        `rotation` is the round's public seed, the same for all clients; `source` is the client's own. Raises
        `ValueError` for an update that is not finite or not of this size.
        """
        if update.shape != (self.size,) or not bool(update.isfinite().all()):
            raise ValueError(f"an update of {tuple(update.shape)} numbers is not {self.size} finite ones")
        flat = update.double()
        scale = self.radius / max(float(flat.norm()), self.clipping_norm)
        turned = hadamard.rotated((flat * scale)[None], self._signs(rotation))[0]
        codes = rounded(turned, self.radius, source) + draw(self.variance / self.survivors, self.padded, source)
        return self._in_ring(codes.numpy())

    def decode(self, total: np.ndarray, rotation: int) -> Tensor:
        """Return the sum of the clipped updates with its noise, (D,) float32, from the sum in the ring."""
        half = 1 << (self.bits - 1)
        signed = self._in_ring(total.astype(np.int64) + half).astype(np.int64) - half
        flat = torch.from_numpy(signed).double()[None] * (self.clipping_norm / self.radius)
        return hadamard.rotated_back(flat, self._signs(rotation), self.size)[0].float()

    @property
    def rdp(self) -> np.ndarray:
        """Return a round's Renyi epsilon of each of ORDERS, float64."""
        return skellam_rdp(self.sensitivity, self.padded, self.variance)

    def _signs(self, rotation: int) -> Tensor:
        return hadamard.signs(self.padded, rotation, "skellam")

    def _in_ring(self, numbers: np.ndarray) -> np.ndarray:
        return (numbers & ((1 << self.bits) - 1)).astype(np.uint32)


def rounded_norm(norm: float, size: int) -> float:
    """Return Delta_2 for vectors of `size` numbers and at most this norm, beta being exp(-1/2) and the root in it 1."""
    # Their other bound, norm + sqrt(size), is never less with this beta.
    return math.sqrt(norm**2 + size / 4 + norm + math.sqrt(size) / 2)


def rounded(values: Tensor, norm: float, source: Source) -> Tensor:
    """Return integers next to `values` (d,) float64, up or down at random so that the mean is right, (d,) int64.

    Roundings longer than `rounded_norm` are drawn again; `norm` is the greatest that values may have.
    """
    most = math.floor(rounded_norm(norm, len(values)) ** 2)
    # One try fails with probability exp(-1/2) at most, all of them with 10^-43.
    for _ in range(200):
        codes = (values + source.uniform(len(values))).floor()
        if float(codes @ codes) <= most:
            return codes.long()
    raise RuntimeError("no rounding is short enough: the values are longer than their norm is said to be")


def skellam_rdp(sensitivity: float, size: int, variance: float) -> np.ndarray:
    """Return the Renyi epsilon of each of ORDERS for integer vectors of that norm and noise of that variance."""
    l2, l1 = sensitivity**2, sensitivity * min(math.sqrt(size), sensitivity)
    beyond = np.minimum(((2 * ORDERS - 1) * l2 + 6 * l1) / (4 * variance**2), 3 * l1 / (2 * variance))
    return ORDERS * l2 / (2 * variance) + beyond


def draw(variance: float, count: int, source: Source) -> Tensor:
    """Return `count` integers of Skellam noise with this variance, (count,) int64.

    Each is the quantile that belongs to a normal z: by the exact table of tails up to a variance of 2^20, and beyond by
    the expansion of Cornish and Fisher to order 1 / mu, rounded (Sheppard's correction is the 1/12). The probabilities
    are then off by less than 10^-9 of themselves within 6 standard deviations.
    """
    z = source.normal(count, dtype=torch.float64)
    if variance > _TABLE:
        return (z * (1 + (z * z - 3) / (24 * variance)) * math.sqrt(variance - 1 / 12)).round().long()
    steps = torch.searchsorted(_limits(variance), z.abs())
    return torch.where(z < 0, -steps, steps)


@functools.lru_cache(maxsize=4)
def _limits(variance: float) -> Tensor:
    """Return t_0 <= t_1 <= ..., float64: P(|z| > t_k) = P(|X| > k) for Skellam noise X of this variance."""
    largest = math.ceil(10 * math.sqrt(variance)) + 40
    # P(X = k) = exp(-mu) I_k(mu); tails are added from their small end.
    tails = ive(np.arange(1, largest), variance)[::-1].cumsum()[::-1]
    return torch.from_numpy(-ndtri(tails[tails > 0]))
