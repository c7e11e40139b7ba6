"""The synthetic task: every draw has the distribution that FedProx's paper gives, and says what alpha and beta do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from core.config import RunConfig
from core.errors import InputError
from simulations.run import preset, simulate
from tasks.base import Table, build_model
from tasks.synthetic import DATASETS, Client, Synthetic, draw_client, draw_examples


def config(dataset: str = "", **changes: object) -> RunConfig:
    return RunConfig.of({"task": "synthetic", "dataset": dataset, "clients": 30, **changes})


def table(dataset: str, **changes: object) -> Table:
    return Synthetic(config(dataset, **changes)).dataset.read(config(dataset, **changes), None)


def clients(count: int, alpha: float, beta: float, iid: bool = False) -> list[Client]:
    return [draw_client(0, k, alpha, beta, iid) for k in range(count)]


def test_thirty_clients_of_sixty_features_and_ten_classes():
    data = table("")
    assert data.x.shape == (len(data.y), 60)
    assert data.x.dtype == np.float32
    assert data.y.dtype == np.int64
    assert (data.y.min(), data.y.max()) == (0, 9)
    assert np.bincount(data.natural).tolist() == [client.size for client in clients(30, 1, 1)]
    assert np.array_equal(data.x, table("1,1").x)


def test_sizes_are_fifty_and_a_log_normal_up_to_five_thousand():
    sizes = np.array([client.size for client in clients(2000, 0, 0)])
    assert (sizes.min(), sizes.max()) == (50, 5000)
    # The median of lognormal(4, 2) is e^4 = 54.6, and 1.2 % of it lies above 4,950.
    assert np.median(sizes) == pytest.approx(104.6, abs=8)
    assert (sizes == 5000).mean() == pytest.approx(0.012, abs=0.006)


def test_equal_seeds_are_equal_bits_others_are_not_and_further_clients_change_none():
    first, again, other, fewer = table("1,1"), table("1,1"), table("1,1", seed=1), table("1,1", clients=7)
    assert np.array_equal(first.x, again.x)
    assert np.array_equal(first.y, again.y)
    assert not np.array_equal(first.x[:50], other.x[:50])
    assert np.array_equal(first.x[: len(fewer.x)], fewer.x)


def test_inputs_vary_by_sigma_around_the_clients_mean():
    large = Client(5000, np.zeros((60, 10)), np.zeros(10), mean=np.full(60, 3.0))
    x, _ = draw_examples(0, 0, large)
    # Sigma_11 is 1, Sigma_22 is 2^-1.2 = 0.435, Sigma_60,60 is 60^-1.2 = 0.00735.
    assert x.var(axis=0)[[0, 1, 59]] == pytest.approx([1, 0.435, 0.00735], rel=0.1)
    assert np.abs(x.mean(axis=0) - 3).max() < 0.06
    assert np.abs(np.corrcoef(x.T) - np.eye(60)).max() < 0.08


def test_a_label_is_the_largest_logit_of_the_clients_own_model():
    client = draw_client(0, 3, alpha=1, beta=1)
    x, y = draw_examples(0, 3, client)
    assert np.array_equal(y, np.argmax(x @ client.weights + client.bias, axis=1))


def test_alpha_moves_weights_apart_and_changes_no_label():
    def squared_distance(alpha: float) -> float:
        weights = np.stack([client.weights.ravel() for client in clients(400, alpha, 0)])
        return float(np.mean((weights[::2] - weights[1::2]) ** 2))

    # Two weights of N(u_k, 1) with u_k of deviation alpha differ by 2 (1 + alpha^2) on average, squared.
    assert squared_distance(0) == pytest.approx(2, rel=0.02)
    assert squared_distance(1) == pytest.approx(4, rel=0.15)
    assert squared_distance(3) == pytest.approx(20, rel=0.2)
    assert (table("0,1").y == table("5,1").y).mean() > 0.9999


def test_beta_moves_the_clients_mean_inputs_apart():
    def variance_of_centres(beta: float) -> float:
        return float(np.var([client.mean.mean() for client in clients(400, 0, beta)]))

    # v_k averages sixty N(B_k, 1): its variance is beta^2 + 1/60.
    assert variance_of_centres(0) == pytest.approx(1 / 60, rel=0.2)
    assert variance_of_centres(2) == pytest.approx(4 + 1 / 60, rel=0.2)


def test_iid_clients_share_one_model_and_one_distribution_of_inputs():
    first, second = clients(2, 0, 0, iid=True)
    assert np.array_equal(first.weights, second.weights)
    assert not first.mean.any()
    assert not np.array_equal(draw_examples(0, 0, first)[0][:50], draw_examples(0, 1, second)[0][:50])


def test_optimal_weights_lie_apart_where_each_client_labels_its_own_way():
    def distance(dataset: str) -> float:
        """Return the mean distance between large clients' optimal weights, in ridge regression and at unit length."""
        data, fitted = table(dataset), []
        for k in np.flatnonzero(np.bincount(data.natural) >= 300):
            if len(np.unique(data.y[data.natural == k])) == 1:
                continue
            x, y = data.x[data.natural == k].astype(np.float64), np.eye(10)[data.y[data.natural == k]]
            x -= x.mean(axis=0)
            weights = np.linalg.solve(x.T @ x + np.eye(60), x.T @ (y - y.mean(axis=0)))
            fitted.append(weights / np.linalg.norm(weights))
        return float(np.mean([np.linalg.norm(a - b) for i, a in enumerate(fitted) for b in fitted[:i]]))

    # Unit vectors that have nothing in common are sqrt(2) = 1.414 apart, whatever alpha and beta.
    assert distance("iid") < 1
    assert distance("0,0") == pytest.approx(1.414, abs=0.02)
    assert distance("1,1") == pytest.approx(1.414, abs=0.02)


