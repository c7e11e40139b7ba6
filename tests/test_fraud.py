"""The fraud task: what the generated banks are like, that federating helps, and the readers of real files."""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch.func import functional_call, grad, stack_module_state, vmap

from core.config import RunConfig
from core.errors import InputError
from simulations.run import preset, simulate
from tasks.base import Table, build_model
from tasks.fraud import CREDITCARD, DATASETS, GERMAN, Fraud
from tasks.fraud_generator import CATEGORIES, FEATURES, STYLES, Transactions, features, generate, simulate_banks

SHARED = Path(__file__).parents[2] / "shared" / "data" / "fraud"


class Banks(NamedTuple):
    """The eight banks of seed 0: features, labels, bank of each row, and whether it is in the central test set."""

    x: np.ndarray
    y: np.ndarray
    bank: np.ndarray
    late: np.ndarray


@pytest.fixture(scope="module")
def eight_banks() -> Banks:
    table = generate(RunConfig(task="fraud", clients=8))
    assert table.natural is not None
    assert table.central is not None
    return Banks(table.x, table.y, table.natural, table.central)


def _logistic(x: np.ndarray, y: np.ndarray) -> LogisticRegression:
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)).fit(x, y)


def _pr_auc(model: LogisticRegression | HistGradientBoostingClassifier, x: np.ndarray, y: np.ndarray) -> float:
    return float(average_precision_score(y, model.predict_proba(x)[:, 1]))


def test_eight_banks_hold_sixty_thousand_transactions_and_few_frauds(eight_banks: Banks) -> None:
    assert 55_000 < len(eight_banks.y) < 63_000
    assert eight_banks.x.shape == (len(eight_banks.y), 25)
    assert eight_banks.x.dtype == np.float32
    assert np.isfinite(eight_banks.x).all()
    assert 0.004 < eight_banks.y.mean() < 0.009
    assert np.bincount(eight_banks.bank, weights=eight_banks.y).min() >= 5


@pytest.mark.parametrize("banks", [1, 3, 100, 1000])
def test_any_number_of_banks(banks: int) -> None:
    federation = Fraud(RunConfig(task="fraud", clients=banks)).federation()
    assert len(federation.names) == len(federation) == banks
    assert federation.names[0] == "Alder Bank"
    assert federation.train.sizes.min() >= 7
    assert set(np.unique(federation.central.y)) == set(np.unique(federation.train.y)) == {0, 1}


def test_equal_seeds_are_equal_bits_and_others_are_not(eight_banks: Banks) -> None:
    again, other = (generate(RunConfig(task="fraud", clients=8, seed=seed)) for seed in (0, 1))
    assert np.array_equal(again.x, eight_banks.x)
    assert np.array_equal(again.y, eight_banks.y)
    assert len(other.y) != len(eight_banks.y)


def test_the_central_test_set_is_the_last_fifth_of_the_time_in_every_bank(eight_banks: Banks) -> None:
    _, transactions = simulate_banks(8, seed=0)
    assert transactions.hours[~eight_banks.late].max() < 48 * 24 <= transactions.hours[eight_banks.late].min()
    assert transactions.hours.max() < 60 * 24
    for bank in range(8):
        assert eight_banks.late[eight_banks.bank == bank].mean() == pytest.approx(0.2, abs=0.03)


def test_features_of_one_card_by_hand() -> None:
    # Saturday 10:00, 10:30 and Sunday 10:00 of the first week, 20, 20 and 80 euros; the last abroad at another shop.
    hours = np.array([5 * 24 + 10, 5 * 24 + 10.5, 6 * 24 + 10])
    no = np.zeros(3, dtype=bool)
    shops = {"category": np.array([0, 0, 1]), "merchant": np.array([7, 8, 7])}
    card = Transactions(
        np.zeros(3, dtype=np.int64), hours, **shops, log_amount=np.log([20, 20, 80]), foreign=np.array([0, 0, 1]) > 0,
        online=no, fraud=no,
    )  # fmt: skip
    x = dict(zip(FEATURES, features(card).T, strict=True))
    assert x["weekend"].tolist() == [1, 1, 1]
    assert x["log_hours_since_previous"] == pytest.approx(np.log([60 * 24 + 0.01, 0.51, 23.51]))
    assert x["log_count_last_hour"] == pytest.approx(np.log([1, 2, 1]))
    assert x["log_count_last_day"] == pytest.approx(np.log([1, 2, 3]))
    assert x["log_count_before"] == pytest.approx(np.log([1, 2, 3]))
    assert x["log_amount_over_mean_before"] == pytest.approx([0, 0, math.log(4)], abs=1e-6)
    assert x["usual_hour"] == pytest.approx([0, math.cos(math.pi / 24), (1 + math.cos(math.pi / 24)) / 2])
    assert x["new_merchant"].tolist() == [1, 1, 1]
    assert x["new_category"].tolist() == [1, 0, 1]
    assert x["country_changed"].tolist() == [0, 0, 1]
    assert x["category_groceries"].tolist() == [1, 1, 0]


