"""The page and the terminal on virtual time, answers that did not count, malicious clients, own models, compression."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_reports import HOSTILE, Reader, read, round_row, run_folder

from reports import plots
from reports.cost import model_bytes
from reports.load import load
from reports.page import write_report
from simulations.progress import Progress
from simulations.run import Run

REJECTED = "rejected: it sent '0.weight' with numbers that are not finite"


def words(page: Reader) -> str:
    """Return the page's text with single spaces."""
    return " ".join(page.text.split())


def curves(page: Reader, axis: str) -> list[dict[str, Any]]:
    """Return the traces of the one figure whose x or y axis is called so."""
    layouts = [figure["layout"] for figure in page.figures]
    titles = [[layout[a].get("title", {}).get("text") for a in ("xaxis", "yaxis")] for layout in layouts]
    [found] = [figure for figure, named in zip(page.figures, titles, strict=True) if axis in named]
    return list(found["data"])


def terminal(run: Run) -> list[str]:
    """Return the lines of the terminal's summary after the tables."""
    lines = shown(run)
    return lines[next(i for i, line in enumerate(lines) if line.startswith("completed")) + 1 :]


def shown(run: Run) -> list[str]:
    """Return the lines of the terminal's summary."""
    console = Console(file=StringIO(), width=120)
    Progress(load_config(run), console).summarise(run)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue().splitlines()


def load_config(run: Run) -> Any:
    from server.recorder import RunFolder

    return RunFolder.open(run.path).config


def test_a_plain_run_has_none_of_these(ran: Callable[..., Run]) -> None:
    run = ran()
    page = read(run.path)
    for absent in ("irtual", "did not count", "alicious", "own model", "float32 model", "Failed clients"):
        assert absent not in "".join(page.text.split("Configuration\n")[:-1]), absent
    assert [line.split(":")[0] for line in terminal(run)] == ["Privacy", "Run folder", "Report"]


def test_virtual_time_stands_beside_rounds(ran: Callable[..., Run]) -> None:
    run = ran(devices__kind="lognormal", faults__dropout=0.4, rounds=4)
    rows = load(run.path).rounds
    page = read(run.path)
    assert "AUROC over virtual time" in page.text
    [worst, mean, central] = curves(page, "virtual seconds")
    assert central["x"] == mean["x"] == worst["x"] == [row["virtual_seconds"] for row in rows]
    assert central["y"] == [row["central"]["auroc"] for row in rows]
    [each] = curves(page, "virtual seconds per round")
    assert sum(each["y"]) == pytest.approx(run.summary["virtual_seconds"]) == rows[-1]["virtual_seconds"]
    assert "Virtual time of a round" in page.text
    assert f"Virtual time: {run.summary['virtual_seconds']:.2f} s on the clients' devices." in terminal(run)


@pytest.mark.parametrize(("seconds", "unit", "last"), [(90, "seconds", 90), (600, "minutes", 10), (9000, "hours", 2.5)])
def test_long_virtual_time_is_read_in_larger_units(tmp_path: Path, seconds: int, unit: str, last: float) -> None:
    rows = [round_row(1, virtual_seconds=seconds / 2), round_row(2, virtual_seconds=seconds)]
    best = {"round": 2, "metric": "loss", "value": 0.1}
    run = load(run_folder(tmp_path, rows=rows, virtual_seconds=float(seconds), kept="best", best=best))
    chart = plots.virtual_curve(run, "accuracy")
    assert chart is not None
    assert chart.layout.xaxis.title.text == f"virtual {unit}"
    assert list(chart.data[-1].x) == [last / 2, last]
    assert chart.layout.shapes[0].x0 == last


def test_lost_answers_are_counted_and_no_failures(ran: Callable[..., Run]) -> None:
    run = ran(devices__kind="lognormal", faults__dropout=0.4, rounds=4)
    page = read(run.path)
    lost = [row["lost"] for row in load(run.path).rounds]
    assert sum(lost) > 0
    assert f"{sum(lost)} of 16 answers did not come (lost)" in words(page)
    assert "Rejected client" not in page.text
    assert "Failed clients" not in page.text
    assert [trace["y"] for trace in curves(page, "answers")] == [lost, [0, 0, 0, 0]]
    assert f"Answers that did not count: {sum(lost)} lost, 0 rejected." in terminal(run)


