"""Client-level privacy: whoever sees the models cannot tell whether a client took part at all.

One object, made from the configuration alone, says who is drawn, how long an update may be, how much noise the sum gets
and what a round costs: they cannot disagree. McMahan et al., ICLR 2018: every client takes part with probability q =
sampled / clients; updates are clipped to the norm S; the new model is that of the strategy for

    mean = (sum_k w_k clip_S(update_k) + N(0, (z S)^2 I)) / (q N),    0 <= w_k <= 1,

divided by the expected number, so that one client changes the sum by S and nothing else: a round without anybody is
noise. What travels beside the model (scaffold's controls) is one vector with it. Under local noise each client adds
N(0, (z S)^2 I) to its own update before it leaves; the server sees who sent what, so nothing is gained by sampling, and
two updates may differ by 2 S. Under distributed noise each adds a share inside secure aggregation, and the sum holds
all of it (privacy/secagg/distributed.py). Adaptive clipping is that of Andrew et al., NeurIPS 2021 ("Differentially
private learning with adaptive clipping").

A run may stand for a deployment with more clients, of whom the same share takes part in a round: the noise of its sum
is z S clients / population, so that its mean is as noisy as one of q population clients would be (the noise cohort of
Granqvist et al., NeurIPS 2024, Datasets and Benchmarks). Epsilon is then the deployment's, and nobody's here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from core import records
from core.config import RunConfig
from core.records import Tensors
from core.training import LocalRound, LocalUpdate
from privacy.accounting import EVERYBODY, Event, calibrate
from privacy.banded import BandedNoise
from privacy.noise import Source, noised

# As Andrew et al. have it, the noise of the count is a twentieth of the expected count.
COUNT_SHARE = 1 / 20
MOST_EXPONENT = 3.0
# A clipped update is shorter by this, so that float32 does not make it longer than the norm.
ROUNDING = 1e-6


@dataclass(frozen=True)
class ClientLevel:
    """What a run does to hide its clients."""

    config: RunConfig
    rate: float
    """Probability q that a client takes part in a round."""
    noise_multiplier: float
    """z: standard deviation of the noise over the clipping norm, as accounted."""

    @staticmethod
    def of(config: RunConfig) -> ClientLevel:
        """Return the configured mechanism, its noise calibrated to the planned rounds where only epsilon is given."""
        own = config.privacy
        rate = config.count(config.sampled) / config.clients
        z = own.noise_multiplier
        if not z and own.noise == "local":
            z = 2 * calibrate(1.0, planned(config.rounds, rate), own.epsilon, own.delta)
        elif not z and own.noise == "distributed":
            z = calibrate(1.0, planned(config.rounds, rate), own.epsilon, own.delta, moments=True)
        elif not z and own.mechanism == "banded":
            banded = BandedNoise(bands(config))
            z = calibrate(1.0, banded.participations(config.rounds), own.epsilon, own.delta) * banded.sensitivity(1)
        elif not z:
            z = calibrate(rate, config.rounds, own.epsilon, own.delta)
        return ClientLevel(config, rate, z)

    @property
    def expected(self) -> float:
        """Return q N, the expected number of clients in a round."""
        return self.rate * self.config.clients

    @property
    def adaptive(self) -> bool:
        """Return whether the clipping norm follows the updates."""
        return self.config.privacy.clipping == "adaptive"

    @property
    def scale(self) -> float:
        """Return the noise that this run adds over what epsilon needs: 1, or less where it stands for more clients."""
        return self.config.clients / (self.config.privacy.population or self.config.clients)

    @property
    def count_noise(self) -> float:
        """Return the standard deviation of the noise on the number of updates within the clipping norm.

        Of few clients the count gets as much as the sum, so that it never takes more than a quarter of the budget.
        """
        return max(self.expected * COUNT_SHARE, self.noise_multiplier * self.scale)

    @property
    def sum_multiplier(self) -> float:
        """Return the noise multiplier of the sum: more than z where the count has a part in the budget.

        The count is of b - 1/2, so that one client moves it by 1/2: z_sum = (z^-2 - (2 sigma_b)^-2)^-1/2.
        """
        z = self.noise_multiplier * self.scale
        return float((z**-2 - (2 * self.count_noise) ** -2) ** -0.5) if self.adaptive else z

    @property
    def banded(self) -> bool:
        """Return whether the noise of a round takes part of earlier rounds' away again."""
        return self.config.privacy.mechanism == "banded"

    @property
    def bands(self) -> int:
        """Return b, the rounds in which every client takes part once (sampling.kind=cyclic)."""
        return bands(self.config)

    @property
    def own_event(self) -> Event | None:
        """Return what taking part costs a client that adds noise itself; None where the server adds it.

        Two updates with noise of their own may be 2 S apart; inside a sum an update may be there or zero.
        """
        z = self.noise_multiplier
        return {"central": None, "local": Event(1.0, z / 2), "distributed": Event(1.0, z, moments=True)}[
            self.config.privacy.noise
        ]

    def costs(self, server_round: int, *, repeated: bool = False) -> Iterator[tuple[int, Event, int]]:
        """Yield what the server's noise in a round costs, for all clients alike.

        Of banded noise a whole cycle is one event, at its first round; who takes part again in a `repeated` round
        spends another.
        """
        if not self.banded:
            yield EVERYBODY, Event(self.rate, self.noise_multiplier), 1
        elif repeated or (server_round - 1) % self.bands == 0:
            yield EVERYBODY, banded_event(self.noise_multiplier, self.bands), 1

    def next_norm(self, norm: float, within: float) -> float:
        """Return the next clipping norm from the noisy share of updates within this one: S exp(-eta (b - gamma))."""
        own = self.config.privacy
        exponent = -own.clipping_rate * (within - own.clipping_quantile)
        # Noise on a count of few clients may be many times it: one round moves the norm by this much at most.
        return norm * math.exp(min(max(exponent, -MOST_EXPONENT), MOST_EXPONENT))


