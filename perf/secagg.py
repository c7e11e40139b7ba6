"""What secure aggregation costs: CPU time against Flower's SecAgg+, whose own code runs in the same process, in turns.

python perf/secagg.py parts       masks, shares, keys, roundings: ours against Flower's primitives
python perf/secagg.py rounds      whole rounds of 10 clients with 1,000,000 numbers, and of 100 with 100,000
python perf/secagg.py thousand    1,000 clients with 100,000 numbers, each with 46 neighbours
python perf/secagg.py answers     the error where all weights are 1/1000 of the largest, and which dropouts are survived
python perf/secagg.py engine      a round of a run: 100 clients of workload (b), in clear and in both profiles

Everything of ours travels as bytes, as do the clients' states between two stages; Flower's is handed over as it is.
Both sides clip, round, mask and decode; ours also hashes the model, signs, and has a round of confirmations.
"""

from __future__ import annotations

import itertools
import logging
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from contextlib import contextmanager
from typing import Any

import numpy as np
from flwr.common.secure_aggregation.crypto import shamir as flower_shamir
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import parameters_addition
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.supercore.primitives import asymmetric

from perf.secagg_flower import FlowerRound
from perf.workloads import config
from privacy.secagg import messages
from privacy.secagg.client import Client, State
from privacy.secagg.graph import MALICIOUS, SEMI_HONEST, plan
from privacy.secagg.keys import Agreement, Identity, KeyPair, Roster, content_hash
from privacy.secagg.masking import add_masks
from privacy.secagg.messages import ADVERTISE, CONFIRM, MASK, SHARE, UNMASK, Terms
from privacy.secagg.quantise import Quantiser
from privacy.secagg.server import Server
from privacy.secagg.shamir import combine, split
from simulations.run import simulate

TURNS = 9
NORM = 1.0
CONFIG = b"train config"
KINDS: dict[str, Any] = {
    ADVERTISE: messages.Advertisement, SHARE: messages.Shares, MASK: messages.Masked, CONFIRM: messages.Confirmation,
    UNMASK: messages.Unmasking,
}  # fmt: skip


class Round:
    """A round of ours: CPU seconds of all clients and of the server, by stage, and the bytes that clients send."""

    def __init__(
        self, updates: np.ndarray, weights: Iterable[int], *, corrupt: float = 0.1, dropout: float = 0.1,
        profile: str = MALICIOUS, largest_weight: float = 1000.0,
    ) -> None:  # fmt: skip
        clients, size = updates.shape
        self.updates, self.weights, self.profile = updates, list(weights), profile
        self.quantiser = Quantiser(size, clients, NORM, largest_weight)
        self.model = {"w": np.zeros(size, dtype=np.float32).tobytes()}
        chosen = plan(clients, corrupt, dropout, profile)
        self.terms = Terms(
            "perf", 1, content_hash(self.model, CONFIG), self.quantiser.length, 32, profile,
            neighbours=chosen.neighbours, threshold=chosen.threshold,
        )  # fmt: skip
        self.identities = [Identity.generate() for _ in range(clients)]
        self.roster = Roster({client: identity.public for client, identity in enumerate(self.identities)})
        self.states = [State().to_bytes()] * clients
        self.client_seconds: dict[str, float] = defaultdict(float)
        self.server_seconds: dict[str, float] = defaultdict(float)
        self.uploaded = 0

    def run(self, absent: dict[str, Collection[int]] | None = None) -> np.ndarray:
        """Return the mean; `absent` says who does not answer in which stage."""
        absent, seconds = absent or {}, self.server_seconds
        with _timed(seconds, ADVERTISE):
            server = Server(self.terms, range(len(self.states)), self.roster)
            invitation = self.terms.to_bytes()
        everybody = set(range(len(self.states))) - set(absent.get(ADVERTISE, ()))
        self._stage(server, ADVERTISE, dict.fromkeys(everybody, invitation), Terms)
        for stage, close in ((SHARE, server.participants), (MASK, server.deliveries)):
            with _timed(seconds, stage):
                outgoing = {client: message.to_bytes() for client, message in close().items()}
            present = {client: data for client, data in outgoing.items() if client not in absent.get(stage, ())}
            self._stage(server, stage, present, messages.Participants if stage == SHARE else messages.Delivery)
        with _timed(seconds, CONFIRM):
            survivors = server.survivors()
            data = survivors.to_bytes()
        if self.profile == MALICIOUS:
            present = dict.fromkeys(set(survivors.ids) - set(absent.get(CONFIRM, ())), data)
            self._stage(server, CONFIRM, present, messages.Survivors)
        with _timed(seconds, UNMASK):
            data = server.unmask_request().to_bytes()
        left = server.answered[CONFIRM if self.profile == MALICIOUS else MASK]
        present = dict.fromkeys(set(left) - set(absent.get(UNMASK, ())), data)
        self._stage(server, UNMASK, present, messages.UnmaskRequest)
        with _timed(seconds, UNMASK):
            return self.quantiser.decode(server.total(), len(survivors.ids)).update

    def _stage(self, server: Server, stage: str, outgoing: dict[int, bytes], kind: Any) -> None:
        answers: dict[int, bytes] = {}
        with _timed(self.client_seconds, stage):
            for client, data in outgoing.items():
                own = Client(
                    client, "perf", self.identities[client], self.roster, profile=self.profile,
                    state=State.from_bytes(self.states[client]),
                )  # fmt: skip
                answer = getattr(own, stage)(kind.from_bytes(data), *(self._trained(client) if stage == MASK else ()))
                answers[client] = answer.to_bytes()
                self.states[client] = own.state.to_bytes()
        self.uploaded += sum(map(len, answers.values()))
        with _timed(self.server_seconds, stage):
            for client, data in answers.items():
                if not server.take(client, KINDS[stage].from_bytes(data)):
                    raise RuntimeError(server.refused)

    def _trained(self, client: int) -> tuple[np.ndarray, bytes]:
        vector = self.quantiser.encode(self.updates[client], self.weights[client], os.urandom(32))
        return vector, content_hash(self.model, CONFIG)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Any:
    began = time.process_time()
    yield
    seconds[name] += time.process_time() - began


