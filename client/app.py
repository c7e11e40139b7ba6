"""The ClientApp: train, evaluate, describe; written once for a cohort of clients. A deployed client is one of one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.evaluate import evaluate, statistics
from client.replies import Reply, merged, refused
from client.secure import IDENTITY, SecureClients, open_secure, refuse_in_clear
from client.train import train
from core import records
from core.records import client_of
from privacy.secagg.errors import SecAggError


class CohortApp(ClientApp):
    """A Flower ClientApp that can also answer for many clients at once, which is what the local engine asks of it."""

    def cohort(self, message_type: str, content: RecordDict, contexts: Sequence[Context]) -> list[Reply]:
        """Return answers that cover every context once. What raises for one client is that client's error alone.

        More clients than train together are several cohorts, one after the other.
        """
        together = contexts[0].run_config.get("engine.cohort-size")
        # One by one they are all handed over: a model is loaded once for them.
        size = together if message_type == "train" and isinstance(together, int) and together > 1 else len(contexts)
        replies: list[Reply] = []
        for start in range(0, len(contexts), size):
            answers = self._answer(message_type, content, contexts[start : start + size])
            replies += [([start + i for i in positions], answer) for positions, answer in answers]
        if not records.config_of(content).get(records.PARTIAL_MEAN):
            return replies
        return merged(replies, content.array_records.get(records.ARRAYS, ArrayRecord()))

    def _answer(self, message_type: str, content: RecordDict, contexts: Sequence[Context]) -> list[Reply]:
        try:
            refuse_in_clear(message_type, content, contexts)
            if records.SECURE not in content:
                # What is left of a round in which a client dropped out is over: it is asked for something else.
                SecureClients.forget(contexts)
            return HANDLERS[message_type](content, contexts)
        except Exception as error:
            if len(contexts) > 1:
                # Somebody in the cohort fails: each answers alone, so that nobody else's work is lost.
                alone = [self._answer(message_type, content, [context]) for context in contexts]
                return [([i], answer) for i, replies in enumerate(alone) for _, answer in replies]
            logging.getLogger("fedra").warning("client %s failed: %s", client_of(contexts[0]), error)
            said = f": {error}"
            if IDENTITY in contexts[0].node_config and not isinstance(error, SecAggError):
                # What is wrong with a table may be told with a cell of it.
                said = "; its own log says more"
            return [([0], refused(f"client {client_of(contexts[0])}: {type(error).__name__}{said}"))]


def _secure(message_type: str) -> Callable[[RecordDict, Sequence[Context]], list[Reply]]:
    """Return what answers one of secure aggregation's messages."""

    def answer(content: RecordDict, contexts: Sequence[Context]) -> list[Reply]:
        secure = open_secure(contexts)
        if secure is None:
            raise ValueError("this run has no secure aggregation (secure-aggregation.profile=none)")
        return secure.answer(message_type, content, contexts)

    return answer


HANDLERS: dict[str, Callable[[RecordDict, Sequence[Context]], list[Reply]]] = {
    "train": train,
    "evaluate": evaluate,
    records.QUERY_STATISTICS: statistics,
    **{message_type: _secure(message_type) for message_type in records.SECURE_STAGES},
}
app = CohortApp()


def _one(message: Message, context: Context) -> Message:
    torch.set_num_threads(1)
    [(_, answer)] = app.cohort(message.metadata.message_type, message.content, [context])
    return Message(answer, reply_to=message)


app.train()(_one)
app.evaluate()(_one)
for message_type in (records.QUERY_STATISTICS, *records.SECURE_STAGES):
    app.query(message_type.removeprefix("query."))(_one)
