"""Plug-ins: a package that pip really installs is found, run and listed; one that is broken stops nobody else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import strategies
from core import processors
from core.config import RunConfig
from core.errors import InputError
from core.plugins import load, offered
from simulations.run import Run, simulate
from tasks import catalogue

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "tests" / "plugins"
FEDRA = str(Path(sys.executable).parent / "fedra")
# Another package: it takes names that are taken, and offers what is no strategy and no task.
RIVAL_POINTS = """[fedra.strategies]
fedavg = rival:Lasso
hospital-lasso = rival:Lasso
rival-lasso = rival:Lasso
rival-text = rival:text
rival-exits = rival_exits:Lasso
rival-typo = rival:Laso
rival-malformed = rival-module

[fedra.tasks]
medical = rival:Lasso
rival-text = rival:text
rival-short = rival:Short
"""
RIVAL = '''from flwr.serverapp.strategy import FedAvg

text = "text"

class Lasso(FedAvg):
    """Another lasso."""

    def __init__(self, *, share=0.1, **fedavg):
        super().__init__(**fedavg)

class Short:
    labels, metrics, standardise = ("no", "yes"), ("loss",), "none"
    def __init__(self, config): pass
    def model(self): pass
'''


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder into which pip has installed tests/plugins."""
    folder = tmp_path_factory.mktemp("plugins")
    # setuptools leaves files beside what it builds.
    source = shutil.copytree(SOURCE, folder / "source", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--target"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", *options, str(folder / "site"), str(source)]
    subprocess.run(command, check=True, timeout=120)
    return folder / "site"


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process find the package."""
    monkeypatch.syspath_prepend(site)


@pytest.fixture
def rival(installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process find a second package too."""
    metadata = tmp_path / "rival" / "rival-2.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: rival\nVersion: 2.0\n")
    (metadata / "entry_points.txt").write_text(RIVAL_POINTS)
    (metadata.parent / "rival.py").write_text(RIVAL)
    (metadata.parent / "rival_exits.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(metadata.parent)


def _fedra(site: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{site}:{ROOT}", "COLUMNS": "200"}
    return subprocess.run([FEDRA, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def _weights(run: Run) -> np.ndarray:
    return np.concatenate([array.ravel() for array in load_file(run.path / "model.safetensors").values()])


def _block(document: str, kind: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8").split(f"```{kind}\n")[1].split("```")[0]


def test_the_documents_show_the_package_itself() -> None:
    assert _block("README.md", "python") == (SOURCE / "hospital_plugins" / "lasso.py").read_text()
    assert _block("docs/guides/plugins.md", "toml") == (SOURCE / "pyproject.toml").read_text()


@pytest.mark.usefixtures("installed")
def test_an_installed_strategy_trains_on_an_installed_task(smoke: Callable[..., RunConfig]) -> None:
    stay = {"task": "hospital-stay", "partition__kind": "natural", "rounds": 5}
    run = simulate(smoke(**stay, strategy="hospital-lasso"))
    assert run.metrics["auroc"] > 0.9
    assert {"task": "hospital-stay", "strategy": "hospital-lasso", "status": "completed"}.items() <= run.summary.items()
    # It is installed under two names, and both are the same strategy.
    again = simulate(smoke(**stay, strategy="hospital_plugins.lasso:Lasso"))
    assert np.array_equal(_weights(again), _weights(run))
    plain = simulate(smoke(**stay, strategy="fedavg"))
    assert np.abs(_weights(run)).sum() < np.abs(_weights(plain)).sum()


@pytest.mark.usefixtures("installed")
def test_a_strategy_named_by_its_module_replaces_the_server_half(smoke: Callable[..., RunConfig]) -> None:
    def after(**changes: object) -> np.ndarray:
        return _weights(simulate(smoke(rounds=1, **changes)))

    part_way = "hospital_plugins.part_way:PartWay"
    mean = after(strategy="fedavg")
    start = after(strategy=part_way, **{"strategy-options.step": 0})
    half = after(strategy=part_way)
    assert np.abs(mean - start).max() > 0.01
    np.testing.assert_allclose(half, (start + mean) / 2, atol=1e-6)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_command_line_and_its_ray_workers_find_a_plugin(
    workers: int, site: Path, installed: None, smoke: Callable[..., RunConfig], tmp_path: Path
) -> None:
    settings = ["task=hospital-stay", "strategy=hospital-lasso", "rounds=2", f"engine.workers={workers}"]
    done = _fedra(site, "run", "smoke", *settings, "--out", "there", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    [there] = (tmp_path / "there").iterdir()
    here = simulate(smoke(task="hospital-stay", strategy="hospital-lasso", rounds=2))
    assert (there / "model.safetensors").read_bytes() == (here.path / "model.safetensors").read_bytes()


def test_the_list_names_each_plugin_and_says_what_is_broken(site: Path, tmp_path: Path) -> None:
    listed = _fedra(site, "list", cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    lines = [" ".join(line.split()) for line in listed.stdout.splitlines()]
    broken = "hospital-broken from hospital-plugins 0.1: cannot be loaded: ImportError: libpatients.so.2 is missing"
    tasks, own = lines.index("Tasks of other packages (task=)"), lines.index("Strategies of other packages (strategy=)")
    assert lines[tasks + 1 : tasks + 4] == [
        f"{broken} [hospital_plugins.broken:Stay]",
        "hospital-stay from hospital-plugins 0.1: Longer than a week or not, from six measurements; four wards "
        "[hospital_plugins.stay:Stay]",
        "",
    ]
    assert lines[own + 1 : own + 4] == [
        f"{broken} [hospital_plugins.broken:Lasso]",
        "hospital-lasso from hospital-plugins 0.1: FedAvg whose clients pay for large weights "
        "[hospital_plugins.lasso:Lasso]",
        "",
    ]
    assert any(line.startswith("fedprox FedAvg with a proximal term") for line in lines)


def test_nothing_is_said_of_plugins_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT)])
    assert strategies.plugins() == catalogue.plugins() == {}


@pytest.mark.parametrize("setting", ["strategy", "task"])
def test_a_run_with_a_broken_plugin_is_one_sentence_and_exit_code_2(
    setting: str,
    installed: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from simulations import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fedra", "run", "smoke", f"{setting}=hospital-broken"])
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        f"Error: {setting} 'hospital-broken' from hospital-plugins 0.1 cannot be loaded: ImportError: "
        f"libpatients.so.2 is missing; mend or update that package, or choose another {setting}.\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("rival")
def test_ours_stay_ours_and_a_name_of_two_packages_is_refused() -> None:
    from flwr.serverapp.strategy import FedAvg

    assert strategies.strategy_class("fedavg") is FedAvg
    with pytest.raises(InputError) as refused:
        strategies.strategy_class("hospital-lasso")
    assert str(refused.value) == (
        "strategy 'hospital-lasso' is offered by rival 2.0 and hospital-plugins 0.1; write strategy=rival:Lasso or "
        "strategy=hospital_plugins.lasso:Lasso, or uninstall one of them."
    )
    assert strategies.strategy_class("rival:Lasso") is strategies.strategy_class("rival-lasso")
    listed = strategies.plugins()
    assert listed["fedavg"] == "from rival 2.0: not used, 'fedavg' is Fedra's own; write strategy=rival:Lasso."
    assert listed["hospital-lasso"] == (
        "from rival 2.0 and hospital-plugins 0.1: not used, several packages offer the name; write "
        "strategy=rival:Lasso or strategy=hospital_plugins.lasso:Lasso."
    )


@pytest.mark.usefixtures("rival")
def test_whatever_another_package_does_the_list_is_whole() -> None:
    listed = strategies.plugins()
    assert listed["rival-lasso"] == "from rival 2.0: Another lasso; share=0.1 [rival:Lasso]"
    assert "strategy 'rival-text' is 'text', not a subclass" in listed["rival-text"]
    assert listed["rival-exits"] == "from rival 2.0: cannot be loaded: SystemExit: 3 [rival_exits:Lasso]"
    assert "AttributeError: module 'rival' has no attribute 'Laso'" in listed["rival-typo"]
    assert "ModuleNotFoundError: No module named 'rival-module'" in listed["rival-malformed"]
    assert {"hospital-broken", "hospital-lasso"} <= listed.keys()
    tasks = catalogue.plugins()
    assert "'medical' is Fedra's own" in tasks["medical"]
    assert "task 'rival-text' is 'text'; name a class" in tasks["rival-text"]
    assert tasks["rival-short"] == "from rival 2.0: no description [rival:Short]"


@pytest.mark.usefixtures("rival")
def test_what_is_no_task_is_refused_before_anything_starts(smoke: Callable[..., RunConfig]) -> None:
    with pytest.raises(InputError, match=r"task 'rival-short' lacks tuned_threshold, federation, loss"):
        simulate(smoke(task="rival-short"))
    with pytest.raises(InputError, match=r"task 'rival-text' is 'text'; name a class"):
        simulate(smoke(task="rival-text"))


@pytest.mark.usefixtures("installed")
def test_knowing_what_is_offered_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("hospital_plugins")]:
        monkeypatch.delitem(sys.modules, name)
    assert {"hospital-lasso", "hospital-broken"} <= offered("fedra.strategies").keys()
    with pytest.raises(InputError, match=r"unknown strategy 'hospital-laso'; did you mean 'hospital-lasso'\?"):
        load("strategy", "hospital-laso", {}, "fedra.strategies")
    assert not [name for name in sys.modules if name.startswith("hospital_plugins")]


@pytest.mark.usefixtures("installed")
def test_an_installed_processor_sees_every_update_before_it_leaves(smoke: Callable[..., RunConfig]) -> None:
    run = simulate(smoke(processors="hospital-rounding", strategy="krum", rounds=1))
    # Krum takes one client's model: three decimals and no more.
    thousandths = np.concatenate([p.detach().numpy().ravel() for p in run.model().parameters()]) * 1000
    assert np.abs(thousandths - np.round(thousandths)).max() < 1e-3
    plain = simulate(smoke(strategy="krum", rounds=1))
    assert np.abs(_weights(plain) * 1000 - np.round(_weights(plain) * 1000)).max() > 0.1
    assert processors.plugins()["hospital-rounding"].startswith("from hospital-plugins 0.1: Weights rounded")
    with pytest.raises(InputError, match=r"processors 'hospital-rouding'"):
        simulate(smoke(processors="hospital-rouding"))
