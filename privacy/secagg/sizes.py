"""How many bytes the messages of a round have: made of messages as long as the real ones, and written as those are."""

from __future__ import annotations

from typing import NamedTuple

from privacy.secagg import messages
from privacy.secagg.channel import seal
from privacy.secagg.client import SHARE_BYTES
from privacy.secagg.graph import MALICIOUS, graph
from privacy.secagg.masking import word_bytes
from privacy.secagg.messages import ADVERTISE, CONFIRM, MASK, SHARE, UNMASK, Message, Terms

_KEY, _SIGNATURE = bytes(32), bytes(64)


class Pair(NamedTuple):
    """What one client is sent and what it answers, in bytes."""

    down: int
    up: int


def of(terms: Terms, clients: int) -> dict[str, Pair]:
    """Return the bytes of each stage for one of so many clients, of whom nobody drops out.

    What is trained from comes beside the message of `mask` and is not counted, nor is Flower's frame.
    """
    near = range(1, 1 + graph(clients, terms.neighbours, _KEY).neighbours)
    everybody, needed = tuple(range(clients)), terms.needed(clients)
    keys = messages.Advertisement(1, 0, _KEY, _KEY, _SIGNATURE)
    sealed = dict.fromkeys(near, seal(_KEY, 0, 1, 1, _KEY, bytes(2 * SHARE_BYTES)))
    malicious = terms.profile == MALICIOUS
    signatures = dict.fromkeys(range(needed), _SIGNATURE) if malicious else {}
    told = messages.Participants(1, everybody, 32 * clients * b"0", dict.fromkeys(near, keys.to_bytes()))
    vector = bytes(terms.length * word_bytes(terms.bits))
    shares = dict.fromkeys([0, *near], bytes(SHARE_BYTES))
    asked: dict[str, tuple[Message, Message]] = {
        ADVERTISE: (terms, keys),
        SHARE: (told, messages.Shares(1, 0, sealed, _KEY)),
        MASK: (messages.Delivery(1, sealed), messages.Masked(1, 0, vector)),
        CONFIRM: (messages.Survivors(1, everybody), messages.Confirmation(1, 0, _SIGNATURE)),
        UNMASK: (messages.UnmaskRequest(1, everybody, signatures), messages.Unmasking(1, 0, shares)),
    }
    return {
        stage: Pair(len(down.to_bytes()), len(up.to_bytes()))
        for stage, (down, up) in asked.items()
        if stage != CONFIRM or malicious
    }
