"""What a hostile client may send: every answer here is refused in one sentence, and none breaks the reader."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from core.config import RunConfig
from core.records import CLIENTS, ENCODED, to_arrays, to_numpy
from server.build import build_strategy
from server.intake import refuse_odd, take_in

SENT = to_arrays({"w": np.zeros((2, 2), np.float32), "b": np.zeros(2, np.float32)})
GOOD: dict[str, Any] = {"w": np.ones((2, 2), np.float32), "b": np.ones(2, np.float32)}


def _reply(arrays: Any = None, metrics: Any = None, rows: Any = None) -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    content = RecordDict({CLIENTS: ConfigRecord(rows or {"client": [7], "num-examples": [5]})})
    content["metrics"] = MetricRecord(metrics or {"num-examples": 5, "train-loss": 0.1})
    content["arrays"] = arrays if isinstance(arrays, ArrayRecord) else to_arrays(GOOD if arrays is None else arrays)
    return Message(content, reply_to=Message(RecordDict(), 9, "train"))


def _refused(reply: Message, **compression: Any) -> str:
    config = RunConfig.of({f"compression.{key}": value for key, value in compression.items()})
    take_in(reply, SENT, config, 1, 3)
    return str(reply.error.reason) if reply.has_error() else ""


def test_an_honest_answer_passes_and_speaks_for_its_own_client() -> None:
    reply = _reply()
    assert _refused(reply) == ""
    assert reply.content[CLIENTS]["client"] == [3]
    assert to_numpy(reply.content["arrays"]["w"]).tolist() == [[1, 1], [1, 1]]


def _lying() -> ArrayRecord:
    """Return an array that says float32 (2, 2) and holds float64: a reader may take either half."""
    inside = Array(np.array([[np.nan, 1], [1, 1]]))
    return ArrayRecord({"w": Array("float32", (2, 2), "numpy.ndarray", inside.data), "b": to_arrays(GOOD)["b"]})


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ({"arrays": {**GOOD, "w": np.full((2, 2), np.nan, np.float32)}}, "'w' with numbers that are not finite"),
        ({"arrays": {**GOOD, "w": np.ones(4, np.float32)}}, r"'w' of shape \(4,\) in place of \(2, 2\)"),
        ({"arrays": {**GOOD, "c": np.ones(4, np.float32)}}, "'c', which the model does not have"),
        ({"arrays": {**GOOD, "w": np.ones((2, 2), np.complex64)}}, "'w' of type complex64"),
        ({"arrays": _lying()}, "'w' in a form that is not what it says"),
        ({"metrics": {"num-examples": float("nan")}}, "its num-examples is nan"),
        ({"metrics": {"num-examples": -9}}, "its num-examples is -9"),
        ({"metrics": {"num-examples": 0}}, "its num-examples is 0"),
        ({"metrics": {"num-examples": 5, "weight": float("inf")}}, "its weight is inf"),
        ({"metrics": {"num-examples": 5, "global-loss": float("nan")}}, "its global-loss is nan"),
        ({"rows": {"client": [1, 2], "num-examples": [5]}}, "its column client has 2 rows"),
        ({"rows": {"client": [1], "num-examples": [-5]}}, "its column num-examples is no count"),
        ({"rows": {"client": [1], "private-steps": ["many"]}}, "its column private-steps is no count"),
        ({"rows": {"client": [1], "private-steps": 3}}, "its column private-steps is no count"),
        ({"rows": {"client": [1], "train-loss": ["low"]}}, "its column train-loss is no number"),
        ({"rows": {"client": [1], ENCODED: 5}}, "its answer cannot be read"),
    ],
)
def test_what_no_model_should_take_is_refused(reply: dict[str, Any], words: str) -> None:
    import re

    reason = _refused(_reply(**reply))
    assert reason.startswith("rejected: ")
    assert re.search(words, reason), reason


def test_codes_that_stand_for_infinity_are_refused() -> None:
    arrays = {"compressed/codes": np.full(6, -128, np.int8), "compressed/scales": np.full(2, 3.4e38, np.float32)}
    reply = _reply(arrays, rows={"client": [3], ENCODED: ["w", "b"]})
    assert "not finite" in _refused(reply, kind="int8")
    few = {"compressed/places": np.arange(2, dtype=np.int32), "compressed/values": np.ones(2, np.float32)}
    reply = _reply(few, rows={"client": [3], ENCODED: ["w", "b"]})
    assert "(2,) numbers were sent, not 3" in _refused(reply, kind="top-k", fraction=0.5)


def test_an_answer_without_a_tensor_that_the_others_have_is_refused() -> None:
    replies = [_reply(), _reply({"w": GOOD["w"]}), _reply()]
    refuse_odd(replies)
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert "differs from the others' in b" in str(replies[1].error.reason)


@pytest.mark.parametrize(
    ("strategy", "metrics"),
    [
        ("ifca", {"cluster": 7.0}), ("ifca", {"cluster": -9.0}), ("qfedavg", {"global-loss": -1.0}),
        ("agnostic", {"global-loss": 1e20}),
    ],
)  # fmt: skip
def test_numbers_that_no_honest_client_says_do_not_break_the_server(strategy: str, metrics: dict[str, float]) -> None:
    server: Any = build_strategy(RunConfig.of({"strategy": strategy, "clients": 3}))
    own = {name: to_numpy(array) for name, array in SENT.items()}
    if strategy == "ifca":
        server.models = [own, own]
    server.current_arrays, server.mixture = SENT, np.full(3, 1 / 3)
    usual = {"num-examples": 5, "cluster": 0.0, "global-loss": 0.5}
    replies = [_reply(metrics={**usual, **said}, rows={"client": [k]}) for k, said in enumerate(({}, {}, metrics))]
    arrays, _ = server.aggregate_train(1, replies)
    assert all(np.isfinite(to_numpy(array)).all() for array in arrays.values())
    assert server.mixture.sum() == pytest.approx(1)
