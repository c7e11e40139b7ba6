"""Secure aggregation's smallest parts: bytes, keys, channels, masks."""

from __future__ import annotations

import hmac
import itertools
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from core.errors import InputError
from core.seeding import rng
from privacy.secagg import channel, masking
from privacy.secagg.codec import decode, encode
from privacy.secagg.errors import BadKeyError, ForgedError, InconsistentError, MalformedError, SecAggError
from privacy.secagg.keys import Agreement, Identity, KeyPair, Roster, check_public, content_hash
from privacy.secagg.messages import Delivery, Shares, Terms

SEED = bytes(range(32))
VALUES = st.one_of(
    st.integers(0, 2**64 - 1), st.binary(max_size=20), st.text(max_size=9),
    st.lists(st.integers(0, 2**64 - 1), max_size=5).map(tuple),
    st.dictionaries(st.integers(0, 2**64 - 1), st.binary(max_size=9), max_size=4),
)  # fmt: skip
# The points of order 1, 2, 4 and 8, and their other encodings (Bernstein, "Curve25519", 2006).
PRIME = 2**255 - 19
LOW_ORDER = [
    0, 1, PRIME - 1, PRIME, PRIME + 1,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
]  # fmt: skip


@given(st.lists(VALUES, max_size=5))
def test_values_are_read_as_they_were_written_and_equal_ones_have_equal_bytes(values: list) -> None:
    assert decode(encode(*values)) == values
    turned = [dict(reversed(v.items())) if isinstance(v, dict) else v for v in values]
    assert encode(*turned) == encode(*values)


@settings(max_examples=300)
@given(st.lists(VALUES, max_size=4), st.lists(VALUES, max_size=4))
def test_different_values_have_different_bytes(one: list, other: list) -> None:
    same = [type(v) for v in one] == [type(v) for v in other] and one == other
    assert (encode(*one) == encode(*other)) == same


@given(st.binary(max_size=60))
def test_bytes_that_nobody_wrote_are_refused_or_read_as_what_writes_them(data: bytes) -> None:
    try:
        values = decode(data)
    except MalformedError:
        return
    assert encode(*values) == data


def test_a_message_is_read_as_its_own_kind_alone() -> None:
    message = Shares(3, 5, {7: b"a", 9: b"bc"}, b"c")
    assert Shares.from_bytes(message.to_bytes()) == message
    with pytest.raises(MalformedError, match="no Delivery"):
        Delivery.from_bytes(message.to_bytes())
    with pytest.raises(MalformedError, match="other kinds"):
        Delivery.from_bytes(encode("Delivery", b"3", {7: b"a"}))
    with pytest.raises(MalformedError, match="no Delivery"):
        Delivery.from_bytes(b"")
    with pytest.raises(MalformedError, match="too early"):
        Shares.from_bytes(message.to_bytes()[:-1])


# RFC 7748, section 6.1.
ALICE = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
BOB = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
SHARED = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
CONTEXT = bytes(reversed(range(32)))


def test_two_clients_derive_what_rfc_7748_and_rfc_5869_say() -> None:
    alice, bob = KeyPair.of(ALICE), KeyPair.of(BOB)
    assert alice.public.hex() == "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    # HKDF written out: extract, then the first block of expand.
    pseudorandom = hmac.digest(CONTEXT, SHARED, "sha256")
    info = encode("mask", 4, alice.public, 7, bob.public)
    expected = hmac.digest(pseudorandom, info + b"\1", "sha256")
    assert Agreement("mask", 4, alice, CONTEXT)(7, bob.public) == expected
    assert Agreement("mask", 7, bob, CONTEXT)(4, alice.public) == expected


def test_what_is_derived_belongs_to_purpose_context_and_both_ends() -> None:
    alice, bob = KeyPair.of(ALICE), KeyPair.of(BOB)
    derived = {
        Agreement(label, own, alice, context)(other, bob.public)
        for label, own, context, other in itertools.product(("mask", "channel"), (4, 5), (CONTEXT, bytes(32)), (7, 8))
    }
    assert len(derived) == 16


