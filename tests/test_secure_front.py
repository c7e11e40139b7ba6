"""Secure aggregation's messages between one server and clients of their own: what is odd costs its sender the round."""

from __future__ import annotations

import copy
import json
import uuid
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from safetensors.numpy import load_file

import server.secure_grid
from client.app import HANDLERS, app
from client.evaluate import _summed
from client.setting import open_setting
from core import records
from core.config import RunConfig
from privacy.secagg import identities
from privacy.secagg.client import State
from privacy.secagg.errors import OutOfTurnError, RefusedError
from privacy.secagg.journal import Journal
from privacy.secagg.rounds import hash_of, payload_of, terms_of
from server.app import train
from server.polled import PolledGrid
from server.recorder import RunFolder
from server.secure_grid import SecureGrid

CLIENTS, ODD = 5, 2
SECURE = {"secure-aggregation.profile": "malicious", "secure-aggregation.stage-seconds": 0.5, "timeout-seconds": 5.0}
NOISY = {"privacy.level": "client", "privacy.noise": "distributed", "privacy.noise-multiplier": 0.5,
         "privacy.delta": 1e-3, "privacy.preprocessing": "uncovered"}  # fmt: skip
Change = Callable[[Message], list[Message]]


@pytest.fixture(autouse=True)
def _server() -> None:
    """Messages are made by a server of a run."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1


class Here(Grid):
    """A Grid whose nodes live in this process and answer one by one, as deployed ones do; node 100 + i is client i."""

    def __init__(self, config: RunConfig, change: Change, own: dict[str, Any]) -> None:
        self.nodes = {100 + i: self._context(config, i, own if i == ODD else {}) for i in range(CLIENTS)}
        self._change, self._replies = change, list[Message]()

    @staticmethod
    def _context(config: RunConfig, client: int, own: dict[str, Any]) -> Context:
        return Context(7, 100 + client, {"partition-id": client}, RecordDict(), {**config.flat(), **own})

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        return Run.create_empty(7)

    def create_message(self, *arguments: Any, **named: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
            reply = app(message, self.nodes[message.metadata.dst_node_id])
            found = [reply]
            if message.metadata.dst_node_id == 100 + ODD and message.metadata.message_type in (
                "train", *records.SECURE_STAGES
            ):  # fmt: skip
                found = self._change(reply)
            self._replies += found
            if found or self._change is not _gone:
                ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        wanted = set(message_ids)
        found = [reply for reply in self._replies if reply.metadata.reply_to_message_id in wanted]
        self._replies = [reply for reply in self._replies if reply not in found]
        return found

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise AssertionError("nobody uses Flower's own loop")


def _run(smoke: Callable[..., RunConfig], change: Change = lambda reply: [reply], **own: Any) -> Path:
    config = smoke(**SECURE, clients=CLIENTS, rounds=2)
    folder = RunFolder.create(config)
    train(Here(config, change, {key.replace("_", "-"): value for key, value in own.items()}), config, folder)
    return folder.path


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").open()]


def _model(folder: Path) -> np.ndarray:
    return np.concatenate([value.ravel() for value in load_file(folder / "model.safetensors").values()])


def _of(reply: Message, **changed: Any) -> Message:
    """Return the reply with other values in its part of the protocol, or other records."""
    own = dict(reply.content.items())
    record = {name: changed.pop(name) for name in (records.CLIENT, records.PART) if name in changed}
    own[records.SECURE] = ConfigRecord({**own[records.SECURE], **record})
    reply.content = RecordDict({**own, **changed})
    return reply


def _twice(reply: Message) -> list[Message]:
    return [reply, reply]


def _more(reply: Message) -> list[Message]:
    numbers = {records.NUM_EXAMPLES: 10**9, records.TRAIN_LOSS: 0.0}
    return [_of(reply, arrays=ArrayRecord([np.full(3, np.inf)]), metrics=MetricRecord(numbers), odd=ConfigRecord({}))]


@pytest.mark.parametrize("change", [_twice, _more])
def test_what_is_said_twice_or_besides_changes_nothing(change: Change, smoke: Callable[..., RunConfig]) -> None:
    honest, odd = _run(smoke), _run(smoke, change)
    assert [row["secure_aggregation"]["sums"] for row in _rows(odd)] == [[CLIENTS]] * 2
    np.testing.assert_array_equal(_model(honest), _model(odd))


def _gone(reply: Message) -> list[Message]:
    return [] if reply.metadata.message_type == "train" else [reply]


def _late(reply: Message) -> list[Message]:
    return [] if reply.metadata.message_type == records.QUERY_CONFIRM else [reply]


def _of_the_superlink(reply: Message) -> list[Message]:
    """Return what Flower says of a node that is gone: the SuperLink itself is the sender."""
    if reply.metadata.message_type != "train":
        return [reply]
    found = Message(Error(ErrorCode.NODE_UNAVAILABLE, "it is gone"), reply_to=reply)
    found.metadata.__dict__.update(
        _src_node_id=SUPERLINK_NODE_ID, _reply_to_message_id=reply.metadata.reply_to_message_id
    )
    return [found]


def _at_mask(**changed: Any) -> Change:
    return lambda reply: [_of(reply, **changed) if reply.metadata.message_type == "train" else reply]


# What a client's answers become, at which stage that costs it its place, and why.
ODDITIES: dict[str, tuple[Change, str, str]] = {
    "another's number": (_at_mask(client=[ODD + 1]), "mask", "its answer is none of the protocol"),
    "two numbers": (_at_mask(client=[ODD, ODD + 1]), "mask", "its answer is none of the protocol"),
    "no list": (_at_mask(client=ODD), "mask", "its answer is none of the protocol"),
    "no bytes": (_at_mask(part=["vector"]), "mask", "its answer cannot be read"),
    "a number": (_at_mask(part=[1.5]), "mask", "its answer cannot be read"),
    "garbage": (_at_mask(part=[b"i" * 1000]), "mask", "its answer cannot be read"),
    "nothing": (_at_mask(part=[b""]), "mask", "its answer cannot be read"),
    "gone": (_gone, "mask", "the node has left"),
    "gone for the SuperLink": (_of_the_superlink, "mask", "it is gone"),
    "never": (_late, "confirm", ""),
}


@pytest.mark.parametrize("oddity", ODDITIES)
def test_an_odd_answer_is_none_and_the_others_have_their_sum(oddity: str, smoke: Callable[..., RunConfig]) -> None:
    change, stage, why = ODDITIES[oddity]
    rows = _rows(_run(smoke, change))
    for row in rows:
        assert row["secure_aggregation"]["dropped"] == {stage: 1}
        # Who drops out after its vector came is in the sum.
        assert row["secure_aggregation"]["sums"] == [CLIENTS - (stage == "mask")]
        assert [(f["client"], f["reason"][: len(why)]) for f in row["failures"]] == [(ODD, why)] * (stage == "mask")


def test_a_client_that_was_told_another_run_configuration_is_in_no_sum(smoke: Callable[..., RunConfig]) -> None:
    with pytest.raises(RuntimeError, match=f"client {ODD}: InconsistentError: the model and config that came are not"):
        _run(smoke, **{"local-epochs": 1})


def test_the_hash_of_a_round_is_of_the_run_configuration_too_but_for_the_engine(
    smoke: Callable[..., RunConfig],
) -> None:
    content, config = RecordDict({records.CONFIG: ConfigRecord({"server-round": 1})}), smoke()
    hashed = hash_of("train", content, config)
    assert hashed == hash_of("train", content, config.with_(**{"engine.workers": 3}))
    assert hashed != hash_of("train", content, config.with_(**{"learning-rate": 3.0}))


def test_no_other_model_has_the_hash_of_a_rounds_model(smoke: Callable[..., RunConfig]) -> None:
    config, told = smoke(), ConfigRecord({"server-round": 1})
    own, other = ArrayRecord([np.ones((2, 3), np.float32)]), ArrayRecord([np.full((2, 3), 7, np.float32)])
    [[name, array]] = own.items()
    turned = ArrayRecord({name: Array(array.dtype, (3, 2), array.stype, array.data)})
    swapped = ArrayRecord({name: Array(">f4", array.shape, array.stype, array.data)})
    contents = [
        RecordDict({records.ARRAYS: arrays, **beside, records.CONFIG: told})
        # The model that all were told of in a record that nobody reads, and one made for a single client in its place.
        for arrays, beside in [(own, {}), (other, {}), (other, {"beside": own}), (turned, {}), (swapped, {})]
    ]
    assert len({hash_of("train", content, config) for content in contents}) == 5
    # Nor can one client be asked for statistics while the others of its sum train.
    assert hash_of("train", contents[0], config) != hash_of(records.QUERY_STATISTICS, contents[0], config)


def _ask(message_type: str, config: RunConfig, *, state: RecordDict | None = None, **node: Any) -> Message:
    content = RecordDict({records.ARRAYS: ArrayRecord(), records.CONFIG: ConfigRecord({"server-round": 1})})
    if message_type == "loss":
        content[records.CONFIG] = ConfigRecord({records.SPLIT: "train"})
        message_type = "evaluate"
    context = Context(7, 1, {"partition-id": 0, **node}, state or RecordDict(), dict(config.flat()))
    return app(Message(content, 1, message_type), context)


def test_a_client_refuses_what_would_show_it_in_clear(smoke: Callable[..., RunConfig]) -> None:
    secure, plain = smoke(**SECURE), smoke()
    for config, message_type, node, words in [
        (secure, "train", {}, "nobody trains for an answer that is not masked"),
        (secure, "loss", {}, "nobody tells its own loss on its training examples"),
        *[(plain, kind, {"secure-identity": "KEY"}, "secure-aggregation.profile=none")
          for kind in ("train", "evaluate", records.QUERY_STATISTICS, *records.SECURE_STAGES)],
    ]:  # fmt: skip
        reason = str(_ask(message_type, config, **node).error.reason)
        assert reason.startswith("client 0: RefusedError: ")
        assert words in reason
    # What it does say of itself before training is its name.
    assert dict(_ask(records.QUERY_STATISTICS, secure).content[records.METRICS]) == {}
    assert dict(_ask(records.QUERY_STATISTICS, plain).content[records.METRICS])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"attack.kind": "zero", "attack.fraction": 0.5}, "attack.kind=zero, and where others do not send"),
        ({"privacy.noise-seed": 3, **NOISY}, "privacy.noise-seed=3, and noise of a seed hides nothing"),
    ],
    ids=["attack", "seed"],
)
def test_a_client_with_an_identity_refuses_what_would_leave_it_alone_in_a_sum(
    settings: dict[str, Any], words: str, smoke: Callable[..., RunConfig]
) -> None:
    config = smoke(**SECURE, **settings)
    for message_type in ("train", records.QUERY_STATISTICS, *records.SECURE_STAGES):
        reason = str(_ask(message_type, config, **{"secure-identity": "KEY"}).error.reason)
        assert reason.startswith("client 0: RefusedError: ")
        assert words in reason
    assert _ask(records.QUERY_STATISTICS, config).has_content()


def test_a_client_with_an_identity_describes_its_data_in_one_sum_of_a_run(
    smoke: Callable[..., RunConfig], tmp_path: Path
) -> None:
    roster = identities.create(tmp_path / "keys", CLIENTS)
    config = smoke(**SECURE, clients=CLIENTS, **{"secure-aggregation.roster": str(roster)})
    here = _identified(Here(config, lambda reply: [reply], {}), roster)
    setting = open_setting([here.nodes[100]])
    each = np.array([_summed(setting, client) for client in range(CLIENTS)])
    grid, content = SecureGrid(PolledGrid(here), config), RecordDict({records.CONFIG: ConfigRecord({})})
    grid.order_by({100 + i: i for i in range(CLIENTS)})
    nodes = {i: 100 + i for i in range(CLIENTS)}
    assert grid.add_up(content, nodes, each.shape[1], 5.0) == pytest.approx(each.sum(0))
    # Without the last client the difference would be all that it has said.
    with pytest.raises(RuntimeError, match="OutOfTurnError: it has described its data in this run"):
        grid.add_up(content, {i: 100 + i for i in range(CLIENTS - 1)}, each.shape[1], 5.0)


def _identified(here: Here, roster: Path) -> Here:
    """Let every client have the key of its own that lies beside the roster."""
    for i, context in enumerate(here.nodes.values()):
        key = roster.with_name(f"client-{i}.key")
        context.node_config |= {"secure-identity": str(key), "secure-roster": str(roster)}
    return here


class SideBySide(Here):
    """A Grid that gives every message of the protocol twice, at once: both are answered from the same state."""

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Push the messages, and answer each once more from the state before."""
        found = list(messages)
        for message in found:
            node = message.metadata.dst_node_id
            before = copy.deepcopy(self.nodes[node])
            [identifier] = super().push_messages([message])
            if records.SECURE in message.content:
                again = app(message, before)
                self.second.append(str(again.error.reason) if again.has_error() else "an answer")
            self.identifiers.append(identifier)
        return self.identifiers[-len(found) :]

    second: list[str]
    identifiers: list[str]