def test_a_client_sees_a_few_classes_and_an_iid_client_nearly_all():
    def classes(dataset: str) -> float:
        data = table(dataset)
        return float(np.mean([len(np.unique(data.y[data.natural == k])) for k in range(30)]))

    assert classes("1,1") < 3
    assert classes("0,0") < 3
    assert classes("iid") > 8


def test_gradients_differ_from_client_to_client_as_in_the_papers_figure():
    def dissimilarity(dataset: str) -> float:
        """Return the variance over clients of the loss's gradient at W = 0, where every class has probability 0.1."""
        data = table(dataset)
        residuals = 0.1 - np.eye(10)[data.y]
        own = np.stack([data.x[data.natural == k].T @ residuals[data.natural == k] for k in range(30)])
        own /= np.bincount(data.natural)[:, None, None]
        return float(((own - own.mean(axis=0)) ** 2).sum(axis=(1, 2)).mean())

    iid, none, half, one = map(dissimilarity, ("iid", "0,0", "0.5,0.5", "1,1"))
    assert 10 * iid < none < half < one


def test_each_client_keeps_a_fifth_for_the_central_test_set_and_splits_the_rest():
    federation = Synthetic(config("1,1")).federation()
    sizes = np.array([client.size for client in clients(30, 1, 1)])
    assert federation.names[:2] == ("client 0", "client 1")
    own = federation.train.sizes + federation.validation.sizes + federation.test.sizes
    assert len(federation.central) == pytest.approx(0.2 * sizes.sum(), abs=1)
    # Labels are split in proportion one by one, and each may round.
    assert np.abs(own - 0.8 * sizes).max() <= 10
    assert np.abs(federation.train.sizes - 0.56 * sizes).max() <= 15


def test_any_pair_is_a_data_set_and_what_is_none_is_refused():
    assert list(DATASETS) == ["1,1", "0.5,0.5", "0,0", "iid"]
    assert not np.array_equal(table("0,2").x, table("0,3").x)
    assert np.array_equal(table("0, 1.0").x, table("0,1").x)
    for wrong in ("1,x", "-1,0", "1,nan", "1,2,3"):
        with pytest.raises(InputError, match=r"is not ALPHA,BETA; give two numbers from 0 as in dataset=0\.5,0\.5"):
            Synthetic(config(wrong))
    with pytest.raises(InputError, match="unknown dataset of task synthetic 'idd'; did you mean 'iid'"):
        Synthetic(config("idd"))
    with pytest.raises(InputError, match="reads no files, so data-dir has no effect; leave it out"):
        Synthetic(config("1,1", **{"data-dir": "/tmp"}))
    with pytest.raises(InputError, match="logistic"):
        build_model(Synthetic(config(model="mlp")), 0)


def test_the_model_is_logistic_regression():
    model = build_model(Synthetic(config()), 0)
    assert sum(p.numel() for p in model.parameters()) == 60 * 10 + 10
    assert model(torch.zeros(3, 60)).shape == (3, 10)


def test_the_preset_has_the_papers_settings():
    plain, prox = preset("synthetic"), preset("synthetic", strategy="fedprox")
    assert (plain.clients, plain.sampled, plain.rounds, plain.local_epochs) == (30, 10, 200, 20)
    assert (plain.batch_size, plain.optimizer, plain.learning_rate) == (10, "sgd", 0.01)
    assert prox.strategy_options == {"proximal-mu": 1.0}
    assert prox.with_(strategy="fedavg", strategy_options__proximal_mu="default") == plain


def test_a_tenth_of_the_epochs_and_of_the_rounds_gets_most_of_the_way(tmp_path: Path):
    changes = {"rounds": 20, "local_epochs": 2, "baselines": False, "evaluate_every": 20, "out": str(tmp_path)}
    run = simulate(preset("synthetic", engine__workers=0, engine__cohort_size=10, **changes))
    # Pooled training reaches 0.898, a client alone 0.28 on average, the whole preset 0.81.
    assert 0.68 < run.metrics["accuracy"] < 0.85


@pytest.mark.slow
def test_the_proximal_term_helps_with_the_papers_settings(tmp_path: Path):
    def loss(strategy: str) -> float:
        changes = {"rounds": 30, "baselines": False, "evaluate_every": 30, "out": str(tmp_path)}
        run = simulate(preset("synthetic", strategy=strategy, engine__workers=0, engine__cohort_size=5, **changes))
        return run.metrics["loss"]

    # 1.02 and 0.66.
    assert loss("fedprox") < loss("fedavg") - 0.15
