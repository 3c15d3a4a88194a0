"""What is missing is found from the shards that are there, however they came about."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.cache.records import ShardRange
from shared.documents import corpus_digest
from shared.errors import TidecacheError
from stage1_teacher.planning import ShardPart, segments
from tests.stage1_teacher.captures import raw

CORPUS = [raw(f"text {i}", str(i)) for i in range(60)]
OUT = Path("out")


def receipt(shard: ShardRange, corpus=CORPUS) -> SimpleNamespace:
    return SimpleNamespace(
        range=shard, corpus=corpus_digest(d.key for d in corpus[shard.first_document : shard.document_stop])
    )


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


@settings(max_examples=200, deadline=None)
@given(
    before=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 3), st.integers(1, 20)), max_size=2),
    length=st.integers(1, 60),
    draws=st.integers(1, 5),
    size=st.integers(1, 20),
    count=st.integers(1, 6),
    order=st.randoms(use_true_random=False),
)
def test_parts_in_one_folder_are_one_capture(
    before: list, length: int, draws: int, size: int, count: int, order
) -> None:
    """Whatever was there before, and whatever of the others' work each part finds when it starts."""
    completed: list = []
    for then in before:
        completed += run(then[0], completed, *then[1:])
    expected = {one.range for one in run(length, completed, draws, size)}
    jobs = [ShardPart(number, count) for number in range(1, count + 1)]
    order.shuffle(jobs)
    written: list = []
    for job in jobs:
        seen = completed + order.sample(written, order.randint(0, len(written)))
        own = [
            receipt(shard)
            for segment in segments(iter(CORPUS[:length]), seen, draws, size, OUT, job)
            for shard in segment.shards
        ]
        written += own
    assert len(written) == len(expected)
    assert {one.range for one in written} == expected


def test_parts_in_folders_of_their_own_grow_without_overlap() -> None:
    """A corpus that ended within a shard, then more of it: the shard's rest stays with the part that began it."""
    folders: list[list] = [[], []]
    for length in (10, 23):
        for number, folder in enumerate(folders):
            plan = segments(iter(CORPUS[:length]), folder, 2, 4, OUT, ShardPart(number + 1, 2))
            folder += [receipt(shard) for segment in plan for shard in segment.shards]
    assert [r.range.first_document for r in folders[0]] == [0, 8, 10, 16]
    assert [r.range.first_document for r in folders[1]] == [4, 12, 20]
    assert sum(r.range.document_stop - r.range.first_document for f in folders for r in f) == 23


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "-1/2", "1/0", "1/2/3", "²/2"])
def test_parts_that_are_none(text: str) -> None:
    with pytest.raises(TidecacheError, match=r"--part: expected i/n with i from 1 to n, such as 2/8, found"):
        ShardPart.parse(text)
    assert ShardPart.parse("2/3") == ShardPart(2, 3)


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
