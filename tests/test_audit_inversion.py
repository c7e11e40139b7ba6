"""Gradient inversion: exact where it ought to be, better than a guess where it can be, and stopped by noise."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from privacy.audit import inversion
from reports.page import write_report
from server.recorder import RunFolder
from simulations.audit_inversion import audit_inversion
from simulations.run import one_thread, simulate
from tasks.text_models import BagOfEmbeddings


def quiet(what: str, steps: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda count: None)


def test_a_fully_connected_first_layer_gives_its_input_away() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
    x = torch.randn(1, 5)
    F.cross_entropy(model(x), torch.tensor([1])).backward()
    weight, bias = model[0].weight.grad, model[0].bias.grad
    assert weight is not None
    assert bias is not None
    candidates = inversion.from_first_layer(-0.1 * weight, -0.1 * bias)
    assert candidates.shape == (7, 5)
    assert torch.allclose(candidates, x.expand(7, 5), atol=1e-4)
    # A unit that nothing excites tells nothing.
    assert inversion.from_first_layer(torch.zeros(2, 5), torch.zeros(2)).shape == (0, 5)


def test_the_layers_that_see_the_inputs_are_found() -> None:
    images, tokens = torch.rand(1, 1, 4, 4), torch.tensor([[3, 1, 0]])
    dense = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.ReLU(), nn.Linear(3, 2))
    convolution = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(16, 2))
    assert inversion.first_layer(dense, images) == "1"
    assert inversion.first_layer(convolution, images) == ""
    assert inversion.first_layer(nn.Sequential(nn.Flatten(), nn.Linear(16, 3, bias=False)), images) == ""
    assert inversion.embedding(BagOfEmbeddings(10, 2), tokens) == "embedding"
    assert inversion.embedding(dense, images) == ""


def test_matching_by_hand() -> None:
    truth = torch.tensor([[0.0, 0.0], [1.0, 1.0], [5.0, 5.0]])
    candidates = torch.tensor([[1.0, 1.0], [0.0, 2.0]])
    errors, places = inversion.matched(truth, candidates)
    assert places.tolist() == [1, 0, -1]
    assert errors[:2].tolist() == [2.0, 0.0]
    assert math.isnan(errors[2])
    # A mean squared error of a hundredth of the squared span is 20 dB.
    assert inversion.psnr(np.array([0.04, 0.0]), (0.0, 2.0)).tolist() == [20, 100]
    assert inversion.relative(np.array([2.0, 0.5]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])) == pytest.approx(
        [2**0.5, 1]
    )


def test_words_are_the_rows_that_moved_most() -> None:
    rows = torch.zeros(6, 3)
    rows[4], rows[2] = 3.0, 1.0
    assert inversion.words(rows, 2).tolist() == [4, 2]


def _cases(run: Any) -> dict[str, list[dict[str, Any]]]:
    """Return the cases by amount, in the order of their protections, after a look at the page."""
    with one_thread():
        found = audit_inversion(RunFolder.open(run.path), quiet)
    (run.path / "audit.json").write_text(json.dumps({"inversion": found}))
    assert "Gradient inversion" in write_report(run.path).read_text()
    cases: dict[str, list[dict[str, Any]]] = {}
    for case in found["cases"]:
        cases.setdefault(case["amount"].split()[0 if case["amount"] != "a batch" else 1], []).append(case)
    return cases


def test_a_table_leaks_exactly_and_noise_stops_it(smoke: Callable[..., Any]) -> None:
    cases = _cases(simulate(smoke(rounds=1)))
    bare, noised = cases["one"]
    assert bare["best"] < 1e-4
    assert bare["recovered"] == 1
    assert noised["best"] > 0.5
    assert [case["recovered"] for case in cases["a"]] == [0, 0]
    assert cases["all"][0]["examples"] == 80


def test_central_noise_protects_from_observers_and_not_from_the_server(smoke: Callable[..., Any]) -> None:
    private = {"privacy__level": "client", "privacy__noise_multiplier": 1.0, "privacy__preprocessing": "uncovered"}
    bare, received, released = _cases(simulate(smoke(rounds=1, privacy__noise_seed=1, **private)))["one"]
    assert bare["best"] < 1e-4
    assert received["best"] < 1e-4
    assert released["best"] > 0.5


def test_private_steps_protect_from_the_server_too(smoke: Callable[..., Any]) -> None:
    private = {"privacy__level": "example", "privacy__noise_multiplier": 1.0, "privacy__preprocessing": "uncovered"}
    bare, sent = _cases(simulate(smoke(rounds=1, privacy__noise_seed=1, **private)))["one"]
    assert bare["best"] < 1e-4
    assert sent["best"] > 0.5


def test_images_are_seen_through_convolutions(smoke: Callable[..., Any]) -> None:
    cases = _cases(simulate(smoke(task="digits", rounds=1, clients=20, local_epochs=1)))
    bare, noised = cases["one"]
    assert bare["best"] > 30
    assert noised["best"] < 12
    assert cases["a"][0]["recovered"] > 0
    assert cases["a"][1]["recovered"] == 0
    [[true, found]] = bare["pictures"]
    for picture in (true, found):
        assert base64.b64decode(picture.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")


def test_an_embedding_tells_the_words(smoke: Callable[..., Any]) -> None:
    config = smoke(task="nlp", rounds=1, clients=10, partition__kind="natural", local_epochs=1, batch_size=8)
    cases = _cases(simulate(config))
    for bare, noised in cases.values():
        assert bare["best"] == 1
        assert noised["best"] < 0.3
