"""Known answers: fixed keys give fixed bytes, here, on other machines, in other processes, and by hand.

`python tests/test_secagg_vectors.py` writes the file anew: clients of another version then share no key with these.
"""

from __future__ import annotations

import hmac
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from secagg_federation import Party, drawn

from core.seeding import rng
from privacy.secagg.client import State
from privacy.secagg.codec import encode
from privacy.secagg.graph import MALICIOUS, SEMI_HONEST
from privacy.secagg.keys import Entropy, Identity, Roster
from privacy.secagg.messages import MASK, SHARE, Terms

FILE = Path(__file__).parent / "vectors" / "secagg.json"
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "malicious": (5, {"profile": MALICIOUS}),
    "semi-honest": (8, {"profile": SEMI_HONEST, "neighbours": 4, "threshold": 3, "bits": 20}),
}


class Known(Party):
    """A party whose clients have given secrets; what they draw besides is random."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.given = {own["id"]: own for own in case["clients"]}
        terms = case["terms"]
        super().__init__(len(self.given))
        self.ids = list(self.given)
        self.identities = {client: Identity(bytes.fromhex(own["identity"])) for client, own in self.given.items()}
        self.roster = Roster({client: identity.public for client, identity in self.identities.items()})
        self.vectors = {client: np.array(own["vector"], dtype=np.uint32) for client, own in self.given.items()}
        self.states = {client: State().to_bytes() for client in self.ids}
        self.begin(Terms(**{**terms, "content": bytes.fromhex(terms["content"])}))

    def _drawing(self, client: int) -> Entropy:
        if client not in self.given:
            return os.urandom
        left = [bytes.fromhex(self.given[client][name]) for name in ("channel", "mask", "seed")]
        return lambda size: left.pop(0) if left else os.urandom(size)


def _case(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text())[name]
    return found


def _masked(case: dict[str, Any]) -> tuple[dict[int, str], list[int]]:
    """Return every client's masked vector in hexadecimal, and the sum."""
    party = Known(case)
    outgoing = party.until(MASK)
    answers = {client: party.answer(client, MASK, message) for client, message in outgoing.items()}
    for client, answer in answers.items():
        assert party.send(client, MASK, answer)
    for stage in party.stages[party.stages.index(MASK) + 1 :]:
        party.run(stage, party.outgoing(stage))
    return {client: answer.vector.hex() for client, answer in answers.items()}, party.server.total().tolist()


@pytest.mark.parametrize("name", CASES)
def test_fixed_keys_give_the_known_bytes(name: str) -> None:
    case = _case(name)
    masked, total = _masked(case)
    assert masked == {own["id"]: own["masked"] for own in case["clients"]}
    assert total == case["total"]
    vectors = np.array([own["vector"] for own in case["clients"]])
    assert total == (vectors.sum(0) % 2 ** case["terms"]["bits"]).tolist()


def test_another_process_gives_the_same_bytes() -> None:
    code = "import json, test_secagg_vectors as t; print(json.dumps([t._masked(t._case(n)) for n in t.CASES]))"
    path = os.pathsep.join([str(FILE.parents[1]), str(FILE.parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == json.loads(json.dumps([_masked(_case(name)) for name in CASES]))


@pytest.mark.parametrize("name", CASES)
def test_the_known_bytes_are_those_of_the_papers_by_hand(name: str) -> None:
    """x_i + PRG(b_i) + sum PRG(s_ij) over j > i - sum over j < i, all of it written out."""
    case = _case(name)
    bits, context = case["terms"]["bits"], bytes.fromhex(case["context"])
    secrets = {own["id"]: X25519PrivateKey.from_private_bytes(bytes.fromhex(own["mask"])) for own in case["clients"]}
    public = {client: secret.public_key().public_bytes_raw() for client, secret in secrets.items()}

    def stream(seed: bytes) -> np.ndarray:
        cipher = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
        return np.frombuffer(cipher.update(bytes(4 * case["terms"]["length"])), "<u4").astype(np.int64)

    for own in case["clients"]:
        i, vector = own["id"], np.array(own["vector"], dtype=np.int64) + stream(bytes.fromhex(own["seed"]))
        for j in own["neighbours"]:
            low, high = sorted((i, j))
            extracted = hmac.digest(context, secrets[i].exchange(secrets[j].public_key()), "sha256")
            info = encode("mask", low, public[low], high, public[high])
            vector += (1 if i < j else -1) * stream(hmac.digest(extracted, info + b"\x01", "sha256"))
        whole = (vector % 2**bits).astype("<u4").tobytes()
        width = -(-bits // 8)
        assert own["masked"] == b"".join(whole[k : k + width] for k in range(0, len(whole), 4)).hex()


def _written() -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, (clients, changes) in CASES.items():
        party = Party(clients, length=6, server_round=3, **changes)
        terms = {field: getattr(party.terms, field) for field in Terms.__dataclass_fields__}
        given = {
            client: {
                "id": client, "identity": party.identities[client].secret.hex(),
                **{key: drawn(name, key, client)(32).hex() for key in ("channel", "mask", "seed")},
                "vector": rng(0, name, "vector", client).integers(0, 1 << party.terms.bits, 6).tolist(),
            }
            for client in party.ids
        }  # fmt: skip
        case = {"terms": {**terms, "content": party.terms.content.hex()}, "clients": list(given.values())}
        known = Known(case)
        outgoing = known.until(SHARE)
        for client, message in outgoing.items():
            given[client]["neighbours"] = sorted(message.advertisements)
        masked, total = _masked(case)
        for client, own in given.items():
            own["masked"] = masked[client]
        out[name] = {**case, "context": known.server._context.hex(), "total": total}
    return out


if __name__ == "__main__":
    FILE.write_text(json.dumps(_written(), indent=1) + "\n")
