"""What is missing is found from the shards that are there, however they came about."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.cache.records import ShardRange
from shared.errors import TidecacheError
from stage1_teacher.planning import corpus_digest, segments
from tests.stage1_teacher.captures import raw

CORPUS = [raw(f"text {i}", str(i)) for i in range(60)]
OUT = Path("out")


def receipt(shard: ShardRange, corpus=CORPUS) -> SimpleNamespace:
    return SimpleNamespace(range=shard, corpus=corpus_digest(corpus[shard.first_document : shard.document_stop]))


def run(length: int, completed: list, draws: int, size: int) -> list:
    """One capture: the receipts of all shards that it would write."""
    found = list(segments(iter(CORPUS[:length]), completed, draws, size, OUT))
    assert sum(len(s.documents) for s in found) == length
    assert [s.first for s in found] == [sum(len(t.documents) for t in found[:i]) for i in range(len(found))]
    return [receipt(shard) for s in found for shard in s.shards]


@settings(max_examples=200, deadline=None)
@given(
    runs=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9), st.integers(1, 20)), min_size=1, max_size=4),
    lost=st.sets(st.integers(0, 200)),
)
def test_any_sequence_of_captures_covers_every_draw_once(runs: list[tuple[int, int, int]], lost: set[int]) -> None:
    """Larger and smaller corpora, more and fewer draws, other shard sizes, and shards that a kill (or a cluster) left out."""
    completed: list = []
    for length, draws, size in runs:
        new = run(length, completed, draws, size)
        for one in new:
            assert not any(one.range.overlaps(other.range) for other in completed)
        completed += [one for i, one in enumerate(new) if i not in lost]
    length, draws, size = runs[-1]
    completed += run(length, completed, draws, size)
    assert run(length, completed, draws, size) == []
    cells = [
        (p, d)
        for r in completed
        for p in range(r.range.first_document, r.range.document_stop)
        for d in range(r.range.first_draw, r.range.draw_stop)
    ]
    assert len(cells) == len(set(cells))
    assert set(cells) >= {(p, d) for p in range(length) for d in range(draws)}


def test_a_fresh_capture_is_cut_evenly() -> None:
    assert [s.range for s in run(10, [], 3, 4)] == [
        ShardRange(0, 4, 0, 3),
        ShardRange(4, 8, 0, 3),
        ShardRange(8, 10, 0, 3),
    ]


def test_more_draws_are_new_shards_over_the_same_documents() -> None:
    first = run(10, [], 3, 4)
    assert [s.range for s in run(10, first, 5, 64)] == [
        ShardRange(0, 4, 3, 5), ShardRange(4, 8, 3, 5), ShardRange(8, 10, 3, 5),
    ]  # fmt: skip


def test_another_corpus_is_refused() -> None:
    completed = run(10, [], 2, 4)
    changed = [*CORPUS[:5], raw("other"), *CORPUS[6:20]]
    with pytest.raises(TidecacheError, match="documents 4 to 7 of this corpus"):
        list(segments(iter(changed), completed, 2, 4, OUT))
    swapped = [*CORPUS[:4], CORPUS[5], CORPUS[4], *CORPUS[6:20]]
    with pytest.raises(TidecacheError, match="documents 4 to 7"):
        list(segments(iter(swapped), completed, 4, 4, OUT))


def test_only_one_segment_is_read_ahead() -> None:
    read = []

    def stream():
        for document in CORPUS:
            read.append(document)
            yield document

    plan = segments(stream(), [], 1, 8, OUT)
    next(plan)
    assert len(read) == 8
    next(plan)
    assert len(read) == 16
