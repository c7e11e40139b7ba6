"""Inputs that are no finite numbers are refused before anything starts, and the sentence says where they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from lines import Lines

from core.errors import InputError
from server.build import check
from simulations.run import preset
from tasks.base import numbers


def _check(tmp_path: Path, task: str, **changes: object) -> None:
    check(preset("smoke", out=str(tmp_path), task=f"test_inputs:{task}", **changes))


class Unreadable(Lines):
    """A task whose file is not what it expects."""

    def federation(self) -> object:  # type: ignore[override]
        """Raise what numpy does."""
        return np.array(["abc"]).astype(np.float32)


def test_a_table_of_numbers_is_float32() -> None:
    found = numbers(pd.DataFrame({"age": [1, 2], "yes": [True, False], "dose": ["0.5", "1"]}))
    assert found.dtype == np.float32
    assert found.tolist() == [[1.0, 1.0, 0.5], [2.0, 0.0, 1.0]]


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ([1.0, None, 3.0], "column 'dose' has 1 of 3 values missing or not finite"),
        ([1.0, np.inf, 3.0], "column 'dose' has 1 of 3 values missing or not finite"),
        ([1.0, "high", None], "column 'dose' has 'high' in row 2, which is not a number, and 1 such cells in all"),
    ],
)
def test_cells_that_are_no_numbers_are_named(cells: list[object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        numbers(pd.DataFrame({"age": [1, 2, 3], "dose": cells}))


def test_no_run_starts_on_inputs_that_are_not_finite(tmp_path: Path) -> None:
    # The second client's four points; the central test set is the first client's, and train and test are the same.
    with pytest.raises(InputError, match=r"input column 1 \(of 1\) has 8 of 14 values missing or not finite"):
        check(preset("smoke", task="lines:Lines", dataset="1,0,2;nan,1,4", clients=2, out=str(tmp_path)))


def test_what_a_task_raises_while_it_loads_is_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Unreadable cannot load its data: ValueError: could not convert.*'abc'"):
        _check(tmp_path, "Unreadable", dataset="1,0,2", clients=1)
