"""`tidecache cache diff`: what it says of two caches is what their rows say, compared one by one."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer
from rich.console import Console

from shared.cache import commands_tools
from shared.cache.diffing import Difference, diff_caches, render
from shared.cache.reader import Cache
from shared.cache.records import ContextScores, DrawRecord, ShardRange
from shared.cache.writer import CacheWriter
from tests.shared.cache import synthetic
from tests.shared.test_cli import tidecache

BOTH = {"contexts": ("compdemo", "plain")}
Change = Callable[[int, DrawRecord], DrawRecord]


def build(folder: Path, change: Change, documents: int = 8, per_shard: int = 4, draws: int = 3, **changes) -> Path:
    """A cache whose draws `change` has edited."""
    spec = synthetic.spec(**{**BOTH, **changes})
    writer = CacheWriter.open(folder, spec, synthetic.vocabulary())
    for first in range(0, documents, per_shard):
        stop = min(first + per_shard, documents)
        prepared = {p: synthetic.document(p) for p in range(first, stop)}
        records = [change(p, synthetic.draw(spec, p, d, k)) for p, d in prepared.items() for k in range(draws)]
        writer.write_shard(ShardRange(first, stop, 0, draws), list(prepared.items()), [], records, "corpus", 4096)
    writer.finish()
    return folder


def unchanged(position: int, record: DrawRecord) -> DrawRecord:
    return record


def edited(record: DrawRecord, context: str, **arrays: np.ndarray) -> DrawRecord:
    scores = dataclasses.replace(record.contexts[context], **arrays)
    return dataclasses.replace(record, contexts={**record.contexts, context: scores})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("diff") / "a", unchanged)


def text_of(found: Difference) -> str:
    stream = io.StringIO()
    render(found, Console(file=stream, width=100, highlight=False))
    return stream.getvalue()


def test_equal_caches_are_the_same_and_no_row_is_read(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "b", unchanged, per_shard=3)
    monkeypatch.setattr(Cache, "read_shard", None)
    with pytest.raises(typer.Exit) as caught:
        commands_tools.diff(str(cache), str(tmp_path / "b"))
    assert caught.value.exit_code == 0
    found = diff_caches(cache, tmp_path / "b")
    assert found.same
    assert text_of(found).startswith("the same: 8 documents, 24 draws")


def test_extents(cache: Path, tmp_path: Path) -> None:
    build(tmp_path / "b", unchanged, documents=10, per_shard=5, draws=2)
    found = diff_caches(cache, tmp_path / "b")
    assert not found.same
    assert (found.documents, found.draws) == ((8, 0, 2), (16, 8, 4))
    assert (found.other_documents, found.other_draws, found.compared) == (0, 0, 16)
    assert found.alone == ([], ["document 8", "document 9"])
    assert "only in the second: document 8, document 9\n" in text_of(found)
    assert all(c.largest.value == 0.0 for c in found.contexts.values())
    assert found.contexts["plain"].best == found.contexts["plain"].chunks_B.sum() > 0
    back = diff_caches(tmp_path / "b", cache)
    assert (back.documents, back.draws, back.compared) == ((8, 2, 0), (16, 4, 8), 16)


def test_a_changed_value_is_found_where_it_is(cache: Path, tmp_path: Path) -> None:
    def change(position: int, record: DrawRecord) -> DrawRecord:
        if (position, record.draw) != (5, 1):
            return record
        gold = record.contexts["plain"].gold_logp_N.copy()
        gold[-1] -= 3.0
        return edited(record, "plain", gold_logp_N=gold)

    build(tmp_path / "b", change, per_shard=3)
    found = diff_caches(cache, tmp_path / "b")
    largest = found.contexts["plain"].largest
    assert (largest.document, largest.draw) == ("document 5", 1)
    assert largest.value == pytest.approx(3.0, abs=0.02)
    draw = next(d for d in Cache.open(cache).iter_draws() if d.stored.position == 5 and d.draw == 1)
    assert largest.chunk == draw.chunks[-1]
    bins = np.flatnonzero(found.contexts["plain"].largest_B)
    assert bins.tolist() == [int(draw.timestep * 10)]
    assert found.contexts["plain"].gold_B.sum() == pytest.approx(largest.value)
    assert found.contexts["compdemo"].largest.value == 0.0
    assert "document 5, draw 1" in text_of(found)


def test_candidates_against_a_slow_comparison(cache: Path, tmp_path: Path) -> None:
    def change(position: int, record: DrawRecord) -> DrawRecord:
        ids = record.contexts["compdemo"].topk_ids.copy()
        rng = np.random.default_rng([position, record.draw])
        ids[rng.random(len(ids)) < 0.2] = 42
        logp = record.contexts["compdemo"].topk_logp_MK - np.float32(0.25)
        return edited(record, "compdemo", topk_ids=ids, topk_logp_MK=logp)

    build(tmp_path / "b", change)
    found = diff_caches(cache, tmp_path / "b").contexts["compdemo"]
    best = shared = total = 0
    apart = []
    for a, b in zip(Cache.open(cache).iter_draws(), Cache.open(tmp_path / "b").iter_draws(), strict=True):
        for ours, theirs in zip(by_filling(a), by_filling(b), strict=True):
            best += ours[0][0] == theirs[0][0]
            total += len(ours)
            shared += sum(filling in [f for f, _ in theirs] for filling, _ in ours)
            apart += [abs(x - y) for f, x in ours for g, y in theirs if f == g]
    assert (found.best, found.shared, found.candidates) == (best, shared, total)
    assert 0 < shared < total
    assert found.largest_candidate.value == pytest.approx(max(apart))
    assert found.largest_log_z.value == 0.0


def by_filling(draw) -> list[list[tuple[tuple[int, ...], float]]]:
    scores: ContextScores = draw.scores["compdemo"]
    found, at = [], 0
    for count, logp_K in zip(draw.token_count_M.tolist(), scores.topk_logp_MK.tolist(), strict=True):
        row = []
        for logp in logp_K:
            row.append((tuple(scores.topk_ids[at : at + count].tolist()), logp))
            at += count
        found.append(row)
    return found


def test_other_specs_are_compared_as_far_as_they_go(cache: Path, tmp_path: Path) -> None:
    build(tmp_path / "gold", unchanged, lanes=("gold",), contexts=("plain",))
    found = diff_caches(cache, tmp_path / "gold")
    assert [name for name, _, _ in found.spec] == ["contexts", "lanes"]
    assert list(found.contexts) == ["plain"]
    assert "not in both" in found.contexts["plain"].lane
    assert found.compared == 24
    text = text_of(found)
    assert "['gold', 'topk']" in text
    build(tmp_path / "seed", unchanged, seed=1)
    found = diff_caches(cache, tmp_path / "seed")
    assert (found.draws, found.other_draws) == ((24, 0, 0), 24)
    json.dumps(found.to_json(), allow_nan=False)


def test_held_out_parts_count(cache: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1), ("d", None)):
        build(tmp_path / name, unchanged, documents=2)
        if seed is not None:
            build(tmp_path / name / "held-out", unchanged, documents=2 + seed)
    assert diff_caches(tmp_path / "a", tmp_path / "b").same
    other = diff_caches(tmp_path / "a", tmp_path / "c")
    assert not other.same
    assert other.held_out.documents == (2, 0, 1)
    assert "In held-out:" in text_of(other)
    alone = diff_caches(tmp_path / "a", tmp_path / "d")
    assert not alone.same
    assert "only in" in text_of(alone)


def test_names_of_documents_never_reach_the_terminal_raw(tmp_path: Path) -> None:
    for name, low in (("a", 0.0), ("b", 1.0)):
        spec = synthetic.spec()
        writer = CacheWriter.open(tmp_path / name, spec, synthetic.vocabulary())
        prepared = dataclasses.replace(synthetic.document(0), name="evil\x1b]0;title\x07 [red]")
        records = []
        for k in range(3):
            record = synthetic.draw(spec, 0, prepared, k)
            gold = record.contexts["compdemo"].gold_logp_N - np.float32(low)
            records.append(edited(record, "compdemo", gold_logp_N=gold))
        writer.write_shard(ShardRange(0, 1, 0, 3), [(0, prepared)], [], records, "corpus", 4096)
        writer.finish()
    text = text_of(diff_caches(tmp_path / "a", tmp_path / "b"))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "evil\\x1b]0;title\\x07 [red]" in text


def test_exit_codes_are_those_of_diff(cache: Path, tmp_path: Path) -> None:
    build(tmp_path / "b", unchanged, draws=2)
    done = tidecache("cache", "diff", str(cache), str(tmp_path / "b"), "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["draws"] == {"both": 16, "first": 8, "second": 0}
    done = tidecache("cache", "diff", str(cache), str(tmp_path / "nothing"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
