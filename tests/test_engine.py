"""RayGrid and its pools: the same bits for any number of workers, partial means, failures that stay where they are."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import ray
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid
from safetensors.numpy import load_file

from client.app import HANDLERS, Reply
from core.config import RunConfig
from core.errors import InputError
from core.records import to_arrays, travelling
from server.build import check
from simulations.grid import RayGrid
from simulations.pool import LocalPool, RayPool, _share, start_ray
from simulations.run import preset, simulate
from simulations.worker import Worker, node_of
from tasks import load
from tasks.base import build_model


def _local(app: str, clients: int, cohort_size: int = 2) -> RayGrid:
    return RayGrid(LocalPool(lambda: Worker(f"foreign_apps:{app}", {}, clients, None)), clients, cohort_size)


def _train_messages(grid: Grid, nodes: list[int] | None = None) -> list[Message]:
    content = RecordDict({"arrays": ArrayRecord([np.zeros(3)]), "config": ConfigRecord({"server-round": 1})})
    return [Message(content, node, "train") for node in (nodes or grid.get_node_ids())]


def test_the_same_bits_and_records_with_0_1_2_and_4_workers(ray_session: None, tmp_path: Path) -> None:
    changes = {"baselines": False, "rounds": 2, "sampled": 7, "keep": "best", "out": str(tmp_path)}
    first = simulate(preset("medical", {**changes, "engine.workers": 0})).path
    # The size that `auto` measured stands in config.toml: with it the run is repeated.
    assert isinstance(preset(str(first / "config.toml")).engine.cohort_size, int)
    for workers in (1, 2, 4):
        other = simulate(preset(str(first / "config.toml"), {"engine.workers": workers})).path
        a, b = (load_file(run / "model.safetensors") for run in (first, other))
        assert all(np.array_equal(a[name], b[name]) for name in a)
        rounds = [[_untimed(json.loads(line)) for line in (run / "rounds.jsonl").open()] for run in (first, other)]
        assert rounds[0] == rounds[1]
        tables = [pd.read_parquet(run / "clients.parquet").drop(columns="train_seconds") for run in (first, other)]
        pd.testing.assert_frame_equal(*tables, check_exact=True)


def _untimed(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in ("seconds", "clients_per_second")}


def test_a_run_with_partial_means_equals_one_with_every_update(
    smoke: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = load_file(simulate(smoke()).path / "model.safetensors")
    monkeypatch.setattr("server.session.makes_partial_means", lambda config: False)
    every = load_file(simulate(smoke()).path / "model.safetensors")
    for name in partial:
        np.testing.assert_allclose(partial[name], every[name], atol=1e-6)


def test_cohorts_change_nothing_but_the_last_digits(smoke: Callable[..., RunConfig]) -> None:
    one = load_file(simulate(smoke(engine__cohort_size=1)).path / "model.safetensors")
    four = load_file(simulate(smoke(engine__cohort_size=4)).path / "model.safetensors")
    for name in one:
        np.testing.assert_allclose(one[name], four[name], atol=1e-5)


def test_any_client_app_runs_and_keeps_its_state() -> None:
    grid = _local("counting", clients=3)
    for times in (1, 2):
        replies = list(grid.send_and_receive(_train_messages(grid)))
        assert [reply.content["arrays"]["w"].numpy().item() for reply in replies] == [times] * 3
    assert len(grid.client_states) == 3


def test_push_and_pull_return_each_reply_once() -> None:
    grid = _local("counting", clients=5)
    ids = list(grid.push_messages(_train_messages(grid)))
    assert len(set(ids)) == 5
    pulled = []
    for _ in range(10):
        pulled += list(grid.pull_messages(ids))
    assert sorted(reply.metadata.src_node_id for reply in pulled) == [node_of(i) for i in range(5)]
    assert {reply.metadata.reply_to_message_id for reply in pulled} == set(ids)


def test_pushed_messages_are_answered_though_others_are_sent_meanwhile() -> None:
    grid = _local("counting", clients=4)
    ids = list(grid.push_messages(_train_messages(grid, [node_of(0), node_of(1)])))
    replies = list(grid.send_and_receive(_train_messages(grid, [node_of(2), node_of(3)])))
    assert [reply.metadata.src_node_id for reply in replies] == [node_of(2), node_of(3)]
    pulled = [reply for _ in range(3) for reply in grid.pull_messages(ids)]
    assert {reply.metadata.reply_to_message_id for reply in pulled} == set(ids)


def test_a_client_that_raises_is_an_error_reply_and_the_others_answer() -> None:
    grid = _local("raising", clients=4)
    replies = list(grid.send_and_receive(_train_messages(grid)))
    errors = [reply for reply in replies if reply.has_error()]
    assert len(replies) == 4
    assert [reply.metadata.src_node_id for reply in errors] == [node_of(1)]
    assert "the disk of partition 1 is gone" in str(errors[0].error.reason)


def test_replies_later_than_the_timeout_are_left_out() -> None:
    grid = _local("counting", clients=4)
    assert list(grid.send_and_receive(_train_messages(grid), timeout=0)) == []


def test_a_late_reply_is_left_out_and_the_others_are_kept(ray_session: None) -> None:
    pool = RayPool(2, "", ("foreign_apps:sleeping", {}, 4, None))
    try:
        grid = RayGrid(pool, 4, cohort_size=1)
        replies = list(grid.send_and_receive(_train_messages(grid), timeout=3.0))
    finally:
        pool.close()
    assert node_of(1) not in [reply.metadata.src_node_id for reply in replies]
    assert len(replies) >= 2


def test_a_worker_that_cannot_start_says_why_at_once(ray_session: None) -> None:
    with pytest.raises(RuntimeError, match=r"a worker cannot start: .*no_such_app"):
        RayPool(2, "", ("foreign_apps:no_such_app", {}, 2, None))


def test_an_address_where_nobody_listens_is_refused(smoke: Callable[..., RunConfig]) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # taken, and not listening
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(InputError, match=f"engine.address={address}: no Ray cluster answers there"):
            start_ray(ray, 1, address)
        assert time.monotonic() - began < 30
    with pytest.raises(InputError, match=r"engine\.address=.* does nothing with engine.workers=0"):
        simulate(smoke(engine__address=address))


def test_a_strategy_that_does_not_say_the_round_is_told_so(smoke: Callable[..., RunConfig]) -> None:
    with pytest.raises(RuntimeError, match="sent no 'server-round'; put it into configure_train's config"):
        simulate(smoke(strategy="foreign_plugins:Silent"))


@pytest.mark.parametrize("always", [False, True])
def test_a_worker_that_dies_is_replaced_and_its_cohort_runs_again(
    always: bool, ray_session: None, tmp_path: Path
) -> None:
    marker = tmp_path / "died"
    pool = RayPool(1, "", ("foreign_apps:deadly", {"marker": str(marker), "always": always}, 6, None))
    try:
        grid = RayGrid(pool, 6, cohort_size=2)
        replies = list(grid.send_and_receive(_train_messages(grid)))
    finally:
        pool.close()
    failed = [reply.metadata.src_node_id for reply in replies if reply.has_error()]
    # Partitions 2 and 3 share the cohort that kills its worker.
    assert failed == ([node_of(2), node_of(3)] if always else [])
    assert [reply.metadata.src_node_id for reply in replies] == [node_of(i) for i in range(6)]
    assert marker.exists()


def test_a_client_without_usable_data_fails_alone(
    smoke: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    import client.train

    real = client.train.inputs

    def broken(setting, split, clients, config):  # type: ignore[no-untyped-def]
        if split == "train" and 2 in clients:
            raise OSError("scanner offline")
        return real(setting, split, clients, config)

    monkeypatch.setattr(client.train, "inputs", broken)
    rows: list[dict] = []
    run = simulate(smoke(), on_round=rows.append)
    assert run.summary["status"] == "completed"
    assert [(row["sampled"], row["failed"]) for row in rows] == [(4, 1)] * 3
    assert rows[0]["failures"] == [{"client": 2, "reason": "client 2: OSError: scanner offline"}]


def test_a_model_that_diverges_is_refused_and_never_averaged(smoke: Callable[..., RunConfig]) -> None:
    with pytest.raises(RuntimeError, match=r"round 1 failed; the first: .*not finite.*; lower learning-rate"):
        simulate(smoke(learning_rate=1e30))


def test_every_client_gets_a_message_of_its_own() -> None:
    grid = _local("popping", clients=4, cohort_size=4)
    messages = _train_messages(grid)
    for _ in range(2):
        replies = list(grid.send_and_receive(messages))
        assert [reply.has_error() for reply in replies] == [False] * 4


def test_a_changed_content_is_sent_as_it_is_now(ray_session: None) -> None:
    """A ServerApp may keep one RecordDict and change it between rounds."""
    pool = RayPool(1, "", ("foreign_apps:echoing", {}, 2, None))
    try:
        grid = RayGrid(pool, 2, cohort_size=2)
        messages = _train_messages(grid)
        for value in (1.0, 2.0):
            messages[0].content["config"]["value"] = value
            replies = list(grid.send_and_receive(messages))
            assert [reply.content["arrays"]["w"].numpy().item() for reply in replies] == [value] * 2
    finally:
        pool.close()


def test_a_timed_out_round_leaves_nothing_to_later_ones() -> None:
    grid = _local("counting", clients=4)
    assert list(grid.send_and_receive(_train_messages(grid), timeout=0)) == []
    replies = list(grid.send_and_receive(_train_messages(grid)))
    assert [reply.content["arrays"]["w"].numpy().item() for reply in replies] == [1.0] * 4


def test_a_failed_evaluation_is_counted(smoke: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    import client.evaluate

    real = client.evaluate.inputs

    def broken(setting, split, clients, config):  # type: ignore[no-untyped-def]
        if split == "test" and 2 in clients:
            raise OSError("scanner offline")
        return real(setting, split, clients, config)

    monkeypatch.setattr(client.evaluate, "inputs", broken)
    rows: list[dict] = []
    simulate(smoke(rounds=1), on_round=rows.append)
    assert rows[0]["failed"] == 0
    assert rows[0]["failed_evaluations"] == 1


def _messages(config: RunConfig, partial: bool) -> tuple[LocalPool, RecordDict]:
    federation = check(config)
    arrays = to_arrays(travelling(build_model(load(config), 0)))
    constants = {"constants.mean": [0.0] * 30, "constants.std": [1.0] * 30, "server-round": 1, "partial-mean": partial}
    pool = LocalPool(lambda: Worker("client.app:app", config.flat(), config.clients, federation))
    return pool, RecordDict({"arrays": arrays, "config": ConfigRecord(constants)})


@pytest.mark.parametrize("partial", [True, False])
def test_several_cohorts_in_a_job_answer_what_they_answer_one_a_job(
    smoke: Callable[..., RunConfig], partial: bool
) -> None:
    pool, content = _messages(smoke(clients=10, engine__cohort_size=2), partial)
    answers = []
    for together in (2, 6):
        grid = RayGrid(pool, 10, together)
        answers.append(list(grid.send_and_receive([Message(content, node, "train") for node in grid.get_node_ids()])))
    assert [len(replies) for replies in answers] == [1 if partial else 10] * 2
    for one, other in zip(*answers, strict=True):
        assert one.content["metrics"]["num-examples"] == other.content["metrics"]["num-examples"]
        assert one.content["clients"]["client"] == other.content["clients"]["client"]
        for name, array in one.content["arrays"].items():
            np.testing.assert_allclose(array.numpy(), other.content["arrays"][name].numpy(), atol=1e-6)


def test_a_failing_client_of_a_job_costs_nobody_else_a_batch(
    smoke: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, content = _messages(smoke(clients=6, engine__cohort_size=2, local_steps=3), True)
    train = HANDLERS["train"]

    def failing(content: RecordDict, contexts: Sequence[Context]) -> list[Reply]:
        if any(context.node_config["partition-id"] == 3 for context in contexts):
            raise OSError("its disk is gone")
        return train(content, contexts)

    monkeypatch.setitem(HANDLERS, "train", failing)
    grid = RayGrid(pool, 6, cohort_size=6)
    mean, error = list(grid.send_and_receive([Message(content, node, "train") for node in grid.get_node_ids()]))
    assert sorted(mean.content["clients"]["client"]) == [0, 1, 2, 4, 5]
    assert "its disk is gone" in str(error.error.reason)
    drawn = {node: state["fedra"]["batches-drawn"] for node, state in grid.client_states.items()}
    assert drawn == {node_of(client): 3 for client in (0, 1, 2, 4, 5)}


def test_workers_never_ask_for_more_than_the_gpus_there_are() -> None:
    for workers, gpus, share in ((1, 1, 1.0), (2, 1, 0.5), (3, 2, 0.5), (8, 3, 0.333), (2, 8, 4.0), (3, 8, 2.0)):
        assert _share(gpus, workers) == share
    with pytest.raises(InputError, match=r"Ray finds no GPU; set engine.device=cpu"):
        _share(0.0, 2)


def test_a_federations_bytes_are_those_of_its_arrays(smoke: Callable[..., RunConfig]) -> None:
    federation = check(smoke())
    rows = sum(len(split.y) for split in (federation.train, federation.validation, federation.test, federation.central))
    assert federation.nbytes == rows * (30 * 4 + 8)


def test_a_clients_process_starts_without_what_only_plans_and_audits_need() -> None:
    # Flower starts one for every message.
    code = "import client.app, sys; print(*(name for name in ('scipy.stats', 'dp_accounting', 'pandas', 'opacus') "
    code += "if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []
