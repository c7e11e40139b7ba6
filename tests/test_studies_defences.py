"""The programs behind docs/robustness.md and docs/compression.md make runs once and fill their page's marked places."""

from __future__ import annotations

import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _as_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "studies"))


def _study(program: str, page: str, folder: Path, *options: str) -> str:
    """Return the page that a program made of the documents' one, in a folder of the test's own."""
    own = folder / page
    if not own.exists():
        shutil.copy(ROOT / "docs" / page, own)
    with pytest.MonkeyPatch.context() as patch:
        given = ["--seeds", "1", "--rounds", "1", *options, "--out", str(folder / "runs"), "--page", str(own)]
        patch.setattr(sys, "argv", [program, *given])
        runpy.run_path(str(ROOT / "studies" / program), run_name="__main__")
    return own.read_text(encoding="utf-8")


def _place(text: str, name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)
    assert found
    return found.group(1)


def test_the_tables_of_defences(tmp_path: Path) -> None:
    options = ["--defences", "rfa, buckets of 2", "--attacks", "sign-flip x3/backdoor"]
    options += ["--fractions", "0.1", "--breaking-seeds", "1"]
    text = _study("defences.py", "robustness.md", tmp_path, *options)
    lines = _place(text, "defences").splitlines()
    assert lines[0] == "| defence | none | sign-flip x3 | backdoor | backdoor opens |"
    assert lines[2].startswith("| rfa, buckets of 2 | ")
    assert lines[2].count("|") == 6
    assert "Without attackers FedAvg gives" in lines[-1]
    assert "| rfa, buckets of 2 | 100 / " in _place(text, "selected")
    assert _place(text, "breakdown").startswith("sign-flip x3:")
    # Without and with two attacks, one of them at another share, and the trigger without attackers.
    made = sorted((tmp_path / "runs").iterdir())
    assert len(made) == 3 + 1 + 1
    assert _study("defences.py", "robustness.md", tmp_path, *options) == text
    assert sorted((tmp_path / "runs").iterdir()) == made


def test_the_table_and_figure_of_compression(tmp_path: Path) -> None:
    text = _study("compression.py", "compression.md", tmp_path, "--schemes", "fp16")
    lines = _place(text, "compression").splitlines()
    assert len(lines) == 4
    # 9,930 numbers: six tensors in float32, one vector in half precision, each with its header.
    assert " | 40,488 | 1.0 | " in lines[2]
    assert " | 19,988 | 2.0 | " in lines[3]
    assert 5_000 < (tmp_path / "figures" / "compression.png").stat().st_size < 200_000
