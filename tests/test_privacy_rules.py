"""What a private run refuses, in one sentence with a remedy, and what it says that epsilon does not cover."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from core.config import RunConfig
from core.errors import InputError
from privacy.coverage import uncovered
from reports.protection import compared, lines, promise, strength
from reports.words import NOTHING
from server.build import check
from simulations.run import preset
from tasks.medical import Medical

CLIENT = {"privacy__level": "client", "privacy__epsilon": 8.0, "privacy__delta": 1e-3}
EXAMPLE = {"privacy__level": "example", "privacy__epsilon": 8.0, "server_examples": 60}


class Normalised(Medical):
    """The medical task with a model that keeps running statistics."""

    def model(self) -> nn.Module:
        """Return a network with batch normalisation."""
        return nn.Sequential(nn.Linear(30, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1), nn.Flatten(0))


class Mixing(Medical):
    """The medical task with a model whose examples look at each other."""

    def model(self) -> nn.Module:
        """Return a network that subtracts the batch's mean."""
        return nn.Sequential(Centred(), nn.Linear(30, 1), nn.Flatten(0))


class Centred(nn.Module):
    """x minus its mean over the batch."""

    def forward(self, x: Any) -> Any:
        return x - x.mean(0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"privacy__epsilon": 4.0}, r"privacy.epsilon=4.0 does nothing with privacy.level=none; it acts with"),
        ({"privacy__level": "client"}, "has no noise; set privacy.epsilon"),
        ({**CLIENT, "strategy": "krum", "clients": 8}, "krum needs every update.*choose privacy.noise=local"),
        ({**CLIENT, "strategy": "fedbuff", "devices__kind": "lognormal", "sampling__kind": "uniform"},
         "fedbuff takes answers as they come.*set privacy.noise=local"),
        # The remedies that these name lead to no second refusal.
        ({**CLIENT, "strategy": "fedasync"}, "fedasync takes answers as they come.*set privacy.noise=local"),
        ({**CLIENT, "strategy": "qfedavg"}, "goes by its clients' losses, which.*choose fedavg, fedprox, or a server"),
        ({**CLIENT, "strategy": "foreign_plugins:Unsaid"},
         "foreign_plugins:Unsaid does not say that it needs only weighted means; if so, set partial_means = True"),
        ({**CLIENT, "sampled": 2, "sampling__kind": "uniform"}, "set it"),
        ({**CLIENT, "sampling__kind": "oort"}, "chooses clients by their losses, which no epsilon covers"),
        ({**CLIENT, "sampling__over_selection": 1.5, "devices__kind": "lognormal"}, "who else is slow; set 1"),
        ({**CLIENT, "privacy__noise": "distributed"}, "inside secure aggregation.*=central or local"),
        ({**CLIENT, "privacy__noise": "local", "privacy__clipping": "adaptive"}, "adaptive is about the server"),
        ({**CLIENT, "privacy__noise": "local", "privacy__mechanism": "banded"}, "banded is about the server"),
        ({**CLIENT, "privacy__mechanism": "banded", "privacy__clipping": "adaptive"}, "privacy.clipping=fixed"),
        ({**CLIENT, "privacy__mechanism": "banded", "sampled": 2, "sampling__kind": "poisson"}, "sampling.kind=cyclic"),
        ({**CLIENT, "privacy__delta": 0.5}, "privacy.delta=0.5 with 4 clients allows to publish one of them whole"),
        ({**EXAMPLE, "server_examples": 19}, "the means of server-examples=19 scale all inputs.*set 20 or more"),
        ({**CLIENT, "standardise": "federated"}, "sums over all clients' examples, which epsilon does not cover"),
        ({**CLIENT, "strategy": "fednova"}, "set local-steps"),
        (
            {**CLIENT, "strategy": "fednova", "local_steps": 2, "faults__stragglers": 0.5, "faults__late": "partial"},
            "how many steps each client took.*faults.late=lost",
        ),
        ({**CLIENT, "strategy": "fednova", "privacy__noise": "local"}, "set local-steps"),
        ({**CLIENT, "strategy": "qfedavg", "privacy__noise": "local"}, "goes by its clients' losses"),
        ({**CLIENT, "strategy": "agnostic", "privacy__noise": "local"}, "goes by its clients' losses"),
        ({**CLIENT, "strategy": "ifca", "privacy__noise": "local"}, "which model is best for a client"),
        ({**CLIENT, "task": "test_privacy_rules:Normalised"}, r"running statistics \(1.running_mean\).*GroupNorm"),
        ({**CLIENT, "privacy__noise_multiplier": 0.3, "privacy__epsilon": 1.0}, "in one round, more than the budget"),
        ({**EXAMPLE, "server_examples": 0}, "sums over all clients' examples.*standardise=server.*=uncovered"),
        ({**EXAMPLE, "standardise": "local"}, "each client's own means, which epsilon does not cover"),
        ({**EXAMPLE, "strategy": "mimelite"}, "otherwise than in gradient steps"),
        ({**EXAMPLE, "strategy": "qfedavg"}, "otherwise than in gradient steps"),
        ({**EXAMPLE, "strategy": "fedrep", "batch_size": 500, "local_epochs": 1}, "takes one step a round"),
        ({**EXAMPLE, "strategy": "fedrep", "faults__stragglers": 0.5, "faults__late": "partial"}, "faults.late=lost"),
        ({**EXAMPLE, "strategy": "foreign_plugins:Unsaid"},
         "does not say that its clients use examples in gradient steps.*set private_by_example = True in the class"),
        ({**EXAMPLE, "privacy__noise": "local"}, "privacy.noise=local does nothing with privacy.level=example"),
        ({**EXAMPLE, "privacy__weight_cap": 5}, "privacy.weight-cap=5 does nothing with privacy.level=example"),
        ({**EXAMPLE, "privacy__delta": 0.1}, "examples of the largest client allows to publish"),
        ({**EXAMPLE, "engine__precision": "bf16"}, "clipped in float32"),
        ({**EXAMPLE, "engine__compile": True}, "set false"),
        ({**EXAMPLE, "task": "test_privacy_rules:Normalised"}, "GroupNorm"),
        ({**EXAMPLE, "task": "test_privacy_rules:Mixing"}, "examples"),
        ({**EXAMPLE, "server_examples": 0, "standardise": "server"}, "set server-examples=50"),
        ({"privacy__level": "device"}, "privacy.level='device' is not valid"),
        ({**CLIENT, "privacy__epsilon": -1.0}, "privacy.epsilon=-1.0 is not valid"),
    ],
)  # fmt: skip
def test_what_would_not_be_private_is_refused(
    changes: dict[str, Any], said: str, smoke: Callable[..., RunConfig]
) -> None:
    with pytest.raises(InputError, match=said):
        check(smoke(**{"partition__min_examples": 5, **changes}))


