"""Settings: the same flat keys everywhere, and one sentence for every wrong one."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from core.config import DEFAULT, RunConfig, keys, parse_override
from core.errors import InputError
from simulations.run import preset, preset_names
from strategies import STRATEGIES, options_of, strategy_class

ROOT = Path(__file__).parents[1]


def test_a_config_survives_flat_keys_and_toml() -> None:
    config = RunConfig.of({"partition.alpha": 0.1, "strategy": "fedprox", "strategy-options.proximal-mu": 0.3})
    assert RunConfig.of(config.flat()) == config
    assert RunConfig.model_validate(tomllib.loads(config.toml())) == config


def test_every_key_has_a_sentence() -> None:
    assert all(sentence.endswith(".") for sentence in keys().values())


def test_flower_knows_every_key_and_its_default() -> None:
    app = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    listed = {key: value for key, value in _flat(app["config"]).items() if not key.startswith("strategy-options")}
    assert listed == RunConfig().flat()
    options = {option for name in STRATEGIES for option in options_of(strategy_class(name))}
    assert app["config"]["strategy-options"] == dict.fromkeys(options, DEFAULT)


def _flat(nested: dict) -> dict:
    return {
        f"{key}.{name}" if isinstance(value, dict) else key: item
        for key, value in nested.items()
        for name, item in (value.items() if isinstance(value, dict) else [("", value)])
    }


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_valid_and_name_themselves(name: str) -> None:
    assert preset(name).preset == name


def test_the_contracts_presets_exist() -> None:
    assert {"medical", "heart", "fraud", "nlp", "smoke"} <= set(preset_names())


def test_a_strategy_may_have_settings_of_its_own_in_a_preset_and_the_user_wins() -> None:
    assert preset("heart").learning_rate == 0.001
    assert preset("heart", strategy="fedadam").learning_rate == 0.01
    assert preset("heart", strategy="fedadam", learning_rate=0.5).learning_rate == 0.5


def test_overrides_are_toml_values_and_bare_words_are_strings() -> None:
    assert parse_override("rounds=5") == ("rounds", 5)
    assert parse_override("sampled=0.1") == ("sampled", 0.1)
    assert parse_override("baselines=true") == ("baselines", True)
    assert parse_override("strategy=fedavg") == ("strategy", "fedavg")
    assert parse_override("data-dir=/a=b") == ("data-dir", "/a=b")


@pytest.mark.parametrize(
    ("flat", "words"),
    [
        ({"rond": 1}, ["unknown key 'rond'", "did you mean 'rounds'"]),
        ({"rounds": 0}, ["rounds=0", "must be a number from 1"]),
        ({"partition.kind": "dirichelt"}, ["partition.kind='dirichelt'", "'dirichlet'"]),
        ({"partition.alpha": -1}, ["partition.alpha=-1", "above 0"]),
        ({"engine.workers": -2}, ["engine.workers=-2", "'auto'"]),
        ({"engine.cohort-size": "two"}, ["engine.cohort-size='two'", "must be 'auto' or a number"]),
        ({"engine.compile": "maybe"}, ["engine.compile='maybe'", "must be true or false"]),
        ({"engine.gpus-per-worker": 1.5}, ["engine.gpus-per-worker=1.5", "a share above 0 and up to 1"]),
        ({"sampled": 11, "clients": 10}, ["sampled=11", "10 clients"]),
        ({"learning-rate": "fast"}, ["learning-rate='fast'", "number"]),
        ({"learning-rate": float("nan")}, ["learning-rate", "finite number"]),
    ],
)
def test_wrong_values_get_one_sentence(flat: dict, words: list[str]) -> None:
    with pytest.raises(InputError) as raised:
        RunConfig.of(flat)
    message = str(raised.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_sampled_is_a_count_a_fraction_or_everybody() -> None:
    config = RunConfig.of({"clients": 20, "sampled": 0.25})
    assert [config.count(value) for value in (0, 0.25, 3, 0.01)] == [20, 5, 3, 1]
