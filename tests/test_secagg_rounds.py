"""Rounds of secure aggregation among honest parties: sums, dropouts, what the server sees, what clients keep."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from secagg_federation import Party

from core.errors import InputError
from core.seeding import rng
from privacy.secagg import client as client_side
from privacy.secagg import messages
from privacy.secagg.client import State
from privacy.secagg.errors import OutOfTurnError, TooFewError
from privacy.secagg.graph import MALICIOUS, SEMI_HONEST
from privacy.secagg.masking import expand
from privacy.secagg.messages import ADVERTISE, CONFIRM, MASK, SHARE, STAGES, UNMASK, Terms
from privacy.secagg.quantise import Quantiser
from privacy.secagg.server import Server

COMPLETE = {"profile": SEMI_HONEST, "threshold": 3}
WHAT = {
    ADVERTISE: "have advertised keys", SHARE: "have shared their secrets", MASK: "have sent their vectors",
    CONFIRM: "have confirmed the survivors", UNMASK: "have answered to remove the masks",
}  # fmt: skip
REGULAR = {"profile": SEMI_HONEST, "neighbours": 8, "threshold": 4}


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(3, 8), st.sampled_from([MALICIOUS, SEMI_HONEST]), st.integers(1, 32))
def test_whoever_drops_out_wherever_the_sum_is_exact_or_the_round_ends(
    data: st.DataObject, clients: int, profile: str, bits: int
) -> None:
    threshold = 0 if profile == MALICIOUS else data.draw(st.integers(2, clients))
    party = Party(clients, bits=bits, profile=profile, threshold=threshold)
    leaves = data.draw(st.lists(st.sampled_from([*STAGES, *[""] * 15]), min_size=clients, max_size=clients))
    absent = {stage: [c for c, own in zip(party.ids, leaves, strict=True) if own == stage] for stage in party.stages}
    left, enough = list(party.ids), True
    for stage in party.stages:
        left = [client for client in left if client not in absent[stage]]
        if stage == ADVERTISE:
            needed = party.terms.needed(len(left))
        if stage == MASK:
            survivors = left
        enough &= len(left) >= (needed if stage in (CONFIRM, UNMASK) else max(3, needed))
    if enough:
        assert party.total(absent).tolist() == party.expected(survivors)
        assert party.server.answered[MASK] == tuple(sorted(survivors))
    else:
        with pytest.raises(TooFewError, match="are needed"):
            party.total(absent)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 32))
def test_among_neighbours_on_a_circle_sums_are_exact_too(seed: int, bits: int) -> None:
    party = Party(24, bits=bits, **REGULAR)
    # Four of 24 drop out, each somewhere: nobody of 8 neighbours and itself has fewer than 4 left.
    lost = rng(seed, "lost").choice(party.ids, 4, replace=False).tolist()
    stages = rng(seed, "stages").choice(party.stages, 4).tolist()
    absent = {stage: [c for c, own in zip(lost, stages, strict=True) if own == stage] for stage in party.stages}
    gone = {c for stage in (ADVERTISE, SHARE, MASK) for c in absent[stage]}
    assert party.total(absent).tolist() == party.expected([c for c in party.ids if c not in gone])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("clients", "needed"), [(6, 5), (10, 7)])
def test_exactly_t_are_enough_and_t_minus_1_are_not(stage: str, clients: int, needed: int) -> None:
    for count in (needed, needed - 1):
        party = Party(clients)
        absent = {stage: party.ids[count:]}
        if stage == ADVERTISE:
            # The threshold is of those who advertise; three is the smallest cohort of all.
            party, absent = Party(clients, minimum=needed), {stage: party.ids[count:]}
        if count == needed:
            left = party.ids[:count] if stage in (ADVERTISE, SHARE, MASK) else party.ids
            assert party.total(absent).tolist() == party.expected(left)
        else:
            with pytest.raises(TooFewError, match=f"{count} clients {WHAT[stage]}, and {needed} are needed"):
                party.total(absent)


def test_dropouts_at_every_stage_of_one_round() -> None:
    party = Party(16, bits=20)
    one, two, three, four, five = party.ids[:5]
    absent = {ADVERTISE: [one], SHARE: [two], MASK: [three], CONFIRM: [four], UNMASK: [five]}
    # t = 11 of the 15 that advertise, and 11 answer to the end.
    assert party.total(absent).tolist() == party.expected(party.ids[3:])
    assert [len(party.server.answered[stage]) for stage in STAGES] == [15, 14, 13, 12, 11]


def test_who_has_too_few_neighbours_left_is_left_out() -> None:
    party = Party(24, **REGULAR)
    outgoing = party.until(SHARE)
    victim = party.ids[0]
    near = sorted(messages.Advertisement.from_bytes(keys).client for keys in outgoing[victim].advertisements.values())
    # Two of its eight neighbours and itself are fewer than t = 4.
    party.run(SHARE, outgoing, near[:6])
    deliveries = party.outgoing(MASK)
    assert victim not in deliveries
    assert party.server.refused[victim] == "too few of its neighbours have shared their secrets"
    party.run(MASK, deliveries)
    party.run(UNMASK, party.outgoing(UNMASK))
    assert party.server.total().tolist() == party.expected(party.server.answered[MASK])


@pytest.mark.parametrize("terms", [{}, COMPLETE, REGULAR])
def test_nothing_that_the_server_sees_has_plaintext_or_a_key_in_it(terms: dict) -> None:
    party = Party(12, length=40, **terms)
    secrets: list[bytes] = []
    for stage in party.stages[:-1]:
        party.run(stage, party.outgoing(stage), {SHARE: party.ids[:1], MASK: party.ids[1:2]}.get(stage, ()))
        for data in party.states.values():
            state = State.from_bytes(data)
            kept = [state.channel, state.mask, state.seed, *state.channel_keys.values(), *state.mask_seeds.values()]
            secrets += [*kept, *state.shares.values()]
            secrets += [expand(seed, 8).tobytes() for seed in (state.seed, *state.mask_seeds.values()) if seed]
    party.run(UNMASK, party.outgoing(UNMASK))
    before = b"".join(data for data in party.seen if not data.startswith(messages.Unmasking(0, 0, {}).to_bytes()[:18]))
    everything = b"".join(party.seen)
    # Every two neighbouring numbers of every vector; nonces, which are no secret, have 12 bytes.
    for vector in party.vectors.values():
        assert not any(vector[i : i + 2].tobytes() in everything for i in range(39))
    drawn = [secret for secret in party.secrets if len(secret) > 12]
    assert len(drawn) >= 3 * 11
    for secret in [*drawn, *(identity.secret for identity in party.identities.values())]:
        assert not any(secret[i : i + 16] in everything for i in (0, 8, 16))
    # Shares are what the answers of the last stage are made of, and travel sealed before.
    assert len([secret for secret in secrets if len(secret) == 2 * client_side.SHARE_BYTES]) > 30
    for secret in filter(None, secrets):
        assert not any(secret[i : i + 16] in before for i in range(0, len(secret) - 15, 16))
    assert party.server.total().tolist() == party.expected(party.ids[2:])


@pytest.mark.parametrize("terms", [{}, COMPLETE, REGULAR])
def test_of_every_client_the_server_gets_shares_of_one_secret_only(terms: dict) -> None:
    party = Party(12, **terms)
    dropped = party.ids[2:4]
    party.run(SHARE, party.until(SHARE))
    party.run(MASK, party.outgoing(MASK), dropped)
    if CONFIRM in party.stages:
        party.run(CONFIRM, party.outgoing(CONFIRM))
    halves: dict[tuple[int, int], bytes] = {}
    for client, data in party.states.items():
        for owner, share in State.from_bytes(data).shares.items():
            halves[client, owner] = share
    outgoing = party.outgoing(UNMASK)
    for client, message in outgoing.items():
        answer = party.answer(client, UNMASK, message)
        for owner, share in answer.shares.items():
            self_mask, key = halves[client, owner][:64], halves[client, owner][64:]
            assert share == (key if owner in dropped else self_mask)
        party.send(client, UNMASK, answer)
    assert len(outgoing) == 10
    assert party.server.total().tolist() == party.expected([c for c in party.ids if c not in dropped])


def test_after_the_round_a_client_has_kept_nothing_of_it() -> None:
    party = Party(5)
    largest = 0
    for stage in party.stages:
        party.run(stage, party.outgoing(stage), party.ids[:1] if stage == MASK else ())
        largest = max(largest, *map(len, party.states.values()))
    for client in party.ids[1:]:
        assert party.states[client] == State(round=1).to_bytes()
        assert len(party.states[client]) < 300 < largest
    # Who has dropped out forgets with the next round.
    old = State.from_bytes(party.states[party.ids[0]])
    assert old.seed
    party.next_round()
    party.run(ADVERTISE, party.outgoing(ADVERTISE))
    new = State.from_bytes(party.states[party.ids[0]])
    assert (new.seed, new.shares, new.round) == (b"", {}, 2)


def test_what_each_stage_keeps_is_what_the_next_ones_need() -> None:
    party, kept = Party(4), []
    for stage in party.stages:
        party.run(stage, party.outgoing(stage))
        state = State.from_bytes(party.states[party.ids[0]])
        kept.append({name for name in ("channel", "mask", "channel_keys", "mask_seeds", "seed", "shares", "survivors")
                     if getattr(state, name)})  # fmt: skip
    assert kept == [
        {"channel", "mask"}, {"channel_keys", "mask_seeds", "seed", "shares"}, {"shares"}, {"shares", "survivors"},
        set(),
    ]  # fmt: skip


def test_rounds_go_on_with_new_keys_and_new_masks() -> None:
    party, seen = Party(4), set()
    for _ in range(3):
        assert party.total().tolist() == party.expected(party.ids)
        # The very same vectors.
        seen |= {data[-40:] for data in party.seen}
        party.next_round()
    assert len(seen) == 3 * 5 * 4
    assert len({secret for secret in party.secrets if len(secret) > 12}) == 3 * 4 * 4


def test_a_client_that_lost_its_state_is_a_dropout() -> None:
    party = Party(7)
    outgoing = party.until(MASK)
    killed = party.ids[3]
    party.states[killed] = State().to_bytes()
    with pytest.raises(OutOfTurnError, match=f"client {killed} is in round 0, not in round 1"):
        party.answer(killed, MASK, outgoing[killed])
    party.run(MASK, outgoing, [killed])
    party.run(CONFIRM, party.outgoing(CONFIRM))
    party.run(UNMASK, party.outgoing(UNMASK))
    assert party.server.total().tolist() == party.expected([c for c in party.ids if c != killed])


@pytest.mark.parametrize("stage", STAGES)
def test_late_second_and_strange_answers_are_ignored(stage: str) -> None:
    party = Party(7)
    outgoing = party.until(stage)
    late, twice, *others = outgoing
    answers = {client: party.answer(client, stage, message) for client, message in outgoing.items()}
    for client in [twice, *others]:
        assert party.send(client, stage, answers[client])
    assert not party.send(twice, stage, answers[twice])
    assert not party.send(999, stage, answers[late])
    # In somebody else's name, and of another round.
    for false in (replace(answers[late], client=twice), replace(answers[late], round=2)):
        assert not party.send(late, stage, false)
        assert "the answer is that of client" in party.server.refused[late]
    after = party.stages[party.stages.index(stage) + 1 :]
    for following in after:
        outgoing = party.outgoing(following)
        assert not party.send(late, stage, answers[late])
        party.run(following, outgoing)
    left = party.ids if stage in (CONFIRM, UNMASK) else [client for client in party.ids if client != late]
    assert party.server.total().tolist() == party.expected(left)
    assert late not in party.server.answered[stage]
    assert not party.send(late, stage, answers[late])


def test_stages_are_closed_in_their_order() -> None:
    party = Party(4)
    for close in (party.server.deliveries, party.server.survivors, party.server.unmask_request, party.server.total):
        with pytest.raises(OutOfTurnError, match="the round is at stage 'advertise'"):
            close()
    party.total()
    with pytest.raises(OutOfTurnError, match="the round is at stage ''"):
        party.server.total()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"version": 2}, "the protocol's version is 2, not 1"),
        ({"profile": "trusting"}, "there is no profile 'trusting'"),
        ({"minimum": 2}, "a cohort of 2 is smaller than 3"),
        ({"threshold": 3}, "under the profile malicious everybody masks with everybody"),
        ({"profile": SEMI_HONEST, "threshold": 1}, "1 shares of 0 neighbours are no threshold"),
        ({"profile": SEMI_HONEST, "threshold": 5, "neighbours": 4}, "5 shares of 4 neighbours are no threshold"),
        ({"profile": SEMI_HONEST, "threshold": 3, "neighbours": 5}, "3 shares of 5 neighbours are no threshold"),
        ({"bits": 33}, "7 numbers of 33 bits"),
        ({"length": 0}, "0 numbers of 32 bits"),
        ({"content": b""}, "a hash of 0 bytes"),
    ],
)
def test_terms_that_no_round_can_have_are_refused(changes: dict, sentence: str) -> None:
    party = Party(4)
    with pytest.raises(InputError, match=sentence):
        Server(replace(party.terms, **changes), party.ids, party.roster)


def test_two_clients_are_no_cohort() -> None:
    party = Party(5)
    with pytest.raises(TooFewError, match="2 clients are asked to take part, and 3 are needed"):
        Server(party.terms, party.ids[:2], party.roster)


@pytest.mark.parametrize("ring_bits", [20, 32])
def test_quantised_updates_of_clients_that_drop_out_have_their_mean(ring_bits: int) -> None:
    quantiser = Quantiser(30, 6, 1.0, 100.0, bounds=(10.0,), counts=(50,), ring_bits=ring_bits)
    party = Party(6, quantiser.length, ring_bits)
    updates = {client: rng(2, "update", i).standard_normal(30) / 6 for i, client in enumerate(party.ids)}
    weights = dict(zip(party.ids, (100, 1, 50, 3, 77, 20), strict=True))
    for client, update in updates.items():
        seed = rng(2, "rounding", client).bytes(32)
        party.vectors[client] = quantiser.encode(update, weights[client], seed, [weights[client] / 10], [7])
    left = party.ids[:5]
    found = quantiser.decode(party.total({MASK: party.ids[5:]}), len(left))
    expected = np.average([updates[c] / max(1, np.linalg.norm(updates[c])) for c in left], axis=0,
                          weights=[weights[c] for c in left])  # fmt: skip
    assert found.weight == 231
    assert found.counts == (35,)
    assert np.abs(found.update - expected).max() < found.worst_error
    assert found.metrics[0] == pytest.approx(sum(weights[c] ** 2 for c in left) / 2310, abs=10 * found.worst_error)


def test_what_a_client_uploads_is_half_of_what_int64_would_be() -> None:
    party = Party(10, length=20_000)
    party.total()
    uploaded = sum(map(len, party.seen)) / 10
    # Flower's masked vectors are int64; keys, shares and signatures are 5 kB here.
    assert 4 * 20_000 < uploaded < 0.51 * 8 * 20_000 + 4_000
    small = Party(10, length=20_000, bits=24)
    small.total()
    assert sum(map(len, small.seen)) / 10 == pytest.approx(uploaded - 20_000)


def test_terms_differ_where_anything_differs() -> None:
    terms = Terms("run", 1, bytes(32), 7, 32)
    changes = [
        {"run": "ru"}, {"round": 2}, {"content": b"\1" * 32}, {"length": 8}, {"bits": 8}, {"minimum": 4},
        {"profile": SEMI_HONEST}, {"neighbours": 2}, {"threshold": 2}, {"version": 3},
    ]  # fmt: skip
    found = [terms, *(replace(terms, **change) for change in changes)]
    assert all(a.hash != b.hash for a, b in itertools.combinations(found, 2))
