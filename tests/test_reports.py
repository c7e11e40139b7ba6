"""The pages: what a reader sees of finished, interrupted and failed runs, and that a page never leaves the disk."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from core.config import RunConfig
from core.errors import InputError
from core.metrics import HIGHER_IS_BETTER
from reports import heterogeneity, plots
from reports.compare import table, write_comparison
from reports.heterogeneity import Counts
from reports.load import load
from reports.page import write_report
from reports.variants import Interval, interval
from reports.words import METRICS, bounded, duration, number, ordered, size

HOSTILE = "<script>alert('x')</script><a href=\"https://evil.example\">&"
# What summary.json holds of secure aggregation.
MASKED = {
    "protocol": "secagg+", "profile": "semi-honest", "clients": 1000, "neighbours": 46, "threshold": 26,
    "corrupt": 100, "dropouts": 100, "privacy_bits": 41.1, "correctness_bits": 23.0, "ring_bits": 32, "clip": 10.0,
    "groups": 1, "identities": "roster", "sums": 3, "failed": 0, "dropped": 7, "recovered": 4, "smallest_sum": 993,
    "solvable": [], "not_covered": ["who takes part in which round"],
}  # fmt: skip
METRIC_VALUES = {"loss": 0.25, "accuracy": 0.9, "auroc": 0.95}


def round_row(number: int, **changes: Any) -> dict[str, Any]:
    """Return a line of rounds.jsonl: accuracy grows by 0.1 a round."""
    value = 0.5 + 0.1 * number
    row = {
        "round": number,
        "seconds": 2.0 / number,
        "clients_per_second": 2.0 * number,
        "sampled": 2,
        "failed": 0,
        "failures": [],
        "train_loss": 1 / number,
        "central": {"loss": 1 / number, "accuracy": value, "auroc": value},
        "clients": {
            "loss": {"mean": 1 / number, "worst": 2 / number, "std": 0.1},
            "accuracy": {"mean": value, "worst": value - 0.1, "std": 0.05},
            "auroc": {"mean": None, "worst": None, "std": None},
        },
        "downlink_bytes": 1000 * number,
        "uplink_bytes": 500 * number,
    }
    return {**row, **changes}


def summary_of(rounds: int, **changes: Any) -> dict[str, Any]:
    """Return what summary.json holds after so many rounds."""
    spread = {name: {"mean": value, "worst": value - 0.2, "std": 0.1} for name, value in METRIC_VALUES.items()}
    summary = {
        "task": "medical",
        "strategy": "fedavg",
        "seed": 3,
        "rounds": rounds,
        "clients": 2,
        "seconds": 252.0,
        "clients_per_second": 63.86,
        "metrics": METRIC_VALUES if rounds else {},
        "clients_metrics": spread if rounds else {},
        "baselines": None,
        "privacy": {"level": "none", "epsilon": None, "delta": None, "accountant": None},
        "secure_aggregation": None,
        "traffic": {"downlink_bytes": 2_000_000, "uplink_bytes": 1_000_000},
        "versions": {"fedra": "0.1.0", "torch": "2.13.0"},
        "status": "completed",
        "stopped_by": None,
        "error": None,
    }
    return {**summary, **changes}


def run_folder(
    parent: Path,
    rounds: int = 3,
    *,
    name: str = "20261123T152043Z-medical-fedavg-s3",
    names: list[str] | None = None,
    label_counts: list[list[int]] | None = None,
    labels: tuple[str, ...] = ("benign", "malignant"),
    rows: list[dict[str, Any]] | None = None,
    config: dict[str, Any] | None = None,
    **summary: Any,
) -> Path:
    """Write a run folder as a finished run leaves it, and return it."""
    folder = parent / name
    folder.mkdir(parents=True)
    names = names or ["client 0", "client 1"]
    counts = label_counts or [[30, 10], [5, 15]]
    totals = [sum(row) for row in counts]
    described = {
        "labels": labels,
        "names": names,
        "label_counts": counts,
        "sizes": {"train": totals, "validation": totals, "test": totals},
    }
    flat = {"rounds": 3, "clients": len(names), **(config or {})}
    (folder / "config.toml").write_text(RunConfig.of(flat).toml(), encoding="utf-8")
    (folder / "heterogeneity.json").write_text(json.dumps(described), encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(summary_of(rounds, **summary)), encoding="utf-8")
    lines = rows if rows is not None else [round_row(i + 1) for i in range(rounds)]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    trained = [
        {
            "round": r + 1,
            "client": c,
            "num_examples": totals[c],
            "train_loss": 0.1 * (c + 1),
            "train_seconds": 0.5,
            "test_auroc": 0.9,
        }
        for r in range(rounds)
        for c in range(len(names))
    ]
    columns = ["round", "client", "num_examples", "train_loss", "train_seconds", "test_auroc"]
    pd.DataFrame(trained, columns=columns).to_parquet(folder / "clients.parquet", index=False)
    return folder


class Reader(HTMLParser):
    """Collects the text outside scripts, the figures' JSON, and every address outside the page that is named."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.outside, self.figures, self.tags = "", [], [], []
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append("svg.main-svg" if ("class", "main-svg") in attrs else tag)
        self._inside = "json" if ("type", "application/json") in attrs else tag
        named = [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]
        self.outside += [value for value in named if not value.startswith(("#", "data:"))]

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "json":
            self.figures.append(json.loads(data))
        elif self._inside not in ("script", "style"):
            self.text += data + "\n"