def test_features_know_nothing_of_the_future() -> None:
    _, transactions = simulate_banks(3, seed=5)
    past = np.flatnonzero(transactions.hours < 30 * 24)
    assert np.allclose(features(transactions.take(past)), features(transactions)[past], atol=1e-5)


def test_banks_suffer_different_frauds(eight_banks: Banks) -> None:
    _, transactions = simulate_banks(8, seed=0)
    amount = [np.median(transactions.log_amount[transactions.fraud & (eight_banks.bank == bank)]) for bank in (0, 1)]
    assert amount[0] < math.log(10) < math.log(100) < amount[1]
    assert list(STYLES)[:2] == ["card testing", "electronics at night"]
    abroad = transactions.foreign & transactions.fraud
    assert abroad[eight_banks.bank == 2].sum() > 2 * abroad[eight_banks.bank == 3].sum()


def test_pooled_transactions_are_learnable_but_not_by_a_line(eight_banks: Banks) -> None:
    x, y, late = eight_banks.x, eight_banks.y, eight_banks.late
    trees = HistGradientBoostingClassifier(learning_rate=0.05, l2_regularization=5.0, random_state=0)
    # Threads that wait for each other on a busy machine make this ten times as slow.
    with threadpool_limits(1):
        by_trees = _pr_auc(trees.fit(x[~late], y[~late]), x[late], y[late])
    by_line = _pr_auc(_logistic(x[~late], y[~late]), x[late], y[late])
    assert 0.6 < by_trees < 0.9
    assert 40 * y.mean() < by_line < by_trees - 0.1


def test_a_federated_model_beats_banks_alone(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"rounds": 6, "optimizer": "sgd", "learning_rate": 0.1, "momentum": 0.9}
    changes |= {"evaluate_every": 6, "baselines": False, "engine__workers": 0, "out": str(tmp_path)}
    metrics = simulate(preset("fraud", positive_weight=3, batch_size=64, **changes)).metrics
    federation = Fraud(preset("fraud")).federation()
    alone = [_logistic(federation.train[bank].x, federation.train[bank].y) for bank in range(8)]
    mean_alone = np.mean([_pr_auc(model, federation.central.x, federation.central.y) for model in alone])
    assert metrics["pr_auc"] > 0.5
    assert metrics["pr_auc"] > 1.5 * mean_alone


