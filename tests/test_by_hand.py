"""Whole rounds against loops written out by hand: what the settings say is what the clients do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from test_training import _round
from torch import nn
from torch.nn import functional as F

from core.config import RunConfig
from core.metrics import best_threshold, score_counts
from core.records import travelling
from core.seeding import permutations
from server.build import build_strategy, check
from simulations.grid import RayGrid
from simulations.run import engine, preset, simulate
from strategies import client_half
from tasks import load
from tasks.base import build_model


def _average(models: list[nn.Module], weights: list[int]) -> dict[str, torch.Tensor]:
    parameters = [dict(model.named_parameters()) for model in models]
    shares = [weight / sum(weights) for weight in weights]
    return {n: sum(w * p[n].detach() for w, p in zip(shares, parameters, strict=True)) for n in parameters[0]}


def test_two_rounds_of_fedavg_equal_a_loop_written_by_hand(smoke: Callable[..., RunConfig]) -> None:
    config = smoke(
        clients=3, rounds=2, partition__kind="quantity", local_epochs=2, momentum=0.9, weight_decay=0.01,
        gradient_clip=0.5, learning_rate_schedule="exponential", learning_rate_decay=0.5, engine__cohort_size=3,
    )  # fmt: skip
    train = check(config).train
    assert len(set(train.sizes)) == 3
    mean, std = train.x.mean(0, dtype=np.float64), train.x.std(0, ddof=1, dtype=np.float64)
    model = build_model(load(config), config.seed)
    for server_round in (1, 2):
        trained = []
        for client in range(3):
            local = copy.deepcopy(model)
            rate = config.learning_rate * 0.5 ** (server_round - 1)
            optimizer = torch.optim.SGD(local.parameters(), lr=rate, momentum=0.9, weight_decay=0.01)
            x = torch.from_numpy(((train[client].x - mean) / std).astype(np.float32))
            y = torch.from_numpy(train[client].y).float()
            [shuffles] = permutations(config.seed, "batches", server_round, clients=[client], size=len(y), times=2)
            for shuffle in shuffles:
                for rows in torch.from_numpy(shuffle).split(config.batch_size):
                    optimizer.zero_grad()
                    F.binary_cross_entropy_with_logits(local(x[rows]), y[rows]).backward()
                    nn.utils.clip_grad_norm_(local.parameters(), 0.5)
                    optimizer.step()
            trained.append(local)
        model.load_state_dict(_average(trained, train.sizes.tolist()))
    for name, p in simulate(config).model().named_parameters():
        torch.testing.assert_close(p.detach(), model.get_parameter(name).detach(), atol=1e-5, rtol=0)


class _Nodes(RayGrid):
    """Only lists nodes: what a strategy asks of a grid before it aggregates."""

    def __init__(self, clients: int) -> None:
        super().__init__(pool=None, clients=clients, cohort_size=1)  # type: ignore[arg-type]


def _aggregate(strategy: str, updates: list[list[float]], rounds: int = 1, **options: object) -> list[float]:
    """Return w, which starts at 0, after rounds in which the clients answer with these weights above the current w."""
    changes = {f"strategy-options.{key}": value for key, value in options.items()}
    config = RunConfig.of({"strategy": strategy, "clients": len(updates), "learning-rate": 1.0, **changes})
    chosen, grid = build_strategy(config), _Nodes(len(updates))
    arrays = ArrayRecord({"w": Array(np.zeros(len(updates[0]), dtype=np.float32))})
    for server_round in range(1, rounds + 1):
        messages = list(chosen.configure_train(server_round, arrays, ConfigRecord({}), grid))
        messages.sort(key=lambda message: message.metadata.dst_node_id)
        replies = []
        for message, update in zip(messages, updates, strict=True):
            w = message.content["arrays"]["w"].numpy() + np.array(update, dtype=np.float32)
            metrics = MetricRecord({"num-examples": 1, "global-loss": 1.0})
            content = RecordDict({"arrays": ArrayRecord({"w": Array(w)}), "metrics": metrics})
            replies.append(Message(content, reply_to=message))
        aggregated, _ = chosen.aggregate_train(server_round, replies)
        assert aggregated is not None
        arrays = aggregated
    return arrays["w"].numpy().tolist()


@pytest.mark.parametrize(
    ("strategy", "options", "wanted"),
    [
        ("fedavg", {}, 151.5 / 7),
        ("fedmedian", {}, 3.0),
        ("fedtrimmedavg", {"beta": 0.2}, 15.5 / 5),  # -3 and 139 fall away
        # Squared distances to the four nearest: 11.25 at 3, then 17.25 at 2; 1 and 5 are the last of five.
        ("krum", {"num-malicious-nodes": 1}, 3.0),
        ("multikrum", {"num-malicious-nodes": 1, "num-nodes-to-select": 2}, 2.5),
        ("bulyan", {"num-malicious-nodes": 1}, 9.5 / 3),  # of these five the three nearest to their median: 2, 3, 4.5
    ],
)
def test_robust_rules_on_six_honest_clients_and_an_attacker(strategy: str, options: dict, wanted: float) -> None:
    updates = [[value] for value in (-3.0, 1.0, 2.0, 3.0, 4.5, 5.0, 139.0)]
    assert _aggregate(strategy, updates, **options) == pytest.approx([wanted])


def test_adaptive_servers_follow_reddi_et_al_for_two_rounds() -> None:
    """d = 2 in both rounds, eta = 1, b1 = 0.9, b2 = 0.99, tau = 0.5; m and v by hand."""
    options = {"eta": 1.0, "tau": 0.5}
    m1, m2 = 0.2, 0.38
    adam = m1 / (0.04**0.5 + 0.5) + m2 / (0.0796**0.5 + 0.5)
    yogi = m1 / (0.04**0.5 + 0.5) + m2 / (0.08**0.5 + 0.5)
    adagrad = m1 / (4**0.5 + 0.5) + m2 / (8**0.5 + 0.5)
    betas = {"beta-1": 0.9, "beta-2": 0.99}
    assert _aggregate("fedadam", [[2.0], [2.0]], rounds=2, **betas, **options) == pytest.approx([adam], rel=1e-5)
    assert _aggregate("fedyogi", [[2.0], [2.0]], rounds=2, **betas, **options) == pytest.approx([yogi], rel=1e-5)
    got = _aggregate("fedadagrad", [[2.0], [2.0]], rounds=2, **{"beta-1": 0.9}, **options)
    assert got == pytest.approx([adagrad], rel=1e-5)


def test_server_momentum_adds_up() -> None:
    """v1 = 1, v2 = 0.5 * 1 + 1: w = 1 + 1.5."""
    assert _aggregate("fedavgm", [[1.0], [1.0]], rounds=2, **{"server-momentum": 0.5}) == pytest.approx([2.5])


def test_defaults_are_not_those_of_a_simpler_rule() -> None:
    """Momentum 0.9 adds 0.9 to two steps of 1; of seven clients with one attacker Multi-Krum averages six."""
    assert _aggregate("fedavgm", [[1.0], [1.0]], rounds=2) == pytest.approx([2.9])
    updates = [[value] for value in (-3.0, 1.0, 2.0, 3.0, 4.5, 5.0, 139.0)]
    assert _aggregate("multikrum", updates, **{"num-malicious-nodes": 1}) == pytest.approx([12.5 / 6])


def test_q_zero_is_the_unweighted_mean() -> None:
    assert _aggregate("qfedavg", [[1.0], [3.0]], q=0.0) == pytest.approx([2.0], rel=1e-5)


def test_qfedavg_sends_the_loss_before_training() -> None:
    r = _round("mlp", epochs=1)
    update = client_half(RunConfig.of({"strategy": "qfedavg"})).local_update(r)
    losses = r.loss(r.model(r.x), r.y).detach()
    assert update.metrics["global-loss"][0] == pytest.approx(float(losses[:7].mean()), abs=1e-6)


def test_the_threshold_comes_from_validation_splits_alone(tmp_path: Path) -> None:
    config = preset("fraud", clients=3, rounds=2, baselines=False, engine__workers=0, out=str(tmp_path))
    run = simulate(config)
    validation = check(config).validation
    counts = score_counts(run.predict(validation.x), validation.y)
    assert run.summary["threshold"] == pytest.approx(best_threshold(counts))
    assert run.summary["threshold"] != 0.5


def test_only_the_clients_that_are_asked_evaluate(smoke: Callable[..., RunConfig]) -> None:
    run = simulate(smoke(evaluated=2, rounds=2))
    rows = pd.read_parquet(run.path / "clients.parquet")
    evaluated = rows[rows["test_accuracy"].notna()].groupby("round")["client"].apply(tuple)
    assert len(evaluated[1]) == 2
    assert evaluated[1] == evaluated[2]


def test_one_mean_comes_back_where_the_strategy_needs_no_more(smoke: Callable[..., RunConfig]) -> None:
    config = smoke(engine__cohort_size=2)
    federation = check(config)
    arrays = ArrayRecord({n: Array(t.numpy()) for n, t in travelling(build_model(load(config), 0)).items()})
    constants = {"constants.mean": [0.0] * 30, "constants.std": [1.0] * 30, "server-round": 1}
    means, losses = [], []
    for partial, replies in ((True, 1), (False, 4)):
        content = RecordDict({"arrays": arrays, "config": ConfigRecord({**constants, "partial-mean": partial})})
        with engine(config, federation) as grid:
            got = list(grid.send_and_receive([Message(content, node, "train") for node in grid.get_node_ids()]))
        assert len(got) == replies
        weights = [int(reply.content["metrics"]["num-examples"]) for reply in got]
        assert sum(weights) == federation.train.sizes.sum()
        bias = [reply.content["arrays"]["2.bias"].numpy() for reply in got]
        means.append(np.average(bias, axis=0, weights=weights))
        assert bias[0].dtype == np.float32
        losses.append(np.average([reply.content["metrics"]["train-loss"] for reply in got], weights=weights))
        columns = [reply.content["clients"]["num-examples"] for reply in got]
        assert sorted(n for column in columns for n in column) == sorted(federation.train.sizes)
    assert means[0] == pytest.approx(means[1], rel=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad"])
def test_normalisation_statistics_are_plain_weighted_means_under_every_server_optimiser(
    strategy: str, smoke: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server step on a variance could make it negative: after four rounds of Adam it did."""
    import server.observe

    seen: list[list[RecordDict]] = []
    real = server.observe.ObservedGrid._received

    def watched(self, replies):  # type: ignore[no-untyped-def]
        replies = real(self, replies)
        if replies and replies[0].metadata.message_type == "train":
            seen.append([reply.content.copy() for reply in replies])
        return replies

    monkeypatch.setattr(server.observe.ObservedGrid, "_received", watched)
    run = simulate(smoke(task="foreign_plugins:NormalisedMedical", strategy=strategy, rounds=4, clients=3))
    weights = [float(content["metrics"]["num-examples"]) for content in seen[-1]]
    for name in ("1.running_mean", "1.running_var"):
        values = [content["arrays"][name].numpy() for content in seen[-1]]
        wanted = np.average(values, axis=0, weights=weights)
        np.testing.assert_allclose(run.model().state_dict()[name].numpy(), wanted, rtol=1e-5, atol=1e-7)
    assert np.isfinite(run.metrics["loss"])


