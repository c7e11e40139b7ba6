"""Fraud detection: rare positives, banks that differ. Generated card transactions, or one of four public data sets.

Accuracy is not among the metrics: with 0.7 % frauds a model that never raises an alarm has 99.3 %.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor, nn

from core.config import RunConfig
from core.data import Federation
from core.errors import InputError
from tasks.base import Dataset, Standardise, Table, choose, choose_model, classification_loss, refuse_missing
from tasks.fraud_generator import FEATURES, generate
from tasks.partition import federate

HIDDEN = (64, 32)


class Fraud:
    """Fraudulent or not, from standardised features: clients are banks, car makes, or groups of customers."""

    metrics: tuple[str, ...] = ("loss", "pr_auc", "recall_at_1pct_fpr", "f1", "auroc", "ece")
    standardise: Standardise = "federated"
    tuned_threshold = True

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        _, self.dataset = choose(DATASETS, config)
        self.labels = self.dataset.labels
        self.models = {"mlp": self._mlp, "logistic": self._logistic}

    def federation(self) -> Federation:
        """Return the raw clients and the central test set; `InputError` names a missing file, column or wrong line."""
        folder = Path(self.config.data_dir).expanduser() if self.config.data_dir else None
        return federate(self.dataset.read(self.config, folder), self.config)

    def model(self) -> nn.Module:
        """Return a small network or logistic regression: x (B, features) float32 -> logits (B,)."""
        return choose_model(self.models, self.config)

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return each example's binary cross-entropy, (B,), frauds weighted by `positive-weight`."""
        return classification_loss(logits, y, self.config.positive_weight)

    def _mlp(self) -> nn.Module:
        wide, narrow = HIDDEN
        hidden = nn.Linear(self.dataset.features, wide), nn.ReLU(), nn.Linear(wide, narrow), nn.ReLU()
        return nn.Sequential(*hidden, nn.Linear(narrow, 1), nn.Flatten(0))

    def _logistic(self) -> nn.Module:
        return nn.Sequential(nn.Linear(self.dataset.features, 1), nn.Flatten(0))


@dataclass(frozen=True)
class Schema:
    """The columns of a published CSV file. Levels are fixed here, so that the width of x is known before it is read."""

    files: tuple[str, ...]
    """Names under which the file is looked for."""
    page: str
    """Where it is published."""
    numbers: tuple[str, ...]
    """Columns used as they are."""
    label: str
    levels: Mapping[str, tuple[str, ...]]
    """Column -> its values: one 0/1 feature each."""
    classes: Mapping[str, int]
    """Value of the label -> 0 or 1."""
    natural: Callable[[pd.DataFrame], pd.Series] | None = None
    """Name of the natural group of each row."""
    feature: str | None = None
    """Number that partition.kind=feature sorts by."""
    header: bool = True
    """Without a header, columns are called 0, 1, ..."""

    @property
    def width(self) -> int:
        """Return the number of features."""
        return len(self.numbers) + sum(map(len, self.levels.values()))


def read(schema: Schema, config: RunConfig, folder: Path | None) -> Table:
    """Return the file's x (n, features) float32, numbers before 0/1 features, y (n,) int64 and its natural groups."""
    path = _find(schema, folder)
    frame = _parse(path, schema)
    numbers = _numbers(path, frame, schema.numbers)
    onehot = [_codes(path, frame, c, levels)[:, None] == np.arange(len(levels)) for c, levels in schema.levels.items()]
    label = _codes(path, frame, schema.label, tuple(schema.classes))
    natural, names = (None, ()) if schema.natural is None else pd.factorize(schema.natural(frame), sort=True)
    return Table(
        x=np.concatenate([numbers, *onehot], axis=1).astype(np.float32),
        y=np.array(list(schema.classes.values()), dtype=np.int64)[label],
        natural=natural,
        names=tuple(names),
        feature=None if schema.feature is None else numbers[:, schema.numbers.index(schema.feature)],
    )


def _find(schema: Schema, folder: Path | None) -> Path:
    remedy = f"get {schema.files[0]} from {schema.page} and set data-dir to its folder"
    if folder is None:
        raise InputError(f"this data set is read from a file: {remedy}.")
    found = [folder / name for name in schema.files if (folder / name).is_file()]
    if not found:
        raise InputError(f"{folder.absolute()} has no {' or '.join(schema.files)}; {remedy}.")
    return found[0]