def test_rejected_clients_are_named_with_their_reason(ran: Callable[..., Run]) -> None:
    # A median wants every answer: of four, two send nan in each of three rounds.
    run = ran(attack__kind="non-finite", attack__fraction=0.5, strategy="fedmedian")
    page = read(run.path)
    text = words(page)
    assert "6 of 12 answers came and were rejected: they would have spoiled the model." in text
    first, second = sorted(failure["client"] for failure in load(run.path).rounds[0]["failures"])
    reason = REJECTED.removeprefix("rejected: ")
    assert f"First round Last round client {first} {reason} 3 1 3 client {second} {reason} 3 1 3" in text
    assert "Failed clients" not in page.text
    assert "Malicious clients 2 of 4 0 of their answers counted" in text
    assert "No answer of theirs counted" in text
    assert terminal(run)[:2] == [
        "Answers that did not count: 0 lost, 6 rejected.",
        "Attack: non-finite by 2 of 4 clients.",
    ]


def test_what_was_expected_does_not_hide_what_was_not(ran: Callable[..., Run]) -> None:
    run = ran(attack__kind="non-finite", attack__fraction=0.5, strategy="fedmedian", faults__dropout=0.3, clients=8)
    for row in load(run.path).rounds:
        present = row["failed"] - row["lost"]
        assert present == row["rejected"]
        assert [failure["reason"] == REJECTED for failure in row["failures"]] == [True] * present + [False] * row[
            "lost"
        ]


def test_failed_lost_and_rejected_answers_are_told_apart(tmp_path: Path) -> None:
    fault = {"client": 0, "reason": "client 0: out of memory"}
    refused = {"client": 1, "reason": f"rejected: {HOSTILE}"}
    gone = {"client": 2, "reason": "client 2: its answer was lost"}
    rows = [
        # Of the four rejected answers one is named.
        round_row(1, sampled=9, failed=7, lost=2, rejected=4, failures=[fault, refused]),
        round_row(2, sampled=2, failed=2, lost=1, rejected=0, failures=[fault, gone]),
    ]
    page = read(run_folder(tmp_path, rows=rows, names=["north", "south", "west"], label_counts=[[1, 1]] * 3))
    text = words(page)
    assert "2 replies missing in 2 rounds" in text
    assert "Sampled Failed 1 client 0: out of memory 9 1 2 client 0: out of memory 2 1" in text
    assert "3 of 11 answers did not come (lost)" in text
    assert "4 of 11 answers came and were rejected" in text
    assert f"south {HOSTILE} 1 1 1" in text
    assert "3 further answers of rounds with very many are counted, not named." in text
    assert "its answer was lost" not in text


def test_a_rule_that_lets_malicious_clients_in_is_found_out(ran: Callable[..., Run]) -> None:
    attack = {"attack__kind": "backdoor", "attack__fraction": 0.25, "clients": 8}
    run = ran(strategy="multikrum", **attack)
    page, rows = read(run.path), load(run.path).rounds
    success = [row["attack_success"] for row in rows]
    [curve] = curves(page, "share of triggered examples")
    assert curve["y"] == success
    # MultiKrum is not told of malicious clients, so that it takes all eight: two of eight answers and a quarter.
    assert [trace["y"] for trace in curves(page, "share")] == [[1, 1, 1], [0.25] * 3, [0.25] * 3]
    text = words(page)
    assert "Let in 100 % of their answers that came" in text
    assert "Weight 25 % of theirs in a new model" in text
    assert f"Backdoor success {100 * success[-1]:.0f} % of triggered test examples" in text
    said = f"100% of their answers let in, weight 25%; backdoor success {success[-1]:.0%}"
    assert f"Attack: backdoor by 2 of 8 clients; {said}." in terminal(run)
    # A mean keeps no account of whom it lets in.
    text = words(read(ran(**attack).path))
    assert "fedavg does not choose among answers" in text
    assert "Let in" not in text


