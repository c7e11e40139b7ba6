"""The medical task, and Fed-Heart-Disease against FLamby's published table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from core.errors import InputError
from server.build import check
from simulations.run import preset, simulate
from tasks.medical import HEART_FILES

# Correct answers of 254 on the pooled test set, FedAvg with 100 local updates, seeds 42 to 46:
# owkin/FLamby, flamby/results/results_benchmark_fed_heart_disease (Ogier du Terrail et al., NeurIPS 2022).
PUBLISHED = {42: 191, 43: 194, 44: 194, 45: 178, 46: 193}


def test_the_demo_reaches_its_goal_without_ray(tmp_path: Path) -> None:
    metrics = simulate(preset("medical", engine__workers=0, baselines=False, out=str(tmp_path))).metrics
    assert metrics["accuracy"] >= 0.95
    assert metrics["auroc"] >= 0.98


def test_flambys_split_and_features(heart_files: str) -> None:
    federation = check(preset("heart", data_dir=heart_files))
    assert federation.names == ("cleveland", "hungarian", "switzerland", "va")
    assert federation.train.sizes.tolist() == [199, 172, 30, 85]
    assert federation.test.sizes.tolist() == [104, 89, 16, 45]
    assert federation.validation.sizes.tolist() == [0, 0, 0, 0]
    assert federation.central.x.shape == (254, 13)
    assert set(np.unique(federation.central.x[:, -5:])) == {0.0, 1.0}


@pytest.mark.parametrize("seed", [42, 45])
def test_fedavg_differs_from_flamby_by_at_most_two_rows(seed: int, heart_files: str, tmp_path: Path) -> None:
    changes = {"seed": seed, "data_dir": heart_files, "engine__workers": 0, "baselines": False, "out": str(tmp_path)}
    correct = simulate(preset("heart", **changes)).metrics["accuracy"] * 254
    assert abs(round(correct) - PUBLISHED[seed]) <= 2


def _copy_with(heart_files: str, tmp_path: Path, change: dict[str, str | None]) -> str:
    for name in HEART_FILES:
        text = (Path(heart_files) / name).read_text()
        if name in change:
            if change[name] is None:
                continue
            text = str(change[name])
        (tmp_path / name).write_text(text)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("processed.va.data", None, ["processed.va.data", "data-dir"]),
        ("processed.va.data", "1,2,3\n", ["3 columns, expected 14"]),
        ("processed.va.data", "1,2,3,4,5,6,7,8,9,10,11,12,13,0\n1,2,3,x,5,6,7,8,9,10,11,12,13,0\n", ["line 2", "'x'"]),
        ("processed.va.data", "1,2\n1,2,3\n", ["line 2"]),
        ("processed.va.data", "1,2,3,4,5,6,7,8,9,10,11,12,13,0\n1,2,3\n", ["line 2, column 3: '' is not a number"]),
        ("processed.va.data", "", ["processed.va.data"]),
        (
            "processed.va.data",
            "1,2,3,4,5,6,7,8,9,10,11,12,13,0\n" * 9,
            ["va has 0 complete rows with heart disease and 9"],
        ),
        ("processed.va.data", "1,2,3,4,5,6,7,8,9,10,11,12,13,0\n", ["four rows at least"]),
    ],
)
def test_bad_heart_files_are_named(
    file: str, text: str | None, words: list[str], heart_files: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as raised:
        check(preset("heart", data_dir=_copy_with(heart_files, tmp_path, {file: text})))
    for word in words:
        assert word in str(raised.value)
