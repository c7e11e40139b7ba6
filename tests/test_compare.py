"""fedra compare: lists of any settings make a grid, rows are named by what varies, tables say whose numbers."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_reports import Reader, run_folder, summary_of

from core.errors import InputError
from reports.compare import write_comparison
from reports.variants import details, personal, table
from simulations.compare import compare


def compared(tmp_path: Path, **overrides: Any) -> tuple[list[str], Reader]:
    """Return what the terminal shows of a comparison on the smoke preset, and its page."""
    console = Console(file=StringIO(), width=120)
    settings = {key.replace("__", ".").replace("_", "-"): value for key, value in overrides.items()}
    page = compare("smoke", {"rounds": 1, "out": str(tmp_path), **settings}, console)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue().splitlines(), Reader(page.read_text(encoding="utf-8"))


def cells(lines: list[str], heading: str) -> list[str]:
    """Return the first column of the table that starts with this heading, as far as it is wide."""
    start = next(i for i, line in enumerate(lines) if line.startswith(f" {heading} "))
    return [line[1 : 1 + len(heading)].strip() for line in lines[start + 1 :] if line.startswith(" ")]


def test_two_lists_make_a_grid_named_by_its_values(tmp_path: Path) -> None:
    lists = {"attack__kind": "none,sign-flip", "strategy": "fedavg,krum"}
    lines, page = compared(tmp_path, **lists, clients=8, attack__fraction=0.25, seeds=2)
    variants = ["none, fedavg", "none, krum", "sign-flip, fedavg", "sign-flip, krum"]
    runs = [(variant, seed) for variant in variants for seed in (0, 1)]
    warned = "Warning: krum is told that nobody is malicious (strategy-options.num-malicious-nodes=0)"
    assert lines[0].startswith(warned)
    assert page.text.count(warned) == 1
    assert lines[1:9] == [f"[{i}/8] {variant}, seed {seed}" for i, (variant, seed) in enumerate(runs, start=1)]
    # Two tables of four rows, under one heading each.
    assert [name for name in cells(lines, "attack.kind, strategy") if name in variants] == 2 * variants
    assert len(page.outside) == 8
    assert "medical by attack.kind, strategy" in page.text
    assert "4 variants, 2 seeds" in page.text
    legend = page.text.split("Learning curves\n")[2]
    assert [legend.index(variant) for variant in variants] == sorted(legend.index(variant) for variant in variants)


def test_one_strategy_list_prints_what_it_always_did(tmp_path: Path) -> None:
    lines, page = compared(tmp_path, strategy="fedavg,ditto", seeds=2, devices__kind="lognormal")
    assert [lines[0], lines[3]] == ["[1/4] fedavg, seed 0", "[4/4] ditto, seed 1"]
    assert lines[4].strip() == "Mean and 95 % confidence interval over seeds"
    assert lines[5].split() == ["Strategy", "AUROC", "Accuracy", "F1"]
    assert [line.split()[0] for line in lines[6:8]] == ["fedavg", "ditto"]
    assert lines[8].strip() == "Clients' own test splits, and cost"
    for heading in ("Clients AUROC", "Worst client AUROC", "Virtual seconds", "Uplink kB"):
        assert heading in lines[9]
    for heading in ("Mean over clients.", "Worst client.", "Virtual seconds", "Uplink kB"):
        assert heading in page.text
    # A model of 1025 float32 in four arrays with a header of 128 bytes each, from four clients: 18.4 kB.
    assert lines[10].split()[-3:] == ["18.4", "±", "0.0"]
    said = "Numbers of clients under ditto are of each client's own model; all others are of the global model."
    assert lines[12].startswith("Means over completed runs with 95 % confidence intervals")
    assert lines[13] == said
    assert said in page.text
    assert "medical: fedavg, ditto" in page.text


def test_without_a_list_the_one_strategy_is_shown(tmp_path: Path) -> None:
    lines, _ = compared(tmp_path, seeds=1)
    assert lines[0] == "[1/1] fedavg, seed 0"
    assert cells(lines, "Strategy")[0] == "fedavg"


def test_numbers_in_a_list_are_numbers_and_baselines_follow_the_data(tmp_path: Path) -> None:
    lines, page = compared(tmp_path, partition__kind="dirichlet", partition__alpha="0.5, 5", seeds=1, baselines=True)
    names = ["0.5", "5", "pooled data, 0.5", "clients alone, 0.5", "pooled data, 5", "clients alone, 5"]
    start = next(i for i, line in enumerate(lines) if line.startswith(" partition.alpha"))
    assert [line[1:20].strip() for line in lines[start + 1 : start + 7]] == names
    assert "medical by partition.alpha" in page.text


def test_an_option_goes_to_the_strategies_that_have_it(tmp_path: Path) -> None:
    settings = {"strategy": "fedavg,multikrum", "strategy-options.num-malicious-nodes": 1, "clients": 5, "seeds": 1}
    lines, _ = compared(tmp_path, **settings)
    assert lines[:2] == ["[1/2] fedavg, seed 0", "[2/2] multikrum, seed 0"]
    [config] = tmp_path.glob("*/*-multikrum-s0/config.toml")
    assert "num-malicious-nodes = 1" in config.read_text()
    [config] = tmp_path.glob("*/*-fedavg-s0/config.toml")
    assert "num-malicious-nodes" not in config.read_text()
    # A strategy that has no such option is compared once.
    lists = {"strategy": "fedavg,fedprox", "strategy-options.proximal-mu": "0.1,1"}
    lines, _ = compared(tmp_path, **lists, seeds=1)
    assert lines[:3] == ["[1/3] fedavg, seed 0", "[2/3] fedprox, 0.1, seed 0", "[3/3] fedprox, 1, seed 0"]
    with pytest.raises(InputError, match=r"strategy-options\.beta is an option of none of strategy=fedavg,fedprox"):
        compared(tmp_path, **{"strategy": "fedavg,fedprox", "strategy-options.beta": 0.1})


def test_a_grid_must_be_right_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"attack.kind='nope'"):
        compared(tmp_path, attack__kind="none,nope")
    with pytest.raises(InputError, match="seeds=1,2 is not a whole number"):
        compared(tmp_path, seeds="1,2")
    with pytest.raises(InputError, match="seed='1,2'"):
        compared(tmp_path, seed="1,2")
    # A comma between processors is no list.
    with pytest.raises(InputError, match="nowhere:a"):
        compared(tmp_path, processors="nowhere:a,nowhere:b")
    with pytest.raises(InputError, match="1,1"):
        compared(tmp_path, dataset="1,1")
    assert not list(tmp_path.iterdir())


def test_a_list_may_lead_beyond_what_the_preset_allows_alone(tmp_path: Path) -> None:
    # Six of the preset's four clients would be refused, six of eight are not.
    lines, _ = compared(tmp_path, clients="8,12", sampled=6, seeds=1)
    assert lines[:2] == ["[1/2] 8, seed 0", "[2/2] 12, seed 0"]


def test_a_run_that_fails_does_not_end_the_others(tmp_path: Path) -> None:
    console = Console(file=StringIO(), width=120)
    settings = {"rounds": 1, "out": str(tmp_path), "learning-rate": "1e30,0.2", "seeds": 2}
    reason = "all 4 clients of round 1 failed; the first: client 0: the trained model is not finite"
    with pytest.raises(
        RuntimeError, match=r"^2 of 4 runs failed and did not count; the first: 1e\+30, seed 0: all 4 clients"
    ):
        compare("smoke", settings, console)
    assert isinstance(console.file, StringIO)
    lines = console.file.getvalue().splitlines()
    assert [line for line in lines if line.startswith("[")][-1] == "[4/4] 0.2, seed 1"
    assert [line for line in lines if line.startswith(f"Failed: 1e+30, seed 1: {reason}")]
    # The one that works has two runs, the other none.
    start = next(i for i, line in enumerate(lines) if line.startswith(" learning-rate"))
    assert lines[start + 1].split() == ["1e+30", *["\N{EN DASH}"] * 3]
    assert lines[start + 2].split()[0] == "0.2"
    [page] = tmp_path.glob("*/report.html")
    read = Reader(page.read_text(encoding="utf-8"))
    assert read.text.count(f"failed: {reason}") == 2
    assert "2 runs not completed and not counted" in read.text
    assert len(read.outside) == 4


def test_a_run_that_fails_before_it_has_a_folder_has_a_line_too(tmp_path: Path) -> None:
    about = {"task": "medical", "status": "failed", "error": "RuntimeError: no\nworker"}
    rows = [*rows_of(tmp_path, a={}), {"variant": "b", "strategy": "b", "seed": 0, "path": None, "summary": about}]
    page = Reader(write_comparison(tmp_path / "report.html", rows).read_text(encoding="utf-8"))
    assert "failed: RuntimeError: no worker" in page.text
    assert page.outside == ["a/report.html"]


def rows_of(parent: Path, **changes: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a completed run for each variant; uplink is 2 MB and the clients' AUROC is unknown."""
    rows = []
    for variant, own in changes.items():
        summary = {"traffic": {"uplink_bytes": 2_000_000, "downlink_bytes": 1}, **own}
        summary["clients_metrics"] = {"auroc": {"mean": None, "worst": None}, "accuracy": {"mean": 0.8, "worst": 0.5}}
        path = run_folder(parent, name=variant, **summary)
        row = {"variant": variant, "strategy": "fedavg", "seed": 0, "path": path}
        rows.append({**row, "summary": summary_of(3, **summary)})
    return rows


