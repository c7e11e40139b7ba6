"""What arrives from clients: decoded if it is compressed, and refused if it would poison a model or a table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from core import bundle, compression, records
from core.config import RunConfig

# Columns that tables and ledgers are made of.
_COUNTS = (records.NUM_EXAMPLES, records.PRIVATE_STEPS, records.DROPPED)
_NUMBERS = (records.TRAIN_LOSS, records.TRAIN_SECONDS)


def take_in(
    reply: Message, sent: ArrayRecord | None, config: RunConfig | None, server_round: int, client: int | None
) -> None:
    """Make a reply what the server expects; one that cannot be becomes an error, which says why.

    `sent` is the model that went out with a training message, None for other messages. `client` is whose reply it is;
    None where the local engine answers, which may speak for many. Strategies see errors as they see those of clients
    that failed: nothing of the answer enters the model.
    """
    try:
        reason = _numbers(reply.content, client)
        if not reason and sent is not None:
            reason = _model(reply.content, sent, config, server_round)
    except Exception as error:
        # A hostile answer may break the reader anywhere; what it cannot read it refuses.
        reason = f"its answer cannot be read ({type(error).__name__}: {error})"
    if reason:
        refuse(reply, reason)


def refuse(reply: Message, reason: str) -> None:
    """Turn a reply into an error."""
    reply.__dict__["_content"] = None
    reply.error = Error(ErrorCode.UNKNOWN, f"{records.REJECTED}: {reason}")


def refuse_odd(replies: Sequence[Message]) -> None:
    """Refuse training replies whose tensors or numbers have other names than most of the round's have."""
    names = {id(reply): _names(reply.content) for reply in replies}
    if len(set(names.values())) > 1:
        [(usual, _)] = Counter(names.values()).most_common(1)
        for reply in replies:
            if odd := names[id(reply)] ^ usual:
                refuse(reply, f"it differs from the others' in {', '.join(sorted(odd)[:3])}")


def _names(content: RecordDict) -> frozenset[str]:
    arrays = {name for record in content.array_records.values() for name in record}
    return frozenset(arrays | {f"the number {name}" for name in records.metrics_of(content)})


def _numbers(content: RecordDict, client: int | None) -> str:
    """Return what is wrong with a reply's numbers; a client speaks for itself alone, whatever number it gives."""
    if len(content.metric_records) != 1:
        return f"it has {len(content.metric_records)} records of metrics in place of one"
    metrics = records.metrics_of(content)
    if not metrics.get(records.NUM_EXAMPLES, 1) >= 0:
        return f"its {records.NUM_EXAMPLES} is {metrics[records.NUM_EXAMPLES]}"
    if client is None:
        return ""
    rows: dict[str, Any] = dict(content.config_records.get(records.CLIENTS, ConfigRecord()))
    for name, column in rows.items():
        if isinstance(column, list) and name != records.ENCODED and len(column) != 1:
            return f"its column {name} has {len(column)} rows"
        if name in _NUMBERS and not (isinstance(column, list) and isinstance(column[0], int | float)):
            return f"its column {name} is no number"
        if name in _COUNTS and not (isinstance(column, list) and isinstance(column[0], int) and column[0] >= 0):
            return f"its column {name} is no count"
    content[records.CLIENTS] = ConfigRecord({**rows, records.CLIENT: [client]})
    return ""


def _model(content: RecordDict, sent: ArrayRecord, config: RunConfig | None, server_round: int) -> str:
    """Return why a training reply must not enter the model; decode it where it is compressed."""
    if len(content.array_records) != 1:
        return f"it has {len(content.array_records)} records of arrays in place of one"
    for name, value in records.metrics_of(content).items():
        weight = name in (records.NUM_EXAMPLES, records.WEIGHT)
        if isinstance(value, list) or not math.isfinite(value) or (weight and value <= 0):
            return f"its {name} is {value}"
    reason = records.refusal(content, sent)
    rows: dict[str, Any] = dict(content.config_records.get(records.CLIENTS, ConfigRecord()))
    names = rows.pop(records.ENCODED, None)
    if reason or names is None or config is None:
        return reason
    model, _ = bundle.split(sent)
    own = {name: records.to_numpy(array) for name, array in model.items()}
    arrays = content.array_records[records.ARRAYS]
    content[records.ARRAYS] = compression.unpacked(arrays, config, names, own, server_round)
    content[records.CLIENTS] = ConfigRecord(rows)
    # Codes may be harmless and what they stand for not.
    return records.refusal(content, sent)