@pytest.mark.parametrize(
    "changed",
    [
        {"run": "other"}, {"round": 2}, {"content": bytes(32)}, {"length": 8}, {"bits": 31}, {"minimum": 4},
        {"profile": "semi-honest", "threshold": 2}, {"version": 2},
    ],
)  # fmt: skip
def test_the_context_is_of_everything_agreed_on_and_of_all_keys(changed: dict) -> None:
    terms, ids, digests = Terms("run", 1, SEED, 7, 32), (1, 2, 3), bytes(96)
    context = terms.context(ids, digests)
    assert replace(terms, **changed).context(ids, digests) != context
    assert terms.context((1, 2, 4), digests) != context
    assert terms.context(ids, bytes(95) + b"\1") != context


@pytest.mark.parametrize("number", LOW_ORDER)
def test_points_of_low_order_are_refused(number: int) -> None:
    for point in (number, number + 2**255):
        with pytest.raises(BadKeyError, match="low order"):
            check_public(point.to_bytes(32, "little"))


def test_what_is_no_key_or_the_own_one_is_refused() -> None:
    alice, bob = KeyPair.of(ALICE), KeyPair.of(BOB)
    agree = Agreement("mask", 4, alice, CONTEXT)
    for other, key in ((7, alice.public), (4, bob.public)):
        with pytest.raises(BadKeyError, match="its own key"):
            agree(other, key)
    with pytest.raises(BadKeyError, match="no key"):
        agree(7, bob.public[:31])
    check_public(bob.public)


def test_a_roster_knows_who_signed() -> None:
    one, two = Identity(SEED), Identity.generate()
    assert Identity(one.secret).public == one.public
    roster = Roster({1: one.public, 2: two.public})
    roster.verify(1, b"said", one.sign(b"said"))
    for client, message, signature in ((2, b"said", one.sign(b"said")), (1, b"sad", one.sign(b"said")), (1, b"", b"")):
        with pytest.raises(ForgedError, match=f"not that of client {client}"):
            roster.verify(client, message, signature)
    with pytest.raises(InconsistentError, match="client 3 is not on the roster"):
        roster.verify(3, b"said", one.sign(b"said"))
    with pytest.raises(InputError, match="the same identity key"):
        Roster({1: one.public, 2: one.public})
    with pytest.raises(InputError, match="no Ed25519 public key"):
        Roster({1: b"short"})


def test_the_hash_of_a_rounds_content_is_of_names_arrays_order_and_config() -> None:
    found = [
        content_hash({"a": b"1", "b": b"2"}, b"c"), content_hash({"b": b"2", "a": b"1"}, b"c"),
        content_hash({"a": b"1", "b": b"3"}, b"c"), content_hash({"a": b"12", "b": b""}, b"c"),
        content_hash({"a": b"1", "c": b"2"}, b"c"), content_hash({"a": b"1", "b": b"2"}, b"d"),
    ]  # fmt: skip
    assert len({*found}) == 6
    assert content_hash({"a": b"1", "b": b"2"}, b"c") == found[0]


@given(st.binary(max_size=200), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_what_is_sealed_opens_at_its_destination(plain: bytes, source: int, destination: int) -> None:
    sealed = channel.seal(SEED, source, destination, 3, CONTEXT, plain)
    assert len(sealed) == len(plain) + channel.NONCE_BYTES + channel.TAG_BYTES
    assert channel.unseal(SEED, source, destination, 3, CONTEXT, sealed) == plain


@settings(max_examples=50)
@given(st.integers(0, 8 * (20 + 28) - 1))
def test_a_ciphertext_with_a_flipped_bit_does_not_open(bit: int) -> None:
    sealed = bytearray(channel.seal(SEED, 1, 2, 3, CONTEXT, b"a" * 20))
    sealed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ForgedError, match="client 2 got from client 1 in round 3"):
        channel.unseal(SEED, 1, 2, 3, CONTEXT, bytes(sealed))


@pytest.mark.parametrize(
    ("key", "source", "destination", "server_round", "context"),
    [
        (CONTEXT, 1, 2, 3, CONTEXT), (SEED, 4, 2, 3, CONTEXT), (SEED, 1, 4, 3, CONTEXT), (SEED, 2, 1, 3, CONTEXT),
        (SEED, 1, 2, 4, CONTEXT), (SEED, 1, 2, 3, SEED),
    ],
)  # fmt: skip
def test_a_ciphertext_opens_nowhere_else(
    key: bytes, source: int, destination: int, server_round: int, context: bytes
) -> None:
    sealed = channel.seal(SEED, 1, 2, 3, CONTEXT, b"share")
    with pytest.raises(ForgedError):
        channel.unseal(key, source, destination, server_round, context, sealed)
    for size in (0, 5, 12, 20):
        with pytest.raises(ForgedError):
            channel.unseal(SEED, 1, 2, 3, CONTEXT, sealed[:size])


