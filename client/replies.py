"""From a cohort's update to replies: a mean where the server asked for no more, else an answer for each client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from torch import Tensor

from core import bundle, compression, records
from core.compression import Encoded
from core.training import LocalUpdate

Reply = tuple[list[int], RecordDict | Error]
"""Positions of the clients that an answer stands for, and the answer."""
NOT_FINITE = "the trained model is not finite, or its loss is not; lower learning-rate or set gradient-clip"


def merged(replies: Sequence[Reply], sent: ArrayRecord) -> list[Reply]:
    """Return the cohorts' means as one; errors, and what the server will refuse, stay as they are."""
    means: list[Reply] = []
    others: list[Reply] = []
    for reply in replies:
        sound = isinstance(reply[1], RecordDict) and not records.refusal(reply[1], sent)
        (means if sound else others).append(reply)
    mean = records.MergedReply()
    for _, content in means:
        assert isinstance(content, RecordDict)
        mean.add(content)
    whole: list[Reply] = [([i for positions, _ in means for i in positions], mean.content())] if means else []
    return whole + others


def answer(metrics: dict[str, Any], clients: dict[str, Any]) -> RecordDict:
    """Return a reply's records: metrics of the whole answer, and a column a number for the clients it stands for."""
    return RecordDict({records.METRICS: MetricRecord(metrics), records.CLIENTS: ConfigRecord(clients)})


def refused(reason: str, code: int = ErrorCode.CLIENT_APP_RAISED_EXCEPTION) -> Error:
    """Return the answer of a client that cannot give one."""
    return Error(code, reason)


def finite(update: LocalUpdate) -> np.ndarray:
    """Return which clients' tensors and numbers are finite, (C,) bool."""
    # What it keeps counts too: a personal model that is not finite would never recover.
    kinds = (*update.beside.values(), *update.state.values())
    tensors = [*update.params.values(), *(t for own in kinds for t in own.values())]
    # A sum is not finite where one of its terms is not, and costs an eighth of looking at each.
    sums = torch.stack([t.reshape(len(t), -1).sum(1) for t in tensors])
    # In a mean of the cohort one client's endless loss would be everybody's, and the server would take none of it.
    sums = torch.cat([sums, *(v.to(sums).unsqueeze(0) for v in (update.loss, *update.metrics.values()))])
    found: np.ndarray = sums.isfinite().all(0).cpu().numpy()
    return found


def of_update(
    update: LocalUpdate, clients: Sequence[int], sizes: Sequence[int], columns: dict[str, Sequence[Any]], partial: bool,
    hostile: np.ndarray, encoded: Encoded | None = None,
) -> list[Reply]:  # fmt: skip
    """Return the replies of a cohort: one mean if `partial`, else an answer for each.

    `columns` are further numbers of each client. A model or a loss that is not finite would poison every mean that it
    enters: it is its client's error. Clients (C,) bool that are `hostile` do not look, and answer alone with whatever
    they have.
    """
    good = finite(update) & ~hostile
    together = np.flatnonzero(good).tolist()
    groups = [together] if partial and together else [[i] for i in together]
    groups += [[i] for i in np.flatnonzero(hostile).tolist()]
    replies: list[Reply] = [(group, _trained(update, group, clients, sizes, columns, encoded)) for group in groups]
    return replies + not_finite(clients, good | hostile)


def not_finite(clients: Sequence[int], sound: np.ndarray) -> list[Reply]:
    """Return the errors of those clients (C,) bool that are not sound."""
    return [([i], refused(f"client {clients[i]}: {NOT_FINITE}")) for i in np.flatnonzero(~sound).tolist()]


def _trained(
    update: LocalUpdate, group: list[int], clients: Sequence[int], sizes: Sequence[int],
    columns: dict[str, Sequence[Any]], encoded: Encoded | None,
) -> RecordDict:  # fmt: skip
    examples = torch.tensor([float(sizes[i]) for i in group], device=update.loss.device)
    weights = examples if update.weight is None else update.weight[group]
    share = weights / weights.sum().clamp_min(1e-30)

    def mean(values: Tensor) -> Tensor:
        if len(group) == 1:
            return values[group[0]]
        # Choosing copies every model: not where all are chosen.
        return torch.tensordot(share, values if len(group) == len(sizes) else values[group], dims=1)

    metrics: dict[str, Any] = {records.NUM_EXAMPLES: sum(sizes[i] for i in group)}
    if update.weight is not None:
        metrics[records.WEIGHT] = float(weights.sum())
    metrics |= {key: float(mean(v)) for key, v in {records.TRAIN_LOSS: update.loss, **update.metrics}.items()}
    content = answer(
        metrics,
        {
            records.CLIENT: [clients[i] for i in group],
            records.NUM_EXAMPLES: [sizes[i] for i in group],
            records.TRAIN_LOSS: update.loss[group].tolist(),
            **{name: [values[i] for i in group] for name, values in columns.items()},
        },
    )
    if encoded is not None and len(group) == 1:
        content[records.ARRAYS] = compression.packed(encoded, group[0])
        content.config_records[records.CLIENTS][records.ENCODED] = list(update.params)
    else:
        tensors = {**update.params, **bundle.beside(update.beside)}
        content[records.ARRAYS] = records.to_arrays({name: mean(t) for name, t in tensors.items()})  # type: ignore[arg-type]
    return content
