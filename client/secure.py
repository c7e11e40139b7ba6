"""A client's part in secure aggregation: it answers the protocol's stages, and trains into a masked vector.

The protocol is `privacy/secagg`; here are Flower's messages and what a client keeps of a round in `Context.state`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, RecordDict

from client.replies import Reply, refused
from core import bundle, records
from core.config import RunConfig
from core.devices import dropped
from core.records import client_of
from core.training import LocalUpdate
from privacy.noise import Simulated, Source
from privacy.secagg import exact, identities, messages
from privacy.secagg.client import Client, State
from privacy.secagg.distributed import NoisyPayload
from privacy.secagg.errors import RefusedError, SecAggError
from privacy.secagg.graph import MALICIOUS, MINIMUM, SEMI_HONEST
from privacy.secagg.journal import Journal
from privacy.secagg.keys import Derived
from privacy.secagg.messages import Message
from privacy.secagg.quantise import Layout
from privacy.secagg.rounds import hash_of, least_of, payload_of, run_name
from strategies import ClientHalf, client_half

# What a deployed client is started with: paths of its own key and of everybody's, and what it does not go below.
IDENTITY, ROSTER, PROFILE, MIN_COHORT = "secure-identity", "secure-roster", "secure-profile", "secure-min-cohort"
STATE = "state"
_STAGES: dict[str, tuple[str, type[Message]]] = {
    records.QUERY_ADVERTISE: ("advertise", messages.Terms),
    records.QUERY_SHARE: ("share", messages.Participants),
    records.QUERY_CONFIRM: ("confirm", messages.Survivors),
    records.QUERY_UNMASK: ("unmask", messages.UnmaskRequest),
}


class SecureClients:
    """The protocol's client for whoever of a run asks for one."""

    def __init__(self, config: RunConfig, half: ClientHalf) -> None:
        self._config, self._half = config, half

    @staticmethod
    def of(config: RunConfig, half: ClientHalf) -> SecureClients | None:
        """Return what the configuration asks for; None without secure aggregation."""
        return SecureClients(config, half) if config.secure_aggregation.profile != "none" else None

    def answer(self, message_type: str, content: RecordDict, contexts: Sequence[Context]) -> list[Reply]:
        """Return the answers to one of the protocol's own messages."""
        stage, kind = _STAGES[message_type]
        clients = [client_of(context) for context in contexts]
        lost = dropped(self._config, stage, server_round_of(content), clients) & (server_round_of(content) > 0)

        def answer(own: Client, part: bytes, i: int) -> Message:
            found: Message = getattr(own, stage)(kind.from_bytes(part))
            return found

        return self._each(content, contexts, answer, lost, stage)

    def masked(
        self, update: LocalUpdate, origin: Mapping[str, np.ndarray], names: Sequence[str], sizes: Sequence[int],
        content: RecordDict, contexts: Sequence[Context], sound: np.ndarray, noise: Source | None,
    ) -> list[Reply]:  # fmt: skip
        """Return the cohort's updates as masked vectors: tensors `names` minus those of `origin`, and their numbers.

        Clients (C,) bool that are not `sound` have no answer here. `noise` is where distributed privacy draws.
        """
        config, hashed = records.config_of(content), hash_of("train", content, self._config)
        number, cohort = int(config[records.SERVER_ROUND]), int(config[records.COHORT])
        # A server that names a large cohort and opens a small sum would have too little noise.
        least = least_of(self._config, cohort)
        tensors: dict[str, Any] = {**update.params, **bundle.beside(update.beside)}
        if tensors.keys() != set(names):
            raise ValueError(f"the update holds {sorted(tensors.keys() ^ set(names))[:3]}, of which nobody was told")
        # What travels beside the model is a difference already.
        away = {name: tensors[name].cpu().numpy() for name in names}
        away = {name: t if "/" in name else t - origin[name] for name, t in away.items()}
        layout = Layout.of({name: t[0] for name, t in away.items()})
        payload = payload_of(self._config, layout.size, config, self._half.numbers)
        numbers = {key: v.tolist() for key, v in {records.TRAIN_LOSS: update.loss, **update.metrics}.items()}
        weights = None if update.weight is None else update.weight.tolist()

        def answer(own: Client, part: bytes, i: int) -> Message:
            client = client_of(contexts[i])
            drawn: Source
            if isinstance(payload, NoisyPayload):
                assert noise is not None
                drawn = noise.at("share", number, client)
            else:
                drawn = Simulated(self._config.seed, "secure rounding", number, client)
            weight = None if weights is None else weights[i]
            each = {key: column[i] for key, column in numbers.items()}
            vector = payload.encode(
                layout.flatten({name: t[i] for name, t in away.items()}), sizes[i], weight, each, drawn
            )
            return own.mask(messages.Delivery.from_bytes(part), vector, hashed, least=least, most=cohort)

        return self._each(content, contexts, answer, ~sound, messages.MASK, told=False)

    def masked_statistics(
        self, values: Sequence[Sequence[float]], content: RecordDict, contexts: Sequence[Context]
    ) -> list[Reply]:
        """Return numbers of each client's as masked vectors, to be added up exactly.

        They are the same whenever it is asked: a second sum, of others, could show it alone. A client with an identity
        says them once a run; on one machine a run that is resumed asks again.
        """
        hashed = hash_of(records.QUERY_STATISTICS, content, self._config)

        def answer(own: Client, part: bytes, i: int) -> Message:
            return own.mask(messages.Delivery.from_bytes(part), exact.encode(values[i]), hashed)

        return self._each(content, contexts, answer, np.zeros(len(contexts), dtype=bool), messages.MASK, once=True)

    @staticmethod
    def forget(contexts: Sequence[Context]) -> None:
        """Let clients forget what is left of a round: it is over when they are asked for something else."""
        for context in contexts:
            if (kept := context.state.config_records.get(records.SECURE)) is not None:
                state = State.from_bytes(kept[STATE])  # type: ignore[arg-type]
                context.state[records.SECURE] = ConfigRecord({STATE: State(state.round).to_bytes()})

    def _each(
        self, content: RecordDict, contexts: Sequence[Context], answer: Callable[[Client, bytes, int], Message],
        lost: np.ndarray, stage: str, *, told: bool = True, once: bool = False,
    ) -> list[Reply]:  # fmt: skip
        """Return one reply with the answers of all that have one, and the errors of the others.

        Of those `lost` nothing is said where that was told (`told`) already. A client with an identity gives each
        answer of a `stage` once, and one that is for `once` a run in no other round either.
        """
        parts = parts_of(content)
        replies: list[Reply] = []
        # It is gone when the cohort has answered. A deployed client has nobody to share it with.
        derived: Derived | None = {} if len(contexts) > 1 else None
        done: list[int] = []
        answers: list[bytes] = []
        for i, context in enumerate(contexts):
            client = client_of(context)
            if lost[i]:
                if told:
                    replies.append(([i], refused(f"client {client}: its answer was lost", records.LOST)))
                continue
            own = self._open(context, derived)
            try:
                answered = answer(own, parts(client), i).to_bytes()
                if IDENTITY in context.node_config:
                    number = messages.STAGES.index(stage)
                    journal = Journal(str(context.node_config[IDENTITY]))
                    journal.claim(run_name(context.run_id), own.state.round, number, once=once)
                answers.append(answered)
                done.append(i)
            except (SecAggError, ValueError) as error:
                replies.append(([i], refused(f"client {client}: {type(error).__name__}: {error}")))
            context.state[records.SECURE] = ConfigRecord({STATE: own.state.to_bytes()})
        if done:
            record = ConfigRecord({records.CLIENT: [client_of(contexts[i]) for i in done], records.PART: answers})
            replies.insert(0, (done, RecordDict({records.SECURE: record})))
        return replies

    def _open(self, context: Context, derived: Derived | None) -> Client:
        """Return the protocol's client as it was left.

        Who it is and whom it believes comes from its operator. Only where it was given nothing, as on one machine,
        are keys simulated.
        """
        kept = context.state.config_records.get(records.SECURE)
        state = State.from_bytes(kept[STATE]) if kept is not None else State()  # type: ignore[arg-type]
        client, node, own = client_of(context), context.node_config, self._config.secure_aggregation
        if own.roster and IDENTITY not in node:
            raise RefusedError(
                f"this run has a roster, and client {client} was given no key of its own; start its node with "
                f"{IDENTITY}=PATH and {ROSTER}=PATH (`fedra identities` makes the files)"
            )
        if IDENTITY in node:
            identity = identities.read_identity(str(node[IDENTITY]))
            roster = identities.read_roster(str(node.get(ROSTER, "")))
            profile, minimum = str(node.get(PROFILE, MALICIOUS)), int(node.get(MIN_COHORT, MINIMUM))
        else:
            identity = identities.simulated_identity(self._config.seed, client)
            roster = identities.simulated_roster(self._config.seed, self._config.clients)
            profile, minimum = MALICIOUS if own.profile == MALICIOUS else SEMI_HONEST, own.min_cohort
        return Client(
            client, run_name(context.run_id), identity, roster, profile=profile, minimum=minimum, bits=own.bits,
            state=state, derived=derived,
        )  # fmt: skip


