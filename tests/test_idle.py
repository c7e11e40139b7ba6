"""Settings that act only beside others: refused alone, dropped from a preset that others put out of action."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from core.config import RunConfig, keys
from core.errors import InputError
from core.idle import ACTS, idle, refuse_idle, without_idle
from server.build import check
from server.recorder import RunFolder
from simulations.compare import compare
from simulations.run import preset, preset_names
from simulations.tune import tune

# A value that is not the default of each setting in the table, and settings with which it acts.
OTHER: dict[str, tuple[Any, dict[str, Any]]] = {
    "partition.alpha": (0.1, {"partition.kind": "mixed"}),
    "partition.shards": (3, {"partition.kind": "shards"}),
    "partition.strictness": (0.1, {"partition.kind": "feature"}),
    "local-epochs": (3, {"local-steps": 0}),
    "learning-rate-decay": (0.5, {"learning-rate-schedule": "exponential"}),
    "momentum": (0.9, {"optimizer": "adam", "baselines": True, "baseline.optimizer": "rmsprop"}),
    "early-stopping.patience": (2, {"early-stopping.metric": "loss"}),
    "baseline.optimizer": ("adam", {"baselines": True}),
    "baseline.learning-rate": (0.3, {"baselines": True}),
    "baseline.epochs": (3, {"baselines": True}),
    "baseline.alone-epochs": (3, {"baselines": True}),
    "sampling.candidates": (3.0, {"sampling.kind": "power-of-choice"}),
    "sampling.exploration": (0.5, {"sampling.kind": "oort"}),
    "sampling.over-selection": (1.5, {"devices.kind": "lognormal"}),
    "devices.seconds-per-example": (2.0, {"devices.kind": "trace"}),
    "devices.uplink-bytes-per-second": (2.0, {"devices.kind": "lognormal"}),
    "devices.downlink-bytes-per-second": (2.0, {"devices.kind": "lognormal"}),
    "devices.jitter": (2.0, {"devices.kind": "trace"}),
    "devices.availability": (0.5, {"devices.kind": "lognormal"}),
    "devices.deadline-seconds": (2.0, {"devices.kind": "lognormal"}),
    "devices.trace": ("x.csv", {"devices.kind": "trace"}),
    "devices.compute-spread": (2.0, {"devices.kind": "lognormal"}),
    "devices.bandwidth-spread": (2.0, {"devices.kind": "lognormal"}),
    "faults.late": ("partial", {"faults.stragglers": 0.5}),
    "attack.fraction": (0.3, {"attack.kind": "zero"}),
    "attack.strength": (3.0, {"attack.kind": "alie"}),
    "attack.target": (1, {"attack.kind": "backdoor"}),
    "compression.fraction": (0.1, {"compression.kind": "top-k"}),
    "compression.rotation": (True, {"compression.kind": "int4"}),
    "privacy.epsilon": (3.0, {"privacy.level": "client"}),
    "privacy.delta": (1e-4, {"privacy.level": "example"}),
    "privacy.noise-multiplier": (3.0, {"privacy.level": "client"}),
    "privacy.clipping-norm": (3.0, {"privacy.level": "example"}),
    "privacy.noise-seed": (3, {"privacy.level": "client"}),
    "privacy.preprocessing": ("uncovered", {"privacy.level": "example"}),
    "privacy.noise": ("local", {"privacy.level": "client"}),
    "privacy.mechanism": ("banded", {"privacy.level": "client"}),
    "privacy.clipping": ("adaptive", {"privacy.level": "client"}),
    "privacy.weight-cap": (3, {"privacy.level": "client"}),
    "privacy.population": (3, {"privacy.level": "client"}),
    "privacy.clipping-quantile": (0.1, {"privacy.clipping": "adaptive", "privacy.level": "client"}),
    "privacy.clipping-rate": (0.1, {"privacy.clipping": "adaptive", "privacy.level": "client"}),
    "faults.stage": ("share", {"secure-aggregation.profile": "malicious"}),
    "secure-aggregation.bits": (24, {"secure-aggregation.profile": "auto"}),
    "secure-aggregation.clip": (3.0, {"secure-aggregation.profile": "malicious"}),
    "secure-aggregation.min-cohort": (5, {"secure-aggregation.profile": "semi-honest"}),
    "secure-aggregation.dropout-tolerance": (0.2, {"secure-aggregation.profile": "auto"}),
    "secure-aggregation.corrupt": (0.2, {"secure-aggregation.profile": "semi-honest"}),
    "secure-aggregation.groups": (3, {"secure-aggregation.profile": "malicious"}),
    "secure-aggregation.roster": ("roster.json", {"secure-aggregation.profile": "malicious"}),
    "secure-aggregation.stage-seconds": (5.0, {"secure-aggregation.profile": "malicious"}),
    "secure-aggregation.threshold": (5, {"secure-aggregation.profile": "semi-honest"}),
    "engine.gpus-per-worker": (0.5, {"engine.workers": 2}),
    "engine.address": ("auto", {"engine.workers": "auto"}),
}
# Where the defaults let it act.
NOT_BY_DEFAULT = {
    "local-epochs": {"local-steps": 5}, "momentum": {"optimizer": "adam"},
    "engine.gpus-per-worker": {"engine.workers": 0}, "engine.address": {"engine.workers": 0},
}  # fmt: skip


def test_the_table_is_about_settings() -> None:
    assert ACTS.keys() == OTHER.keys()
    assert {key for acts in ACTS.values() for key in acts.by} | ACTS.keys() <= keys().keys()


@pytest.mark.parametrize("key", OTHER)
def test_a_setting_that_does_nothing_is_refused_and_acts_where_the_table_says(key: str) -> None:
    value, beside = OTHER[key]
    alone = {key: value, **NOT_BY_DEFAULT.get(key, {})}
    with pytest.raises(
        InputError, match=rf"^{key}=\S+ does nothing with \S+=.*; it acts with .*: set that, or drop {key}\.$"
    ):
        refuse_idle([RunConfig.of(alone)])
    refuse_idle([RunConfig.of({**alone, **beside})])
    assert without_idle(RunConfig.of(alone)) == RunConfig.of(NOT_BY_DEFAULT.get(key, {}))


def test_a_run_is_refused_in_one_sentence() -> None:
    with pytest.raises(InputError) as refused:
        check(preset("smoke", {"attack.strength": 3.0}))
    assert str(refused.value) == (
        "attack.strength=3.0 does nothing with attack.kind=none; it acts with attack.kind=sign-flip, scaling, "
        "gaussian, ipm or alie: set that, or drop attack.strength."
    )
    # Heart counts steps: epochs that somebody asks for would be passed over.
    with pytest.raises(
        InputError, match=r"local-epochs=3 does nothing with local-steps=100; it acts with local-steps=0"
    ):
        check(preset("heart", local_epochs=3))


@pytest.mark.parametrize("name", preset_names())
def test_presets_have_nothing_idle(name: str) -> None:
    assert idle(preset(name)) == []


def test_what_a_preset_says_is_dropped_where_the_users_settings_put_it_out_of_action(tmp_path: Path) -> None:
    assert preset("digits").partition.alpha == 0.3
    assert preset("digits", partition__kind="iid").partition.alpha == RunConfig().partition.alpha
    assert preset("medical", local_steps=5).local_epochs == 1
    assert preset("fraud", baselines=False).baseline == RunConfig().baseline
    # One falls with the other: without a device there is no deadline, and without that nobody is late.
    file = tmp_path / "mine.toml"
    file.write_text('[devices]\nkind = "lognormal"\ndeadline-seconds = 2.0\n[faults]\nlate = "partial"\n')
    assert idle(preset(str(file))) == []
    assert preset(str(file), devices__kind="none").faults.late == "lost"
    # What a file itself says in vain is refused, and so is what the user does.
    file.write_text("[attack]\nstrength = 2.0\n")
    assert idle(preset(str(file), rounds=3)) == ["attack.strength"]
    assert idle(preset("digits", partition__kind="iid", partition__alpha=0.1)) == ["partition.alpha"]


def test_compared_and_searched_settings_need_act_in_one_of_them_only(tmp_path: Path) -> None:
    some = {"rounds": 1, "seeds": 1, "out": str(tmp_path), "compression.kind": "none,top-k"}
    page = compare("smoke", {**some, "compression.fraction": 0.5}, Console(quiet=True))
    configs = [RunFolder.open(run).config for run in page.parent.iterdir() if run.is_dir()]
    assert {c.compression.kind: c.compression.fraction for c in configs} == {"none": 0.01, "top-k": 0.5}
    with pytest.raises(InputError, match=r"compression.rotation=true does nothing with compression.kind=none"):
        compare("smoke", {**some, "compression.rotation": True}, Console(quiet=True))
    searched = {"out": str(tmp_path / "tuned"), "rounds": 1, "attack.kind": "none,scaling"}
    folder = tune(
        "smoke", {**searched, "attack.fraction": "0.3..0.5", "baselines": True, "baseline.epochs": 2}, trials=3
    )
    assert preset(str(folder / "best.toml")).baseline.epochs == 2
    with pytest.raises(
        InputError, match=r"local-epochs=2 does nothing .*comes of searching local-epochs=2\.\.3; narrow"
    ):
        tune("smoke", {"local-epochs": "2..3", "local-steps": 3}, trials=1)