def test_messages_that_come_side_by_side_have_one_answer(smoke: Callable[..., RunConfig], tmp_path: Path) -> None:
    roster = identities.create(tmp_path / "keys", CLIENTS)
    config = smoke(**SECURE, clients=CLIENTS, rounds=1, **{"secure-aggregation.roster": str(roster)})
    here = SideBySide(config, lambda reply: [reply], {})
    here.second, here.identifiers = [], []
    folder = RunFolder.create(config)
    train(_identified(here, roster), config, folder)
    assert [row["secure_aggregation"]["sums"] for row in _rows(folder.path)] == [[CLIENTS]]
    # Five stages of the sum of statistics, and of the round.
    assert len(here.second) == 2 * 5 * CLIENTS
    assert {reason.split(": ")[1] for reason in here.second} == {"OutOfTurnError"}


def test_a_client_that_cannot_keep_what_it_has_answered_does_not_answer(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "client-0.key"))
    journal.claim("run 1", 3, 1)
    for server_round, stage in [(3, 1), (3, 0), (2, 4)]:
        with pytest.raises(OutOfTurnError):
            journal.claim("run 1", server_round, stage)
    journal.claim("run 1", 3, 2)
    journal.claim("run 2", 1, 0)
    with pytest.raises(RefusedError, match="cannot be kept in"):
        Journal(str(tmp_path / "nowhere" / "client-0.key")).claim("run 1", 1, 0)
    (tmp_path / "client-0.key.answered").write_text('{"run 1": [3')
    with pytest.raises(RefusedError, match="JSONDecodeError"):
        journal.claim("run 1", 4, 0)


