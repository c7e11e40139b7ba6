"""What a server or a client that lies gets from honest ones: a typed error, and no key, share or vector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from secagg_federation import CONTENT, RUN, Party

from core.seeding import rng
from privacy.secagg import messages
from privacy.secagg.client import Client, State
from privacy.secagg.errors import (
    BadKeyError,
    ForgedError,
    InconsistentError,
    MalformedError,
    OutOfTurnError,
    RefusedError,
    SecAggError,
    TooFewError,
)
from privacy.secagg.graph import MALICIOUS, SEMI_HONEST
from privacy.secagg.keys import Identity, KeyPair, Roster
from privacy.secagg.messages import ADVERTISE, CONFIRM, MASK, SHARE, UNMASK, Advertisement, Confirmation
from privacy.secagg.server import Server
from privacy.secagg.shamir import P, _lagrange

Alter = Callable[[Party, int, Any], Any]


def _aborts(
    party: Party, stage: str, client: int, message: Any, error: type[SecAggError], content: bytes = CONTENT
) -> None:
    """Assert that a client raises, has forgotten the round, and answers nothing more in it."""
    with pytest.raises(error):
        party.answer(client, stage, message, content)
    assert party.states[client] == State(party.terms.round).to_bytes()
    for later in party.stages[1:]:
        with pytest.raises(OutOfTurnError):
            party.answer(client, later, message)
    with pytest.raises(OutOfTurnError):
        party.answer(client, ADVERTISE, party.terms)


def _advertisement(party: Party, client: int, pair: KeyPair, mask: KeyPair, signer: int | None = None) -> Advertisement:
    """Return keys in a client's name, signed by it or by another."""
    signed = Advertisement.signed_part(party.terms.hash, client, pair.public, mask.public)
    signature = party.identities[client if signer is None else signer].sign(signed)
    return Advertisement(party.terms.round, client, pair.public, mask.public, signature)


def _told(party: Party, client: int, keys: dict[int, Advertisement]) -> messages.Participants:
    """Return a list of participants that fits these keys, for one client of the complete graph."""
    ids = tuple(sorted(keys))
    digests = b"".join(keys[c].digest(party.roster[c]) for c in ids)
    others = {c: keys[c].to_bytes() for c in ids if c != client}
    return messages.Participants(party.terms.round, ids, digests, others)


def _keys(party: Party) -> dict[int, Advertisement]:
    """Return what clients have advertised."""
    return dict(party.server._came)


def _with(keys: dict[int, Advertisement], client: int, **changes: Any) -> dict[int, Advertisement]:
    return {**keys, client: replace(keys[client], **changes)}


# Each from the party, the true keys, the client that is lied to (a) and the one that the lie is about (b).
ROSTERS: dict[str, tuple[type[SecAggError], Callable[[Party, dict[int, Advertisement], int, int], dict]]] = {
    # A server that wants to stand between two clients has no signature for its keys.
    "a channel key of the server's": (ForgedError, lambda p, k, a, b: _with(k, b, channel=_pair(1).public)),
    "a mask key of the server's": (ForgedError, lambda p, k, a, b: _with(k, b, mask=_pair(1).public)),
    "keys exchanged": (ForgedError, lambda p, k, a, b: _with(k, b, channel=k[b].mask, mask=k[b].channel)),
    "a bad signature": (ForgedError, lambda p, k, a, b: _with(k, b, signature=bytes(64))),
    "keys that a third client has signed": (ForgedError, lambda p, k, a, b: _signed(p, k, b, _pair(1), by=p.ids[3])),
    "another client's keys": (ForgedError, lambda p, k, a, b: {**k, b: replace(k[p.ids[3]], client=b)}),
    # From here on the other client has signed what it should not have.
    "a point of low order": (BadKeyError, lambda p, k, a, b: _signed(p, k, b, KeyPair(b"", bytes(32)))),
    "a mask key of low order": (BadKeyError, lambda p, k, a, b: _signed(p, k, b, _pair(1), KeyPair(b"", bytes(32)))),
    "no key": (BadKeyError, lambda p, k, a, b: _signed(p, k, b, KeyPair(b"", b"key"))),
    "the client's own keys": (InconsistentError, lambda p, k, a, b: _signed(p, k, b, KeyPair(b"", k[a].channel))),
    "two equal keys": (InconsistentError, lambda p, k, a, b: _signed(p, k, b, _pair(2), _pair(2))),
    "the client left out": (InconsistentError, lambda p, k, a, b: {c: k[c] for c in k if c != a}),
    "the client's own key changed": (InconsistentError, lambda p, k, a, b: _with(k, a, mask=bytes(32))),
    "fewer than the minimum": (TooFewError, lambda p, k, a, b: {a: k[a], b: k[b]}),
}