def _parse(path: Path, schema: Schema) -> pd.DataFrame:
    """Return the file with its line numbers as index; levels and labels are text."""
    text = dict.fromkeys((*schema.levels, schema.label), str)
    try:
        frame = pd.read_csv(
            path,
            header=0 if schema.header else None,
            dtype=text if schema.header else {int(name): str for name in text},
            # Blank lines are counted, so that messages name the right line.
            skip_blank_lines=False,
            low_memory=False,
        )
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(f"{path} is not a readable CSV file: {str(error).strip().rstrip('.')}.") from None
    if not isinstance(frame.index, pd.RangeIndex):
        raise InputError(f"{path} line 2 has more fields than the header.")
    frame.columns = frame.columns.astype(str)
    missing = [name for name in (*schema.numbers, *schema.levels, schema.label) if name not in frame]
    if missing:
        raise refuse_missing(str(path), missing, list(frame.columns))
    frame.index += 2 if schema.header else 1
    frame = frame.dropna(how="all")
    if frame.empty:
        raise InputError(f"{path} has no rows.")
    return frame


def _numbers(path: Path, frame: pd.DataFrame, columns: tuple[str, ...]) -> np.ndarray:
    """Return the columns (n, k) float64; `InputError` names the first value that is not a finite number."""
    numbers = frame[list(columns)].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float64)
    wrong = np.argwhere(~np.isfinite(numbers))
    if len(wrong):
        row, column = wrong[0]
        name = columns[column]
        raise InputError(f"{path} line {frame.index[row]}: {name}={frame[name].iloc[row]} is not a number.")
    return numbers


def _codes(path: Path, frame: pd.DataFrame, column: str, levels: tuple[str, ...]) -> np.ndarray:
    """Return the position (n,) of each value in `levels`; `InputError` names the first value that is not among them."""
    codes = pd.Categorical(frame[column].str.strip(), categories=levels).codes
    if (codes < 0).any():
        row = int(np.argmax(codes < 0))
        value = frame[column].iloc[row]
        raise InputError(f"{path} line {frame.index[row]}: {column}={value} is not one of {', '.join(levels)}.")
    return codes


def read_generated(config: RunConfig, folder: Path | None) -> Table:
    """Return transactions of `config.clients` banks; no file is read."""
    return generate(config)


def _education_and_marriage(frame: pd.DataFrame) -> pd.Series:
    """Return education and marriage as words; groups of fewer than 100 customers are one group, 'other'."""
    schools = {"1": "graduate school", "2": "university", "3": "high school", "4": "other school"}
    education = frame["EDUCATION"].map(schools).fillna("unknown school")
    marriage = frame["MARRIAGE"].map({"1": "married", "2": "single", "3": "other status"}).fillna("unknown status")
    group = education + ", " + marriage
    return group.where(group.map(group.value_counts()) >= 100, "other")


_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_POLICIES = ("All Perils", "Collision", "Liability")
_VEHICLES = ("Sedan", "Sport", "Utility")
_YES_NO = ("No", "Yes")

