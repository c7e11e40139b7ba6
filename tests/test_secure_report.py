"""What a user sees of secure aggregation: the plan and the keys on the command line, the terminal's lines, the page."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from secagg_federation import Party
from test_privacy_plan import _fedra as fedra
from test_report_sections import terminal, words
from test_reports import MASKED, read, round_row, run_folder

from client import secure as deployed
from core.config import RunConfig
from core.errors import InputError
from privacy.secagg import graph, identities, sizes
from privacy.secagg.exposure import Exposure
from reports import secure
from reports.load import load, read_rounds
from simulations.run import Run
from simulations.secure_plan import plan

PROFILE = "secure_aggregation__profile"
SMALL = {"clients": 8, "sampled": 4, "partition__min_examples": 5, "engine__workers": 0, PROFILE: "malicious"}


@pytest.mark.parametrize("terms", [{}, {"profile": graph.SEMI_HONEST, "neighbours": 6, "threshold": 4}, {"bits": 20}])
def test_the_bytes_of_a_plan_are_those_of_real_messages(terms: dict[str, Any]) -> None:
    party = Party(10, 101, **{"bits": 32, **terms})
    planned = sizes.of(party.terms, 10)
    assert list(planned) == party.stages
    for stage in party.stages:
        asked, before = party.outgoing(stage), len(party.seen)
        party.run(stage, asked)
        assert {len(message.to_bytes()) for message in asked.values()} == {planned[stage].down}
        assert {len(answer) for answer in party.seen[before:]} == {planned[stage].up}


def test_a_plan_by_hand() -> None:
    found = plan(10, 10_000, {})
    # t = floor(2 * 10 / 3) + 1; 3 * 3 < 10 is fewer than a third; everybody masks with everybody.
    assert [found[name] for name in ("profile", "neighbours", "threshold", "dropouts", "corrupt")] == [
        "malicious", 9, 7, 3, 3,
    ]  # fmt: skip
    assert math.isinf(found["privacy_bits"])
    # 10 (2^28 - 1) < 2^32 < 10 (2^29 - 1), and a step is 2 * 100 / (2^28 - 1).
    assert found["code_bits"] == 28
    assert found["off"] == pytest.approx(7.4506e-7, rel=1e-4)
    assert found["deviation"] == pytest.approx(7.4506e-7 / (2 * 10**0.5), rel=1e-4)
    assert found["together"] == pytest.approx(100 * 7.4506e-7, rel=1e-4)
    # 10,000 numbers, the training loss, the weight, who was clipped, and two counts, of 4 bytes each.
    assert found["messages"]["mask"].up == pytest.approx(4 * 10_005, abs=60)
    assert found["downlink_bytes"] == 40_000 + sum(pair.down for pair in found["messages"].values())
    # Three bytes a number save a quarter, and cost eight bits of each.
    smaller = plan(10, 10_000, {"bits": 24})
    assert smaller["messages"]["mask"].up == pytest.approx(3 * 10_005, abs=60)
    assert smaller["code_bits"] == 20


def test_the_plan_of_a_thousand_is_the_calculators() -> None:
    found, chosen = plan(1000, 10, {}), graph.plan(1000, 0.1, 0.1)
    assert (found["profile"], found["neighbours"], found["threshold"]) == ("semi-honest", 46, 26)
    assert (found["privacy_bits"], found["correctness_bits"]) == (chosen.privacy_bits, chosen.correctness_bits)
    assert found["privacy_bits"] >= 40
    assert found["correctness_bits"] >= 20
    assert "confirm" not in found["messages"]


def test_fedra_secure_compares_and_shows_the_messages_of_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, printed = fedra(["secure", "--clients", "10", "--clients", "1000"], capsys, monkeypatch)
    assert code == 0
    lines = [line.split() for line in printed.splitlines()]
    assert ["10", "malicious", "9", "7", "3", "3", "certain", "certain"] in lines
    assert ["1,000", "semi-honest", "46", "26", "100", "100", "41.1", "23.0"] in lines
    assert "Its messages" not in printed
    code, printed = fedra(["secure", "--clients", "10"], capsys, monkeypatch)
    assert code == 0
    assert "confirm" in printed.split("Its messages")[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--clients", "2"], "2 clients a round hide nobody; choose 3 or more."),
        (["--clients", "10", "--profile", "none"], "--profile none hides nothing; choose auto, malicious or semi-"),
        (["--clients", "10", "--profile", "fast"], "secure-aggregation.profile='fast' is not valid"),
        (["--clients", "10", "--corrupt", "0.4"], "4 corrupt clients of 10 are a third or more"),
        (["--clients", "10", "--dropout", "0.5"], "set profile=semi-honest, or expect 3 or fewer."),
        (["--clients", "200", "--bits", "8"], "choose 2 bits or fewer, or fewer clients."),
        ([], "Missing option '--clients'"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, printed = fedra(["secure", *arguments], capsys, monkeypatch)
    assert (code, printed.count("Error:")) == (2, 1)
    assert sentence in " ".join(printed.split())


def test_identities_are_made_once_and_are_read_by_clients(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "keys"
    code, printed = fedra(["identities", str(folder), "--clients", "4"], capsys, monkeypatch)
    assert code == 0
    roster = identities.read_roster(str(folder / "roster.json"))
    keys = [folder / f"client-{client}.key" for client in range(4)]
    assert [roster[client] for client in range(4)] == [identities.read_identity(str(key)).public for key in keys]
    assert {key.stat().st_mode & 0o777 for key in keys} == {0o600}
    for setting in (deployed.IDENTITY, deployed.ROSTER, deployed.PROFILE):
        assert f"{setting}=" in printed
    assert str(folder / "roster.json") in printed.replace("\n", "")
    code, printed = fedra(["identities", str(folder), "--clients", "4"], capsys, monkeypatch)
    assert code == 2
    assert "choose another folder" in printed


def test_a_masked_run_says_what_was_masked_and_from_whom(ran: Callable[..., Run]) -> None:
    run = ran(**{PROFILE: "malicious"})
    said = terminal(run)
    assert said[0] == (
        "Secure aggregation: malicious profile, each of 4 clients masks with 3 others, 3 shares open a mask. "
        "The server saw 3 sums of updates and none alone, the smallest of 4 clients; no update was cut "
        "(secure-aggregation.clip=100)."
    )
    assert "Keys are simulated: this hides nothing from whoever runs this machine." in said
    assert "Privacy: none; the server sees sums alone, to which no noise is added." in said
    [hidden] = [line for line in said if line.startswith("Not hidden: ")]
    assert "who takes part in which round" in hidden
    assert "simulated" not in hidden
    assert not any(line.startswith(("Dropouts", "Failed", "Clipped", "Exposed")) for line in said)
    page = words(read(run.path))
    assert "clear" not in page
    assert "updates masked, malicious secure aggregation; no noise" in page
    assert "a server that lies, and up to 1 client on its side" in page
    # What clients said of their data is known as sums alone.
    assert "4 clients with 318 training examples in all" in page
    assert "benign 199 63 %" in page.replace("\N{NO-BREAK SPACE}", " ")


def test_dropouts_failed_sums_and_the_plan_of_a_round_are_told(ran: Callable[..., Run]) -> None:
    run = ran(**SMALL | {"sampled": 0, "rounds": 5}, faults__dropout=0.3, faults__stage="any")
    masked, rows = run.summary["secure_aggregation"], read_rounds(run.path)
    sums = [row["secure_aggregation"]["sums"] for row in rows]
    assert (masked["sums"], masked["failed"]) == (sum(map(len, sums)), sums.count([]))
    assert masked["failed"]
    assert masked["recovered"]
    said = terminal(run)
    dropped = sum(sum(row["secure_aggregation"]["dropped"].values()) for row in rows)
    assert f"Dropouts: {dropped} clients left a round, {masked['recovered']} of them after they had shared their " in (
        "\n".join(said)
    )
    failed = sums.index([]) + 1
    assert f"whose clients' answers are all lost (round {failed}: TooFewError: " in "\n".join(said)
    assert any(f"round {failed}: no secure sum: TooFewError" in row for row in _spoken(run, rows))
    page = words(read(run.path))
    assert "instead of sending their update" in page
    assert f"{masked['failed']} did not come" in page


def test_clipped_updates_are_told(ran: Callable[..., Run]) -> None:
    run = ran(**{PROFILE: "auto"}, secure_aggregation__clip=0.1)
    told = "100.0 % of updates were longer than secure-aggregation.clip=0.1 and were cut to it"
    assert any(told in line.replace("\N{NO-BREAK SPACE}", " ") for line in terminal(run))
    assert told in words(read(run.path)).replace("\N{NO-BREAK SPACE}", " ")


def test_who_becomes_solvable_is_told_and_the_remedy_works(ran: Callable[..., Run]) -> None:
    # Uniform samples: as many independent sums as clients after 8 rounds at the earliest.
    run = ran(**SMALL, rounds=14)
    found = run.summary["secure_aggregation"]["solvable"]
    assert found
    [line] = [line for line in terminal(run) if line.startswith("Exposed: ")]
    assert f"solvable since round {min(one['round'] for one in found)}" in line
    assert "set sampling.kind=cyclic and secure-aggregation.min-cohort=4: fixed groups" in line
    assert "Remedy: set sampling.kind=cyclic and" in words(read(run.path))
    # Fixed groups alone do not help where clients drop out: a group with and without a client differ by it.
    fixed = {**SMALL, "rounds": 14, "sampling__kind": "cyclic", "faults__dropout": 0.1}
    run = ran(**fixed)
    assert run.summary["secure_aggregation"]["solvable"]
    [line] = [line for line in terminal(run) if line.startswith("Exposed: ")]
    assert "Remedy: set secure-aggregation.min-cohort=4, so that" in line
    # All of a group or nobody: sums that somebody is missing from do not come.
    masked = ran(**fixed, secure_aggregation__min_cohort=4).summary["secure_aggregation"]
    assert (masked["solvable"], masked["smallest_sum"]) == ([], 4)
    assert masked["sums"]
    assert masked["failed"]


def test_fixed_groups_have_no_solvable_client_ever() -> None:
    exposure = Exposure(12)
    for number in range(1, 40):
        exposure.observe(number, [[(number % 3) * 4 + i for i in range(4)]])
    assert (exposure.solvable, exposure.smallest) == ({}, 4)
    exposure.observe(40, [[0, 1, 2]])
    assert exposure.solvable == {3: 40}


def test_remedies_by_the_runs_own_settings() -> None:
    masked = {**MASKED, "clients": 5, "solvable": [{"client": 1, "round": 3}]}
    uniform, cyclic = RunConfig.of({"clients": 20}).flat(), RunConfig.of({"clients": 20, "sampling.kind": "cyclic"})
    assert secure.remedy(masked, uniform).startswith("set sampling.kind=cyclic and secure-aggregation.min-cohort=5: ")
    assert secure.remedy(masked, cyclic.flat()).startswith("set secure-aggregation.min-cohort=5, so that")
    # Everybody in every round: cyclic would change nothing.
    assert secure.remedy({**masked, "clients": 20}, uniform).startswith("set secure-aggregation.min-cohort=20, so that")
    # Of 20 in rounds of 6, groups have 5 each.
    assert "min-cohort=5" in secure.remedy({**masked, "clients": 6}, uniform)
    assert secure.remedy({**masked, "clients": 6}, RunConfig.of({"clients": 21}).flat()).endswith("divides 21 clients")
    assert "secure-aggregation.groups=1" in secure.remedy({**masked, "groups": 3}, uniform)


def test_a_group_has_a_plan_of_its_own(ran: Callable[..., Run]) -> None:
    run = ran(**SMALL | {"sampled": 0}, strategy="fedmedian", secure_aggregation__groups=2)
    masked = run.summary["secure_aggregation"]
    assert [masked[name] for name in ("clients", "neighbours", "threshold", "smallest_sum")] == [4, 3, 3, 4]
    assert "each of 4 clients in each of 2 groups masks with 3 others" in terminal(run)[0]
    assert "4, 4" in words(read(run.path))


def test_noise_beside_masks_says_who_adds_it_and_what_is_known_as_sums(ran: Callable[..., Run]) -> None:
    private = {"privacy__level": "client", "privacy__epsilon": 8.0, "privacy__delta": 1e-3, "rounds": 2}
    private |= {"privacy__preprocessing": "uncovered", **SMALL}
    run = ran(**private)
    page = words(read(run.path))
    assert "the server adds noise to the secure sum of clipped updates; it sees the sum, and no update" in page
    assert "updates themselves" not in page
    assert "the sums of clients' numbers of examples and labels" in page
    run = ran(**private, privacy__noise="distributed")
    page = words(read(run.path))
    assert "every client adds a share of it under its masks" in page
    assert "training losses" not in page.split("Epsilon says nothing about:")[1].split("Secure aggregation")[0]
    # No count of clipped clients leaves them, and privacy.clipping-norm is what cuts.
    assert secure.clipped(read_rounds(run.path), load(run.path).config) is None
    assert "Clipped \N{EN DASH} to privacy.clipping-norm=1.000" in page
    assert "secure-aggregation.clip" not in terminal(run)[0]
    assert "sums of examples and labels, and each client's metrics. Do not publish" in page


def test_a_page_of_many_sums_and_of_a_round_without_clients(tmp_path: Path) -> None:
    own = {"sums": [9] * 12, "failed": [], "dropped": {"share": 2}, "recovered": 0, "clipped": None}
    rows = [
        round_row(1, secure_aggregation={**own, "worst_error": 1e-6, "solvable": 0}),
        # Nobody was drawn, so that there was no sum.
        round_row(2, sampled=0, secure_aggregation={**own, "worst_error": 1e-6, "solvable": 0}),
    ]
    page = words(read(run_folder(tmp_path, rows=rows, secure_aggregation=MASKED)))
    assert "9, 9, 9, 9, 9, 9, 9, 9 and 4 more 2 before they shared their secrets" in page
    assert page.count("and 4 more") == 1
    assert "semi-honest profile, each of 1,000 clients masks with 46 others, 26 shares open a mask" in page
    assert "Privacy, bits a round 41.1" in page
    assert "Keys are simulated" not in page
    assert "100 clients of 1,000 corrupt" in page


def test_the_share_of_clipped_updates_counts_clients() -> None:
    rows = [
        {"sampled": clients, "secure_aggregation": {"sums": [clients], "clipped": share}}
        for clients, share in ((9, 1 / 3), (3, 1.0), (0, 1.0))
    ]
    # 3 of 9 and 3 of 3; in the last round nobody was drawn.
    assert secure.clipped(rows, {}) == pytest.approx(6 / 12)
    assert secure.clipped(rows[:0], {}) is None


def test_a_setting_that_no_plan_fits_raises() -> None:
    with pytest.raises(InputError, match="profile none hides nothing"):
        plan(10, 10, {"profile": "none"})


def _spoken(run: Run, rows: list[dict[str, Any]]) -> list[str]:
    """Return what the terminal says round by round."""
    from io import StringIO

    from rich.console import Console

    from server.recorder import RunFolder
    from simulations.progress import Progress

    console = Console(file=StringIO(), width=120)
    progress = Progress(RunFolder.open(run.path).config, console)
    for row in rows:
        progress.round(row)
    found: str = console.file.getvalue()  # type: ignore[attr-defined]
    return found.splitlines()
