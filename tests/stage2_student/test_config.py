"""Recipes and configurations: what is read, what is refused, and what a cache must hold."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from shared.cache.reader import Cache
from shared.errors import TidecacheError
from stage2_student.config import TrainConfig, load_recipe, recipe_names, require, resolve


def test_every_named_recipe_is_valid_and_distinct() -> None:
    configs = {name: load_recipe(name) for name in recipe_names()}
    assert {"reverse-calm-tidal", "tide-cross", "calm", "cross-entropy", "events", "kl", "reverse-kl"} <= set(configs)
    assert len(set(configs.values())) == len(configs)


def test_the_default_recipe_is_reverse_calm_with_tidal_weighting() -> None:
    config = load_recipe("reverse-calm-tidal")
    assert (config.objective, config.tidal, config.context) == ("reverse-calm", "weight", "compdemo")
    assert (config.lambda_init, config.lambda_max, config.tidal_axis) == (0.1, 0.9, "both")


def test_tide_cross_has_neither_tidal_nor_compdemo() -> None:
    config = load_recipe("tide-cross")
    assert (config.objective, config.tidal, config.context) == ("reverse-calm", "none", "plain")


def test_a_users_file_and_the_command_line_override_in_that_order(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('objective = "calm"\nbatch = 3\nlearning_rate = 1\n')
    config = load_recipe(str(path), {"batch": 5})
    assert (config.objective, config.batch, config.learning_rate) == ("calm", 5, 1.0)


def test_an_unknown_field_is_refused_with_the_near_ones(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("lamda_init = 0.2\n")
    with pytest.raises(TidecacheError, match=r"mine\.toml: unknown field 'lamda_init' \(did you mean lambda_init"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"objective": "reverse_calm"}, "did you mean reverse-calm"),
        ({"batch": "8"}, "batch: expected int, found '8'"),
        ({"batch": 0}, "batch: expected a whole number of at least 1, found 0"),
        ({"batch": True}, "batch: expected int"),
        ({"fresh": 1.5}, "fresh: expected a number from 0 to 1"),
        ({"temperature": 0.0}, "temperature: expected a number above 0"),
        ({"min_timestep": 0.5, "max_timestep": 0.5}, "min_timestep: expected less than max_timestep"),
        ({"objective": "reverse-kl", "tidal": "interpolate"}, "forward objective"),
        ({"epochs": 0.0}, "epochs: expected a number above 0"),
    ],
)
def test_impossible_values_are_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(TidecacheError, match=said):
        resolve(values, "test")


def test_a_recipe_that_does_not_exist_names_those_that_do() -> None:
    with pytest.raises(TidecacheError, match=r"did you mean events.*reverse-calm-tidal"):
        load_recipe("event")


def test_bad_toml_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("objective = \n")
    with pytest.raises(TidecacheError, match=r"broken\.toml: not valid TOML"):
        load_recipe(str(path))


def test_what_the_cache_lacks_is_said_with_the_command_that_adds_it(cache: Cache) -> None:
    kl = resolve({"objective": "kl", "temperature": 3.0, "tidal": "none"}, "test")
    with pytest.raises(TidecacheError, match=r"holds 1, 2: .*teacher extend here --temperatures 1,2,3"):
        require(kl, cache.spec, "here")
    gold_only = dataclasses.replace(cache.spec, lanes=("gold",))
    with pytest.raises(TidecacheError, match=r"needs the topk lane.*teacher extend here --lanes topk"):
        require(dataclasses.replace(kl, temperature=2.0), gold_only, "here")
    compdemo_only = dataclasses.replace(cache.spec, contexts=("compdemo",))
    with pytest.raises(
        TidecacheError, match=r"asks for plain.*pass --context compdemo.*teacher extend here --context plain"
    ):
        require(resolve({"context": "plain"}, "test"), compdemo_only, "here")


def test_calm_needs_neither_topk_nor_a_stored_temperature(cache: Cache) -> None:
    spec = dataclasses.replace(cache.spec, lanes=("gold",), temperatures=(1.0,))
    require(resolve({"objective": "calm", "temperature": 5.0}, "test"), spec, "here")
    require(
        resolve({"objective": "none", "context": "plain"}, "test"),
        dataclasses.replace(spec, contexts=("compdemo",)),
        "here",
    )


def test_a_configuration_survives_its_json() -> None:
    config = TrainConfig(batch=3, fresh=0.5)
    assert resolve(config.to_json(), "json") == config
