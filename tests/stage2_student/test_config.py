"""Recipes and configurations: what is read, what is refused, and what a cache must hold."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shared.cache.reader import Cache
from shared.errors import TidecacheError
from stage2_student.commands import app
from stage2_student.config import (
    CHOICES,
    TrainConfig,
    automatic_fresh,
    automatic_reuse,
    base_defaults,
    load_recipe,
    recipe_names,
    require,
    resolve,
)
from tests.conftest import TINY_STUDENT


def test_every_named_recipe_is_valid_and_distinct() -> None:
    configs = {name: load_recipe(name) for name in recipe_names()}
    ours = {"reverse-calm-tidal", "events", "cross-entropy"}
    assert set(configs) == ours | set(PAPER)
    assert len(set(configs.values())) == len(configs)


def test_the_default_recipe_is_reverse_calm_with_tidal_weighting() -> None:
    config = load_recipe("reverse-calm-tidal")
    assert (config.objective, config.tidal, config.context) == ("reverse-calm", "weight", "compdemo")
    assert (config.lambda_init, config.lambda_max, config.tidal_axis) == (0.1, 0.9, "both")


def test_tide_cross_has_neither_tidal_nor_compdemo() -> None:
    config = load_recipe("tide-cross")
    assert (config.objective, config.tidal, config.context) == ("reverse-calm", "none", "plain")


PAPER = {  # TIDE's README, scripts/distill_llada2.sh, scripts/distill_wedlm.sh and dllm/core/trainers, field by field
    "calm": ("calm", "plain", "none", "uniform", 8),
    "tide-cross": ("reverse-calm", "plain", "none", "uniform", 8),
    "tide-shared-x": ("calm", "compdemo", "interpolate", "uniform", 8),
    "kl": ("kl", "plain", "none", "uniform", 10),
    "reverse-kl": ("reverse-kl", "plain", "none", "uniform", 10),
    "tide-shared": ("kl", "compdemo", "interpolate", "midrange", 10),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_variants_are_as_released(name: str) -> None:
    config = load_recipe(name)
    found = (config.objective, config.context, config.tidal, config.timestep_weight, config.batch)
    assert found == PAPER[name]
    assert (config.temperature, config.epochs, config.distill_weight) == (2.0, 10.0, 1.0)
    assert (config.learning_rate, config.scheduler, config.warmup, config.weight_decay) == (5e-5, "cosine", 0.1, 0.0)
    assert (config.lambda_init, config.lambda_max, config.tidal_decay, config.tidal_axis) == (
        0.1,
        0.9,
        "cosine",
        "both",
    )
    assert (config.block_size, config.block_start, config.ce_normalisation) == (32, "sequence", "token")


@pytest.mark.parametrize(
    ("uses", "reuse", "share"),
    [
        (0.75, "same", 0.0), (1.0, "same", 0.0), (1.5, "same", 0.3333), (5.0, "same", 0.5), (3.0, "same", 0.5),
        (1.0, "halves", 0.0), (3.0, "halves", 0.0), (5.0, "halves", 0.4), (10.0, "halves", 0.5),
    ],
)  # fmt: skip
def test_fresh_rows_are_on_where_draws_are_fewer_than_epochs(uses: float, reuse: str, share: float) -> None:
    assert automatic_fresh(uses, reuse) == share
    views = 3 if reuse == "halves" else 1
    assert uses * (1.0 - share) <= views + 1e-3 or share == 0.5  # no row twice, unless that would take more than half


def test_draws_are_used_again_by_halves_where_compdemo_is_distilled() -> None:
    for recipe, expected in (("reverse-calm-tidal", "halves"), ("events", "halves"), ("calm", "same"), ("kl", "same")):
        config = load_recipe(recipe)
        assert config.reuse == "auto"
        assert automatic_reuse(config, 2.0, ["chunk"]) == expected
        assert automatic_reuse(config, 1.0, ["chunk"]) == "same"
        assert automatic_reuse(config, 2.0, ["chunk", "token"]) == "same"
        assert automatic_reuse(dataclasses.replace(config, min_timestep=0.1), 2.0, ["chunk"]) == "same"
    assert automatic_reuse(load_recipe("cross-entropy"), 2.0, ["chunk"]) == "same"
    for recipe in ("tide-shared", "tide-shared-x"):  # the paper's
        assert load_recipe(recipe).reuse == "same"


def test_fresh_is_a_number_or_automatic() -> None:
    assert resolve({"fresh": "0.25"}, "test").fresh == resolve({"fresh": 0.25}, "test").fresh_share == 0.25
    assert resolve({"fresh": 1}, "test").fresh_share == 1.0
    automatic = resolve({"fresh": "auto"}, "test")
    assert automatic == TrainConfig()
    with pytest.raises(TidecacheError, match="decided when the cache is known"):
        _ = automatic.fresh_share
    with pytest.raises(TidecacheError, match=r"fresh: expected a number or auto, found 'often'"):
        resolve({"fresh": "often"}, "test")


SPECIAL: dict[str, Any] = {
    "fresh": 0.25,
    "timestep_weight": "1,0.5",
    "draws_together": 2,
    "lora_targets": "q_proj,v_proj",
    "min_timestep": 0.25,
}


def another(field: dataclasses.Field[Any], now: Any) -> Any:
    """A value that the field does not have now and may have, beside all others as they are."""
    if field.name in SPECIAL:
        return SPECIAL[field.name]
    if field.name in CHOICES:
        return next(value for value in CHOICES[field.name] if value != now)
    if isinstance(now, bool):
        return not now
    return now + 1 if isinstance(now, int) else now / 2 + 0.125


@pytest.mark.parametrize("field", dataclasses.fields(TrainConfig), ids=lambda field: field.name)
@pytest.mark.parametrize("recipe", ["tide-shared", "reverse-calm-tidal"])
def test_every_field_can_be_overridden_on_the_command_line(
    recipe: str, field: dataclasses.Field[Any], cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stage2_student import run

    recipe = "kl" if field.name == "gold_share" else recipe  # only KL has a target to mix it into
    given: list[TrainConfig] = []

    def instead(config: TrainConfig, *_: Any, **__: Any) -> dict[str, Any]:
        given.append(config)
        return {"steps": 0, "seconds": 0.0}

    monkeypatch.setattr(run, "train", instead)
    before = load_recipe(recipe, None, base_defaults(TINY_STUDENT))
    value = another(field, getattr(before, field.name))
    name = f"--{field.name.replace('_', '-')}"
    option = [name if value else f"--no-{name[2:]}"] if isinstance(value, bool) else [name, str(value)]
    result = CliRunner().invoke(app, ["train", "--cache", str(cache.path), "--recipe", recipe, *option])
    assert result.exit_code == 0, result.output + str(result.exception)
    assert value != getattr(before, field.name)
    assert given == [dataclasses.replace(before, **{field.name: value})]


def test_a_base_says_what_blocks_it_knows(tmp_path: Path) -> None:
    (tmp_path / "tidecache.json").write_text(
        '{"block_size": 16, "block_start": "response", "defaults": {"warmup": 0.2}}'
    )
    defaults = base_defaults(tmp_path)
    config = load_recipe("tide-cross", {"warmup": 0.3}, defaults)
    assert (config.block_size, config.block_start, config.warmup) == (16, "response", 0.3)


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
        ({"block_start": "prompt"}, "block_start: expected one of sequence, response"),
        ({"min_coverage": 2.0}, "min_coverage: expected a number from 0 to 1"),
        ({"lora_rank": -1}, "lora_rank: expected a whole number of at least 0"),
        ({"lora_targets": " , "}, "lora_targets: expected all-linear, or names of modules"),
        ({"fresh": 1.5}, "fresh: expected a number from 0 to 1"),
        ({"temperature": 0.0}, "temperature: expected a number above 0"),
        ({"min_timestep": 0.5, "max_timestep": 0.5}, "min_timestep: expected less than max_timestep"),
        ({"objective": "reverse-kl", "tidal": "interpolate"}, "forward objective"),
        ({"epochs": 0.0}, "epochs: expected a number above 0"),
        ({"objective": "kl", "gold_share": 1.0}, "gold_share: expected a number from 0 to below 1, found 1"),
        ({"objective": "calm", "gold_share": 0.5}, "gold_share: mixes the gold into the target of kl and reverse-kl"),
        (
            {"timestep_weight": "measured", "tidal": "none"},
            "measured weighs what TIDAL distils, found objective reverse-calm and tidal none: pass",
        ),
        ({"timestep_weight": "midrang"}, "timestep_weight: expected one of uniform, midrange, measured, or numbers"),
        ({"timestep_weight": "1"}, "timestep_weight: expected at least two numbers"),
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
    with pytest.raises(TidecacheError, match=r"holds 1, 2: .*teacher extend here --temperatures 3`"):
        require(kl, cache.spec, "here")
    gold_only = dataclasses.replace(cache.spec, lanes=("gold",))
    with pytest.raises(TidecacheError, match=r"needs the topk lane.*teacher extend here --lanes topk`"):
        require(dataclasses.replace(kl, temperature=2.0), gold_only, "here")
    nothing = dataclasses.replace(cache.spec, lanes=("gold",), contexts=("plain",))
    with pytest.raises(TidecacheError, match=r"extend here --context compdemo --lanes topk --temperatures 3`"):
        require(kl, nothing, "here")
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