def _signed(
    party: Party,
    keys: dict[int, Advertisement],
    client: int,
    channel: KeyPair,
    mask: KeyPair | None = None,
    by: int = 0,
) -> dict[int, Advertisement]:
    """Return the keys with others of a client, signed by itself or somebody else."""
    return {**keys, client: _advertisement(party, client, channel, mask or _pair(2), by or client)}


def _pair(number: int) -> KeyPair:
    return KeyPair.of(bytes([number]) * 32)


@pytest.mark.parametrize("lie", ROSTERS)
def test_a_list_of_keys_that_is_not_true_ends_the_round(lie: str) -> None:
    error, alter = ROSTERS[lie]
    party = Party(5)
    party.run(ADVERTISE, party.outgoing(ADVERTISE))
    own, other = party.ids[0], party.ids[1]
    keys = _keys(party)
    # The true one is accepted, so that it is the lie that is not.
    assert _told(party, own, keys) == party.outgoing(SHARE)[own]
    _aborts(party, SHARE, own, _told(party, own, alter(party, keys, own, other)), error)


def test_lists_that_contradict_themselves_end_the_round() -> None:
    def changed(**changes: Callable[[messages.Participants], Any]) -> None:
        party = Party(5)
        told = party.until(SHARE)[party.ids[0]]
        altered = replace(told, **{name: change(told) for name, change in changes.items()})
        _aborts(party, SHARE, party.ids[0], altered, InconsistentError)

    changed(ids=lambda t: t.ids[::-1])
    changed(ids=lambda t: (t.ids[0], *t.ids[:-1]))
    changed(digests=lambda t: t.digests[:-32])
    changed(digests=lambda t: t.digests[32:] + t.digests[:32])
    changed(advertisements=lambda t: dict(list(t.advertisements.items())[:-1]))
    # A digest of a neighbour that is not that of its keys: others were told other keys.
    changed(digests=lambda t: t.digests[:-32] + bytes(32))


def test_who_is_not_on_the_roster_does_not_take_part() -> None:
    party = Party(5)
    told = party.until(SHARE)[party.ids[0]]
    known = Roster({client: party.roster[client] for client in party.ids[:4]})
    own = Client(
        party.ids[0], RUN, party.identities[party.ids[0]], known, state=State.from_bytes(party.states[party.ids[0]])
    )
    with pytest.raises(InconsistentError, match=f"client {party.ids[4]} is not on the roster"):
        own.share(told)
    stranger = Server(party.terms, [*party.ids, 99], party.roster)
    identity = Identity.generate()
    signed = Advertisement.signed_part(party.terms.hash, 99, _pair(1).public, _pair(2).public)
    assert not stranger.take(99, Advertisement(1, 99, _pair(1).public, _pair(2).public, identity.sign(signed)))
    assert stranger.refused[99] == "client 99 is not on the roster"


@pytest.mark.parametrize("changes", [{"content": bytes(32)}, {"length": 8}, {"bits": 31}, {"minimum": 4}])
def test_clients_that_are_told_different_terms_do_not_talk_to_each_other(changes: dict) -> None:
    party = Party(5)
    special = party.ids[0]
    terms = dict.fromkeys(party.ids, party.terms) | {special: replace(party.terms, **changes)}
    answers = {client: party.answer(client, ADVERTISE, terms[client]) for client in party.ids}
    for client in party.ids:
        _aborts(party, SHARE, client, _told(party, client, answers), ForgedError)
    # An honest server does not let it come to that.
    assert [party.send(client, ADVERTISE, answers[client]) for client in party.ids] == [False, *[True] * 4]


