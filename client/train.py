"""A cohort trains: data, time, local update, state, processors, replies; each step one line of `train`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, RecordDict

from client import replies
from client.replies import Reply
from client.setting import Setting, batches_of, inputs, note_batches, open_setting, received
from core import adversary, bundle, compression, records
from core.devices import Work
from core.optimizers import learning_rate, make_optimizer
from core.records import Tensors, client_of
from core.seeding import seeds
from core.training import LocalRound, LocalUpdate, assemble, train_each


@dataclass(frozen=True)
class _Round:
    """What the server sent, read once for a cohort."""

    number: int
    config: Mapping[str, Any]
    params: Tensors
    sent: dict[str, Tensors]
    arrays: ArrayRecord
    bytes: int

    @staticmethod
    def of(content: RecordDict, setting: Setting) -> _Round:
        number = records.server_round(content)
        if number is None:
            raise ValueError(f"the strategy sent no '{records.SERVER_ROUND}'; put it into configure_train's config")
        params, sent = received(content, setting)
        arrays = content.array_records[records.ARRAYS]
        return _Round(number, records.config_of(content), params, sent, arrays, records.array_bytes(content))


def train(content: RecordDict, contexts: Sequence[Context]) -> list[Reply]:
    """Return the cohort's new models, or their weighted mean where the server asked for no more."""
    began = time.perf_counter()
    setting = open_setting(contexts)
    this = _Round.of(content, setting)
    everyone = [client_of(context) for context in contexts]
    work = _work(setting, everyone, this)
    at = [i for i, steps in enumerate(work.steps) if steps] if work else list(range(len(everyone)))
    lost = [(i, reason) for i, reason in enumerate(work.reasons) if reason] if work else []
    at, poor = _affordable(setting, everyone, contexts, at)
    lost += [(i, "its privacy budget is spent") for i in poor]
    absent: list[Reply] = [([i], replies.refused(f"client {everyone[i]}: {why}", records.LOST)) for i, why in lost]
    if not at:
        return absent
    clients, own = [everyone[i] for i in at], [contexts[i] for i in at]
    update, r = _learn(setting, this, clients, own, work.steps[at] if work else None)
    hostile = np.zeros(len(clients), dtype=bool)
    for processor in setting.processors:
        update = processor(update, r)
    taken: Mapping[str, Sequence[int]] = {}
    columns: dict[str, Sequence[Any]] = {}
    if setting.privacy:
        update = setting.privacy.protect(update, r, this.number, clients)
        taken = setting.privacy.taken(r)
        setting.privacy.note(own, r.sizes, taken)
        columns = {records.CANARIES: seen} if (seen := setting.privacy.canaries(r)) else {}
    if setting.attack:
        hostile = setting.attack.careless(clients)
        update = setting.attack(update, r, clients, lambda chosen: _learn(setting, this, chosen, None, None)[0])
    encoded = None
    if setting.compressor:
        update, encoded = setting.compressor(update, r)
    columns[records.TRAIN_SECONDS] = [(time.perf_counter() - began) / len(clients)] * len(clients)
    columns |= taken
    if encoded:
        columns[records.UPLINK_BYTES] = [encoded.bytes()] * len(clients)
    if work:
        columns[records.VIRTUAL_SECONDS] = work.seconds[at].tolist()
    partial = bool(this.config.get(records.PARTIAL_MEAN))
    if setting.secure:
        answers = _masked(setting, this, update, r, content, own)
    else:
        answers = replies.of_update(update, clients, r.sizes, columns, partial, hostile, None if partial else encoded)
        if setting.attack:
            setting.attack.spoil([answer for positions, answer in answers if hostile[positions[0]]])
    sound = {i for positions, answer in answers if isinstance(answer, RecordDict) for i in positions}
    keep = sorted(sound)
    note_batches(setting.config, [own[i] for i in keep], r.batches.steps[keep].tolist())
    state = update.state
    if state and len(keep) < len(clients):
        # Choosing copies every state: not where all are chosen.
        state = {kind: {name: t[keep] for name, t in kept.items()} for kind, kept in state.items()}
    bundle.write_state([own[i] for i in keep], state)
    return [([at[i] for i in positions], answer) for positions, answer in answers] + absent


def _masked(
    setting: Setting, this: _Round, update: LocalUpdate, r: LocalRound, content: RecordDict, contexts: Sequence[Context]
) -> list[Reply]:
    """Return the cohort's answers under secure aggregation: vectors of which the server learns the sum alone."""
    assert setting.secure is not None
    sound = replies.finite(update)
    origin = {name: p.cpu().numpy() for name, p in this.params.items()}
    noise = setting.privacy.source() if setting.privacy else None
    answers = setting.secure.masked(update, origin, setting.sends, r.sizes, content, contexts, sound, noise)
    return answers + replies.not_finite([client_of(context) for context in contexts], sound)


def _work(setting: Setting, clients: Sequence[int], this: _Round) -> Work | None:
    """Return what the clients get done in this round; None where neither devices nor faults are configured."""
    if setting.devices is None:
        return None
    config, sizes = setting.config, setting.data.train.sizes[list(clients)]
    deadline = float(this.config.get(records.DEADLINE, config.devices.deadline_seconds))
    up = compression.uplink_bytes(config, setting.sends, this.arrays)
    return setting.devices.work(this.number, clients, sizes, this.bytes, up, deadline)


def _affordable(
    setting: Setting, clients: Sequence[int], contexts: Sequence[Context], at: list[int]
) -> tuple[list[int], list[int]]:
    """Return which of the clients at these positions may train, and which have no privacy left to spend."""
    if setting.privacy is None:
        return at, []
    sizes = setting.data.train.sizes[list(clients)]
    exhausted = setting.privacy.exhausted([contexts[i] for i in at], sizes[at].tolist())
    return [i for i, out in zip(at, exhausted, strict=True) if not out], [
        i for i, out in zip(at, exhausted, strict=True) if out
    ]


def _learn(
    setting: Setting, this: _Round, clients: Sequence[int], contexts: Sequence[Context] | None, steps: np.ndarray | None
) -> tuple[LocalUpdate, LocalRound]:
    """Return what the clients learn and the round they learn it in; without contexts, as clients without a past."""
    config = setting.config
    x, y, sizes = inputs(setting, "train", clients, this.config)
    if min(sizes) == 0:
        raise ValueError("no training examples")
    x, y = adversary.poisoned(config, x, y, sizes, clients, len(setting.task.labels))
    # Colluders that train each other's data have no secrets to keep.
    private = setting.privacy if contexts is not None else None
    batches = private.batches(this.number, clients, sizes) if private else None
    if batches is None:
        batches = batches_of(config, this.number, clients, sizes, contexts or [_blank() for _ in clients])
    own = (private and private.seeds(clients)) or seeds(config.seed, "model", this.number, clients=clients)
    cohort = assemble(
        config, setting.model, setting.task.loss, x, y,
        batches if steps is None else batches.cut(steps),
        make_optimizer(config, learning_rate(config, this.number)),
        global_params=this.params,
        config=this.config,
        seed=own[0],
        seeds=own,
        sizes=tuple(sizes),
        options=setting.half.options,
        sent=this.sent,
        private=private.steps(this.number, clients, sizes) if private else None,
    )  # fmt: skip
    cohort = setting.with_past(cohort, contexts or [_blank() for _ in clients])
    return train_each(setting.half.local_update, cohort), cohort


def _blank() -> Context:
    return Context(run_id=0, node_id=0, node_config={}, state=RecordDict(), run_config={})
