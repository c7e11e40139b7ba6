"""The digits task: the images and their turns, three networks, and that federating them works."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from core.config import RunConfig
from core.errors import InputError
from core.training import can_vectorise
from simulations.run import preset, simulate
from tasks.base import Table, build_model
from tasks.digits import Digits


def config(**changes: object) -> RunConfig:
    return RunConfig.of({"task": "digits", "clients": 20}).with_(**changes)


# A given cohort size: measuring the fastest takes longer than some of these runs, and may end differently.
FIXED = {"engine__workers": 0, "engine__cohort_size": 2}


def table(**changes: object) -> Table:
    return Digits(config(**changes)).dataset.read(config(**changes), None)


def test_images_are_scikit_learns_between_nought_and_one():
    data = table()
    assert data.x.shape == (1797, 1, 8, 8)
    assert data.x.dtype == np.float32
    assert (data.x.min(), data.x.max()) == (0, 1)
    assert np.bincount(data.y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    # The first row of the first image, a nought, is 0 0 5 13 9 1 0 0 sixteenths.
    assert (16 * data.x[0, 0, 0]).tolist() == [0, 0, 5, 13, 9, 1, 0, 0]
    assert data.natural is None


def test_rotated_clients_hold_the_same_images_turned_by_their_number_of_right_angles():
    upright, turned = table(), table(dataset="rotated")
    assert np.array_equal(turned.y, upright.y)
    for k in range(20):
        rows = turned.natural == k
        by_hand = np.stack([np.rot90(image, k % 4) for image in upright.x[rows, 0]])
        assert rows.sum() in (89, 90)
        assert np.array_equal(turned.x[rows, 0], by_hand)
    assert turned.names[:5] == (
        "client 0 (0 degrees)", "client 1 (90 degrees)", "client 2 (180 degrees)", "client 3 (270 degrees)",
        "client 4 (0 degrees)",
    )  # fmt: skip
    first = np.flatnonzero(turned.natural == 1)[0]
    # Counter-clockwise: the last column, read downwards, becomes the first row.
    assert np.array_equal(turned.x[first, 0, 0], upright.x[first, 0, :, 7])


def test_equal_seeds_deal_the_same_groups_and_others_do_not():
    first, again, other = (table(dataset="rotated", seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first.x, again.x)
    assert not np.array_equal(first.natural, other.natural)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "shards", "quantity", "feature", "mixed"])
def test_every_partition_deals_all_images(kind: str):
    federation = Digits(config(partition__kind=kind)).federation()
    own = (federation.train, federation.validation, federation.test)
    assert len(federation) == 20
    assert len(federation.central) == 360
    assert sum(len(split.y) for split in own) == 1797 - 360
    assert all(split.x.shape[1:] == (1, 8, 8) for split in own)


def test_rotated_clients_keep_their_turn_in_the_federation_and_sorting_by_it_groups_them():
    natural = Digits(config(dataset="rotated", partition__kind="natural")).federation()
    assert natural.names[19] == "client 19 (270 degrees)"
    sorted_by_turn = Digits(
        config(dataset="rotated", clients=4, partition__kind="feature", partition__strictness=1.0)
    ).federation()
    upright = {image.tobytes() for image in table().x}
    for federation, of_quarter in ((natural, range(0, 20, 4)), (sorted_by_turn, range(1))):
        for k in of_quarter:
            own = [image.tobytes() in upright for image in federation.train[k].x]
            assert np.mean(own) > 0.97


@pytest.mark.parametrize(
    ("model", "parameters", "together"),
    [
        ("", (9 * 16 + 16) + (9 * 16 * 32 + 32) + (32 * 4 * 4 * 10 + 10), True),
        ("cnn-batchnorm", 9930 + 2 * 16 + 2 * 32, False),
        ("mlp", (64 * 64 + 64) + (64 * 10 + 10), True),
    ],
)
def test_models_by_hand(model: str, parameters: int, together: bool):
    task = Digits(config(model=model))
    network = build_model(task, 0)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert network(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
    assert can_vectorise(network) is together
    assert task.loss(torch.zeros(2, 10), torch.tensor([0, 9])).tolist() == pytest.approx([math.log(10)] * 2)


def test_normalisation_keeps_statistics_of_both_convolutions():
    buffers = dict(build_model(Digits(config(model="cnn-batchnorm")), 0).named_buffers())
    # The first normalisation is layer 1, the second layer 4.
    assert [buffers[f"{layer}.{name}"].shape for layer in (1, 4) for name in ("running_mean", "running_var")] == [
        (16,), (16,), (32,), (32,),
    ]  # fmt: skip
    assert len(buffers) == 6


def test_wrong_names_and_too_many_clients_are_refused():
    with pytest.raises(InputError, match="did you mean 'rotated'"):
        Digits(config(dataset="rotate"))
    with pytest.raises(InputError, match="cnn, cnn-batchnorm, mlp"):
        Digits(config(model="resnet")).model()
    with pytest.raises(InputError, match="needs data with natural groups"):
        Digits(config(partition__kind="natural")).federation()
    with pytest.raises(InputError, match="1437 examples cannot give 200 clients"):
        Digits(config(clients=200, dataset="rotated")).federation()


def test_the_preset_comes_close_to_pooled_training(tmp_path: Path):
    # Pooled training reaches 0.972 and a client alone 0.46 on average.
    run = simulate(preset("digits", baselines=False, evaluate_every=30, out=str(tmp_path), **FIXED))
    assert run.metrics["accuracy"] > 0.93
    assert run.metrics["macro_f1"] > 0.93


def test_batch_normalisation_trains_in_a_federation(tmp_path: Path):
    changes = {"baselines": False, "evaluate_every": 5, "out": str(tmp_path), **FIXED}
    run = simulate(preset("digits", model="cnn-batchnorm", rounds=5, **changes))
    assert run.metrics["accuracy"] > 0.85


def test_one_model_for_all_turns_is_worse_than_one_for_each(tmp_path: Path):
    changes = {"clients": 4, "partition__kind": "natural", "model": "mlp", "rounds": 15, "evaluate_every": 15, **FIXED}
    run = simulate(preset("digits", dataset="rotated", out=str(tmp_path), **changes))
    alone = run.summary["baselines"]["local"]["own_test"]["accuracy"]["mean"]
    assert run.summary["clients_metrics"]["accuracy"]["mean"] < alone - 0.05