def test_a_model_of_the_servers_own_making_gets_no_answer() -> None:
    party = Party(5)
    outgoing = party.until(MASK)
    _aborts(party, MASK, party.ids[0], outgoing[party.ids[0]], InconsistentError, content=bytes(32))


@pytest.mark.parametrize(
    "changes",
    [
        {"run": "another"}, {"profile": SEMI_HONEST, "threshold": 2}, {"minimum": 4}, {"version": 2}, {"bits": 0},
        {"threshold": 2}, {"neighbours": 2},
    ],
)  # fmt: skip
def test_terms_that_are_weaker_than_a_clients_own_are_refused_and_nothing_happens(changes: dict) -> None:
    party = Party(5)
    own = Client(party.ids[0], RUN, party.identities[party.ids[0]], party.roster, minimum=5)
    accepted = replace(party.terms, minimum=5)
    with pytest.raises(RefusedError, match="does not accept the terms"):
        own.advertise(replace(accepted, **changes))
    assert own.state == State()
    assert own.advertise(accepted).round == 1
    # Who is content with an honest server takes a malicious one's terms too.
    content = Client(party.ids[0], RUN, party.identities[party.ids[0]], party.roster, profile=SEMI_HONEST)
    assert content.advertise(party.terms).round == 1


DELIVERIES: dict[str, tuple[type[SecAggError], Alter]] = {
    "a flipped bit": (ForgedError, lambda p, a, m: _first(m, m.sealed[min(m.sealed)][:-1] + b"?")),
    "a flipped nonce": (ForgedError, lambda p, a, m: _first(m, b"?" + m.sealed[min(m.sealed)][1:])),
    "cut off": (ForgedError, lambda p, a, m: _first(m, m.sealed[min(m.sealed)][:30])),
    "from somebody else": (ForgedError, lambda p, a, m: _first(m, m.sealed[max(m.sealed)])),
    "for somebody else": (ForgedError, lambda p, a, m: _first(m, _sent(p, min(m.sealed), max(m.sealed)))),
    "sent back": (ForgedError, lambda p, a, m: _first(m, _sent(p, a, min(m.sealed)))),
    "a stranger's": (InconsistentError, lambda p, a, m: replace(m, sealed={**m.sealed, 99: b"share"})),
    "its own": (InconsistentError, lambda p, a, m: replace(m, sealed={**m.sealed, a: b"share"})),
    "of too few": (TooFewError, lambda p, a, m: replace(m, sealed=dict(list(m.sealed.items())[:2]))),
    "of nobody": (TooFewError, lambda p, a, m: replace(m, sealed={})),
}


def _first(message: messages.Delivery, sealed: bytes) -> messages.Delivery:
    """Return the message with something else in place of the first client's share."""
    return replace(message, sealed={**message.sealed, min(message.sealed): sealed})


def _sent(party: Party, source: int, destination: int) -> bytes:
    return party.server._shares[source].sealed[destination]


@pytest.mark.parametrize("lie", DELIVERIES)
def test_shares_that_are_not_what_was_sent_end_the_round(lie: str) -> None:
    error, alter = DELIVERIES[lie]
    party = Party(5)
    own = party.ids[2]
    message = party.until(MASK)[own]
    _aborts(party, MASK, own, alter(party, own, message), error)


def test_shares_of_the_last_round_do_not_open_in_this_one() -> None:
    party = Party(5)
    own = party.ids[0]
    old = party.until(MASK)[own]
    party.next_round()
    party.until(MASK)
    _aborts(party, MASK, own, replace(old, round=2), ForgedError)


def test_keys_of_the_last_round_are_no_keys_of_this_one() -> None:
    party = Party(5)
    party.run(ADVERTISE, party.outgoing(ADVERTISE))
    old = _keys(party)[party.ids[1]]
    party.outgoing(SHARE)
    party.next_round()
    party.run(ADVERTISE, party.outgoing(ADVERTISE))
    lie = {**_keys(party), party.ids[1]: replace(old, round=2)}
    _aborts(party, SHARE, party.ids[0], _told(party, party.ids[0], lie), ForgedError)