def test_an_identified_clients_error_holds_none_of_its_data(
    smoke: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(content: RecordDict, contexts: Any) -> Any:
        return float("Smith")

    monkeypatch.setitem(HANDLERS, records.QUERY_STATISTICS, unreadable)
    config = smoke(**SECURE)
    assert "Smith" in str(_ask(records.QUERY_STATISTICS, config).error.reason)
    reason = str(_ask(records.QUERY_STATISTICS, config, **{"secure-identity": "KEY"}).error.reason)
    assert reason == "client 0: ValueError; its own log says more"


def test_a_client_with_a_roster_in_the_run_and_no_key_refuses(smoke: Callable[..., RunConfig]) -> None:
    reason = str(_advertise(smoke(**SECURE, **{"secure-aggregation.roster": "roster.json"})).error.reason)
    assert "RefusedError: this run has a roster, and client 0 was given no key of its own" in reason


def _advertise(config: RunConfig) -> Message:
    content = RecordDict({records.SECURE: ConfigRecord({records.SERVER_ROUND: 1, records.PART: b""})})
    context = Context(7, 1, {"partition-id": 0}, RecordDict(), dict(config.flat()))
    return app(Message(content, 1, records.QUERY_ADVERTISE), context)


def test_a_client_forgets_a_round_when_it_is_asked_for_something_else(smoke: Callable[..., RunConfig]) -> None:
    state = RecordDict({records.SECURE: ConfigRecord({"state": State(3, "mask", seed=b"secret" * 6).to_bytes()})})
    _ask(records.QUERY_STATISTICS, smoke(**SECURE), state=state)
    assert state[records.SECURE]["state"] == State(3).to_bytes()


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ({"cohort": 50}, "a sum of 5 clients may be opened, and 45 are needed"),
        ({"cohort": 4}, "5 clients take part, and their vectors are made for 4"),
        ({"bits": 32}, "a ring of 32 bits is not the run's of 24"),
        ({"minimum": 3}, "a sum of 4 clients may be opened, and 5 are needed"),
    ],
    ids=str,
)
def test_a_server_cannot_have_less_noise_than_clients_share_out(
    lie: dict[str, int], words: str, smoke: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def payload(config: RunConfig, size: int, told: dict[str, Any], numbers: Any) -> Any:
        found = payload_of(config, size, told, numbers)
        told[records.COHORT] = lie.get("cohort", told[records.COHORT])
        return found

    def terms(*arguments: Any) -> Any:
        found = terms_of(*arguments)
        return replace(found, minimum=lie.get("minimum", found.minimum), bits=lie.get("bits", found.bits))

    monkeypatch.setattr(server.secure_grid, "payload_of", payload)
    monkeypatch.setattr(server.secure_grid, "terms_of", terms)
    config = smoke(**SECURE, **NOISY, clients=CLIENTS, rounds=1, **{"secure-aggregation.bits": 24})
    folder = RunFolder.create(config)
    with pytest.raises(RuntimeError, match=words):
        train(Here(config, lambda reply: [reply], {}), config, folder)
