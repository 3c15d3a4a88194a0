"""Training from a packed cache: the same rows as from a raw one, and nearly the same loss."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from shared.cache.reader import Cache
from stage2_student import run
from stage2_student.config import load_recipe
from tests.stage2_student import synthetic


def losses(cache: Cache, base: Path, out: Path, recipe: str) -> list[dict[str, float]]:
    config = load_recipe(recipe, {"batch": 4, "steps": 4, "save_steps": 0, "learning_rate": 1e-3, "fresh": 0.0})
    run.train(config, cache.path, base, out, console=Console(file=io.StringIO()))
    lines = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    return [line for line in lines if "ce" in line]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """The cache of `conftest.cache`, packed."""
    folder = tmp_path_factory.mktemp("packed") / "texts"
    return synthetic.make_cache(folder, synthetic.texts(12), draws=3, per_shard=5, codec="packed")


@pytest.mark.parametrize("recipe", ["events", "reverse-calm-tidal"])
def test_a_packed_cache_trains_as_a_raw_one(
    recipe: str, cache: Cache, packed: Cache, student_folder: Path, tmp_path: Path
) -> None:
    assert packed.spec.codec == "packed"
    raw_lines, packed_lines = (losses(c, student_folder, tmp_path / c.spec.codec, recipe) for c in (cache, packed))
    assert len(raw_lines) == 4
    for raw, found in zip(raw_lines, packed_lines, strict=True):
        tolerance = 1e-7 if recipe == "reverse-calm-tidal" else 2e-3  # the gold lane is no part of the codec
        assert found["distill"] == pytest.approx(raw["distill"], rel=tolerance)
        assert found["ce"] == pytest.approx(raw["ce"], rel=tolerance)
    if recipe == "events":
        assert [line["distill"] for line in raw_lines] != [line["distill"] for line in packed_lines]