def bands(config: RunConfig) -> int:
    """Return in how many rounds clients that take turns have all had theirs."""
    return math.ceil(config.clients / config.count(config.sampled))


def banded_event(noise_multiplier: float, count: int) -> Event:
    """Return the event of a client's one participation under noise of `count` bands."""
    return Event(1.0, noise_multiplier / BandedNoise(count).sensitivity(1))


def planned(rounds: int, rate: float) -> int:
    """Return in how many rounds a client that is drawn at this rate will take part: two deviations above the mean."""
    return min(rounds, math.ceil(rounds * rate + 2 * math.sqrt(rounds * rate * (1 - rate))))


class Clipping:
    """The client's half, an update processor: clip, weigh alike, and keep back all other numbers."""

    def __init__(self, level: ClientLevel) -> None:
        self._level = level

    def __call__(self, update: LocalUpdate, r: LocalRound) -> LocalUpdate:
        """Return the cohort's update with every client's part no longer than the round's clipping norm."""
        norm = float(r.config[records.CLIPPING_NORM])
        norms = lengths(update, r.global_params)
        weight = self._weights(r).to(norms.device)
        # No noise covers what a strategy's clients say beside their updates: the server must not hear of it.
        metrics = {}
        if self._level.adaptive:
            # The server takes means by weight; of these it needs the plain sum.
            metrics[records.WITHIN] = ((norms <= norm).float() - 0.5) / weight
        # What is not finite stays so and is its client's error (client/replies.py): it must not become a zero here.
        clipped = scaled(update, r.global_params, (norm / norms * (1 - ROUNDING)).clamp(max=1.0))
        return replace(clipped, metrics=metrics, weight=weight)

    def _weights(self, r: LocalRound) -> Tensor:
        cap = self._level.config.privacy.weight_cap
        sizes = torch.tensor(r.sizes, dtype=torch.float32)
        return (sizes / cap).clamp(max=1.0) if cap else torch.ones_like(sizes)


def with_noise(update: LocalUpdate, r: LocalRound, noise_multiplier: float, sources: Sequence[Source]) -> LocalUpdate:
    """Return the cohort's clipped update with normal noise on all of it, each client's from its own source."""
    deviation = noise_multiplier * float(r.config[records.CLIPPING_NORM])

    def noisy(tensors: Tensors) -> Tensors:
        return {
            name: torch.stack(
                [
                    noised(own, source.normal(*own.shape, dtype=torch.float64).to(own.device), deviation)
                    for own, source in zip(t, sources, strict=True)
                ]
            )
            for name, t in tensors.items()
        }

    away = noisy({name: p - r.global_params[name] for name, p in update.params.items()})
    params = {name: r.global_params[name] + t for name, t in away.items()}
    return replace(update, params=params, beside={kind: noisy(own) for kind, own in update.beside.items()})


def lengths(update: LocalUpdate, origin: Mapping[str, Tensor]) -> Tensor:
    """Return the L2 norm of all that each client adds, beside the model included, (C,) float32."""
    parts = [p - origin[name] for name, p in update.params.items()]
    parts += [t for own in update.beside.values() for t in own.values()]
    return torch.stack([t.reshape(len(t), -1).double().pow(2).sum(1) for t in parts]).sum(0).sqrt().float()


def scaled(update: LocalUpdate, origin: Mapping[str, Tensor], factor: Tensor) -> LocalUpdate:
    """Return the update with what each client adds multiplied by its factor (C,)."""

    def times(t: Tensor) -> Tensor:
        return t * factor.view(-1, *[1] * (t.ndim - 1))

    # Only where something is cut: adding a difference to where it came from does not give back the same bits.
    whole = factor >= 1
    params = {
        name: torch.where(whole.view(-1, *[1] * (p.ndim - 1)), p, origin[name] + times(p - origin[name]))
        for name, p in update.params.items()
    }
    beside = {kind: {name: times(t) for name, t in own.items()} for kind, own in update.beside.items()}
    return replace(update, params=params, beside=beside)
