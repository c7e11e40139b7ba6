"""What server and clients compute alike of a round, from the configuration and from what all are told."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import RecordDict

from core import records
from core.config import RunConfig
from privacy.secagg import graph
from privacy.secagg.distributed import NoisyPayload
from privacy.secagg.graph import MALICIOUS, Plan
from privacy.secagg.keys import content_hash
from privacy.secagg.messages import Terms
from privacy.secagg.payload import Payload

# Before the first round clients say how many examples they have, in powers of two up to this.
SIZE_CLASSES = 48


def run_name(run_id: int) -> str:
    """Return what clients and server call a run."""
    return f"run {run_id}"


def plan_of(config: RunConfig, clients: int) -> Plan:
    """Return the graph and threshold for a sum of so many clients, and what they buy; `InputError` where none is."""
    own = config.secure_aggregation
    profile = "" if own.profile == "auto" else own.profile
    return _plan(clients, own.corrupt, own.dropout_tolerance, profile, own.threshold)


@functools.lru_cache(maxsize=256)
def _plan(clients: int, corrupt: float, dropout: float, profile: str, threshold: int) -> Plan:
    found = graph.plan(clients, corrupt, dropout, profile)
    if threshold and found.profile != MALICIOUS:
        sides = found.neighbours or clients - 1
        return graph.safety(clients, sides, threshold, found.corrupt, found.dropouts)
    return found


def terms_of(config: RunConfig, run_id: int, number: int, content: bytes, length: int, clients: int) -> Terms:
    """Return what the clients of a sum agree on."""
    plan, own = plan_of(config, clients), config.secure_aggregation
    return Terms(
        run_name(run_id), number, content, length, own.bits, plan.profile, least_of(config, clients), plan.neighbours,
        plan.threshold,
    )  # fmt: skip


def hash_of(message_type: str, content: RecordDict, config: RunConfig) -> bytes:
    """Return the hash of what all clients of a round must have alike: what they are asked for, arrays, config, and the
    run's configuration.

    What only says how it is computed (`engine.*`) may differ. An array is what its bytes, type and shape are in its own
    record: under the hash of another a server could slip one client a model of its own making.
    """
    arrays = {
        json.dumps([kind, name, array.stype, array.dtype, array.shape]): array.data
        for kind, record in content.array_records.items()
        for name, array in record.items()
    }
    # Validated once more: a default that was never written down may be 0 here and 0.0 there.
    run = {key: value for key, value in config.with_().flat().items() if not key.startswith("engine.")}
    told = [message_type, records.config_of(content), run]
    return content_hash(arrays, json.dumps(told, sort_keys=True, default=bytes.hex).encode())


def payload_of(
    config: RunConfig, size: int, told: Mapping[str, Any], numbers: Callable[[RunConfig, int], Mapping[str, float]]
) -> Payload | NoisyPayload:
    """Return how vectors of a round are made, from the config that all clients are sent.

    `numbers` says how large the numbers are that the strategy's clients send (`strategies.ClientHalf`).
    """
    cohort, norm = int(told[records.COHORT]), told.get(records.CLIPPING_NORM)
    if _noisy(config):
        number = int(told[records.SERVER_ROUND])
        least = survivors_of(config, cohort), honest_of(config, cohort)
        return NoisyPayload(config, size, cohort, *least, number, float(norm or 0.0))
    largest = int(told[records.LARGEST_WEIGHT])
    return Payload(config, size, cohort, largest, None if norm is None else float(norm), numbers(config, largest))


def least_of(config: RunConfig, cohort: int) -> int:
    """Return of how many of a cohort's clients a sum must be for anybody to see it: with noise in it, noise enough."""
    return survivors_of(config, cohort) if _noisy(config) else config.secure_aggregation.min_cohort


def _noisy(config: RunConfig) -> bool:
    return config.privacy.level == "client" and config.privacy.noise == "distributed"


def survivors_of(config: RunConfig, cohort: int) -> int:
    """Return how many of a cohort must be in its sum: fewer have too little noise."""
    own = config.secure_aggregation
    return max(own.min_cohort, cohort - int(own.dropout_tolerance * cohort))


def honest_of(config: RunConfig, cohort: int) -> int:
    """Return how many of those add noise that nobody takes away again: the corrupt ones know their own shares."""
    return max(1, survivors_of(config, cohort) - int(config.secure_aggregation.corrupt * cohort))