def _updates(clients: int, size: int) -> np.ndarray:
    """Return updates (clients, size) float32 of norm 0.7 or so."""
    generator = np.random.default_rng(0)
    return generator.standard_normal((clients, size), dtype=np.float32) * np.float32(0.7 / size**0.5)


def _spread(ratios: list[float]) -> str:
    ratios = sorted(ratios)
    return f"{statistics.median(ratios):.3g}x ({ratios[0]:.3g}-{ratios[-1]:.3g})"


def _compared(name: str, theirs: Callable[[], object], ours: Callable[[], object], turns: int, repeats: int) -> None:
    """Print both sides' CPU time and its ratio: median, least and most of the turns; our side runs `repeats` times."""
    found: list[tuple[float, float]] = []
    ours()
    for _ in range(turns):
        began = time.process_time()
        theirs()
        middle = time.process_time()
        for _ in range(repeats):
            ours()
        found.append((middle - began, (time.process_time() - middle) / repeats))
    flower, fedra = (statistics.median(side) * 1e3 for side in zip(*found, strict=True))
    print(f"| {name} | {flower:.3g} | {fedra:.3g} | {_spread([a / b for a, b in found])} |", flush=True)


def parts() -> None:
    """Print each primitive's CPU time and Flower's over it."""
    size, seed = 1_000_000, bytes(range(32))
    vector, theirs = np.zeros(size, dtype=np.uint32), [np.zeros(size, dtype=np.int64)]
    update = _updates(1, size)[0]
    quantiser = Quantiser(size, 10, NORM, 1000.0)
    print("| | Flower, ms | Fedra, ms | Flower / Fedra |\n|---|---|---|---|")
    _compared(
        "a mask of 1,000,000, added", lambda: parameters_addition(theirs, pseudo_rand_gen(seed, 1 << 32, [(size,)])),
        lambda: add_masks(vector, [seed]), 3 * TURNS, 4,
    )  # fmt: skip
    _compared(
        "1,000,000 numbers rounded", lambda: quantize([update], 8.0, 1 << 22),
        lambda: quantiser.encode(update, 1000, seed), 3 * TURNS, 1,
    )  # fmt: skip
    one, other = asymmetric.generate_key_pairs(), asymmetric.generate_key_pairs()
    texts = asymmetric.private_key_to_bytes(one[0]), asymmetric.public_key_to_bytes(other[1])
    pairs = KeyPair.generate(), KeyPair.generate()
    agree = Agreement("mask", 1, pairs[0], seed)

    def flower_agrees() -> None:
        for _ in range(50):
            secret, public = asymmetric.bytes_to_private_key(texts[0]), asymmetric.bytes_to_public_key(texts[1])
            generate_shared_key(secret, public)

    def fedra_agrees() -> None:
        for _ in range(50):
            agree(2, pairs[1].public)

    _compared("50 shared secrets", flower_agrees, fedra_agrees, TURNS, 3)
    for clients, turns in ((10, TURNS), (100, 5), (1000, 1)):
        threshold = 2 * clients // 3 + 1

        def flower_shares(clients: int = clients, threshold: int = threshold) -> None:
            shares = flower_shamir.create_shares(seed, threshold, clients)
            assert flower_shamir.combine_shares(shares[:threshold]) == seed

        def fedra_shares(clients: int = clients, threshold: int = threshold) -> None:
            shares = split(seed, clients, threshold)
            assert combine(range(1, threshold + 1), shares[:threshold], threshold) == seed

        _compared(f"32 bytes shared among {clients}, combined of {threshold}", flower_shares, fedra_shares, turns, 5)