def read(folder: Path) -> Reader:
    """Return the run's page, newly written."""
    return Reader(write_report(folder).read_text(encoding="utf-8"))


def test_a_completed_run_shows_its_numbers(tmp_path: Path) -> None:
    page = read(run_folder(tmp_path))
    for text in ("medical with fedavg, seed 3", "completed", "23 November 2026, 15:20 UTC", "AUROC", "0.950", "63.9"):
        assert text in page.text
    assert "4 min 12 s" in page.text
    assert "3.00 MB" in page.text
    assert "2.00 MB to clients, 1.00 MB back" in page.text
    assert "updates leave clients in clear" in page.text
    assert "2 clients with 60 training examples: 20 to 40 each, median 30" in page.text
    assert f"fedra run {tmp_path}/20261123T152043Z-medical-fedavg-s3/config.toml" in page.text
    assert "What federation bought" not in page.text


def test_a_page_loads_nothing_and_holds_plotly_once(tmp_path: Path) -> None:
    text = write_report(run_folder(tmp_path, names=[HOSTILE, "client 1"])).read_text(encoding="utf-8")
    assert Reader(text).outside == []
    assert text.count("plotly.js v") == 1
    assert "default-src 'none'" in text
    assert len(text) < 6_000_000


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    folder = run_folder(
        tmp_path,
        names=[HOSTILE, "client 1"],
        labels=(HOSTILE, "malignant"),
        config={"data-dir": HOSTILE, f"strategy-options.{HOSTILE}": 0.1},
        rows=[round_row(1, failed=1, failures=[{"client": 0, "reason": HOSTILE}]), round_row(2)],
        strategy=HOSTILE,
        status="failed",
        error=HOSTILE,
        versions={HOSTILE: HOSTILE},
    )
    page = read(folder)
    assert page.text.count(HOSTILE) >= 8
    # Plotly.js, the drawing script, and one JSON element per figure: nothing else is a script.
    assert page.tags.count("script") == 2 + len(page.figures)
    hovers = [trace["hovertemplate"] for figure in page.figures for trace in figure["data"] if "hovertemplate" in trace]
    assert any("&lt;script&gt;" in hover for hover in hovers)
    assert not any("<script" in hover or "<a " in hover for hover in hovers)


def test_nan_and_none_are_dashes(tmp_path: Path) -> None:
    nowhere = {"mean": None, "worst": None, "std": None}
    empty = {"loss": None, "auroc": None}
    folder = run_folder(
        tmp_path,
        rows=[round_row(1, train_loss=None, central=empty, clients={"loss": nowhere, "auroc": nowhere})],
        metrics=empty,
        clients_metrics={"loss": nowhere, "auroc": nowhere},
        clients_per_second=None,
        baselines={"central": empty, "local": {**empty, "own_test": {"auroc": nowhere}, "each": [empty]}},
    )
    page = read(folder)
    assert "nan" not in page.text.lower().split()
    assert number(None) == number(math.nan) == number(math.inf) == "\N{EN DASH}"
    assert plots.learning_curves(load(folder)) == {}


def test_rounds_without_evaluation_leave_gaps_out(tmp_path: Path) -> None:
    bare = {key: value for key, value in round_row(2).items() if key not in ("central", "clients")}
    curves = plots.learning_curves(load(run_folder(tmp_path, rows=[round_row(1), bare, round_row(3)])))
    [central] = [trace for trace in curves["accuracy"].data if trace.name == "central test set"]
    assert list(central.x) == [1, 3]
    assert central.y == pytest.approx([0.6, 0.8])
    [training] = [trace for trace in curves["loss"].data if trace.name == "training"]
    assert list(training.x) == [1, 2, 3]