def test_the_command_line_ends_with_2_and_one_sentence(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "fedra"), "run", "smoke", "privacy.epsilon=2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_private_run_draws_its_clients_independently_unless_told_otherwise() -> None:
    assert preset("smoke", privacy__level="client").sampling.kind == "poisson"
    assert preset("smoke", privacy__level="client", privacy__mechanism="banded").sampling.kind == "cyclic"
    assert preset("smoke", privacy__level="client", privacy__noise="local").sampling.kind == "uniform"
    assert preset("smoke", privacy__level="client", sampling__kind="cyclic").sampling.kind == "cyclic"
    assert preset("smoke").sampling.kind == "uniform"


def test_what_epsilon_does_not_cover_is_said() -> None:
    config = RunConfig.of({"privacy.level": "client", "privacy.epsilon": 1.0, "keep": "best"})
    found = " ".join(uncovered(config, "federated", tuned=True))
    for phrase in ("scale the inputs", "numbers of examples and labels", "evaluation metrics", "threshold", "is kept"):
        assert phrase in found
    plain = " ".join(uncovered(config.with_(keep="last"), "none", tuned=False))
    assert "scale" not in plain
    assert "threshold" not in plain
    assert "kept" not in plain
    hostile = config.with_(attack__kind="alie", baselines=True, privacy__noise="local")
    assert "malicious clients' own data" in " ".join(uncovered(hostile, "none", tuned=False))
    assert "the baselines" in " ".join(uncovered(hostile, "none", tuned=False))
    # Under the server's noise what they send is clipped like everybody's.
    assert "malicious" not in " ".join(uncovered(hostile.with_(privacy__noise="central"), "none", tuned=False))


def test_simulated_noise_is_no_guarantee_wherever_epsilon_stands() -> None:
    private = {
        "level": "client",
        "epsilon": 3.2,
        "delta": 1e-5,
        "accountant": "PLD",
        "not_covered": [],
        "simulated": True,
    }
    assert list(lines(private)) == [
        "Privacy: epsilon 3.20 at delta 1e-05, client level (simulated noise: not a guarantee), by PLD."
    ]
    assert "simulated" not in next(lines({**private, "simulated": False}))


def test_what_is_compared_costs_together_and_says_so() -> None:
    bare, secret, seeded = ({"summary": {"privacy": {"level": level, "simulated": simulated, "epsilon": 4.0}}}
                            for level, simulated in (("none", False), ("client", False), ("client", True)))  # fmt: skip
    assert compared([bare, {"summary": {}}]) == ""
    assert compared([bare, secret]).endswith("covered by their sum alone, 4.00 of 1 run.")
    assert compared([secret, seeded]).endswith("alone, 8.00 of 2 runs (simulated noise: not a guarantee).")
    nothing, endless = ({"summary": {"privacy": {"level": "client", "epsilon": e}}} for e in (0.0, None))
    assert compared([secret, nothing]).endswith("alone, 4.00 of 2 runs.")
    assert compared([secret, endless]).endswith(f"alone, {NOTHING} of 2 runs.")


@pytest.mark.parametrize(
    ("privacy", "words"),
    [
        (
            {"epsilon": 2.0},
            "may find the odds that any one client took part at all e^epsilon = 7.39 times as high as before",
        ),
        ({"epsilon": 2.0, "population": 5000}, "In a deployment of 5,000 clients, whoever sees the models may find"),
        ({"epsilon": 60.0}, "may become as sure as can be"),
        ({"epsilon": None}, "may become as sure as can be"),
    ],
)
def test_an_epsilon_says_how_much_surer_and_a_large_one_that_it_protects_nobody(
    privacy: dict[str, Any], words: str
) -> None:
    assert words in promise({"level": "client", "noise": "central", **privacy})
    assert bool(strength(privacy)) == (privacy["epsilon"] != 2.0)
    assert strength({"epsilon": 12.0}) == "An epsilon above 10 is weak protection"