def rounds() -> None:
    """Print what whole rounds cost a client and the server, and what a client uploads."""
    print("| clients, numbers | side | Flower, ms | Fedra, ms | Flower / Fedra |\n|---|---|---|---|---|")
    for clients, size, turns in ((10, 1_000_000, TURNS), (100, 100_000, 3)):
        updates, found = _updates(clients, size), []
        uploaded = 0.0
        for _ in range(turns):
            theirs = FlowerRound(updates, [1000] * clients, 2 * clients // 3 + 1)
            mean = theirs.run()
            ours = Round(updates, [1000] * clients)
            assert mean is not None
            assert np.abs(ours.run() - mean).max() < 1e-4
            sides = []
            for run in (theirs, ours):
                own, server = sum(run.client_seconds.values()), sum(run.server_seconds.values())
                sides.append((own / clients, server, own + server))
            found.append(sides)
            uploaded = ours.uploaded / theirs.uploaded
        for i, name in enumerate(("a client", "the server", "everybody")):
            flower, fedra = ([turn[side][i] for turn in found] for side in (0, 1))
            times = " | ".join(f"{statistics.median(side) * 1e3:.4g}" for side in (flower, fedra))
            ratio = _spread([a / b for a, b in zip(flower, fedra, strict=True)])
            print(f"| {clients}, {size:,} | {name} | {times} | {ratio} |", flush=True)
        print(f"| {clients}, {size:,} | uploaded | | | {1 / uploaded:.3g}x: {uploaded:.3f} of it |", flush=True)


def thousand() -> None:
    """Print what a round of 1,000 clients costs, of whom 40 drop out, each with 46 neighbours."""
    updates = _updates(1000, 100_000)
    for _ in range(3):
        run = Round(updates, [1000] * 1000, profile=SEMI_HONEST)
        mean = run.run({ADVERTISE: range(10), SHARE: range(10, 20), MASK: range(20, 30), UNMASK: range(30, 40)})
        error = float(np.abs(mean - updates[30:].mean(0, dtype=np.float64)).max())
        own, server = sum(run.client_seconds.values()), sum(run.server_seconds.values())
        stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in run.client_seconds.items())
        print(f"{own + server:.1f} s: clients {own:.1f} ({stages}), server {server:.2f}; error {error:.1g}", flush=True)


def answers() -> None:
    """Print the largest error at small weights, and whether a sum comes if a client drops out in each stage."""
    updates = _updates(10, 100_000)
    true = updates.mean(0, dtype=np.float64)
    for name, run in (("Flower", FlowerRound(updates, [1] * 10, 7)), ("Fedra", Round(updates, [1] * 10))):
        mean = run.run()
        assert mean is not None
        print(f"{name}: weights of 1/1000, largest error {np.abs(mean - true).max():.2g}", flush=True)
    for stage in (ADVERTISE, SHARE, MASK, CONFIRM, UNMASK):
        lost, outcome = {stage: [9]}, []
        left = updates if stage in (CONFIRM, UNMASK) else updates[:9]
        for run in (FlowerRound(updates, [1000] * 10, 7), Round(updates, [1000] * 10)):
            mean = run.run(lost)
            right = mean is not None and np.abs(mean - left.mean(0, dtype=np.float64)).max() < 1e-4
            outcome.append("the sum of the others" if right else "no sum")
        theirs = outcome[0] if stage != CONFIRM else "has no such stage"
        print(f"one of 10 drops out at {stage}: Flower {theirs}, Fedra {outcome[1]}", flush=True)


def engine() -> None:
    """Print the CPU time of a whole round of a run, all of it in this process, and its ratio to the plain one's."""
    found: dict[str, list[float]] = {"none": [], SEMI_HONEST: [], MALICIOUS: []}
    out = tempfile.mkdtemp()
    for _ in range(TURNS):
        for profile, seconds in found.items():
            ends: list[float] = []
            changes = {"clients": 100, "sampled": 0, "secure_aggregation__profile": profile, "out": out}
            run = config("b", 5, **changes, engine__workers=0, engine__cohort_size=50)
            simulate(run, on_round=lambda row, ends=ends: ends.append(time.process_time()))
            # The last round evaluates, and the first one's beginning is not known.
            seconds.append(statistics.median(b - a for a, b in itertools.pairwise(ends[:-1])))
    print("| profile | CPU seconds a round | against plain |\n|---|---|---|")
    for profile, seconds in found.items():
        ratios = [a / b for a, b in zip(seconds, found["none"], strict=True)]
        print(f"| {profile} | {statistics.median(seconds):.3f} | {_spread(ratios)} |", flush=True)


if __name__ == "__main__":
    # Flower logs every stage, and on purpose not why a round ended.
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    modes = {"parts": parts, "rounds": rounds, "thousand": thousand, "answers": answers, "engine": engine}
    modes[sys.argv[1]]()
