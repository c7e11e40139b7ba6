"""What arrives from clients: decoded if it is compressed, and refused if it would poison a model."""

from __future__ import annotations

from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Error, Message
from flwr.common.constant import ErrorCode

from core import bundle, compression, records
from core.config import RunConfig


def take_in(reply: Message, sent: ArrayRecord, config: RunConfig | None, server_round: int) -> None:
    """Make a training reply plain arrays that fit what was `sent`; one that cannot be becomes an error, which says why.

    Strategies see errors as they see those of clients that failed: nothing of the answer enters the model.
    """
    content = reply.content
    reason = records.refusal(content, sent)
    rows: dict[str, Any] = dict(content.config_records.get(records.CLIENTS, ConfigRecord()))
    names = rows.pop(records.ENCODED, None)
    if not reason and names is not None and config is not None:
        model, _ = bundle.split(sent)
        own = {name: records.to_numpy(array) for name, array in model.items()}
        try:
            arrays = content.array_records[records.ARRAYS]
            content[records.ARRAYS] = compression.unpacked(arrays, config, names, own, server_round)
            content[records.CLIENTS] = ConfigRecord(rows)
        except (ValueError, KeyError, RuntimeError) as error:
            reason = f"its update cannot be decoded ({error})"
    if reason:
        reply.__dict__["_content"] = None
        reply.error = Error(ErrorCode.UNKNOWN, f"{records.REJECTED}: {reason}")
