"""The order of draws: what holds for every cache, seed and group size; and the mixture of several caches."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.cache import open_cache, order
from shared.cache.mixing import Mixture, WeightedCache
from shared.cache.order import DrawIndex, DrawOrder
from shared.cache.records import ShardRange
from shared.cache.selection import Selection
from shared.cache.writer import CacheWriter
from shared.errors import TidecacheError
from tests.shared.cache import synthetic


def index_of(counts: list[int], documents_per_shard: int = 3, ranges: int = 1) -> DrawIndex:
    """Documents with these numbers of draws, spread over `ranges` shards for each range of documents."""
    document_R = np.repeat(np.arange(len(counts)), counts)
    draw_R = np.concatenate([np.arange(c) for c in counts])
    shard_R = document_R // documents_per_shard * ranges + draw_R % ranges
    shards = -(-len(counts) // documents_per_shard) * ranges
    start_D = np.concatenate([[0], np.cumsum(counts)])
    return DrawIndex(
        start_D=start_D,
        position_D=np.arange(len(counts)) * 7,
        shard_D=(np.arange(len(counts)) // documents_per_shard * ranges).astype(np.int32),
        shard_R=shard_R.astype(np.int32),
        row_R=np.zeros(len(draw_R), np.int32),
        draw_R=draw_R.astype(np.int32),
        timestep_R=np.full(len(draw_R), 0.5, np.float32),
        rows_S=np.bincount(shard_R, minlength=shards),
    )


def rows_of(made: DrawOrder, count: int, start: int = 0) -> list[int]:
    places = (made.place(n) for n in range(start, start + count))
    return [int(made.round(round_).row_N[place]) for round_, place in places]


def document(index: DrawIndex, row: int) -> int:
    return int(np.searchsorted(index.start_D, row, side="right")) - 1


COUNTS = st.lists(st.integers(1, 6), min_size=1, max_size=14)


@settings(max_examples=150, deadline=None)
@given(counts=COUNTS, together=st.integers(1, 5), seed=st.integers(0, 9), ranges=st.integers(1, 3))
def test_a_pass_takes_each_draw_once(counts: list[int], together: int, seed: int, ranges: int) -> None:
    index = index_of(counts, ranges=ranges)
    rows = rows_of(DrawOrder(index, seed, "cached", together), 3 * index.draws)
    for passed in range(3):
        assert sorted(rows[passed * index.draws : (passed + 1) * index.draws]) == list(range(index.draws))


@settings(max_examples=150, deadline=None)
@given(counts=COUNTS, together=st.integers(1, 5), seed=st.integers(0, 9))
def test_a_round_takes_each_document_once_with_its_next_draws(counts: list[int], together: int, seed: int) -> None:
    index = index_of(counts)
    made = DrawOrder(index, seed, "cached", together)
    rows = rows_of(made, index.draws)
    rounds = [made.place(n)[0] for n in range(index.draws)]
    assert rounds == sorted(rounds)
    for number in range(-(-max(counts) // together)):
        found = [document(index, row) for row, round_ in zip(rows, rounds, strict=True) if round_ == number]
        groups = [d for i, d in enumerate(found) if i == 0 or found[i - 1] != d]
        left = [k - number * together for k in counts]
        assert sorted(groups) == [d for d, k in enumerate(left) if k > 0]
        assert Counter(found) == {d: min(together, k) for d, k in enumerate(left) if k > 0}


@settings(max_examples=60, deadline=None)
@given(documents=st.integers(1, 12), groups=st.integers(1, 3), together=st.integers(1, 4), seed=st.integers(0, 9))
def test_groups_are_aligned_where_they_divide_the_draws(documents: int, groups: int, together: int, seed: int) -> None:
    index = index_of([groups * together] * documents)
    rows = rows_of(DrawOrder(index, seed, "cached", together), 2 * index.draws)
    for start in range(0, len(rows), together):
        assert len({document(index, row) for row in rows[start : start + together]}) == 1


def test_a_last_group_is_shorter_where_they_do_not() -> None:
    index = index_of([5] * 4)
    rows = rows_of(DrawOrder(index, 0, "cached", 2), index.draws)
    found = [document(index, row) for row in rows]
    assert all(found[n] == found[n + 1] for n in range(0, 16, 2))
    assert sorted(found[16:]) == [0, 1, 2, 3]


@settings(max_examples=60, deadline=None)
@given(counts=COUNTS, together=st.integers(1, 3), seed=st.integers(0, 3), start=st.integers(0, 400))
def test_any_start_gives_the_same_rows(counts: list[int], together: int, seed: int, start: int) -> None:
    index = index_of(counts)
    whole = rows_of(DrawOrder(index, seed, "cached", together), start + 20)
    assert rows_of(DrawOrder(index, seed, "cached", together), 20, start) == whole[start:]


def test_seeds_streams_passes_and_rounds_are_shuffled_differently() -> None:
    index = index_of([4] * 40)
    first = rows_of(DrawOrder(index, 0, "cached"), 40)
    assert first != rows_of(DrawOrder(index, 1, "cached"), 40)
    assert first != rows_of(DrawOrder(index, 0, "cached 1"), 40)
    later = [rows_of(DrawOrder(index, 0, "cached"), 40, n * 40) for n in range(1, 5)]
    documents = [[document(index, row) for row in rows] for rows in (first, *later)]
    assert all(documents[0] != other for other in documents[1:])
    assert sorted(first) != sorted(later[3])  # the second pass begins with other draws


def test_the_shuffle_is_uniform() -> None:
    """Each of 6 documents comes first about as often as the others: 1000 rounds, 5 sigma."""
    made = DrawOrder(index_of([1] * 6, documents_per_shard=6), 0, "cached")
    first = Counter(int(made.round(n).row_N[0]) for n in range(1000))
    assert all(abs(first[d] - 1000 / 6) < 5 * (1000 * 5 / 36) ** 0.5 for d in range(6))


def test_windows_close_with_the_shard_that_fills_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "WINDOW_DRAWS", 7)
    index = index_of([4] * 30)
    for together, number in ((1, 0), (1, 5), (4, 0)):
        made = DrawOrder(index, 0, "cached", together).round(number)
        assert (np.diff(made.window_N) >= 0).all()
        shards: dict[int, set[int]] = {}
        for row, window in zip(made.row_N.tolist(), made.window_N.tolist(), strict=True):
            shards.setdefault(int(index.shard_R[row]), set()).add(window)
        assert all(len(windows) == 1 for windows in shards.values())  # no shard is read twice
        assert Counter(made.window_N.tolist()).most_common(1)[0][1] < 7 + 3 * together
        assert len(set(made.window_N.tolist())) > 1
        in_order = [document(index, row) for row in made.row_N]
        assert in_order != sorted(in_order)


def test_a_round_over_an_extended_cache_reads_few_files() -> None:
    """Draws of one range are used before those of another, so that a round needs one shard for each document."""
    index = index_of([6] * 9, documents_per_shard=9, ranges=3)
    made = DrawOrder(index, 0, "cached", 2)
    assert [len(set(index.shard_R[made.round(n).row_N].tolist())) for n in range(6)] == [1] * 6
    assert len({int(index.shard_R[made.round(n).row_N[0]]) for n in range(3)}) == 3


# --- the index of a real cache -----------------------------------------------------------------------------------


def test_the_index_knows_every_draw_and_no_other(tmp_path) -> None:
    writer = CacheWriter.open(tmp_path, synthetic.spec(), synthetic.vocabulary())
    for shard in (ShardRange(0, 6, 2, 4), ShardRange(6, 12, 0, 4), ShardRange(0, 3, 0, 2), ShardRange(3, 6, 0, 2)):
        synthetic.write(writer, shard, drop=(2,))
    writer.finish()
    cache = open_cache(tmp_path)
    draws = list(cache.iter_draws())
    index = DrawIndex.of(cache, Selection())
    assert (index.documents, index.draws) == (11, 44)
    assert index.position_D[[document(index, r) for r in range(44)]].tolist() == [d.stored.position for d in draws]
    assert index.draw_R.tolist() == [d.draw for d in draws]
    assert index.timestep_R.tolist() == [d.timestep for d in draws]
    for row, draw in enumerate(draws):
        stored = cache.read_shard(int(index.shard_R[row])).draws[int(index.row_R[row])]
        assert (stored.document, stored.draw) == (draw.document, draw.draw)
    assert index.shard_D.tolist() == [0] * 2 + [1] * 3 + [3] * 6  # the first shard with draws of the document


@pytest.mark.parametrize(
    ("selection", "names"),
    [
        (Selection(0.2, 0.6), range(12)),
        (Selection(names="document ?"), range(10)),
        (Selection(names="document 1*"), (1, 10, 11)),
        (Selection(0.3, 1.0, names="*[05]"), (0, 5, 10)),
    ],
)
def test_selections(tmp_path, selection: Selection, names) -> None:
    synthetic.build(tmp_path, drop=())
    cache = open_cache(tmp_path)
    low, high = selection.timesteps
    wanted = {f"document {n}" for n in names}
    expected = [
        (d.stored.position, d.draw) for d in cache.iter_draws() if low <= d.timestep <= high and d.stored.name in wanted
    ]
    index = DrawIndex.of(cache, selection)
    found = zip(index.position_D[[document(index, r) for r in range(index.draws)]], index.draw_R, strict=True)
    assert [(int(p), int(k)) for p, k in found] == expected
    assert [(d.stored.position, d.draw) for d in cache.iter_draws(low, high, names=selection.names)] == expected
    keys = {d.document for d in cache.iter_draws() if d.stored.name in wanted}
    by_key = DrawIndex.of(cache, Selection(low, high, frozenset(keys)))
    assert by_key.position_D.tolist() == index.position_D.tolist()
    assert by_key.draw_R.tolist() == index.draw_R.tolist()
    assert [(d.stored.position, d.draw) for d in cache.iter_draws(low, high, documents=keys)] == expected


def test_empty_selections_and_caches_are_refused(tmp_path) -> None:
    synthetic.build(tmp_path / "some", documents=4)
    with pytest.raises(TidecacheError, match=r"none of its 12 draws has a timestep from 0\.5 to 0\.500001"):
        DrawIndex.of(open_cache(tmp_path / "some"), Selection(0.5, 0.500001))
    with pytest.raises(TidecacheError, match=r"a name like '\*\.py'"):
        DrawIndex.of(open_cache(tmp_path / "some"), Selection(names="*.py"))
    CacheWriter.open(tmp_path / "none", synthetic.spec(), synthetic.vocabulary())
    with pytest.raises(TidecacheError, match="holds no draws yet"):
        DrawIndex.of(open_cache(tmp_path / "none"), Selection())


# --- mixing ------------------------------------------------------------------------------------------------------

WEIGHTS = st.lists(st.sampled_from([0.1, 0.25, 1.0, 1.5, 2.0, 3.0, 7.0]), min_size=1, max_size=5).map(tuple)


@settings(max_examples=100, deadline=None)
@given(weights=WEIGHTS)
def test_shares_are_exact_and_spread_evenly(weights: tuple[float, ...]) -> None:
    mixture = Mixture(weights)
    period = sum(mixture.counts)
    exact = [Fraction(str(w)) / sum(Fraction(str(w)) for w in weights) for w in weights]
    assert [Fraction(c, period) for c in mixture.counts] == exact
    given_ = [0] * len(weights)
    for n in range(3 * period):
        source, number = mixture.place(n)
        assert number == given_[source]  # each cache's items are consecutive
        given_[source] += 1
        for count, share in zip(given_, exact, strict=True):
            assert abs(count - (n + 1) * share) <= Fraction(1, 2) + share * len(weights) / 2
    assert given_ == [3 * c for c in mixture.counts]


def test_equal_weights_take_turns_and_one_cache_takes_all() -> None:
    assert [Mixture((2.0, 2.0)).place(n) for n in range(5)] == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2)]
    assert [Mixture((0.3,)).place(n) for n in (0, 9)] == [(0, 0), (0, 9)]


@pytest.mark.parametrize("weights", [(), (1.0, 0.0), (1.0, -1.0), (float("nan"),), (float("inf"), 1.0), (1.0, 1e-7)])
def test_what_is_no_share_is_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(TidecacheError, match="weight"):
        Mixture(weights)


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("caches/a", "caches/a", 1.0),
        ("caches/a=2.5", "caches/a", 2.5),
        ("caches/date=2026/a", "caches/date=2026/a", 1.0),
        ("caches/date=2026=1", "caches/date=2026", 1.0),
        ("http://host:80/a=3", "http://host:80/a", 3.0),
        ("s3://bucket/a", "s3://bucket/a", 1.0),
        ("=2", "=2", 1.0),
    ],
)
def test_weights_on_the_command_line(text: str, path: str, weight: float) -> None:
    assert WeightedCache.parse(text) == WeightedCache(path, weight)
