"""fedra flower: other people's Flower apps run unmodified and print what they print under `flwr run`."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_flower_runtime import BIN, _processes_naming, flower_home  # noqa: F401

from core.errors import InputError
from simulations.flower_app import FlowerApp

APPS = Path(__file__).parent / "flower_apps"
# What the apps print under `flwr run` with three SuperNodes (flwr 1.41).
PRINTED = {
    "torch_app": {
        "accuracy": 0.691667, "eval_acc": 0.722222, "eval_loss": 1.252428, "first_loss": 2.309332, "loss": 1.287432,
        "train_loss": 1.601569, "weights": 105.380288,
    },
    "numpy_app": {
        "weights": [1.385252, -1.794381, 0.429224, 2.811166], "bias": 0.670747,
        "train_mse": [2.178256, 0.397384, 0.080851], "mse": [2.385621, 0.433304, 0.087389],
    },
    "sklearn_app": {
        "accuracy": 98.245614, "calls": 6.0, "entered": 6.0, "global_evaluations": 1, "left": 5.0, "score": 0.984183,
        "test_logloss": 0.054436, "train_calls": 5.0, "train_logloss": 0.061081, "weights": 13.216777,
    },
    "own_start_app": {
        "rounds": 6, "last": {"lr": 0.16384, "loss": 0.131156, "worst": 0.157915},
        "losses": [0.274504, 0.197927, 0.166435, 0.149184, 0.138408, 0.131156], "weights": 9.792736,
    },
    "push_pull_app": {
        "nodes": 3, "count": 150, "mean": 3.758, "variance": 3.095503, "range": [1.0, 6.9],
        "about": [["petal length (cm)", "query.extremes"]], "histogram": [39, 3, 29, 41, 13], "refusals": 1,
    },
    "stateful_app": {
        "calls": [1.0, 2.0, 3.0], "losses": [4.795045, 3.094466, 1.439863],
        "momentum": [-4.400969, 4.340042, -9.463763], "weights": [0.482283, -0.474094, 1.04002],
    },
}  # fmt: skip


def _result(output: str) -> dict:
    [line] = [line for line in output.splitlines() if "RESULT {" in line]
    return json.loads(line[line.index("{") :])


def _numbers(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        for key in sorted(value):
            yield from _numbers([key, value[key]])
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    else:
        yield pytest.approx(value, rel=1e-3, abs=1e-5) if isinstance(value, float) else value


def _fedra_flower(app: str, workers: int, *more: str) -> dict:
    command = [BIN / "fedra", "flower", APPS / app, "--nodes", "3", "--workers", str(workers), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return _result(done.stdout)


# Seconds of importing each: three of them in the default run.
_SLOW = {"torch_app", "sklearn_app", "own_start_app"}


@pytest.mark.parametrize("app", [pytest.param(app, marks=[pytest.mark.slow] * (app in _SLOW)) for app in PRINTED])
def test_an_app_prints_what_it_prints_under_flwr_run(app: str) -> None:
    assert list(_numbers(_fedra_flower(app, workers=0))) == list(_numbers(PRINTED[app]))


@pytest.mark.slow
@pytest.mark.parametrize("app", ["torch_app", "push_pull_app", "stateful_app"])
def test_with_ray_workers_too(app: str) -> None:
    assert list(_numbers(_fedra_flower(app, workers=2))) == list(_numbers(PRINTED[app]))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("app", ["own_start_app", "stateful_app"])
def test_flwr_run_itself_prints_that(app: str, flower_home: dict[str, str]) -> None:  # noqa: F811
    nodes = "num-supernodes=3 client-resources-num-cpus=1 init-args-num-cpus=2"
    done = subprocess.run(
        ["flwr", "run", str(APPS / app), "--federation-config", nodes, "--stream"],
        env=flower_home, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert list(_numbers(_result(done.stdout))) == list(_numbers(PRINTED[app]))
    assert _processes_naming(flower_home["FLWR_HOME"])


def test_the_run_config_can_be_overridden(tmp_path: Path) -> None:
    app = FlowerApp.read(APPS / "numpy_app", ["num-server-rounds=7"])
    assert app.run_config["num-server-rounds"] == 7
    assert (app.serverapp.count(":"), app.clientapp.count(":")) == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([str(APPS)], ["not a Flower app", "pyproject.toml"]),
        ([str(APPS / "numpy_app"), "--run-config", "speed=3"], ["speed"]),
        ([str(APPS / "numpy_app"), "--run-config", "speed=fast=3"], ["invalid format"]),
        ([str(APPS / "numpy_app"), "--nodes", "3", "--workers", "many"], ["engine.workers='many'"]),
        ([str(APPS / "numpy_app"), "--nodes", "0"], ["nodes"]),
    ],
)
def test_wrong_input_is_one_sentence(arguments: list[str], words: list[str]) -> None:
    done = subprocess.run([BIN / "fedra", "flower", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in done.stderr


def test_a_module_of_ours_may_have_the_same_name(tmp_path: Path) -> None:
    """Apps like to call their modules client and server; ours are called so too."""
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "flat"\nversion = "1.0"\n[tool.flwr.app]\npublisher = "me"\n'
        '[tool.flwr.app.components]\nserverapp = "server:app"\nclientapp = "client:app"\n'
    )
    (tmp_path / "server.py").write_text(
        "from flwr.app import Message, RecordDict\nfrom flwr.serverapp import ServerApp\napp = ServerApp()\n"
        "@app.main()\ndef main(grid, context):\n"
        "    messages = [Message(RecordDict(), node, 'query') for node in grid.get_node_ids()]\n"
        "    print('RESULT {\"answers\": %d}' % sum(r.has_content() for r in grid.send_and_receive(messages)))\n"
    )
    (tmp_path / "client.py").write_text(
        "from flwr.app import Message\nfrom flwr.clientapp import ClientApp\napp = ClientApp()\n"
        "@app.query()\ndef query(message, context):\n    return Message(message.content, reply_to=message)\n"
    )
    done = subprocess.run(
        [BIN / "fedra", "flower", str(tmp_path), "--nodes", "5", "--workers", "0"],
        capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert _result(done.stdout) == {"answers": 5}, done.stdout + done.stderr
    (tmp_path / "core.py").write_text("")
    with pytest.raises(InputError, match="module named 'core', which is Fedra's own"):
        FlowerApp.read(tmp_path)