def test_fares_and_costs_in_numbers(tmp_path: Path) -> None:
    attack = {"kind": "backdoor", "backdoor_success": 0.25}
    rows = rows_of(tmp_path, a={"virtual_seconds": 90.0}, b={"virtual_seconds": None, "attack": attack})
    a, b = details(rows, "attack.kind")
    assert {heading: str(value) for heading, value in a.items()} == {
        "attack.kind": "a", "Clients Accuracy": "0.800", "Worst client Accuracy": "0.500",
        "Virtual seconds": "90.0", "Uplink MB": "2.000", "Backdoor success": "\N{EN DASH}",
    }  # fmt: skip
    assert (str(b["Virtual seconds"]), str(b["Backdoor success"])) == ("\N{EN DASH}", "0.250")
    assert [row["attack.kind"] for row in table(rows, "attack.kind")] == ["a", "b"]
    [hours] = [
        heading for heading in details(rows_of(tmp_path / "h", a={"virtual_seconds": 7200.0}))[0] if "Virt" in heading
    ]
    assert hours == "Virtual hours"


def test_whose_numbers_they_are_is_said_where_it_differs(tmp_path: Path) -> None:
    assert personal(rows_of(tmp_path / "none", a={}, b={})) == ""
    assert personal(rows_of(tmp_path / "both", a={"personal": True}, b={"personal": True})).startswith(
        "Numbers of clients are of each client's own model"
    )
    rows = rows_of(tmp_path / "one", a={}, b={"personal": True})
    assert "Numbers of clients under b are of" in personal(rows)
    page = Reader(write_comparison(tmp_path / "report.html", rows).read_text(encoding="utf-8"))
    assert "Numbers of clients under b are of" in page.text