def open_secure(contexts: Sequence[Context]) -> SecureClients | None:
    """Return what the contexts' run configuration asks for, without the data and the model of `open_setting`."""
    return _opened(tuple(sorted(contexts[0].run_config.items())))


@functools.lru_cache(maxsize=1)
def _opened(items: tuple[tuple[str, Any], ...]) -> SecureClients | None:
    config = RunConfig.of(dict(items))
    return SecureClients.of(config, client_half(config))


def refuse_in_clear(message_type: str, content: RecordDict, contexts: Sequence[Context]) -> None:
    """Raise `RefusedError` for a message to which an honest answer would show what only a sum may.

    What a run is like is for the server to say, but not against a client's operator, who has given it an identity for
    sums in which everybody's update is, and noise that nobody knows.
    """
    config = contexts[0].run_config
    identified = any(IDENTITY in context.node_config for context in contexts)
    if config.get("secure-aggregation.profile", "none") == "none":
        if identified:
            raise RefusedError(
                f"this run has secure-aggregation.profile=none, and a client with {IDENTITY} takes part in secure "
                "sums alone; set malicious, or start its node without it"
            )
        return
    if identified and (kind := config.get("attack.kind", "none")) != "none":
        raise RefusedError(
            f"this run has attack.kind={kind}, and where others do not send what they have learnt a sum may be of one "
            f"client; set none, or start its node without {IDENTITY}"
        )
    if identified and config.get("privacy.level", "none") != "none" and int(config.get("privacy.noise-seed", -1)) >= 0:
        raise RefusedError(
            f"this run has privacy.noise-seed={config['privacy.noise-seed']}, and noise of a seed hides nothing from "
            f"who knows it; set -1, or start its node without {IDENTITY}"
        )
    if message_type == "train" and records.SECURE not in content:
        raise RefusedError("under secure aggregation nobody trains for an answer that is not masked")
    if message_type == "evaluate" and records.config_of(content).get(records.SPLIT) == "train":
        raise RefusedError("under secure aggregation nobody tells its own loss on its training examples")


def server_round_of(content: RecordDict) -> int:
    """Return the training round that a message of the protocol belongs to; 0 before the first."""
    return int(content.config_records[records.SECURE].get(records.SERVER_ROUND, 0))  # type: ignore[arg-type]


def parts_of(content: RecordDict) -> Callable[[int], bytes]:
    """Return what finds a client's part of a message: the same for all, or its own of several."""
    record = content.config_records[records.SECURE]
    part = record[records.PART]
    if isinstance(part, bytes):
        return lambda client: part
    own = dict(zip(record[records.CLIENT], part, strict=True))  # type: ignore[arg-type]

    def find(client: int) -> bytes:
        if client not in own:
            raise ValueError(f"there is nothing for client {client} in the message")
        found: bytes = own[client]  # type: ignore[assignment]
        return found

    return find
