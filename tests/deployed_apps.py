"""Apps of deployments under test: Fedra's own halves, with somebody who watches, dies or lies beside them.

They find each other's files in the folder that the environment names DEPLOYMENT. A process of a client answers one
message, so what is changed in it for that is changed for nobody else.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

import client.app
import client.evaluate
import client.secure
import server.app
from client import replies
from core import records
from core.records import client_of
from privacy.secagg import identities, messages
from privacy.secagg.client import Client
from privacy.secagg.graph import SEMI_HONEST
from privacy.secagg.keys import Identity, KeyPair
from privacy.secagg.messages import Advertisement, Terms
from privacy.secagg.server import Server
from server.polled import PolledGrid
from server.secure_round import Party, SecureRound

plain_client = client.app.app
plain_server = server.app.app


class Wrapped(ClientApp):
    """Fedra's ClientApp, and what is done before it answers."""

    def __init__(self, before: Callable[[Message, Context], None]) -> None:
        super().__init__()
        self._before = before

    def __call__(self, message: Message, context: Context) -> Message:
        """Return the client's own answer."""
        self._before(message, context)
        return client.app.app(message, context)


class Between(Grid):
    """A Grid between Fedra's server and its clients: whoever runs the SuperLink."""

    def __init__(self, grid: Grid) -> None:
        self.inner, self.client_at = grid, dict[int, int]()

    def __getattr__(self, name: str) -> Any:
        if name == "client_of":
            raise AttributeError(name)
        return getattr(self.__dict__["inner"], name)

    def set_run(self, run: Any) -> None:
        self.inner.set_run(run)

    @property
    def run(self) -> Any:
        return self.inner.run

    def create_message(self, *arguments: Any, **named: Any) -> Message:
        return self.inner.create_message(*arguments, **named)

    def get_node_ids(self) -> Iterable[int]:
        return self.inner.get_node_ids()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise AssertionError("nobody uses Flower's own loop")

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self.inner.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        found = list(self.inner.pull_messages(message_ids))
        for reply in found:
            if reply.has_content() and reply.metadata.message_type == records.QUERY_STATISTICS:
                rows = reply.content.config_records.get(records.CLIENTS, {})
                if records.CLIENT in rows:
                    self.client_at[reply.metadata.src_node_id] = rows[records.CLIENT][0]  # type: ignore[index, assignment]
        return found


def _folder() -> Path:
    return Path(os.environ["DEPLOYMENT"])


# Watching: what clients know, and what the server is told.


def _watch(message: Message, context: Context) -> None:
    """Let a client write down what nobody else may learn, for the test alone."""
    kept: dict[str, Any] = {"client": client_of(context), "type": message.metadata.message_type}

    def write() -> None:
        folder = _folder() / "truth" / f"{context.run_id}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{message.metadata.message_id}.pickle").write_bytes(pickle.dumps(kept))

    def trained(update: Any, sizes: Any, origin: dict[str, np.ndarray]) -> None:
        kept["model"] = {name: t[0].cpu().numpy() for name, t in update.params.items()}
        kept["update"] = {name: kept["model"][name] - value for name, value in origin.items()}
        kept["loss"], kept["examples"] = float(update.loss[0]), int(sizes[0])

    share, mask, masked, of_update = Client.share, Client.mask, client.secure.SecureClients.masked, replies.of_update

    def spied_share(self: Client, participants: messages.Participants) -> messages.Shares:
        kept["keys"] = {"channel secret": self.state.channel, "mask secret": self.state.mask}
        found = share(self, participants)
        kept["keys"]["self mask's seed"] = self.state.seed
        for name in ("channel_keys", "mask_seeds", "shares"):
            kept["keys"] |= {f"{name} {other}": value for other, value in getattr(self.state, name).items()}
        write()
        return found

    def spied_mask(
        self: Client, delivery: messages.Delivery, vector: np.ndarray, content: bytes, **bounds: int
    ) -> messages.Masked:
        kept["vector"] = vector.copy()
        write()
        return mask(self, delivery, vector, content, **bounds)

    def spied_masked(self: Any, update: Any, origin: Any, names: Any, sizes: Any, *more: Any) -> Any:
        trained(update, sizes, origin)
        return masked(self, update, origin, names, sizes, *more)

    def spied_of_update(update: Any, clients: Any, sizes: Any, *more: Any) -> Any:
        trained(update, sizes, {name: records.to_numpy(a) for name, a in message.content[records.ARRAYS].items()})
        write()
        return of_update(update, clients, sizes, *more)

    Client.share, Client.mask = spied_share, spied_mask  # type: ignore[method-assign]
    client.secure.SecureClients.masked = spied_masked  # type: ignore[method-assign, assignment]
    replies.of_update = spied_of_update  # type: ignore[assignment]