@pytest.mark.parametrize("stage", [ADVERTISE, SHARE, MASK, CONFIRM, UNMASK])
def test_messages_of_other_rounds_are_refused_and_this_one_goes_on(stage: str) -> None:
    party, first = Party(4), {}
    for before in party.stages:
        first[before] = party.outgoing(before)
        party.run(before, first[before])
    party.next_round()
    outgoing = party.until(stage)
    for client in party.ids:
        kept = party.states[client]
        for before in party.stages:
            with pytest.raises(OutOfTurnError):
                party.answer(client, before, first[before][client])
        assert party.states[client] == kept
    party.run(stage, outgoing)
    for later in party.stages[party.stages.index(stage) + 1 :]:
        party.run(later, party.outgoing(later))
    assert party.server.total().tolist() == party.expected(party.ids)


@pytest.mark.parametrize("stage", [ADVERTISE, SHARE, MASK, CONFIRM, UNMASK])
def test_no_stage_is_answered_twice(stage: str) -> None:
    party = Party(4)
    outgoing = party.until(stage)
    own = party.ids[0]
    party.answer(own, stage, outgoing[own])
    with pytest.raises(OutOfTurnError):
        party.answer(own, stage, outgoing[own])
    # A second time is a lie, and ends the round; being invited twice is refused and no more.
    assert (party.states[own] == State(1).to_bytes()) == (stage != ADVERTISE)


def test_no_stage_is_answered_before_its_turn() -> None:
    for stage in (MASK, CONFIRM, UNMASK):
        party = Party(4)
        message = party.until(stage)[party.ids[0]]
        other = Party(4)
        other.until(SHARE)
        _aborts(other, stage, party.ids[0], message, OutOfTurnError)


SURVIVORS: dict[str, tuple[type[SecAggError], Alter]] = {
    "twice": (InconsistentError, lambda p, a, m: replace(m, ids=(m.ids[0], *m.ids))),
    "not in order": (InconsistentError, lambda p, a, m: replace(m, ids=m.ids[::-1])),
    "without the client": (InconsistentError, lambda p, a, m: replace(m, ids=tuple(c for c in m.ids if c != a))),
    "with a stranger": (InconsistentError, lambda p, a, m: replace(m, ids=(*m.ids, 10**15))),
    "with one that has not shared": (InconsistentError, lambda p, a, m: replace(m, ids=tuple(sorted(p.ids)))),
    "too few": (TooFewError, lambda p, a, m: replace(m, ids=tuple(sorted({a, *m.ids[:3]})))),
}


@pytest.mark.parametrize("lie", SURVIVORS)
@pytest.mark.parametrize("profile", [MALICIOUS, SEMI_HONEST])
def test_survivors_that_cannot_be_end_the_round(profile: str, lie: str) -> None:
    error, alter = SURVIVORS[lie]
    # t = 5 of 7; one has not shared its secrets.
    party = Party(7, profile=profile, threshold=0 if profile == MALICIOUS else 5)
    stage = CONFIRM if profile == MALICIOUS else UNMASK
    message = party.until(stage, {SHARE: party.ids[6:]})[party.ids[2]]
    _aborts(party, stage, party.ids[2], alter(party, party.ids[2], message), error)


def test_one_client_is_never_both_alive_and_dropped() -> None:
    # The server wants a victim's self mask from some and its mask key from others: whoever has confirmed the list with
    # the victim answers to no list without it.
    party = Party(7)
    victim = party.ids[6]
    outgoing = party.until(CONFIRM)
    party.run(CONFIRM, outgoing)
    true = party.outgoing(UNMASK)
    short = tuple(client for client in true[victim].ids if client != victim)
    for client in party.ids[:3]:
        assert len(party.answer(client, UNMASK, true[client]).shares) == 7
    for client in party.ids[3:6]:
        _aborts(party, UNMASK, client, replace(true[client], ids=short), InconsistentError)