def test_no_nonce_comes_twice() -> None:
    nonces = {channel.seal(SEED, *ends, 3, CONTEXT, b"")[:12] for ends in [(1, 2), (2, 1)] * 500}
    assert len(nonces) == 1000
    # Nor where both draw the same: a client that is restored and one with a broken generator.
    one, other = (channel.seal(SEED, *ends, 3, CONTEXT, b"", bytes)[:12] for ends in ((1, 2), (2, 1)))
    assert one != other


@pytest.mark.parametrize("count", [1, 5, masking.CHUNK, 2 * masking.CHUNK + 3])
def test_a_mask_is_the_keystream_of_aes_256_in_counter_mode(count: int) -> None:
    cipher = Cipher(algorithms.AES(SEED), modes.CTR(bytes(16))).encryptor()
    assert masking.expand(SEED, count).tobytes() == cipher.update(bytes(4 * count))


def test_all_256_bits_of_a_seed_count() -> None:
    number = int.from_bytes(SEED)
    found = {masking.expand((number ^ 1 << bit).to_bytes(32), 4).tobytes() for bit in range(256)}
    assert len(found) == 256
    for size in (16, 28, 31, 33):
        with pytest.raises(ValueError, match=f"a seed of {size} bytes"):
            masking.expand(bytes(size), 4)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.integers(1, 50), st.integers(1, 32), st.integers(0, 10**6))
def test_pairwise_masks_cancel_and_self_masks_are_left(clients: int, length: int, bits: int, seed: int) -> None:
    generator = rng(seed, "masks")
    vectors = generator.integers(0, 1 << bits, (clients, length), dtype=np.uint32)
    pair = {frozenset(p): generator.bytes(32) for p in itertools.combinations(range(clients), 2)}
    own = [generator.bytes(32) for _ in range(clients)]
    total = np.zeros(length, dtype=np.uint32)
    for i in range(clients):
        masked = vectors[i].copy()
        masking.add_masks(
            masked, [own[i], *(pair[frozenset((i, j))] for j in range(i + 1, clients))],
            [pair[frozenset((i, j))] for j in range(i)],
        )  # fmt: skip
        total += masking.unpack(masking.pack(masking.in_ring(masked, bits), bits), bits)
    masking.add_masks(total, [], own)
    expected = vectors.astype(np.int64).sum(0) % (1 << bits)
    assert masking.in_ring(total, bits).tolist() == expected.tolist()


@given(st.integers(1, 32), st.integers(0, 40), st.integers(0, 10**6))
def test_a_packed_vector_takes_whole_bytes_and_comes_back(bits: int, length: int, seed: int) -> None:
    vector = rng(seed, "pack").integers(0, 1 << bits, length, dtype=np.uint32)
    packed = masking.pack(vector, bits)
    assert len(packed) == length * -(-bits // 8)
    assert masking.unpack(packed, bits).tolist() == vector.tolist()


def test_masked_vectors_are_uniform_whatever_they_hide() -> None:
    # 2^20 words: a deviation of 1 % in any byte's frequency would show.
    for hidden in (0, 2**32 - 1):
        vector = np.full(1 << 20, hidden, dtype=np.uint32)
        masking.add_masks(vector, [SEED, CONTEXT], [bytes(32)])
        for place in range(4):
            counts = np.bincount(vector.view(np.uint8)[place::4], minlength=256)
            assert stats.chisquare(counts).pvalue > 1e-4
        assert stats.kstest(vector / 2.0**32, "uniform").pvalue > 1e-4
        # Every residue of a small ring, the last one too, and no relation between neighbours.
        assert stats.chisquare(np.bincount(vector & 0xFFF, minlength=4096)).pvalue > 1e-4
        assert abs(np.corrcoef(vector[:-1], vector[1:])[0, 1]) < 5e-3


def test_every_error_is_one_that_a_caller_can_catch() -> None:
    assert all(issubclass(kind, SecAggError) for kind in (BadKeyError, ForgedError, InconsistentError, MalformedError))
