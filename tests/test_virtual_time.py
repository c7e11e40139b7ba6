"""The virtual clock: seconds by hand from a trace, deadlines, over-selection, lost answers, and runs without rounds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from flwr.app import Message
from test_selection import Elsewhere

from core import records
from core.config import RunConfig
from core.devices import Devices
from core.errors import InputError
from server.app import train
from server.build import build_strategy, check
from server.recorder import RunFolder
from simulations.run import Run, engine, resume, simulate

Smoke = Callable[..., RunConfig]
# Seconds an example: client 0 takes 1, client 1 takes 3. Nothing is moved in no time to speak of.
TRACE = "seconds_per_example,uplink_bytes_per_second,downlink_bytes_per_second\n1,1e12,1e12\n3,1e12,1e12\n"
TWO = "1,0,1;2,4,1"


@pytest.fixture
def two(smoke: Smoke, tmp_path: Path) -> Callable[..., Run]:
    """Return a function that runs the two parabolas on the two devices, jitter apart."""
    (tmp_path / "trace.csv").write_text(TRACE)

    def run(strategy: str = "fedavg", **changes: Any) -> Run:
        options = {key: changes.pop(key) for key in list(changes) if "." in key}
        config = smoke(
            task="lines:Lines", dataset=TWO, clients=2, strategy=strategy, batch_size=1,
            learning_rate=0.1, engine__cohort_size=2, devices__kind="trace", devices__jitter=0,
            devices__trace=str(tmp_path / "trace.csv"), **{"rounds": 2, "local_epochs": 1, **changes},
        )  # fmt: skip
        return simulate(RunConfig.of({**config.flat(), **options}))

    return run


def _rows(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "rounds.jsonl").read_text().splitlines()]


def _weight(run: Run) -> float:
    return float(run.model().get_submodule("0").weight.detach())


def test_a_round_takes_as_long_as_its_slowest_client(two: Callable[..., Run]) -> None:
    run = two(local_epochs=2)
    assert run.summary["virtual_seconds"] == pytest.approx(12, abs=1e-3)
    assert [row["virtual_round_seconds"] for row in _rows(run)] == pytest.approx([6, 6], abs=1e-3)
    assert [row["virtual_seconds"] for row in _rows(run)] == pytest.approx([6, 12], abs=1e-3)
    # It does not wait for a deadline that everybody keeps.
    kept = two(local_epochs=2, **{"devices.deadline-seconds": 100.0})
    assert kept.summary["virtual_seconds"] == pytest.approx(12, abs=1e-3)


def test_what_is_not_there_at_the_deadline_is_lost(two: Callable[..., Run]) -> None:
    run = two(**{"devices.deadline-seconds": 2.0})
    assert run.summary["answers"] == {"lost": 2, "rejected": 0}
    assert run.summary["virtual_seconds"] == pytest.approx(4)
    # Only client 0, whose loss is least at 0, where the model begins.
    assert _weight(run) == 0
    assert _rows(run)[0]["failures"] == [{"client": 1, "reason": "client 1: it did not finish in time"}]


def test_or_counts_as_far_as_it_came(two: Callable[..., Run]) -> None:
    run = two(rounds=1, local_epochs=4, **{"devices.deadline-seconds": 7.0, "faults.late": "partial"})
    # Client 1 does two of its four steps in 7 seconds: w = 2 - 2 * 0.6^2.
    assert run.summary["answers"]["lost"] == 0
    assert _weight(run) == pytest.approx((2 - 2 * 0.6**2) / 2, abs=1e-6)
    assert run.summary["virtual_seconds"] == pytest.approx(7)


@pytest.mark.parametrize("steps", ["local_epochs", "local_steps"])
def test_fednova_weighs_the_steps_that_were_taken_and_not_those_asked_for(steps: str, two: Callable[..., Run]) -> None:
    # Client 1 does two of its four steps: d = 1.28 / 2. Client 0 stays at its optimum; tau_eff is (4 + 2) / 2.
    run = two("fednova", rounds=1, **{steps: 4, "devices.deadline-seconds": 7.0, "faults.late": "partial"})
    assert _weight(run) == pytest.approx(3 * 0.64 / 2, abs=1e-6)


def test_over_selection_takes_the_first_to_answer(two: Callable[..., Run]) -> None:
    run = two(sampled=1, **{"sampling.over-selection": 2.0})
    assert [row["sampled"] for row in _rows(run)] == [2, 2]
    assert run.summary["answers"]["lost"] == 2
    assert run.summary["virtual_seconds"] == pytest.approx(2, abs=1e-3)
    assert _weight(run) == 0


def test_the_first_to_answer_are_among_those_who_can(smoke: Smoke) -> None:
    config = smoke(
        clients=12, sampled=3, rounds=8, devices__kind="lognormal", devices__availability=0.6,
        sampling__over_selection=2.0,
    )  # fmt: skip
    answered, reachable = [], []
    for row in _rows(simulate(config)):
        assert row["sampled"] == 6
        away = sum("cannot be reached" in failure["reason"] for failure in row["failures"])
        answered.append(row["sampled"] - row["lost"])
        reachable.append(6 - away)
    assert answered == [min(3, count) for count in reachable]
    assert min(reachable) < 6


def test_fedasync_by_hand(two: Callable[..., Run]) -> None:
    # Both begin with w = 0, where A's loss is least: its answers after 1 and 2 seconds move nothing. After 3 come B's,
    # begun with version 0 and so stale by 2, and A's third.
    run = two("fedasync", rounds=2, **{"strategy-options.mixing": 0.5})
    assert run.summary["virtual_seconds"] == pytest.approx(2, abs=1e-3)
    assert _weight(run) == 0
    run = two("fedasync", rounds=3, **{"strategy-options.mixing": 0.5})
    assert run.summary["virtual_seconds"] == pytest.approx(3, abs=1e-3)
    assert _weight(run) == pytest.approx(0.5 * 3**-0.5 * 0.8, abs=1e-6)


def test_fedbuff_by_hand(two: Callable[..., Run]) -> None:
    # A's answer after 1 second waits for B's after 3, both begun with w = 0.
    run = two("fedbuff", rounds=1, **{"strategy-options.buffer-size": 2})
    assert _weight(run) == pytest.approx((0 + 0.8) / 2, abs=1e-6)
    assert run.summary["virtual_seconds"] == pytest.approx(3, abs=1e-3)


def test_fedbuff_discounts_what_is_stale_and_takes_the_servers_rate(two: Callable[..., Run]) -> None:
    # As in `test_fedasync_by_hand`: the third answer is B's update of 0.8, stale by 2.
    options = {"strategy-options.buffer-size": 1, "strategy-options.server-learning-rate": 0.5}
    assert _weight(two("fedbuff", rounds=3, **options)) == pytest.approx(0.5 * 3**-0.5 * 0.8, abs=1e-6)


def test_fedbuffs_statistics_move_towards_those_that_came() -> None:
    options = {"strategy-options.server-learning-rate": 0.5, "devices.kind": "lognormal", "clients": 4}
    server: Any = build_strategy(RunConfig.of({"strategy": "fedbuff", **options}))
    server.names = ["w"]
    model, came, began = (
        {"w": np.array([w]), "var": np.array([var])} for w, var in ((1.0, 1.0), (3.0, 2.0), (2.0, 5.0))
    )
    # Stale by 3 it counts half. Added to 1, the stale difference of -3 would leave a variance below 0.
    found = server.step(model, [(3, came, began)])
    assert found == {"w": [1 + 0.5 * 0.5 * (3 - 2)], "var": [1 + 0.5 * (2 - 1)]}


@pytest.mark.parametrize(("strategy", "buffer"), [("fedasync", 1), ("fedbuff", 3)])
def test_lost_answers_fill_no_buffer(strategy: str, buffer: int, smoke: Smoke) -> None:
    config = smoke(
        strategy=strategy, clients=12, sampled=6, rounds=8, devices__kind="lognormal", faults__dropout=0.3,
        devices__availability=0.8,
    )  # fmt: skip
    options = {"strategy-options.buffer-size": buffer} if strategy == "fedbuff" else {}
    run = simulate(RunConfig.of({**config.flat(), **options}))
    rows = _rows(run)
    assert [row["sampled"] - row["lost"] for row in rows] == [buffer] * 8
    assert all(row["aggregated"] for row in rows)
    assert run.summary["answers"]["lost"] > 0


def test_a_buffer_that_clients_at_work_cannot_fill_is_refused(two: Callable[..., Run]) -> None:
    with pytest.raises(InputError, match=r"buffer-size=3 is more than the 2 clients at work.*lower it to 2 or less"):
        two("fedbuff", **{"strategy-options.buffer-size": 3})
    # The default of ten was not asked for: here it is two, all who are at work.
    assert _weight(two("fedbuff", rounds=1)) == pytest.approx((0 + 0.8) / 2, abs=1e-6)


@pytest.mark.parametrize("strategy", ["fedasync", "fedbuff"])
def test_a_run_without_rounds_is_resumed_with_the_same_bits(strategy: str, smoke: Smoke) -> None:
    from test_resume import _assert_same, _stopped_after

    config = smoke(strategy=strategy, devices__kind="lognormal", rounds=6, sampled=3)
    whole, folder = simulate(config), _stopped_after(config, 3)
    resume(folder)
    _assert_same(whole.path, folder)


def test_asynchronous_strategies_need_a_clock_and_no_rounds(smoke: Smoke) -> None:
    with pytest.raises(InputError, match=r"fedbuff needs virtual time; set devices.kind=lognormal"):
        simulate(smoke(strategy="fedbuff", devices__kind="none"))
    with pytest.raises(InputError, match="fedasync has no rounds"):
        simulate(smoke(strategy="fedasync", devices__kind="lognormal", devices__deadline_seconds=1.0))


def test_lost_answers_and_stragglers_come_as_often_as_asked_for(smoke: Smoke) -> None:
    config = RunConfig.of({
        **smoke(clients=2000, local_epochs=4).flat(), "faults.dropout": 0.25, "faults.stragglers": 0.5,
        "devices.kind": "lognormal", "devices.availability": 0.8,
    })  # fmt: skip
    # Batches of 16: eight steps in four epochs.
    n, sizes = 2000, np.full(2000, 32)
    work = Devices(config).work(3, np.arange(n), sizes, 0, 0, 0.0)
    reasons = pd.Series(work.reasons).value_counts(normalize=True)
    assert reasons["it cannot be reached in this round"] == pytest.approx(0.2, abs=0.03)
    assert reasons["its answer was lost"] == pytest.approx(0.8 * 0.25, abs=0.03)
    # In another round they are others: out of reach in both is a twenty-fifth.
    both = [first == then == "it cannot be reached in this round" for first, then in zip(
        work.reasons, Devices(config).work(4, np.arange(n), sizes, 0, 0, 0.0).reasons, strict=True)]  # fmt: skip
    assert np.mean(both) == pytest.approx(0.04, abs=0.02)
    # A straggler draws 1 to 4 of 4 epochs: three quarters of them fall short and are late.
    assert reasons["it did not finish in time"] == pytest.approx(0.8 * 0.75 * 0.5 * 0.75, abs=0.03)
    partial = Devices(config.with_(faults__late="partial")).work(3, np.arange(n), sizes, 0, 0, 0.0)
    done = pd.Series(partial.steps[partial.steps > 0]).value_counts(normalize=True)
    assert sorted(done.index) == [2, 4, 6, 8]
    assert done[2] == pytest.approx(0.125, abs=0.03)
    nobody = Devices(config.with_(faults__late="partial", faults__stragglers=1)).work(3, [0, 1], [0, 0], 0, 0, 0.0)
    assert nobody.steps.tolist() == [0, 0]


# A link of one byte a second, where all else takes no time: seconds are bytes.
SLOW = {
    "devices.kind": "lognormal", "devices.compute-spread": 0.0, "devices.bandwidth-spread": 0.0, "devices.jitter": 0.0,
    "devices.seconds-per-example": 1e-9, "devices.uplink-bytes-per-second": 1e15,
    "devices.downlink-bytes-per-second": 1e15,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["none", "fp16", "int8", "int4", "top-k"])
@pytest.mark.parametrize("strategy", ["fedavg", "scaffold", "mimelite", "fedbn", "fedrep", "ifca", "apfl", "qfedavg"])
def test_virtual_time_counts_every_byte_that_is_sent(strategy: str, kind: str, smoke: Smoke) -> None:
    if strategy == "ifca" and kind == "top-k":
        pytest.skip("ifca refuses top-k")
    task = {"task": "foreign_plugins:NormalisedMedical", "engine.cohort-size": 1} if strategy == "fedbn" else {}
    compressed = {"compression.kind": kind, "compression.rotation": kind == "int4"}
    # Not in the round that is evaluated: that traffic takes no virtual time.
    config = {**smoke(strategy=strategy, rounds=2, evaluate_every=2).flat(), **SLOW, **task, **compressed}
    up, down = (
        _rows(simulate(RunConfig.of({**config, f"devices.{way}link-bytes-per-second": 1.0})))[0]
        for way in ("up", "down")
    )
    assert up["virtual_round_seconds"] == pytest.approx(up["uplink_bytes"] / 4, abs=1e-3)
    assert down["virtual_round_seconds"] == pytest.approx(down["downlink_bytes"] / 4, abs=1e-3)
    # The server predicts what the clients find: of four who are asked the first two answer.
    first = _rows(simulate(RunConfig.of({**config, "sampled": 2, "sampling.over-selection": 2.0, **UNEQUAL})))
    assert [(row["sampled"], row["lost"]) for row in first] == [(4, 2), (4, 2)]


UNEQUAL = {"devices.uplink-bytes-per-second": 1.0, "devices.bandwidth-spread": 1.0}


class _Boasting(Elsewhere):
    """A grid like Flower's own, whose clients say of their virtual seconds what they like."""

    said: Any = None

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Return the replies with another number of seconds."""
        replies = list(super().send_and_receive(messages, timeout=timeout))
        for reply in replies:
            if reply.has_content() and reply.metadata.message_type == "train":
                reply.content.config_records[records.CLIENTS][records.VIRTUAL_SECONDS] = self.said
        return replies


@pytest.mark.parametrize("said", [[0.0], [1e9], "soon"])
@pytest.mark.parametrize(
    "own", [{}, {"devices.deadline-seconds": 0.1, "faults.late": "partial"}, {"sampling.over-selection": 1.5}]
)
def test_what_clients_say_of_their_time_is_not_believed(own: dict[str, Any], said: Any, smoke: Smoke) -> None:
    config = smoke(strategy="scaffold", rounds=2, sampled=2, devices__kind="lognormal")
    config = RunConfig.of({**config.flat(), **own})
    with engine(config, check(config)) as grid:
        vars(boasting := _Boasting.__new__(_Boasting)).update(vars(grid), said=said)
        train(boasting, config, folder := RunFolder.create(config))
    honest = _rows(simulate(config))
    found = [json.loads(line) for line in (folder.path / "rounds.jsonl").read_text().splitlines()]
    assert [row["virtual_seconds"] for row in found] == [row["virtual_seconds"] for row in honest]


def test_oort_knows_what_is_sent_beside_the_model(smoke: Smoke) -> None:
    from server.selection import Selection

    seen: list[int] = []

    class Watched(Selection):
        def _oort(self, *arguments: Any) -> np.ndarray:
            seen.append(round(float(arguments[-1].max())))
            return super()._oort(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.session.Selection", Watched)
        config = smoke(strategy="scaffold", rounds=2, evaluate_every=2, sampling__kind="oort")
        run = simulate(RunConfig.of({**config.flat(), **SLOW, "devices.downlink-bytes-per-second": 1.0}))
    assert seen[0] == round(_rows(run)[0]["downlink_bytes"] / 4)


def test_devices_are_lognormal_and_their_own_whoever_else_is_asked(smoke: Smoke) -> None:
    config = smoke(clients=5000, devices__kind="lognormal", devices__compute_spread=0.7)
    devices = Devices(config)
    logs = np.log(devices.columns["seconds_per_example"] / 0.001)
    assert (logs.mean(), logs.std()) == pytest.approx((0, 0.7), abs=0.03)
    some = np.array([7, 4000])
    alone = devices.seconds(2, some[1:], np.array([10]), 1000, 500)
    assert devices.seconds(2, some, np.array([10, 10]), 1000, 500)[1] == alone[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("speed\n1\n", r"unknown column of devices.trace=.*t.csv 'speed'; Choices: .*seconds_per_example"),
        (
            "seconds_per_example,availibility\n1,1\n",
            r"unknown column of devices.trace=.* 'availibility'; did you mean 'availability'\? Choices: availability, ",
        ),
        ("seconds_per_example\n1\n", "has 1 rows for 4 clients"),
        ("seconds_per_example\n1\n-2\n1\n1\n", r"column seconds_per_example, row 2: .*-2.* is not a number above 0"),
    ],
)
def test_a_trace_that_cannot_be_used_is_one_sentence(text: str, words: str, smoke: Smoke, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match=words):
        simulate(smoke(devices__kind="trace", devices__trace=str(tmp_path / "t.csv")))


def test_a_round_in_which_nobody_answers_leaves_the_model_and_goes_on(smoke: Smoke) -> None:
    for strategy in ("fedavg", "scaffold", "fedadam", "fedmedian", "qfedavg", "ifca", "agnostic"):
        run = simulate(smoke(strategy=strategy, rounds=6, clients=4, sampled=1, faults__dropout=0.7))
        rows = _rows(run)
        assert run.summary["status"] == "completed"
        assert not all(row["aggregated"] for row in rows)
        assert run.summary["answers"]["lost"] == sum(row["lost"] for row in rows)
