"""Every command in README.md and docs/ prints what is shown. Numbers and paths may differ, words may not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _blocks(kind: str) -> list[tuple[str, str]]:
    """Return (document, content) of every fenced block of the kind."""
    return [
        (file.relative_to(ROOT).as_posix(), content)
        for file in DOCUMENTS
        for name, content in FENCE.findall(file.read_text(encoding="utf-8"))
        if name == kind
    ]


def _sessions(block: str) -> list[tuple[str, list[str]]]:
    """Return each `$ command` of a console block with the lines that it is said to print."""
    found: list[tuple[str, list[str]]] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append((line.removeprefix("$ "), []))
        else:
            found[-1][1].append(line)
    return found


def _words(line: str, folder: Path) -> str:
    """Return the line without what may differ: numbers (a line that is one number apart), folder, table widths."""
    if line.strip().isdigit():
        return line.strip()
    return re.sub(r"\s+", " ", re.sub(r"\d+(\.\d+)?", "#", line.replace(f"{folder}/", ""))).strip()


def _marked(document: str, block: str) -> object:
    slow = any(words in block for words in ("make demo", "heart", "fedra audit"))
    return pytest.param(
        document, block, id=f"{document}:{_sessions(block)[0][0][:40]}", marks=[pytest.mark.slow] * slow
    )


@pytest.mark.parametrize(("document", "block"), [_marked(*block) for block in _blocks("console")])
def test_a_documented_command_prints_what_is_shown(document: str, block: str, tmp_path: Path) -> None:
    if "flwr run" in block:
        pytest.skip("tests/test_flower_runtime.py runs Flower's own runtime")
    if "data-dir=" in block and not SHARED.is_dir():
        pytest.skip(f"the data sets are not at {SHARED}")
    for _, code in _blocks("python"):
        # A block that starts with its file's name is that file.
        (tmp_path / code.splitlines()[0].removeprefix("# ")).write_text(code)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "140"}
    environment["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    for command, lines in _sessions(block):
        # `make demo` is its recipe here: the environment is there already.
        for shown, real in {"make demo": _recipe("demo"), "DATA/": f"{SHARED}/", "REPO/": f"{ROOT}/"}.items():
            command = command.replace(shown, real)
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=280,
        )
        printed = [_words(line, tmp_path) for line in done.stdout.splitlines()]
        for line in lines:
            if line.strip() and line != "...":
                wanted = _words(line, tmp_path)
                assert wanted in printed, f"{document}: `{command}` does not print {line!r}, but:\n{done.stdout}"
                printed = printed[printed.index(wanted) + 1 :]


def _recipe(target: str) -> str:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = re.search(rf"^{target}:.*\n\t\$\(BIN\)/(.+)$", makefile, re.MULTILINE)
    assert found, f"the Makefile has no {target}"
    return found.group(1)


@pytest.mark.parametrize("document", [file.relative_to(ROOT).as_posix() for file in DOCUMENTS])
def test_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (ROOT / document).parent.joinpath(target).exists(), f"{document} links to {target}"


def test_the_readme_is_short_and_shows_the_whole_tree() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert 60 <= len(readme.splitlines()) <= 120
    for folder in ("core", "tasks", "strategies", "privacy", "client", "server", "simulations", "reports", "docs"):
        assert f"\n{folder}/ " in readme