@pytest.mark.parametrize(("name", "parameters"), [("", 25 * 64 + 64 + 64 * 32 + 32 + 32 + 1), ("logistic", 26)])
def test_models_give_one_logit_and_can_be_vmapped(name: str, parameters: int) -> None:
    task = Fraud(RunConfig(task="fraud", model=name, clients=8))
    models = [build_model(task, seed) for seed in range(3)]
    assert sum(p.numel() for p in models[0].parameters()) == parameters
    weights, buffers = stack_module_state(models)
    x, y = torch.randn(3, 5, 25), torch.tensor([[0, 1, 0, 0, 1]] * 3)

    def loss(w: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return task.loss(functional_call(models[0], w, (x,)), y).mean()

    gradients = vmap(grad(loss))(weights, x, y)
    alone = grad(loss)({name: value[1] for name, value in weights.items()}, x[1], y[1])
    assert not buffers
    assert models[0](x[0]).shape == (5,)
    assert all(torch.allclose(gradients[key][1], alone[key], atol=1e-6) for key in alone)


def test_positive_weight_weighs_frauds_only() -> None:
    task = Fraud(RunConfig(task="fraud", positive_weight=3.0))
    assert task.loss(torch.zeros(2), torch.tensor([0, 1])).tolist() == pytest.approx([math.log(2), 3 * math.log(2)])


def test_accuracy_is_not_a_metric_and_the_threshold_is_tuned() -> None:
    task = Fraud(RunConfig(task="fraud"))
    assert task.metrics == ("loss", "pr_auc", "recall_at_1pct_fpr", "f1", "auroc", "ece")
    assert task.tuned_threshold
    assert task.standardise == "federated"
    assert task.labels == ("honest", "fraud")
    assert len(CATEGORIES) == 10


@pytest.mark.parametrize(
    ("dataset", "rows", "positives", "groups"),
    [
        ("creditcard", 5492, 492, 0),
        ("claims", 15420, 923, 19),
        ("credit-default", 30000, 6636, 11),
        ("german", 1000, 300, 10),
    ],
)
def test_real_files(dataset: str, rows: int, positives: int, groups: int) -> None:
    if not SHARED.is_dir():
        pytest.skip(f"the real fraud data are not at {SHARED}")
    config = RunConfig(task="fraud", dataset=dataset, data_dir=str(SHARED))
    table = DATASETS[dataset].read(config, SHARED)
    assert table.x.shape == (rows, Fraud(config).dataset.features)
    assert table.x.dtype == np.float32
    assert table.y.sum() == positives
    assert len(table.names) == groups
    if groups:
        assert table.natural is not None
        assert np.bincount(table.natural).min() == {"claims": 1, "credit-default": 103, "german": 9}[dataset]


GOOD = "A11,6,A34,A43,1169,A65,A75,4,A93,A101,4,A121,67,A143,A152,2,A173,1,A192,A201,1\n"
BAD = GOOD.replace("A143,A152", "A143,A151").replace(",1\n", ",2\n")


def _german(folder: Path, text: str) -> Table:
    (folder / "german.csv").write_text(text)
    return DATASETS["german"].read(RunConfig(), folder)


def test_german_credit_by_hand(tmp_path: Path) -> None:
    table = _german(tmp_path, GOOD + BAD)
    assert table.y.tolist() == [0, 1]
    assert table.names == ("radio or television",)
    assert table.x[0, :7].tolist() == [6, 1169, 4, 4, 67, 2, 1]
    assert (table.x[:, 7:].sum(axis=1) == 13).all()
    assert np.flatnonzero(table.x[0] != table.x[1]).size == 2
    assert table.x.shape[1] == GERMAN.width == 63


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "german.csv is not a readable CSV file"),
        (GOOD + "A11,6\n", "german.csv line 2: 4=nan is not a number"),
        (GOOD + GOOD.strip() + ",9\n", "line 2, saw 22"),
        (GOOD.removesuffix(",1\n") + "\n", "lacks column '20'"),
        (GOOD + "\n" + GOOD.replace(",1\n", ",3\n"), "line 3: 20=3 is not one of 1, 2"),
        (GOOD + GOOD.replace("A43", "A47B"), "line 2: 3=A47B is not one of A40, A41"),
        (GOOD + GOOD.replace("1169", "many"), "line 2: 4=many is not a number"),
    ],
)
def test_a_bad_file_is_named_with_its_line(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        _german(tmp_path, text)
    assert words in str(raised.value)


def test_a_gzipped_file_is_read_and_a_broken_one_is_named(tmp_path: Path) -> None:
    header = ",".join([*CREDITCARD.numbers, "Class"])
    row = ",".join(["0.5"] * 30)
    file = tmp_path / "creditcard.csv.gz"
    content = gzip.compress(f'{header}\n{row},"0"\n{row},"1"\n'.encode())
    file.write_bytes(content)
    table = DATASETS["creditcard"].read(RunConfig(), tmp_path)
    assert table.y.tolist() == [0, 1]
    assert table.feature is not None
    assert table.feature.tolist() == [0.5, 0.5]
    file.write_bytes(content[:40])
    with pytest.raises(InputError, match=r"creditcard\.csv\.gz is not a readable CSV file"):
        DATASETS["creditcard"].read(RunConfig(), tmp_path)


@pytest.mark.parametrize("dataset", ["creditcard", "claims", "credit-default", "german"])
def test_a_missing_file_says_where_to_get_it(dataset: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"get \w+\.csv from https://.* set data-dir to its folder"):
        Fraud(RunConfig(task="fraud", dataset=dataset)).federation()
    with pytest.raises(InputError) as raised:
        Fraud(RunConfig(task="fraud", dataset=dataset, data_dir=str(tmp_path))).federation()
    assert str(tmp_path) in str(raised.value)


def test_unknown_names_and_a_needless_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'creditcard'"):
        Fraud(RunConfig(task="fraud", dataset="credit-card"))
    with pytest.raises(InputError, match="logistic, mlp"):
        Fraud(RunConfig(task="fraud", model="cnn")).model()
    with pytest.raises(InputError, match="reads no files"):
        Fraud(RunConfig(task="fraud", data_dir=str(tmp_path)))
