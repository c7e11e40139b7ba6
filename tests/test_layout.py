"""The layout: every package is the repository's own, and Flower's bundle will hold it."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_resolves_inside_the_repository(package: str) -> None:
    found = importlib.import_module(package).__file__
    assert found is not None
    assert ROOT in Path(found).parents


def test_the_layers_name_every_package() -> None:
    importlinter = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    named = {name.strip() for line in importlinter["contracts"][0]["layers"] for name in line.split("|")}
    assert named == {name for name in PACKAGES if "." not in name} == set(importlinter["root_packages"])


def test_every_package_is_in_the_wheel() -> None:
    tops = {name for name in PACKAGES if "." not in name}
    folders = {file.parent.relative_to(ROOT) for name in tops for file in (ROOT / name).rglob("__init__.py")}
    assert {".".join(folder.parts) for folder in folders} == set(PACKAGES)


def test_no_file_is_over_a_megabyte_or_written_as_one_long_subject() -> None:
    for package in PACKAGES:
        for file in (ROOT / package.replace(".", "/")).rglob("*.py"):
            assert len(file.read_text().splitlines()) <= 320, f"{file} is long: has it one subject?"
