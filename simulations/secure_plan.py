"""fedra secure and fedra identities: what secure aggregation takes before anything is run, and keys for a deployment.

The answers are a run's own: its graph and threshold, the bytes of its messages, its rounding. The mean of n clients of
equal weight is off by less than a step of rounding at each number, by half of that but rarely, with a standard
deviation of step / (2 sqrt n) at most (privacy/secagg/quantise.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from core.config import RunConfig
from core.errors import InputError
from privacy.secagg import identities, sizes
from privacy.secagg.graph import MALICIOUS, malicious_threshold
from privacy.secagg.messages import MASK
from privacy.secagg.payload import Payload
from privacy.secagg.rounds import plan_of, terms_of
from reports.words import plural, size

PROFILE = "secure-aggregation.profile"
# Of a plain round, each way.
FLOAT_BYTES = 4
STAGES = {
    "advertise": ("the terms", "its keys, signed"),
    "share": ("its neighbours' keys", "sealed shares of its secrets"),
    "mask": ("its neighbours' shares, and the model", "its masked vector"),
    "confirm": ("who was counted", "its signature under that"),
    "unmask": ("the others' signatures", "the shares that remove masks"),
}


def secure_plan(clients: Sequence[int], parameters: int, given: Mapping[str, Any], *, console: Console) -> None:
    """Show what a sum of so many clients takes, for each number of `clients`, and the messages where there is one.

    `given` holds settings of secure-aggregation by their keys.
    """
    rows = [plan(many, parameters, given) for many in dict.fromkeys(clients)]
    _show(rows, parameters, console)


def create_identities(folder: Path, clients: int, console: Console) -> None:
    """Write keys and roster, and say who needs what."""
    try:
        roster = identities.create(folder, clients)
    except OSError as error:
        raise InputError(f"{folder} is not a folder to write in ({error.strerror}); name another.") from None
    lines = [
        f"Roster: {roster}, the public keys of {plural(clients, 'client')}: for the server and for every client.",
        f"Keys: client-0.key to client-{clients - 1}.key, one for each client and for nobody else.",
        "The server's run: secure-aggregation.profile=malicious secure-aggregation.roster=ROSTER",
        "Client i, when its SuperNode is started:",
        '  --node-config \'partition-id=i secure-identity="PATH/client-i.key" secure-roster="PATH/roster.json"\'',
        '  and secure-profile="semi-honest" beside it, where a run may have that profile: else it is refused.',
        "Bring both by a way that the server has no hand in, and delete the keys here.",
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def plan(clients: int, parameters: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a sum of `clients` clients takes, each with a model of `parameters` numbers.

    `given` holds settings of secure-aggregation by their keys. Raises `InputError` where there can be no such sum.
    """
    flat = {PROFILE: "auto", **{f"secure-aggregation.{name}": value for name, value in given.items()}}
    config = RunConfig.of({"clients": clients, **flat})
    own = config.secure_aggregation
    if own.profile == "none":
        raise InputError("--profile none hides nothing; choose auto, malicious or semi-honest.")
    chosen = plan_of(config, clients)
    payload = Payload(config, parameters, clients, 1)
    messages = sizes.of(terms_of(config, 0, 1, bytes(32), payload.length, clients), clients)
    model = FLOAT_BYTES * parameters
    step = 2 * own.clip / ((1 << payload.code_bits) - 1)
    malicious = chosen.profile == MALICIOUS
    threshold = chosen.threshold or malicious_threshold(clients)
    return {
        "clients": clients,
        "profile": chosen.profile,
        "neighbours": chosen.neighbours or clients - 1,
        "threshold": threshold,
        # Of the complete graph more is true than was asked for.
        "dropouts": clients - threshold if malicious else chosen.dropouts,
        "corrupt": (clients - 1) // 3 if malicious else chosen.corrupt,
        "privacy_bits": chosen.privacy_bits,
        "correctness_bits": chosen.correctness_bits,
        "ring_bits": own.bits,
        "code_bits": payload.code_bits,
        "clip": own.clip,
        "messages": messages,
        "uplink_bytes": sum(pair.up for pair in messages.values()),
        "downlink_bytes": model + sum(pair.down for pair in messages.values()),
        "plain_bytes": model,
        "off": step,
        "deviation": step / (2 * math.sqrt(clients)),
        "together": step * math.sqrt(parameters),
    }


def bits(value: float) -> str:
    """Return bits of a probability's smallness in words."""
    return "certain" if math.isinf(value) else f"{value:.1f}"


def _show(rows: Sequence[Mapping[str, Any]], parameters: int, console: Console) -> None:
    """Print the tables."""

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    def table(title: str, headings: Sequence[str], lines: Sequence[Sequence[str]], text: int = 0) -> None:
        made = Table(title=title, title_justify="left", box=None, padding=(0, 3, 0, 0))
        for i, heading in enumerate(headings):
            made.add_column(heading, justify="left" if i < text else "right")
        for line in lines:
            made.add_row(*line)
        console.print(made)

    first = rows[0]
    headings = ["Clients", "Profile", "Each masks with", "Shares open a mask", "May drop out", "May be corrupt"]
    table("Who masks with whom, and what that withstands", [*headings, "Privacy, bits", "Correctness, bits"], [
        (
            f"{row['clients']:,}", row["profile"], f"{row['neighbours']:,}", f"{row['threshold']:,}",
            f"{row['dropouts']:,}", f"{row['corrupt']:,}", bits(row["privacy_bits"]), bits(row["correctness_bits"]),
        )
        for row in rows
    ])  # fmt: skip
    headings = ["Clients", "It sends", "It gets", "The server gets", "Bits a number", "A number is off by less than"]
    table(f"A client's round with {parameters:,} numbers", [*headings, "Standard deviation", "All together"], [
        (
            f"{row['clients']:,}", size(row["uplink_bytes"]), size(row["downlink_bytes"]),
            size(row["clients"] * row["uplink_bytes"]), str(row["code_bits"]),
            *(f"{row[name]:.2g}" for name in ("off", "deviation", "together")),
        )
        for row in rows
    ])  # fmt: skip
    if len(rows) == 1:
        table("Its messages", ["Message", "From the server", "Bytes", "Back", "Bytes"], [
            (stage, STAGES[stage][0], f"{down:,}", STAGES[stage][1], f"{up:,}")
            for stage, (down, up) in _with_model(first).items()
        ], text=2)  # fmt: skip
    for sentence in _explained(rows):
        say(sentence)


def _with_model(row: Mapping[str, Any]) -> dict[str, sizes.Pair]:
    """Return the messages with the model in the one that brings it."""
    return {
        stage: pair._replace(down=pair.down + row["plain_bytes"]) if stage == MASK else pair
        for stage, pair in row["messages"].items()
    }


def _explained(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    first, profiles = rows[0], {row["profile"] for row in rows}
    said = []
    if MALICIOUS in profiles:
        said.append(
            "malicious: even a server that lies, with so many clients on its side, learns one sum a round and no more."
        )
    if len(profiles - {MALICIOUS}):
        said.append(
            "semi-honest: the server keeps to the protocol. Bits are -log2 of the probability, a round, that corrupt "
            "clients open somebody's mask (privacy) or dropouts leave one that nobody can remove (correctness)."
        )
    said.append(
        f"A plain round moves {size(first['plain_bytes'])} each way. Off by: of the mean of clients of equal weight, "
        f"updates no longer than secure-aggregation.clip={first['clip']:g}; half the clip, half of it."
    )
    said.append(f"Run it: fedra run PRESET sampled={first['clients']} {PROFILE}={first['profile']}")
    return said
