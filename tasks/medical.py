"""Medical diagnosis: breast cancer (bundled with scikit-learn) or heart disease in four real hospitals.

Fed-Heart-Disease follows FLamby (Ogier du Terrail et al., NeurIPS 2022) in preprocessing, split and model, so its
published table can be reproduced: `fedra run heart seed=42`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from core.config import RunConfig
from core.data import Federation, Ragged, Split
from core.errors import InputError
from tasks.base import Dataset, Standardise, Table, choose, choose_model, classification_loss
from tasks.download import locate
from tasks.partition import federate

HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
_UCI = "https://archive.ics.uci.edu/ml/machine-learning-databases/heart-disease/processed.{}.data"
_CHECKSUMS = (
    "a74b7efa387bc9d108d7d0115d831fe9b414b29ae7124f331b622b4efa0427c8",
    "d1ad108f785768cd3d7e82dc522e6f5a61eea93cccfb3a46ee8076f73fc3d796",
    "834a405ccf5b66ab4056bb77794adc8df0b7125186454c0a1d002d33c6c3b314",
    "e7c93d8d0d2acdadfa4c5e8de768e2191e7f618b952e29623f1f0d5949ff6b8f",
)
HEART_FILES = {
    f"processed.{hospital}.data": (_UCI.format(hospital), checksum)
    for hospital, checksum in zip(HOSPITALS, _CHECKSUMS, strict=True)
}
# Levels of the two categorical columns, first one dropped: chest pain type (2) and resting ECG (6).
_LEVELS: Mapping[int, tuple[int, ...]] = {2: (2, 3, 4), 6: (1, 2)}
_COLUMNS = 14


class Medical:
    """Binary diagnosis from tabular features; logits (B,)."""

    metrics: tuple[str, ...] = ("loss", "accuracy", "auroc", "f1", "ece")
    tuned_threshold = False

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.name, self.dataset = choose(DATASETS, config)
        self.labels = self.dataset.labels
        # FLamby lets each hospital standardise with its own constants; measurements there are not comparable.
        self.standardise: Standardise = "local" if self.name == "heart" else "federated"
        self.models = _models(self.dataset.features, logistic_first=self.name == "heart")

    def federation(self) -> Federation:
        """Return the clients' raw features (n, 30 or 13) float32, labels int64 in {0, 1}, and the central test set."""
        if self.name == "heart" and self.config.partition.kind == "natural" and self.config.clients == len(HOSPITALS):
            return _flamby_federation(self.config)
        folder = Path(self.config.data_dir) if self.config.data_dir else None
        return federate(self.dataset.read(self.config, folder), self.config)

    def model(self) -> nn.Module:
        """Return a small network, or logistic regression where FLamby takes it."""
        return choose_model(self.models, self.config)

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return binary cross-entropy, (B,)."""
        return classification_loss(logits, y, self.config.positive_weight)


def _models(features: int, logistic_first: bool) -> dict[str, Callable[[], nn.Module]]:
    def logistic() -> nn.Module:
        return nn.Sequential(nn.Linear(features, 1), nn.Flatten(0))

    def mlp() -> nn.Module:
        return nn.Sequential(nn.Linear(features, 32), nn.ReLU(), nn.Linear(32, 1), nn.Flatten(0))

    return {"logistic": logistic, "mlp": mlp} if logistic_first else {"mlp": mlp, "logistic": logistic}


def read_breast_cancer(config: RunConfig, folder: Path | None) -> Table:
    """Return the 569 rows of Wisconsin Diagnostic Breast Cancer; label 1 is malignant. There are no natural groups."""
    # Only who reads the data needs it: scikit-learn takes a second to import, and workers read none.
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    # scikit-learn codes benign as 1; a diagnosis is positive when there is something to find.
    return Table(x=data.data.astype(np.float32), y=1 - data.target.astype(np.int64))


def read_hospital(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return x (n, 13) float32 and y (n,) int64 of one hospital's file: rows with a missing value dropped, order kept.

    Columns 10, 11 and 12 are almost always missing outside Cleveland and are dropped first, as in FLamby.
    """
    import pandas as pd

    try:
        frame = pd.read_csv(path, header=None, dtype=str, keep_default_na=False, skip_blank_lines=False)
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read as CSV: {str(error).strip()}.") from None
    if frame.shape[1] != _COLUMNS:
        raise InputError(f"{path} has {frame.shape[1]} columns, expected {_COLUMNS}: is it a processed.*.data file?")
    frame = frame[(frame != "").any(axis=1)]
    numbers = frame.apply(pd.to_numeric, errors="coerce")
    wrong = numbers.isna() & (frame != "?")
    if wrong.to_numpy().any():
        line, column = np.argwhere(wrong.to_numpy())[0]
        where = f"{path} line {frame.index[line] + 1}, column {column}"
        raise InputError(f"{where}: {frame.iat[line, column]!r} is not a number.")
    kept = numbers.drop(columns=[10, 11, 12]).dropna()
    y = (kept[13] != 0).to_numpy(dtype=np.int64)
    plain = kept.drop(columns=[13, *_LEVELS]).to_numpy(dtype=np.float32)
    dummies = [
        (kept[column] == level).to_numpy(dtype=np.float32) for column, levels in _LEVELS.items() for level in levels
    ]
    return np.column_stack([plain, *dummies]), y