class Recording(Between):
    """Writes down all that the server receives: every object of a message as it travels, and every number in it."""

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        found = super().pull_messages(message_ids)
        folder = _folder() / "received" / f"{self.run.run_id}"
        folder.mkdir(parents=True, exist_ok=True)
        for reply in found:
            content = reply.content if reply.has_content() else RecordDict()
            every = [*content.config_records.items(), *content.metric_records.items()]
            kept = {
                "type": reply.metadata.message_type,
                "client": self.client_at.get(reply.metadata.src_node_id),
                "error": str(reply.error.reason) if reply.has_error() else "",
                "bytes": [part.deflate() for part in get_all_nested_objects(reply).values()],
                "metadata": repr(vars(reply.metadata)),
                "arrays": [list(record) for record in content.array_records.values()],
                "values": {name: dict(record) for name, record in every},
            }
            (folder / f"{len(list(folder.iterdir())):05d}.pickle").write_bytes(pickle.dumps(kept))
        return found


watched_client = Wrapped(_watch)
watched_server = ServerApp()


@watched_server.main()
def _watched(grid: Grid, context: Context) -> None:
    server.app.main(Recording(grid), context)


# Dying and being late, as a file says: {client: [message type, round, seconds late or 0 to die]}.


def _suffer(message: Message, context: Context) -> None:
    orders = json.loads((_folder() / "orders.json").read_text()).get(str(client_of(context)))
    secure = message.content.config_records.get(records.SECURE)
    if orders is None or secure is None:
        return
    message_type, number, late = orders
    if message.metadata.message_type == message_type and secure[records.SERVER_ROUND] == number:
        time.sleep(late)
        if not late:
            os.kill(int((_folder() / f"node-{client_of(context)}.pid").read_text()), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)


mortal_client = Wrapped(_suffer)
mortal_server = server.app.app


# Lying: a server that wants to know one client's vector.

VICTIM, SECOND, THIRD, OTHER, GONE = range(5)


def _part(message: Message, kind: type[messages.Message]) -> Any:
    return kind.from_bytes(message.content[records.SECURE][records.PART])  # type: ignore[arg-type, index]


def _with(message: Message, part: messages.Message | None = None, **changed: Any) -> Message:
    """Return the message with another part of the protocol's, or with other records; None leaves one out."""
    own = {**dict(message.content.items()), **changed}
    if part is not None:
        own[records.SECURE] = ConfigRecord({**message.content[records.SECURE], records.PART: part.to_bytes()})
    found = RecordDict({name: record for name, record in own.items() if record is not None})
    return Message(found, message.metadata.dst_node_id, message.metadata.message_type)


def _to(message: Message, node: int) -> Message:
    return Message(message.content, node, message.metadata.message_type)


def _other_keys(message: Message, grid: Lying, signer: Identity | None) -> Message:
    """Return the list of keys with others of one client, on which everything but the signature is as it should be."""
    told = _part(message, messages.Participants)
    true = Advertisement.from_bytes(told.advertisements[OTHER])
    channel, mask = KeyPair.generate().public, KeyPair.generate().public
    signed = Advertisement.signed_part(grid.terms.hash, OTHER, channel, mask)
    keys = replace(true, channel=channel, mask=mask, signature=signer.sign(signed) if signer else true.signature)
    at = 32 * told.ids.index(OTHER)
    digests = told.digests[:at] + keys.digest(grid.roster[OTHER]) + told.digests[at + 32 :]
    return _with(
        message, replace(told, digests=digests, advertisements={**told.advertisements, OTHER: keys.to_bytes()})
    )


def _other_model(message: Message, grid: Lying) -> Message:
    arrays = {name: Array(records.to_numpy(array) + 1) for name, array in message.content[records.ARRAYS].items()}
    return _with(message, arrays=ArrayRecord(arrays))


def _other_config(message: Message, grid: Lying) -> Message:
    config = {**message.content[records.CONFIG], records.LARGEST_WEIGHT: 1}
    return _with(message, config=ConfigRecord(config))


def _other_terms(message: Message, grid: Lying) -> Message:
    return _with(message, replace(_part(message, Terms), profile=SEMI_HONEST, threshold=2))