def test_two_lists_of_survivors_do_not_both_find_enough_signatures() -> None:
    # Of seven, t = 5 must have signed the same list: three who were told one and three who were told another are not.
    party = Party(7)
    survivors = party.until(CONFIRM)[party.ids[0]]
    short = replace(survivors, ids=tuple(client for client in survivors.ids if client != party.ids[6]))
    lists = {client: survivors if i < 4 else short for i, client in enumerate(party.ids[:6])}
    signatures = {c: party.answer(c, CONFIRM, told).signature for c, told in lists.items()}
    for client, told in lists.items():
        same = {c: signatures[c] for c in lists if lists[c] == told}
        error: type[SecAggError] = TooFewError
        if client % 2:
            # All six signatures, two or four of them under the other list.
            same, error = signatures, ForgedError
        _aborts(party, UNMASK, client, messages.UnmaskRequest(1, told.ids, same), error)


REQUESTS: dict[str, tuple[type[SecAggError], Alter]] = {
    "t - 1 signatures": (TooFewError, lambda p, a, m: replace(m, signatures=dict(list(m.signatures.items())[:-1]))),
    "no signatures": (TooFewError, lambda p, a, m: replace(m, signatures={})),
    "a bad signature": (ForgedError, lambda p, a, m: _also(m, m.ids[0], bytes(64))),
    "one client's signature for another": (ForgedError, lambda p, a, m: _also(m, m.ids[0], m.signatures[m.ids[1]])),
    "a stranger's signature": (InconsistentError, lambda p, a, m: _also(m, 99, bytes(64))),
    "other survivors": (InconsistentError, lambda p, a, m: replace(m, ids=tuple(c for c in m.ids if c != p.ids[6]))),
}


def _also(message: messages.UnmaskRequest, client: int, signature: bytes) -> messages.UnmaskRequest:
    return replace(message, signatures={**message.signatures, client: signature})


@pytest.mark.parametrize("lie", REQUESTS)
def test_a_request_that_too_few_have_confirmed_gets_no_share(lie: str) -> None:
    error, alter = REQUESTS[lie]
    party = Party(7)
    own = party.ids[3]
    _aborts(party, UNMASK, own, alter(party, own, party.until(UNMASK)[own]), error)


def test_what_a_client_has_confirmed_it_does_not_take_back() -> None:
    # All others have signed a list without the victim, to whose secrets this client is to give another kind of share.
    party = Party(7)
    own, victim = party.ids[0], party.ids[6]
    survivors = party.until(CONFIRM)[own]
    short = replace(survivors, ids=tuple(client for client in survivors.ids if client != victim))
    party.answer(own, CONFIRM, survivors)
    signatures = {client: party.answer(client, CONFIRM, short).signature for client in party.ids[1:6]}
    # Five are as many as it asks for, and all of them are good.
    _aborts(party, UNMASK, own, messages.UnmaskRequest(1, short.ids, signatures), InconsistentError)
    request = messages.UnmaskRequest(1, short.ids, signatures)
    assert len(party.answer(party.ids[1], UNMASK, request).shares) == 7


def test_a_client_whose_own_masks_could_not_be_removed_gives_no_share() -> None:
    party = Party(24, profile=SEMI_HONEST, neighbours=8, threshold=4)
    request = party.until(UNMASK)[party.ids[0]]
    own = party.ids[0]
    near = State.from_bytes(party.states[own]).shares.keys()
    # Itself and two neighbours.
    left = sorted([*(set(request.ids) - near), *list(near - {own})[:2], own])
    _aborts(party, UNMASK, own, replace(request, ids=tuple(left)), TooFewError)


def test_only_survivors_confirm_the_survivors() -> None:
    # A client that has dropped out signs whatever the server likes.
    party = Party(7)
    own, corrupt = party.ids[0], party.ids[6]
    request = party.until(UNMASK, {MASK: [corrupt]})[own]
    context = State.from_bytes(party.states[own]).context
    signature = party.identities[corrupt].sign(Confirmation.signed_part(context, request.ids))
    few = replace(request, signatures=dict(list(request.signatures.items())[:-1]))
    _aborts(party, UNMASK, own, _also(few, corrupt, signature), InconsistentError)