def read_heart(config: RunConfig, folder: Path | None) -> Table:
    """Return the 740 complete rows of the four hospitals as one table, for partitions other than FLamby's."""
    parts = _hospitals(config)
    return Table(
        x=np.concatenate([x for x, _ in parts]),
        y=np.concatenate([y for _, y in parts]),
        natural=np.repeat(np.arange(len(parts)), [len(y) for _, y in parts]),
        names=HOSPITALS,
    )


def _hospitals(config: RunConfig) -> list[tuple[np.ndarray, np.ndarray]]:
    folder = locate("heart", config.data_dir, HEART_FILES)
    return [read_hospital(folder / file) for file in HEART_FILES]


def _flamby_federation(config: RunConfig) -> Federation:
    """Return FLamby's split: 66 % of each hospital trains, the rest tests, and the central test set is all the tests.

    FLamby has no validation split, so none is made here: best-model tracking needs another partition.
    """
    from sklearn.model_selection import train_test_split

    trains, tests = [], []
    for name, (x, y) in zip(HOSPITALS, _hospitals(config), strict=True):
        counts = np.bincount(y, minlength=2)
        if counts.min() == 0 or len(y) < 4:
            raise InputError(
                f"hospital {name} has {counts[1]} complete rows with heart disease and {counts[0]} without; "
                "both are needed, and four rows at least: check its file, or choose another partition.kind."
            )
        train, test = train_test_split(
            np.arange(len(y)),
            test_size=1.0 - 0.66,
            train_size=0.66,
            random_state=43,
            shuffle=True,
            stratify=y if counts.min() > 2 else None,
        )
        trains.append(Split(x[np.sort(train)], y[np.sort(train)]))
        tests.append(Split(x[np.sort(test)], y[np.sort(test)]))
    test = Ragged.stack(tests)
    empty = Ragged.stack([Split(s.x[:0], s.y[:0]) for s in trains])
    return Federation(Ragged.stack(trains), empty, test, Split(test.x, test.y), HOSPITALS)


DATASETS = {
    "breast-cancer": Dataset(
        "569 tumours, 30 features (Wisconsin Diagnostic; bundled with scikit-learn)",
        read_breast_cancer, ("benign", "malignant"), 30,
    ),
    "heart": Dataset(
        "740 patients of four hospitals, 13 features (UCI Heart Disease as in FLamby; natural partition)",
        read_heart, ("healthy", "heart disease"), 13, reads_files=True,
    ),
}  # fmt: skip