def _without_one(message: Message, kind: Any) -> Message:
    told = _part(message, kind)
    return _with(message, replace(told, ids=tuple(c for c in told.ids if c != GONE)))


# (round, message type, client) -> name, and what becomes of the message.
LIES: dict[tuple[int, str, int], tuple[str, Callable[[Message, Any], Message]]] = {
    (1, records.QUERY_SHARE, VICTIM): ("a key swapped", lambda m, g: _other_keys(m, g, None)),
    (2, records.QUERY_SHARE, VICTIM): ("a roster of its own", lambda m, g: _other_keys(m, g, Identity.generate())),
    (3, records.QUERY_ADVERTISE, VICTIM): ("weaker terms", _other_terms),
    (3, "train", SECOND): ("another model", _other_model),
    (4, "train", VICTIM): ("another config", _other_config),
    (5, records.QUERY_CONFIRM, VICTIM): (
        "other survivors", lambda m, g: _without_one(m, messages.Survivors),
    ),
    (6, records.QUERY_UNMASK, VICTIM): (
        "both kinds of shares", lambda m, g: _without_one(m, messages.UnmaskRequest),
    ),
}  # fmt: skip


class Lying(Between):
    """Changes messages on their way, sends some of its own, and writes down what it gets for it."""

    def __init__(self, grid: Grid, roster: str) -> None:
        super().__init__(grid)
        self.roster = identities.read_roster(roster)
        self.terms: Terms
        self._names: dict[str, str] = {}
        self._first: list[Message] = []
        self._unmask: Message | None = None

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Push them, and what else pays; return the ids of what was to be pushed."""
        out, lies, more = [], {}, []
        for message in list(messages):
            client, secure = (
                self.client_at.get(message.metadata.dst_node_id),
                message.content.config_records.get("secure-aggregation"),
            )
            number, message_type = secure[records.SERVER_ROUND] if secure else 0, message.metadata.message_type
            if message_type == records.QUERY_ADVERTISE:
                self.terms = _part(message, Terms)
            if number == 1 and client == THIRD:
                self._first.append(message)
            name, change = LIES.get((number, message_type, client), ("", None))
            out.append(change(message, self) if change else message)
            if name:
                lies[len(out) - 1] = name
            if number == 5 and message_type == records.QUERY_UNMASK and client == SECOND:
                # Who has confirmed another list than the others is not asked; this server asks.
                more.append(("the true survivors after others", _to(message, self._node(VICTIM))))
            if number == 6 and message_type == records.QUERY_SHARE and client == THIRD:
                more += [
                    (f"replayed {m.metadata.message_type}", _to(m, message.metadata.dst_node_id)) for m in self._first
                ]
            if number == 6 and message_type == "train" and client == OTHER:
                config = {**message.content[records.CONFIG], records.SPLIT: "train"}
                about_training = {"config": ConfigRecord(config), "secure-aggregation": None}
                evaluate = Message(_with(message, **about_training).content, message.metadata.dst_node_id, "evaluate")
                more += [("training in clear", _with(message, **{"secure-aggregation": None})), ("its loss", evaluate)]
            if number == 6 and message_type == records.QUERY_UNMASK and client == THIRD:
                self._unmask = message
        self.inner.push_messages(out)
        self._names |= {out[i].metadata.message_id: name for i, name in lies.items()}
        self._ask(more)
        return [message.metadata.message_id for message in out]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Pull replies, and write down those to lies."""
        found = super().pull_messages(message_ids)
        for reply in found:
            self._heard(reply)
            of_third = self.client_at.get(reply.metadata.src_node_id) == THIRD
            if of_third and reply.metadata.message_type == records.QUERY_UNMASK and self._unmask is not None:
                asked, self._unmask = self._unmask, None
                self._ask([
                    ("asked twice", _to(asked, asked.metadata.dst_node_id)),
                    ("asked again for the other kind", _without_one(asked, messages.UnmaskRequest)),
                ])  # fmt: skip
        return found

    def rest(self) -> None:
        """Wait for the replies to this server's own messages."""
        while self._names:
            self.pull_messages(set(self._names))
            time.sleep(0.1)

    def _ask(self, named: list[tuple[str, Message]]) -> None:
        if named:
            self.inner.push_messages([message for _, message in named])
            self._names |= {message.metadata.message_id: name for name, message in named}

    def _heard(self, reply: Message) -> None:
        name = self._names.pop(reply.metadata.reply_to_message_id, None)
        if name is not None:
            reason = str(reply.error.reason) if reply.has_error() else "an answer"
            with (_folder() / "lies.jsonl").open("a") as file:
                file.write(json.dumps([name, reason]) + "\n")

    def _node(self, client: int) -> int:
        return next(node for node, own in self.client_at.items() if own == client)


