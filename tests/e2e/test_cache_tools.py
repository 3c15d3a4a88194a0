"""Caches that captures wrote, cut and put together: what comes out is what a capture would have written.

The teacher is a fixed function of what it sees (`HashTeacher`), so likelihoods do not depend on batches.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from shared.cache.manifest import read_manifest
from shared.cache.merging import merge_caches
from shared.cache.slicing import Cut, slice_cache
from shared.cache.verify import verify
from shared.spec import CaptureSpec
from stage1_teacher.planning import ShardPart
from tests.stage1_teacher.captures import HashTeacher, make_spec, write_corpus
from tests.stage1_teacher.test_capture import TEACHER, run

SPEC = make_spec(contexts=("compdemo", "plain"), held_out="hash:0.2", k=3)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_corpus(tmp_path_factory.mktemp("corpus") / "small.jsonl", 16, longest=16))


def captured(folder: Path, corpus: str, spec: CaptureSpec = SPEC, draws: int = 3, **extent: object) -> Path:
    run(HashTeacher(TEACHER.vocabulary, spec.temperatures), folder, corpus, spec, draws, 4, **extent)
    return folder


@pytest.fixture(scope="module")
def whole(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return captured(tmp_path_factory.mktemp("whole") / "cache", corpus)


def contents(folder: Path) -> list[str]:
    return [read_manifest(f).content for f in (folder, folder / "held-out")]


@pytest.mark.parametrize(
    ("cut", "changes"),
    [
        (Cut(k=2), {"k": 2}),
        (Cut(contexts=("plain",), drop_topk=True), {"contexts": ("plain",), "lanes": ("gold",)}),
    ],
    ids=["k", "plain gold"],
)
def test_a_slice_is_what_a_capture_with_its_spec_writes(
    cut: Cut, changes: dict, whole: Path, corpus: str, tmp_path: Path
) -> None:
    slice_cache(whole, tmp_path / "slice", cut)
    captured(tmp_path / "captured", corpus, dataclasses.replace(SPEC, **changes))
    assert contents(tmp_path / "slice") == contents(tmp_path / "captured")


def test_a_capture_goes_on_with_a_slice(whole: Path, corpus: str, tmp_path: Path) -> None:
    """The documents that the slice has lost, and the draws, come back; another corpus is refused at its positions."""
    slice_cache(whole, tmp_path / "slice", Cut(documents=6, draws=2))
    assert contents(tmp_path / "slice") != contents(whole)
    captured(tmp_path / "slice", corpus)
    assert contents(tmp_path / "slice") == contents(whole)
    assert verify(tmp_path / "slice").problems == ()


def test_parts_of_a_capture_merge_into_the_whole(whole: Path, corpus: str, tmp_path: Path) -> None:
    parts = [captured(tmp_path / str(i), corpus, part=ShardPart(i, 3)) for i in (1, 2, 3)]
    merge_caches(parts, tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(whole)
    assert verify(tmp_path / "merged").problems == ()