def test_pooled_and_alone_equal_loops_written_by_hand(smoke: Callable[..., RunConfig]) -> None:
    config = smoke(clients=2, baselines=True, rounds=2, baseline__epochs=3, momentum=0.5)
    federation = check(config)
    task = load(config)

    def trained(x: np.ndarray, y: np.ndarray, name: str, client: int) -> tuple[nn.Module, np.ndarray, np.ndarray]:
        mean, std = x.mean(0, dtype=np.float64), x.std(0, ddof=1, dtype=np.float64)
        model = build_model(task, config.seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=config.learning_rate, momentum=0.5)
        scaled, labels = torch.from_numpy(((x - mean) / std).astype(np.float32)), torch.from_numpy(y).float()
        [shuffles] = permutations(config.seed, "baseline", name, clients=[client], size=len(y), times=3)
        for shuffle in shuffles:
            for rows in torch.from_numpy(shuffle).split(config.batch_size):
                optimizer.zero_grad()
                F.binary_cross_entropy_with_logits(model(scaled[rows]), labels[rows]).backward()
                optimizer.step()
        return model, mean, std

    @torch.no_grad()
    def loss(fitted: tuple[nn.Module, np.ndarray, np.ndarray]) -> float:
        model, mean, std = fitted
        x = torch.from_numpy(((federation.central.x - mean) / std).astype(np.float32))
        return float(F.binary_cross_entropy_with_logits(model(x), torch.from_numpy(federation.central.y).float()))

    train = federation.train
    baselines = simulate(config).summary["baselines"]
    assert baselines["central"]["loss"] == pytest.approx(loss(trained(train.x, train.y, "pooled", 0)), abs=1e-5)
    # A client alone scales by its own constants: nobody else's are known to it.
    alone = [loss(trained(train[i].x, train[i].y, "alone", i)) for i in range(2)]
    assert [row["loss"] for row in baselines["local"]["each"]] == pytest.approx(alone, abs=1e-4)
    assert baselines["local"]["loss"] == pytest.approx(np.mean(alone), abs=1e-4)
