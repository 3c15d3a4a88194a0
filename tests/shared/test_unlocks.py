"""What recipes need of a cache: the table that stage 1 reads says the same as stage 2's own files and refusals."""

from __future__ import annotations

import itertools

import pytest

from shared.errors import TidecacheError
from shared.unlocks import RECIPES, unlocks
from stage2_student.config import load_recipe, recipe_names, require
from tests.shared.cache import synthetic


def test_every_recipe_is_in_the_table_and_no_other():
    assert sorted(RECIPES) == recipe_names()


@pytest.mark.parametrize("name", recipe_names())
def test_the_table_says_what_the_recipe_file_says(name):
    config, need = load_recipe(name), RECIPES[name]
    if config.objective == "none":
        assert need.context is None
        return
    assert need.context == config.context
    assert need.lane == ("topk" if config.uses_events else "gold")
    assert need.temperature == (config.temperature if config.uses_events else None)
    # Forward KL at T > 1 loses much of the tail's mass; docs/recipes.md names the same recipes.
    assert need.tail_samples == (config.objective == "kl" and config.temperature > 1)


CONTEXTS = (("plain",), ("compdemo",), ("compdemo", "plain"))
LANES = (("gold",), ("gold", "topk"))
TEMPERATURES = ((1.0,), (1.0, 2.0), (0.5, 1.0))


@pytest.mark.parametrize("name", recipe_names())
def test_unlocked_is_what_training_accepts(name):
    config = load_recipe(name)
    answers = set()
    for contexts, lanes, temperatures in itertools.product(CONTEXTS, LANES, TEMPERATURES):
        spec = synthetic.spec(contexts=contexts, lanes=lanes, temperatures=temperatures)
        try:
            require(config, spec, "cache")
            accepted = True
        except TidecacheError:
            accepted = False
        [found] = [u for u in unlocks(spec) if u.recipe == name]
        assert found.unlocked == accepted, (spec, found)
        answers.add(accepted)
    assert answers == ({True} if config.objective == "none" else {True, False})


def test_what_is_missing_is_named():
    found = {u.recipe: u for u in unlocks(synthetic.spec(temperatures=(1.0,)))}
    assert found["kl"].missing == ("context plain", "temperature 2")
    assert found["tide-shared"].missing == ("temperature 2",)
    assert found["events"].missing == ()
    assert {u.recipe: u.missing for u in unlocks(synthetic.spec(lanes=("gold",)))}["events"] == ("lane topk",)
    advised = {u.recipe for u in unlocks(synthetic.spec(contexts=("compdemo", "plain"))) if u.advice}
    assert advised == {"kl", "tide-shared"}
    assert not [u for u in unlocks(synthetic.spec(contexts=("compdemo", "plain"), tail_samples=4)) if u.advice]