lying_client = client.app.app
lying_server = ServerApp()


@lying_server.main()
def _lying(grid: Grid, context: Context) -> None:
    between = Lying(grid, str(context.run_config["secure-aggregation.roster"]))
    server.app.main(between, context)
    between.rest()
    (_folder() / "lies.done").touch()


# Known answers: the secrets of `vectors/secagg.json`, and its vectors in place of what clients would say.


def _known(context: Context) -> dict[str, Any]:
    """Return the case, from beside the roster that the run names."""
    found: dict[str, Any] = json.loads(
        (Path(str(context.run_config["secure-aggregation.roster"])).parent / "case.json").read_text()
    )
    return found


class KnownClient(ClientApp):
    """Fedra's ClientApp with given secrets, for one of the case's clients."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Return its answer to a message of the protocol."""
        case = _known(context)
        own = case["clients"][client_of(context)]
        if records.SECURE not in message.content:
            # Who it is, which is no client of the run's data.
            return Message(RecordDict({records.CLIENTS: ConfigRecord({records.CLIENT: [own["id"]]})}), reply_to=message)
        names = {records.QUERY_ADVERTISE: ("channel", "mask"), records.QUERY_SHARE: ("seed",)}
        left = [bytes.fromhex(own[name]) for name in names.get(message.metadata.message_type, ())]
        folder = Path(str(context.run_config["secure-aggregation.roster"])).parent
        given = {"partition-id": own["id"], "secure-identity": str(folder / f"{own['id']}.key"),
            "secure-roster": str(folder / "roster.json"), "secure-profile": case["terms"]["profile"],
        }  # fmt: skip
        known = Context(context.run_id, context.node_id, given, context.state, context.run_config)
        changed = {
            "run_name": lambda run_id: case["terms"]["run"],
            "hash_of": lambda message_type, content, config: bytes.fromhex(case["terms"]["content"]),
            "Client": functools.partial(Client, entropy=lambda size: left.pop(0) if left else os.urandom(size)),
        }
        before = {name: getattr(client.secure, name) for name in changed}
        encode, summed = client.secure.exact.encode, client.evaluate._summed
        client.evaluate._summed = lambda setting, number: []
        vars(client.secure).update(changed)
        client.secure.exact.encode = lambda values: np.array(own["vector"], dtype=np.uint32)  # type: ignore[attr-defined]
        try:
            return client.app.app(message, known)
        finally:
            # The engine's workers answer for others too.
            vars(client.secure).update(before)
            client.evaluate._summed = summed
            client.secure.exact.encode = encode  # type: ignore[attr-defined]


known_client = KnownClient()
known_server = ServerApp()


@known_server.main()
def _knowing(grid: Grid, context: Context) -> None:
    case = _known(context)
    folder = Path(str(context.run_config["secure-aggregation.roster"])).parent
    ids = [own["id"] for own in case["clients"]]
    while len(nodes := list(grid.get_node_ids())) < len(ids):
        time.sleep(0.1)
    # Who is who: each says its place in the case.
    content = RecordDict({records.CONFIG: ConfigRecord({})})
    who = {}
    grid = PolledGrid(grid)
    messages_of_all = [Message(content, node, records.QUERY_STATISTICS) for node in nodes]
    for reply in grid.send_and_receive(messages_of_all, timeout=60):
        who[reply.content[records.CLIENTS][records.CLIENT][0]] = reply.metadata.src_node_id
    terms = Terms(**{**case["terms"], "content": bytes.fromhex(case["terms"]["content"])})
    masked: dict[int, str] = {}

    class Keeping(Server):
        def take(self, client: int, answer: Any) -> bool:
            if isinstance(answer, messages.Masked):
                masked[client] = answer.vector.hex()
            return super().take(client, answer)

    party = Party(Keeping(terms, ids, identities.read_roster(str(folder / "roster.json"))), who)
    places = {node: client for client, node in who.items()}
    together = SecureRound(grid, places.__getitem__, together=False, seconds=60, server_round=0)
    together.run([party], records.QUERY_STATISTICS, content, 60)
    total = None if party.total is None else party.total.tolist()
    found = {
        "masked": {str(c): v for c, v in masked.items()},
        "total": total,
        "error": party.error,
        "reasons": party.reasons,
    }
    (folder / "found.json").write_text(json.dumps(found))
    print("RESULT", json.dumps(found))
