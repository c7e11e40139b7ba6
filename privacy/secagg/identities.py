"""Who is who: identity keys and the roster of them, from files that the operator hands out, or simulated.

A server that could say which keys are whose could play every client but one. So keys come from outside the run: each
client's operator gives it its own secret key and the roster of all public ones. On one machine there is nobody to hide
anything from; keys are then made from the seed, and the run says so.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

from core.errors import InputError
from privacy.secagg.keys import KEY_BYTES, Identity, Roster, digest

ROSTER = "roster.json"


def create(folder: Path, clients: int) -> Path:
    """Write a new key for each client, `client-0.key` and so on for its owner alone, and the roster; return its path.

    Raises `InputError` where the folder has a roster already: it may be in use.
    """
    path = folder / ROSTER
    if path.exists():
        raise InputError(f"{path} exists, and clients may be using it; choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    public = {}
    for client in range(clients):
        identity = Identity.generate()
        public[str(client)] = identity.public.hex()
        descriptor = os.open(folder / f"client-{client}.key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(identity.secret.hex() + "\n")
    path.write_text(json.dumps(public, indent=1) + "\n", encoding="utf-8")
    return path


def read_roster(path: str) -> Roster:
    """Return the roster in a file; `InputError` where it cannot be read."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        return Roster({int(client): bytes.fromhex(key) for client, key in found.items()})
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(
            f"secure-aggregation.roster={path} cannot be read ({error}); make one: `fedra identities FOLDER`."
        ) from None


def read_identity(path: str) -> Identity:
    """Return the identity in a key file; `InputError` where it cannot be read."""
    try:
        secret = bytes.fromhex(Path(path).read_text(encoding="utf-8").strip())
        if len(secret) != KEY_BYTES:
            raise ValueError(f"{len(secret)} bytes are not {KEY_BYTES}")
        return Identity(secret)
    except (OSError, ValueError) as error:
        raise InputError(f"the identity key {path} cannot be read ({error}); `fedra identities` makes them.") from None


def simulated_identity(seed: int, client: int) -> Identity:
    """Return a key that everybody knows who knows the seed: for clients of one machine."""
    return Identity(digest("simulated identity", str(seed), client))


@functools.lru_cache(maxsize=2)
def simulated_roster(seed: int, clients: int) -> Roster:
    """Return the roster of such keys."""
    return Roster({client: simulated_identity(seed, client).public for client in range(clients)})
