"""Checkpoints without pickles: what goes in comes out, and what cannot be saved is refused loudly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from core import tree
from core.errors import InputError
from server.checkpoint import Checkpoint, Writer, load, refuse_unsaved, restore_strategy, strategy_state


def _checkpoint(server_round: int, **changes: object) -> Checkpoint:
    arrays = ArrayRecord({"w": Array(np.arange(3, dtype=np.float32))})
    fields = {"strategy": {}, "unsaved": [], "client_states": {}, "progress": {}, **changes}
    return Checkpoint(round=server_round, arrays=arrays, **fields)  # type: ignore[arg-type]


def test_a_tree_comes_back_as_it_was(tmp_path: Path) -> None:
    records = RecordDict(
        {"a": ArrayRecord({"w": Array(np.ones((2, 1)))}), "c": ConfigRecord({"name": "x", "on": True, "raw": b"\x00y"})}
    )
    before = {
        "numbers": [1, 2.5, None, "x", True],
        "pair": (np.float32(0.5), {"deep": np.arange(4, dtype=np.int64)}),
        "states": {7: records, 9: RecordDict({"m": MetricRecord({"n": 3})})},
        "scalar": np.array(2.0),
    }
    for name, content in tree.dump(before, "state").items():
        (tmp_path / name).write_bytes(content)
    after = tree.load(tmp_path, "state")
    assert after["numbers"] == before["numbers"]
    assert isinstance(after["pair"], tuple)
    assert after["pair"][1]["deep"].tolist() == [0, 1, 2, 3]
    assert after["states"][7]["c"] == records["c"]
    assert after["states"][7]["a"]["w"].numpy().tolist() == [[1.0], [1.0]]
    assert after["states"][9]["m"]["n"] == 3
    assert after["scalar"].shape == ()


@pytest.mark.parametrize(
    "value",
    [object(), {(1, 2): 3}, lambda: None, {1, 2}, np.array(["x"]), np.complex128(1), np.datetime64("2026")],
)
def test_what_a_tree_cannot_hold_is_an_error_that_names_the_place(value: object) -> None:
    with pytest.raises(TypeError, match="state/inner/0"):
        tree.dump({"inner": [value]}, "state")


def test_only_the_newest_checkpoint_is_kept_and_a_half_written_one_is_ignored(tmp_path: Path) -> None:
    assert load(tmp_path) is None
    writer = Writer(tmp_path)
    writer.save(_checkpoint(1))
    writer.save(_checkpoint(2))
    writer.close()
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "state.json").write_text('{"dict": [')
    found = load(tmp_path)
    assert found is not None
    assert found.round == 2
    assert [folder.name for folder in tmp_path.glob("round-*")] == ["round-000002"]


def test_clients_states_are_written_as_they_change_and_read_as_of_the_checkpoint(tmp_path: Path) -> None:
    def state(value: int) -> RecordDict:
        return RecordDict({"kept": ConfigRecord({"value": value})})

    writer, states = Writer(tmp_path), {node: state(0) for node in range(4)}
    writer.save(_checkpoint(1, client_states=dict(states)), states.keys())
    for server_round in range(2, 9):
        node = server_round % 4
        states[node] = state(server_round)
        writer.save(_checkpoint(server_round, client_states=dict(states)), {node})
        writer.wait()
        found = load(tmp_path)
        assert found is not None
        values = {key: kept["kept"]["value"] for key, kept in found.client_states.items()}
        assert values == {key: kept["kept"]["value"] for key, kept in states.items()}
        assert len(list((tmp_path / "clients").iterdir())) <= 2 * 5
    writer.close()
    # A kill between the clients' states and the checkpoint leaves the round before.
    (tmp_path / "clients" / "round-000009.json").write_text("{")
    assert load(tmp_path).round == 8  # type: ignore[union-attr]


class _Remembers(FedAvg):
    def __init__(self) -> None:
        super().__init__()
        self.total = np.zeros(2)
        self.queue: object = []


def test_a_strategy_gets_back_every_attribute_that_is_not_a_function() -> None:
    before, after = _Remembers(), _Remembers()
    before.total += 3
    state, unsaved = strategy_state(before)
    assert unsaved == []
    restore_strategy(after, _checkpoint(1, strategy=state))
    assert after.total.tolist() == [3, 3]
    assert callable(after.train_metrics_aggr_fn)


def test_a_strategy_that_keeps_what_cannot_be_saved_is_not_resumed() -> None:
    strategy = _Remembers()
    strategy.queue = {1, 2}
    state, unsaved = strategy_state(strategy)
    assert unsaved == ["queue"]
    with pytest.raises(InputError, match=r"keeps queue.*load_state_dict"):
        refuse_unsaved(_checkpoint(1, strategy=state, unsaved=unsaved))
