"""The studies: a program leaves a figure, and its table between its marks; what it has run it does not run again."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

STUDIES = Path(__file__).parents[1] / "studies"


def test_fedprox_draws_its_figure_and_writes_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STUDIES))
    fedprox = importlib.import_module("fedprox")
    page = tmp_path / "strategies.md"
    page.write_text("before\n<!-- fedprox -->\nold\n<!-- /fedprox -->\nafter\n")
    monkeypatch.setattr(fedprox, "STRAGGLERS", (0.0,))
    for _ in range(2):
        fedprox.study(2, [2, 7], tmp_path / "runs", tmp_path, ["1,1"], clients=6, sampled=3, local_epochs=1)
    written = page.read_text()
    assert written.startswith("before\n<!-- fedprox -->\n\n| synthetic |")
    assert written.endswith("|\n\n<!-- /fedprox -->\nafter\n")
    assert written.count("\n| (1,1), ") == 3
    assert "old" not in written
    assert (tmp_path / "figures" / "fedprox.png").stat().st_size < 300_000
    # Without stragglers FedProx with mu = 0 is FedAvg's run.
    assert len(list((tmp_path / "runs").iterdir())) == 2 * 2
    first, same, third = written.splitlines()[5:8]
    assert first.partition("FedAvg")[2] == same.partition("mu = 0")[2]
    assert third.startswith("| (1,1), 0%, FedProx, mu = 1 | 3.0 | ")


def test_the_picture_of_secure_aggregation_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STUDIES))
    path = tmp_path / "figures" / "secure.png"
    importlib.import_module("secure_picture").draw(path)
    assert 20_000 < path.stat().st_size < 300_000