def test_numbers_of_own_models_say_so_everywhere(ran: Callable[..., Run]) -> None:
    run = ran(strategy="ditto", baselines=True, keep="best")
    assert run.summary["personal"] is True
    page = read(run.path)
    text = words(page)
    spread = run.summary["clients_metrics"]["auroc"]
    assert f"global model clients' own models: mean {spread['mean']:.3f}, worst {spread['worst']:.3f}" in text
    assert text.count("Numbers of clients are of each client's own model; those on the central test set") == 3
    assert "of the clients' own models on the validation splits" in text
    assert "Each client's own model on each client's own test split." in text
    assert "Own model, mean" in text
    assert "by each client's own model, trained in the federation" in text
    assert "AUROC of each client's own model on its own test split" in text
    assert "Federated, mean" not in text
    names = {trace.get("name") for figure in page.figures for trace in figure["data"]}
    assert {"clients' mean, own models", "worst client, own model", "central test set, global model"} <= names
    assert not {"clients' mean", "worst client", "central test set"} & names


@pytest.mark.parametrize("own", [{"strategy": "ditto"}, {"strategy": "fedavg", "fine_tune_epochs": 1}])
def test_the_terminal_shows_how_clients_own_models_fare(own: dict[str, Any], ran: Callable[..., Run]) -> None:
    run = ran(**own, baselines=True)
    lines = shown(run)
    [start] = [i for i, line in enumerate(lines) if line.startswith("Clients' own test splits")]
    alone = run.summary["baselines"]["local"]["own_test"]
    rows = {"clients' own models": run.summary["clients_metrics"], "clients alone": alone}
    wanted = [
        [*f"{who} ({part})".split(), *(f"{spread[name][part]:.4f}" for name in ("loss", "accuracy", "auroc"))]
        for who, spread in rows.items()
        for part in ("mean", "worst")
    ]
    assert [line.split() for line in lines[start + 2 : start + 6]] == wanted
    assert not any("own" in line for line in shown(ran()))


def test_compression_is_told_in_bytes_and_as_a_ratio(ran: Callable[..., Run]) -> None:
    run = ran(compression__kind="int8")
    # 30 x 32 + 32 + 32 + 1 = 1025 numbers in four tensors; int8 sends an array with a byte for each number and another
    # with a scale for each tensor. An array's header takes 128 bytes.
    assert model_bytes(run.path) == 4 * 1025 + 4 * 128
    assert run.summary["traffic"]["uplink_bytes"] == 3 * 4 * (1025 + 4 * 4 + 2 * 128)
    page = read(run.path)
    assert "the answers of a round take 5.19 kB, 1.30 kB a client." in words(page)
    assert "That is 3.56 times less than float32 models (4.61 kB a client), or 28 %." in words(page)
    assert [trace["y"] for trace in curves(page, "bytes")] == [[4 * 1297] * 3, [4 * 4612] * 3]
    assert "Uplink: 15.6 kB from all clients, updates as int8." in terminal(run)
    # Controls of scaffold travel beside the model, uncompressed.
    page = read(ran(compression__kind="top-k", strategy="scaffold").path)
    assert "That is not less than float32 models" in words(page)


def test_everything_at_once_on_one_page(ran: Callable[..., Run]) -> None:
    run = ran(
        attack__kind="non-finite", attack__fraction=0.3, strategy="fedmedian", devices__kind="lognormal",
        devices__availability=0.8, compression__kind="int8", fine_tune_epochs=1, clients=10,
    )  # fmt: skip
    page = write_report(run.path).read_text(encoding="utf-8")
    anchors = [f'<section id="{anchor}">' for anchor in ("learning", "malicious", "speed", "uncounted")]
    assert [page.count(anchor) for anchor in anchors] == [1, 1, 1, 1]
    # What was rejected did not count, and neither do its bytes.
    counted = sum(row["sampled"] - row["failed"] for row in load(run.path).rounds)
    assert run.summary["traffic"]["uplink_bytes"] == counted * 1297
    assert "1.30 kB a client" in words(Reader(page))
    # A run folder that lost its model has bytes, but no ratio.
    (run.path / "model.safetensors").unlink()
    assert "times less" not in words(read(run.path))