def test_a_cohort_is_not_made_larger_by_naming_somebody_twice() -> None:
    # Among neighbours on a circle a client has the keys of few, and of others only the hashes.
    party = Party(24, profile=SEMI_HONEST, neighbours=4, threshold=3, minimum=24)
    party.run(ADVERTISE, party.outgoing(ADVERTISE))
    keys, own = _keys(party), party.ids[0]
    party.server.participants()
    lies = 0
    for twice in party.ids[1:23]:
        ids = tuple(sorted([*(c for c in party.ids if c != party.ids[23]), twice]))
        digests = b"".join(keys[c].digest(party.roster[c]) for c in ids)
        near = [ids[place] for place in party.terms.graph(ids, digests).of(ids.index(own))]
        if len(set(near)) == 4 and own not in near:
            lies += 1
            told = messages.Participants(1, ids, digests, {c: keys[c].to_bytes() for c in near})
            kept = party.states[own]
            with pytest.raises(InconsistentError, match="names somebody twice"):
                party.answer(own, SHARE, told)
            party.states[own] = kept
    assert lies > 10


def test_a_confirmation_of_another_round_or_context_counts_nowhere() -> None:
    party = Party(5)
    own = party.ids[0]
    request = party.until(UNMASK)[own]
    for context in (bytes(32), party.terms.hash):
        signature = party.identities[request.ids[1]].sign(Confirmation.signed_part(context, request.ids))
        assert not party.server.take(request.ids[1], Confirmation(1, request.ids[1], signature))
        altered = replace(request, signatures={**request.signatures, request.ids[1]: signature})
        copy = Party(5)
        copy.states = dict(party.states)
        _aborts(copy, UNMASK, own, altered, ForgedError)


def test_a_client_that_was_thought_lost_and_comes_back_hides_its_vector() -> None:
    # It was late with its vector, the masks with it are reconstructed, and then it comes: its self mask is still there.
    party = Party(7)
    late = party.ids[6]
    outgoing = party.until(MASK)
    party.run(MASK, outgoing, [late])
    party.run(CONFIRM, party.outgoing(CONFIRM))
    answer = party.answer(late, MASK, outgoing[late])
    party.run(UNMASK, party.outgoing(UNMASK))
    assert not party.send(late, MASK, answer)
    assert party.server.total().tolist() == party.expected(party.ids[:6])
    # It is among no survivors that it could confirm, and has no share to give.
    for stage in (CONFIRM, UNMASK):
        message = messages.Survivors(1, tuple(sorted(party.ids[:6])))
        with pytest.raises(SecAggError):
            party.answer(late, stage, message)
    assert party.states[late] == State(1).to_bytes()


@pytest.mark.parametrize("spare", [0, 2])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("crafted", [False, True])
def test_a_corrupted_share_makes_no_sum(spare: int, dropped: bool, crafted: bool) -> None:
    # Of seven five are needed. Where there is no share to spare, noise still makes no limb of 16 bits; what a client
    # makes up so that a limb is one more than it was is found by the commitment, or by the public key.
    party = Party(7)
    owner = party.ids[0]
    outgoing = party.until(UNMASK, {MASK: [owner]} if dropped else {})
    answering = [client for client in outgoing if client != owner][: 5 + (1 if dropped and spare else spare)]
    places = [sorted(party.ids).index(client) + 1 for client in answering]
    first = tuple(sorted(places)[:5])
    liar = answering[places.index(first[2])]
    one_more, noise = pow(int(_lagrange(first)[2]), -1, P), rng(0, "noise").integers(0, P, 16)
    for client in answering:
        answer = party.answer(client, UNMASK, outgoing[client])
        if client == liar:
            share = np.frombuffer(answer.shares[owner], "<u4").astype(np.uint64)
            share = (share + np.array([0, one_more] + [0] * 14, dtype=np.uint64)) % P if crafted else noise
            answer = replace(answer, shares={**answer.shares, owner: share.astype("<u4").tobytes()})
        assert party.send(client, UNMASK, answer)
    with pytest.raises(ForgedError, match="contradict" if spare else "than it has" if crafted else "make none"):
        party.server.total()