CREDITCARD = Schema(
    files=("creditcard.csv", "creditcard.csv.gz", "creditcard_ulb_5492_scaled.csv.gz"),
    page="https://www.kaggle.com/datasets/mlg-ulb/creditcardfraud",
    numbers=("Time", *(f"V{i}" for i in range(1, 29)), "Amount"),
    levels={},
    label="Class",
    classes={"0": 0, "1": 1},
    feature="Time",
)
CLAIMS = Schema(
    files=("fraud_oracle.csv", "fraud_oracle.csv.gz"),
    page="https://www.kaggle.com/datasets/shivamb/vehicle-claim-fraud-detection",
    numbers=("WeekOfMonth", "WeekOfMonthClaimed", "Age", "Deductible", "DriverRating", "Year"),
    # PolicyNumber and RepNumber are left out: a running number, and the clerk.
    levels={
        "Month": _MONTHS,
        "DayOfWeek": _WEEKDAYS,
        "Make": (
            *("Accura", "BMW", "Chevrolet", "Dodge", "Ferrari", "Ford", "Honda", "Jaguar", "Lexus", "Mazda", "Mecedes"),
            *("Mercury", "Nisson", "Pontiac", "Porche", "Saab", "Saturn", "Toyota", "VW"),
        ),
        "AccidentArea": ("Rural", "Urban"),
        # One claim has 0 for day and month.
        "DayOfWeekClaimed": ("0", *_WEEKDAYS),
        "MonthClaimed": ("0", *_MONTHS),
        "Sex": ("Female", "Male"),
        "MaritalStatus": ("Divorced", "Married", "Single", "Widow"),
        "Fault": ("Policy Holder", "Third Party"),
        "PolicyType": tuple(f"{vehicle} - {policy}" for vehicle in _VEHICLES for policy in _POLICIES),
        "VehicleCategory": _VEHICLES,
        "VehiclePrice": (
            *("less than 20000", "20000 to 29000", "30000 to 39000", "40000 to 59000"),
            *("60000 to 69000", "more than 69000"),
        ),
        "Days_Policy_Accident": ("none", "1 to 7", "8 to 15", "15 to 30", "more than 30"),
        "Days_Policy_Claim": ("none", "8 to 15", "15 to 30", "more than 30"),
        "PastNumberOfClaims": ("none", "1", "2 to 4", "more than 4"),
        "AgeOfVehicle": ("new", "2 years", "3 years", "4 years", "5 years", "6 years", "7 years", "more than 7"),
        "AgeOfPolicyHolder": (
            *("16 to 17", "18 to 20", "21 to 25", "26 to 30", "31 to 35"),
            *("36 to 40", "41 to 50", "51 to 65", "over 65"),
        ),
        "PoliceReportFiled": _YES_NO,
        "WitnessPresent": _YES_NO,
        "AgentType": ("External", "Internal"),
        "NumberOfSuppliments": ("none", "1 to 2", "3 to 5", "more than 5"),
        "AddressChange_Claim": ("no change", "under 6 months", "1 year", "2 to 3 years", "4 to 8 years"),
        "NumberOfCars": ("1 vehicle", "2 vehicles", "3 to 4", "5 to 8", "more than 8"),
        "BasePolicy": _POLICIES,
    },
    label="FraudFound_P",
    classes={"0": 0, "1": 1},
    natural=lambda frame: frame["Make"],
)
CREDIT_DEFAULT = Schema(
    files=("UCI_Credit_Card.csv", "UCI_Credit_Card.csv.gz"),
    page="https://www.kaggle.com/datasets/uciml/default-of-credit-card-clients-dataset",
    numbers=(
        *("LIMIT_BAL", "SEX", "AGE", "PAY_0", *(f"PAY_{i}" for i in range(2, 7))),
        *(f"BILL_AMT{i}" for i in range(1, 7)),
        *(f"PAY_AMT{i}" for i in range(1, 7)),
    ),
    # 0, 5 and 6 are not in the publisher's description but in the data.
    levels={"EDUCATION": ("0", "1", "2", "3", "4", "5", "6"), "MARRIAGE": ("0", "1", "2", "3")},
    label="default.payment.next.month",
    classes={"0": 0, "1": 1},
    natural=_education_and_marriage,
)
_PURPOSES = {
    "A40": "new car", "A41": "used car", "A42": "furniture", "A43": "radio or television", "A44": "appliances",
    "A45": "repairs", "A46": "education", "A47": "vacation", "A48": "retraining", "A49": "business", "A410": "others",
}  # fmt: skip


def _german(attribute: int, last: int, first: int = 1) -> tuple[str, ...]:
    """Return the codes of a German credit attribute as the publisher numbers it from 1: (9, 2) -> A91, A92."""
    return tuple(f"A{attribute}{level}" for level in range(first, last + 1))


GERMAN = Schema(
    files=("german.csv",),
    page="https://archive.ics.uci.edu/dataset/144/statlog+german+credit+data (german.data, commas for spaces)",
    header=False,
    # Column k is the publisher's attribute k + 1.
    numbers=("1", "4", "7", "10", "12", "15", "17"),
    levels={
        "0": _german(1, 4), "2": _german(3, 4, first=0), "3": tuple(_PURPOSES), "5": _german(6, 5), "6": _german(7, 5),
        "8": _german(9, 5), "9": _german(10, 3), "11": _german(12, 4), "13": _german(14, 3), "14": _german(15, 3),
        "16": _german(17, 4), "18": _german(19, 2), "19": _german(20, 2),
    },
    label="20",
    classes={"1": 0, "2": 1},
    natural=lambda frame: frame["3"].map(_PURPOSES),
)  # fmt: skip


def _from_file(sentence: str, schema: Schema, labels: tuple[str, str]) -> Dataset:
    return Dataset(sentence, partial(read, schema), labels, schema.width, reads_files=True)


DATASETS = {
    "generated": Dataset(
        f"invented card transactions, {len(FEATURES)} features, 0.7 % fraudulent; one bank per client",
        read_generated, ("honest", "fraud"), len(FEATURES),
    ),
    "creditcard": _from_file(
        "card transactions, V1 to V28 (ULB); no natural groups, kind=feature sorts by time",
        CREDITCARD, ("honest", "fraud"),
    ),
    "claims": _from_file(
        "15,420 vehicle insurance claims, 6 % fraudulent; natural groups are 19 makes", CLAIMS, ("honest", "fraud"),
    ),
    "credit-default": _from_file(
        "30,000 credit card customers, 22 % default (UCI); natural groups are education x marriage",
        CREDIT_DEFAULT, ("paid", "default"),
    ),
    "german": _from_file(
        "1,000 credits, 30 % bad (UCI German Credit); natural groups are 10 purposes", GERMAN, ("good", "bad"),
    ),
}  # fmt: skip