def test_a_run_that_failed_before_its_first_round(tmp_path: Path) -> None:
    error = "RuntimeError: all 2 clients of round 1 failed"
    folder = run_folder(tmp_path, 0, status="failed", error=error, seconds=1.5, clients_per_second=None)
    for missing in ("heterogeneity.json", "clients.parquet", "rounds.jsonl"):
        (folder / missing).unlink()
    run = load(folder)
    assert (run.rounds, run.clients, run.heterogeneity) == ([], None, {})
    page = read(folder)
    assert f"Failed after 0 of 3 rounds: {error}" in page.text
    assert "no round was evaluated" in page.text
    assert page.figures == []


def test_an_interrupted_run_says_how_to_continue(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, 2, status="interrupted")
    with (folder / "rounds.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"round": 3, "seco')
    (folder / "clients.parquet").write_bytes(b"PAR1 half a file")
    assert [row["round"] for row in load(folder).rounds] == [1, 2]
    page = read(folder)
    assert "Interrupted after 2 of 3 rounds" in page.text
    assert f"fedra run --resume {folder}" in page.text


def test_early_stopping_and_the_best_round_are_said(tmp_path: Path) -> None:
    stopped = "no better auroc for 5 evaluations"
    page = read(
        run_folder(
            tmp_path,
            2,
            stopped_by=stopped,
            kept="best",
            best={"round": 1, "metric": "loss", "value": 0.4},
            threshold=0.25,
        )
    )
    assert f"Stopped early, after 2 of 3 rounds: {stopped}." in page.text
    assert "of round 1 (dotted line), the best by Loss on the validation splits" in page.text
    assert "counts as positive from 0.250" in page.text


def test_privacy_is_never_said_by_silence(tmp_path: Path) -> None:
    private = {"level": "client", "epsilon": 3.21, "delta": 1e-5, "accountant": "rdp"}
    page = read(run_folder(tmp_path / "a", privacy=private, secure_aggregation=MASKED))
    assert "ε = 3.21" in page.text
    assert "client level, δ = 1e-05" in page.text
    assert "updates masked, semi-honest secure aggregation" in page.text
    masked = read(run_folder(tmp_path / "b", secure_aggregation=MASKED))
    assert "updates masked, semi-honest secure aggregation; no noise" in masked.text


def test_failed_clients_are_listed_by_round(tmp_path: Path) -> None:
    rows = [round_row(1), round_row(2, failed=1, failures=[{"client": 1, "reason": "client 1: out of memory"}])]
    page = read(run_folder(tmp_path, rows=rows))
    assert "1 reply missing in 1 round" in page.text
    assert "client 1: out of memory" in page.text


def test_what_federation_bought(tmp_path: Path) -> None:
    found = {
        "central": {"loss": 0.2, "accuracy": 1.0, "auroc": 0.951},
        "local": {
            **{"loss": 0.4, "accuracy": 0.6, "auroc": 0.95},
            "own_test": {"accuracy": {"mean": 0.7, "worst": 0.5, "std": 0.1}},
            "each": [{"loss": 0.3, "accuracy": 0.5, "auroc": 0.9}, {"loss": 0.5, "accuracy": 0.7, "auroc": None}],
        },
    }
    folder = run_folder(tmp_path, baselines=found)
    text = re.sub(r"\s+", " ", read(folder).text)
    assert "Federated training reaches AUROC 0.950 ; a client alone reaches 0.950 on average" in text
    # (0.9 - 0.6) / (1.0 - 0.6) = 75 %. Pooling gains 0.001 AUROC, of which no share is told.
    assert "Accuracy 0.600 0.900 1.000 75 %" in text
    assert "AUROC 0.950 0.950 0.951 \N{EN DASH}" in text
    assert "Loss 0.400 0.250 0.200 75 %" in text
    assert "Accuracy 0.700 0.900 0.500 0.700" in text
    chart = plots.baselines(load(folder))
    assert chart is not None
    assert {trace.name: list(trace.x) for trace in chart.data}["pooled data"] == [0.951, 1.0]


def test_changed_settings_are_marked_and_every_key_stands_once(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, config={"batch-size": 7, "strategy-options.proximal-mu": 0.5})
    text = write_report(folder).read_text(encoding="utf-8")
    changed = re.findall(r'<tr class="changed"><td class="text">(.*?)</td><td class="text value">(.*?)</td>', text)
    assert ("batch-size", "7") in changed
    assert ("strategy-options.proximal-mu", "0.5") in changed
    assert {key for key, _ in changed} == {"rounds", "clients", "batch-size", "strategy-options.proximal-mu"}
    for key in RunConfig().flat():
        assert text.count(f'<td class="text">{key}</td>') == 1


def test_heterogeneity_in_numbers(tmp_path: Path) -> None:
    counts = Counts.of(load(run_folder(tmp_path, label_counts=[[40, 0], [20, 20]])))
    assert counts is not None
    assert counts.single_label == 1
    # All data: 3/4 and 1/4. The clients are 1/4 away from that, one each way.
    assert counts.label_distance == pytest.approx(0.25)
    assert [list(bar.y) for bar in heterogeneity.examples(counts).data] == [[40, 20], [0, 20]]
    assert [list(bar.y) for bar in heterogeneity.label_shares(counts).data] == [[1.0, 0.5], [0.0, 0.5]]


@pytest.mark.parametrize(("labels", "kind"), [(3, "bar"), (20, "heatmap")])
def test_five_hundred_clients_stay_legible(tmp_path: Path, labels: int, kind: str) -> None:
    counts = np.random.default_rng(0).integers(0, 50, (500, labels))
    folder = run_folder(
        tmp_path,
        names=[f"client {i}" for i in range(500)],
        label_counts=counts.tolist(),
        labels=tuple(f"label {k}" for k in range(labels)),
    )
    page = read(folder)
    assert "The first 100 of 500 rows." in page.text
    shares = [figure for figure in page.figures if figure["data"][0]["type"] == kind]
    assert len(shares) == 1
    assert len(shares[0]["data"][0]["x"]) <= 240
    found = Counts.of(load(folder))
    assert found is not None
    [sizes] = heterogeneity.examples(found).data
    assert list(sizes.y) == sorted(counts.sum(axis=1), reverse=True)


def test_what_is_no_run_folder_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        load(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"not a run folder: it has no config\.toml"):
        load(tmp_path)
    folder = run_folder(tmp_path)
    (folder / "summary.json").write_text('{"task": ', encoding="utf-8")
    with pytest.raises(InputError, match=r"cannot read .*summary\.json"):
        load(folder)
    (folder / "summary.json").unlink()
    with pytest.raises(InputError, match="fedra run --resume"):
        write_report(folder)


def test_importing_the_page_imports_no_plotting() -> None:
    heavy = "{'plotly', 'pandas', 'sklearn', 'scipy'}"
    code = f"import sys, reports.page, reports.compare; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_words() -> None:
    assert {name: word.higher_is_better for name, word in METRICS.items()} == HIGHER_IS_BETTER
    assert ordered(["loss", "mine", "accuracy", "pr_auc"]) == ["pr_auc", "accuracy", "mine", "loss"]
    assert [duration(s) for s in (0.823, 18.3, 252, 7500)] == ["0.82 s", "18.3 s", "4 min 12 s", "2 h 05 min"]
    assert [size(b) for b in (922_400, 2_767_200_000)] == ["0.92 MB", "2.77 GB"]


def test_the_interval_is_student_t() -> None:
    # 1, 2, 3: mean 2, standard deviation 1, t(0.975, 2) = 4.302653, half-width 4.302653 / sqrt(3).
    found = interval([1.0, 2.0, 3.0, None, math.nan])
    assert found == Interval(2.0, pytest.approx(4.302653 / math.sqrt(3), abs=1e-5), 3)
    assert str(found) == "2.000 ± 2.484"
    assert str(interval([0.5])) == "0.500"
    # What lies between 0 and 1 has an interval that does: 0.9, 0.95 and 1 have the half-width 0.124.
    assert str(interval([0.9, 0.95, 1.0], bounded=True)) == "0.950 [0.826\N{EN DASH}1.000]"
    assert str(interval([0.0, 0.05, 0.1], bounded=True)) == "0.050 [0.000\N{EN DASH}0.174]"
    assert [bounded(name) for name in ("auroc", "ece", "loss", "mine")] == [True, True, False, False]
    assert str(interval([])) == "\N{EN DASH}"


def compared(parent: Path) -> list[dict[str, Any]]:
    """Return the runs of two strategies: fedavg three times, fedprox once completed and once interrupted."""
    found = {"central": {"accuracy": 0.99}, "local": {"accuracy": 0.7, "own_test": {"accuracy": {"worst": 0.4}}}}
    plan = [("fedavg", 0, 0.7), ("fedavg", 1, 0.8), ("fedavg", 2, 0.9), ("fedprox", 0, 0.85), ("fedprox", 1, 0.1)]
    rows = []
    for strategy, seed, accuracy in plan:
        changes = {
            "strategy": strategy,
            "seed": seed,
            "metrics": {"accuracy": accuracy},
            "clients_metrics": {"accuracy": {"mean": accuracy, "worst": accuracy - 0.2, "std": 0.1}},
            "clients_per_second": 100.0,
            "baselines": found,
            "status": "interrupted" if accuracy == 0.1 else "completed",
        }
        path = run_folder(parent, name=f"{strategy} s{seed}", **changes)
        rows.append({"strategy": strategy, "seed": seed, "path": path, "summary": summary_of(3, **changes)})
    return rows


def test_a_comparison_in_numbers(tmp_path: Path) -> None:
    fedavg, fedprox, pooled, alone = table(compared(tmp_path))
    assert list(fedavg) == ["Strategy", "Runs", "Accuracy", "Clients Accuracy", "Worst client Accuracy", "Clients/s"]
    numbers = ["0.800 [0.552-1.000]", "0.800 [0.552-1.000]", "0.600 [0.352-0.848]", "100.0 ± 0.0"]
    assert [str(value).replace("\N{EN DASH}", "-") for value in fedavg.values()] == ["fedavg", "3", *numbers]
    assert [str(value) for value in fedprox.values()] == ["fedprox", "1", "0.850", "0.850", "0.650", "100.0"]
    assert (pooled["Strategy"], str(pooled["Accuracy"])) == ("pooled data", "0.990 [0.990\N{EN DASH}0.990]")
    assert (alone["Strategy"], str(alone["Worst client Accuracy"])) == (
        "clients alone",
        "0.400 [0.400\N{EN DASH}0.400]",
    )


def test_the_comparison_page_shows_the_same_and_links_to_the_runs(tmp_path: Path) -> None:
    path = write_comparison(tmp_path / "report.html", compared(tmp_path))
    text = path.read_text(encoding="utf-8")
    page = Reader(text)
    assert "medical: fedavg, fedprox" in page.text
    assert "1 run not completed and not counted" in page.text
    assert "0.800 [0.552\N{EN DASH}1.000]" in page.text
    assert page.text.count("Student's t") == 1
    assert page.outside[0] == "fedavg%20s0/report.html"
    assert len(page.outside) == 5
    assert "<b>0.850</b>" in text
    accuracy = next(f for f in page.figures if f["layout"]["yaxis"]["title"]["text"] == "share correct")
    assert [trace.get("name") for trace in accuracy["data"]] == [None, "fedavg", "fedprox"]


def test_a_band_ends_where_its_metric_does(tmp_path: Path) -> None:
    rows = []
    for seed, accuracy in enumerate((0.9, 0.95, 1.0)):
        path = run_folder(tmp_path, name=str(seed), rows=[round_row(1, central={"accuracy": accuracy, "loss": 0.0})])
        rows.append({"strategy": "fedavg", "seed": seed, "path": path, "summary": summary_of(1)})
    page = Reader(write_comparison(tmp_path / "report.html", rows).read_text(encoding="utf-8"))
    accuracy = next(f for f in page.figures if f["layout"]["yaxis"]["title"]["text"] == "share correct")
    assert accuracy["data"][0]["y"] == pytest.approx([1.0, 0.826], abs=1e-3)


def test_chromium_draws_every_figure(tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    folder = run_folder(tmp_path, names=[HOSTILE, "client 1"], labels=(HOSTILE, "malignant"))
    page = read(folder)
    quiet = ["no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync", "disable-component-update"]
    quiet += ["disable-background-networking", f"user-data-dir={tmp_path / 'profile'}"]
    wanted = ["headless", "enable-logging=stderr", "v=0", "virtual-time-budget=8000", "dump-dom"]
    command = [chromium, *(f"--{flag}" for flag in quiet + wanted), (folder / "report.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    seen = Reader(done.stdout)
    assert len(page.figures) == 9
    # Plotly lays several drawings over each other in a figure.
    assert seen.tags.count("svg.main-svg") >= 2 * len(page.figures)
    assert seen.outside == []
    assert seen.text.count(f"{HOSTILE[:17]}…") == 2