def test_who_has_dropped_out_does_not_come_back() -> None:
    party = Party(7)
    gone, *others = party.ids
    outgoing = party.until(MASK, {SHARE: [gone]})
    vector = np.ones(7, dtype="<u4").tobytes()
    assert not party.send(gone, MASK, messages.Masked(1, gone, vector))
    party.run(MASK, outgoing)
    survivors = party.outgoing(CONFIRM)
    signed = Confirmation.signed_part(party.server._context, survivors[others[0]].ids)
    assert not party.send(gone, CONFIRM, Confirmation(1, gone, party.identities[gone].sign(signed)))
    party.run(CONFIRM, survivors)
    party.run(UNMASK, party.outgoing(UNMASK))
    assert party.server.total().tolist() == party.expected(others)


WRONG: dict[str, Callable[[Any], Any]] = {
    ADVERTISE: lambda m: replace(m, mask=bytes(32)),
    SHARE: lambda m: replace(m, sealed=dict(list(m.sealed.items())[1:])),
    MASK: lambda m: replace(m, vector=m.vector[:-1]),
    CONFIRM: lambda m: replace(m, signature=bytes(64)),
    UNMASK: lambda m: replace(m, shares=dict(list(m.shares.items())[1:])),
}


@pytest.mark.parametrize("stage", WRONG)
def test_a_client_whose_answer_is_wrong_is_a_dropout(stage: str) -> None:
    party = Party(7)
    outgoing = party.until(stage)
    wrong, *others = outgoing
    assert not party.send(wrong, stage, WRONG[stage](party.answer(wrong, stage, outgoing[wrong])))
    assert party.server.refused[wrong]
    party.run(stage, {client: outgoing[client] for client in others})
    for later in party.stages[party.stages.index(stage) + 1 :]:
        party.run(later, party.outgoing(later))
    left = party.ids if stage in (CONFIRM, UNMASK) else [client for client in party.ids if client != wrong]
    assert party.server.total().tolist() == party.expected(left)


def test_a_client_with_bad_keys_or_anothers_does_not_reach_the_others() -> None:
    party = Party(5)
    one, two = party.ids[:2]
    low = KeyPair(b"", bytes(32))
    assert not party.send(one, ADVERTISE, _advertisement(party, one, low, _pair(1)))
    assert "low order" in party.server.refused[one]
    assert not party.send(one, ADVERTISE, _advertisement(party, one, _pair(1), _pair(1)))
    assert party.send(one, ADVERTISE, _advertisement(party, one, _pair(1), _pair(2)))
    for pairs in ((_pair(1), _pair(3)), (_pair(3), _pair(1))):
        assert not party.send(two, ADVERTISE, _advertisement(party, two, *pairs))
        assert party.server.refused[two] == "its keys are not new"


def test_a_vector_that_is_not_as_agreed_is_not_masked() -> None:
    party = Party(4)
    message = party.until(MASK)[party.ids[0]]
    for vector in (np.zeros(8, dtype=np.uint32), np.zeros(7, dtype=np.int64), np.zeros((7, 1), dtype=np.uint32)):
        own = party.client(party.ids[0])
        with pytest.raises(ValueError, match="is not 7 numbers of uint32"):
            own.mask(message, vector, CONTENT)
        assert own.state == State(1)


def test_a_kept_state_that_cannot_be_read_is_an_error() -> None:
    party = Party(4)
    party.until(SHARE)
    with pytest.raises(MalformedError):
        State.from_bytes(party.states[party.ids[0]][:-3])


@pytest.mark.parametrize("bounds", [{"most": 4}, {"least": 5}], ids=str)
def test_a_vector_made_for_another_number_of_clients_is_not_masked(bounds: dict[str, int]) -> None:
    # Of five who take part four may be left: noise made for the sum of five would not be enough.
    party = Party(5)
    [first, second, *_] = party.ids
    delivery = party.until(MASK)
    own = party.client(first)
    with pytest.raises(InconsistentError if "most" in bounds else RefusedError, match="clients"):
        own.mask(delivery[first], party.vectors[first].copy(), CONTENT, **bounds)
    assert own.state == State(1)
    party.client(second).mask(delivery[second], party.vectors[second].copy(), CONTENT, least=4, most=5)
