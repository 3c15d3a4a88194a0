"""`tidecache cache slice`: the slice is the cache that a smaller capture would have written."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.cache import files
from shared.cache.copying import record_of, statistics_of
from shared.cache.encoding import encode_stored
from shared.cache.manifest import read_manifest
from shared.cache.reader import Cache
from shared.cache.records import ContextScores, ShardRange
from shared.cache.slicing import Cut, slice_cache
from shared.cache.verify import verify
from shared.cache.writer import CacheWriter
from shared.documents import Dropped, corpus_digest
from shared.errors import TidecacheError
from shared.spec import CaptureSpec
from tests.conftest import ROOT
from tests.shared.cache import synthetic
from tests.shared.cache.test_writer import snapshot
from tests.shared.test_cli import tidecache

BOTH = ("compdemo", "plain")
DROP = (2, 6)
HELD = 100  # the first held-out document
FULL = {"contexts": BOTH, "k": 4, "temperatures": (1.0, 2.0)}


def by_hand(spec: CaptureSpec, scores: ContextScores, count_M: np.ndarray) -> ContextScores:
    """The scores of a capture with fewer candidates, one filling at a time."""
    if "topk" not in spec.lanes:
        return ContextScores(scores.gold_logp_N)
    ids, at = [], 0
    k = scores.topk_logp_MK.shape[1]
    for count in count_M.tolist():
        for filling in range(k):
            if filling < spec.k:
                ids += scores.topk_ids[at : at + count].tolist()
            at += count
    return ContextScores(
        scores.gold_logp_N, scores.log_z_MT, np.array(ids, np.int32), np.array([row[: spec.k] for row in scores.topk_logp_MK])
        if len(count_M) else np.zeros((0, spec.k), np.float32),
    )  # fmt: skip


def capture(
    folder: Path,
    documents: int,
    draws: int,
    per_shard: int = 4,
    draw_ranges: int = 1,
    parts: Sequence[int] = (),
    offset: int = 0,
    **changes,
) -> CacheWriter:
    """A capture whose likelihoods do not depend on what of them is stored; of the shards with these numbers mod 2.

    `offset`: which synthetic document is the first.
    """
    full, spec = synthetic.spec(**FULL), synthetic.spec(**{**FULL, **changes})
    writer = CacheWriter.open(folder, spec, synthetic.vocabulary())
    step = -(-draws // draw_ranges)
    for first, low in itertools.product(range(0, documents, per_shard), range(0, draws, step)):
        shard = ShardRange(first, min(first + per_shard, documents), low, min(low + step, draws))
        if parts and first // per_shard % 2 not in parts:
            continue
        positions = range(shard.first_document, shard.document_stop)
        prepared = {p: synthetic.document(p + offset) for p in positions if p not in DROP}
        dropped = [(p, Dropped(f"{p:032x}", f"document {p}", "empty", "nothing")) for p in positions if p in DROP]
        records = []
        for (p, d), k in itertools.product(prepared.items(), range(shard.first_draw, shard.draw_stop)):
            record = synthetic.draw(full, p, d, k)
            first_C, stop_C = d.teacher.token_ranges(d.chunks)
            count_M = (stop_C - first_C)[record.masked_C]
            scores = {x: by_hand(spec, record.contexts[x], count_M) for x in spec.contexts}
            records.append(dataclasses.replace(record, contexts=scores))
        keys = corpus_digest([prepared[p].key if p in prepared else f"{p:032x}" for p in positions])
        writer.write_shard(shard, list(prepared.items()), dropped, records, keys, spec.batch_tokens)
    writer.finish()
    return writer


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slice") / "source"
    capture(folder, 12, 4, draw_ranges=2)
    capture(folder / "held-out", 4, 4, offset=HELD)
    return folder


CUTS = {
    "nothing": (Cut(), 12, 4, {}),
    "draws": (Cut(draws=3), 12, 3, {}),
    "whole draw ranges": (Cut(draws=2), 12, 2, {}),
    "documents": (Cut(documents=7), 9, 4, {}),
    "whole documents files": (Cut(documents=6), 8, 4, {}),
    "k": (Cut(k=2), 12, 4, {"k": 2}),
    "the same k": (Cut(k=4), 12, 4, {}),
    "lane": (Cut(drop_topk=True), 12, 4, {"lanes": ("gold",)}),
    "context": (Cut(contexts=("plain",)), 12, 4, {"contexts": ("plain",)}),
    "both contexts": (Cut(contexts=("plain", "compdemo")), 12, 4, {}),
    "all": (Cut(5, 3, ("compdemo",), 1), 6, 3, {"k": 1, "contexts": ("compdemo",)}),
    "all but the lane": (Cut(1, 1, ("plain",), None, True), 1, 1, {"lanes": ("gold",), "contexts": ("plain",)}),
}


@pytest.mark.parametrize("name", CUTS)
def test_a_slice_is_a_smaller_capture(name: str, source: Path, tmp_path: Path) -> None:
    cut, documents, draws, changes = CUTS[name]
    sliced = slice_cache(source, tmp_path / "slice", cut)
    capture(tmp_path / "captured", documents, draws, **changes)
    capture(tmp_path / "held", 4, draws, offset=HELD, **changes)
    expected = read_manifest(tmp_path / "captured")
    assert sliced.manifest.spec == expected.spec
    assert sliced.manifest.content == expected.content
    assert sliced.held_out.content == read_manifest(tmp_path / "held").content
    ours, theirs = sliced.manifest.totals, expected.totals
    assert dataclasses.replace(ours, size_bytes=0, dropped={}) == dataclasses.replace(theirs, size_bytes=0, dropped={})
    assert verify(tmp_path / "slice").problems == ()
    assert {r.range.document_stop for r in sliced.manifest.shards} <= {1, 4, 6, 8, 9, 12}


@pytest.mark.parametrize("name", ["draws", "documents", "lane", "context", "k"])
def test_slices_of_packed_caches(name: str, tmp_path: Path) -> None:
    """All but a smaller k, whose grid is another one, to the bit; ids and gold always."""
    cut, documents, draws, changes = CUTS[name]
    capture(tmp_path / "source", 12, 4, codec="packed")
    sliced = slice_cache(tmp_path / "source", tmp_path / "slice", cut)
    capture(tmp_path / "captured", documents, draws, codec="packed", **changes)
    assert sliced.manifest.spec == read_manifest(tmp_path / "captured").spec
    assert (sliced.manifest.content == read_manifest(tmp_path / "captured").content) == (name != "k")
    assert verify(tmp_path / "slice").problems == ()
    for ours, theirs in zip(
        Cache.open(tmp_path / "slice").iter_draws(), Cache.open(tmp_path / "captured").iter_draws(), strict=True
    ):
        for context, scores in ours.scores.items():
            np.testing.assert_array_equal(scores.gold_logp_N, theirs.scores[context].gold_logp_N)
            if name == "k":
                np.testing.assert_array_equal(scores.topk_ids, theirs.scores[context].topk_ids)
                apart = np.exp(scores.topk_logp_MK) - np.exp(theirs.scores[context].topk_logp_MK)
                assert np.abs(apart).max(initial=0.0) < 0.02


def test_shards_that_stay_as_they_are_are_copied(source: Path, tmp_path: Path) -> None:
    slice_cache(source, tmp_path / "slice", Cut(documents=6, draws=2))
    before, after = snapshot(source), snapshot(tmp_path / "slice")
    copied = [n for n in after if n.startswith("shards/")]
    assert copied
    assert all(before[name] == after[name] for name in copied)


@settings(max_examples=10, deadline=None)
@given(
    st.integers(1, 10), st.integers(1, 4), st.integers(1, 4), st.sampled_from([BOTH, BOTH[:1], BOTH[1:]]), st.booleans()
)
def test_any_slice_has_the_rows_that_were_asked_for(
    source: Path,
    tmp_path_factory: pytest.TempPathFactory,
    documents: int,
    draws: int,
    k: int,
    contexts: tuple[str, ...],
    drop: bool,
) -> None:
    out = tmp_path_factory.mktemp("any") / "slice"
    slice_cache(source, out, Cut(documents, draws, contexts, k, drop))
    rows = list(Cache.open(source).iter_draws())
    kept = sorted({d.stored.position for d in rows})[:documents]
    expected = [d for d in rows if d.stored.position in kept and d.draw < draws]
    for ours, theirs in zip(Cache.open(out).iter_draws(), expected, strict=True):
        assert (ours.document, ours.draw, ours.timestep) == (theirs.document, theirs.draw, theirs.timestep)
        assert set(ours.scores) == set(contexts)
        for context in contexts:
            a, b = (dataclasses.replace(d, context=context) for d in (ours, theirs))
            np.testing.assert_array_equal(a.gold_logp, b.gold_logp)
            if not drop:
                assert a.candidates == [fillings[:k] for fillings in b.candidates]


def test_a_slice_grows_like_any_cache(source: Path, tmp_path: Path) -> None:
    """Its receipts say of the corpus what a capture of its extent would say, so that the capture goes on from there."""
    slice_cache(source, tmp_path / "slice", Cut(documents=7, draws=3, k=2))
    captured = capture(tmp_path / "captured", 9, 3, k=2)
    by_range = {(r.range.first_document, r.range.document_stop): r.corpus for r in captured.completed}
    sliced = read_manifest(tmp_path / "slice").shards
    assert {(r.range.first_document, r.range.document_stop): r.corpus for r in sliced} == by_range
    writer = CacheWriter.open(tmp_path / "slice", synthetic.spec(**{**FULL, "k": 2}), synthetic.vocabulary())
    capture(tmp_path / "once", 12, 3, k=2)
    once = Cache.open(tmp_path / "once")
    rows = once.read_shard([r.range.document_stop for r in once.shards].index(12))
    kept = [d for d in rows.documents if d.position >= 9]
    draws = [record_of(d) for d in rows.draws if d.stored.position >= 9]
    writer.commit(encode_stored(writer.spec, ShardRange(9, 12, 0, 3), kept, [], draws, "rest", 4096))
    assert writer.finish().content == read_manifest(tmp_path / "once").content


def test_statistics_are_carried_where_they_still_hold(source: Path, tmp_path: Path) -> None:
    def sums(folder: Path) -> dict:
        cache = Cache.open(folder)
        return {r.range: statistics_of(cache, r) for r in cache.shards}

    before = sums(source)
    slice_cache(source, tmp_path / "context", Cut(contexts=("plain",)))
    for shard, found in sums(tmp_path / "context").items():
        assert found["plain"].to_json() == before[shard]["plain"].to_json()
    slice_cache(source, tmp_path / "k", Cut(k=2))
    capture(tmp_path / "captured", 12, 4, draw_ranges=2, k=2)
    exact = sums(tmp_path / "captured")
    for shard, found in sums(tmp_path / "k").items():
        for context, ours in found.items():
            theirs = exact[shard][context]
            for name in ("chunks_B", "tokens_B", "gold_logp_B", "confident_BE", "hits_BE"):
                np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
            np.testing.assert_allclose(ours.tail_mass_BT, theirs.tail_mass_BT, atol=2e-3 * ours.chunks_B.max())
            np.testing.assert_array_equal(ours.kl_BT, before[shard][context].kl_BT)
            assert theirs.kl_BT.sum() <= ours.kl_BT.sum()  # fewer events tell two distributions apart less well
    slice_cache(source, tmp_path / "gold", Cut(drop_topk=True))
    for shard, found in sums(tmp_path / "gold").items():
        np.testing.assert_array_equal(found["plain"].gold_logp_B, before[shard]["plain"].gold_logp_B)
        assert not found["plain"].tail_mass_BT.any()


def test_tail_samples_go_with_the_candidates_that_they_lie_beyond(tmp_path: Path) -> None:
    changes = {"tail_samples": 3, "k": 4}
    with_tail(tmp_path / "source", **changes)
    kept = slice_cache(tmp_path / "source", tmp_path / "draws", Cut(draws=1))
    assert kept.manifest.spec.tail_samples == 3
    assert not kept.lost_tail_samples
    lost = slice_cache(tmp_path / "source", tmp_path / "k", Cut(k=2))
    assert lost.manifest.spec.tail_samples == 0
    assert lost.lost_tail_samples
    for name in ("draws", "k"):
        assert verify(tmp_path / name).problems == ()


def with_tail(folder: Path, **changes) -> None:
    """A small cache with tail samples."""
    spec = synthetic.spec(**changes)
    writer = CacheWriter.open(folder, spec, synthetic.vocabulary())
    prepared = {p: synthetic.document(p) for p in range(4)}
    records = []
    for (p, d), k in itertools.product(prepared.items(), range(2)):
        record = synthetic.draw(spec, p, d, k)
        first_C, stop_C = d.teacher.token_ranges(d.chunks)
        single = int(((stop_C - first_C)[record.masked_C] == 1).sum()) * spec.tail_samples
        scores = {
            x: dataclasses.replace(
                s, tail_ids=np.arange(single, dtype=np.int32), tail_logp=np.full(single, -9, np.float32)
            )
            for x, s in record.contexts.items()
        }
        records.append(dataclasses.replace(record, contexts=scores))
    writer.write_shard(ShardRange(0, 4, 0, 2), list(prepared.items()), [], records, "corpus", 4096)
    writer.finish()


def test_what_cannot_be_is_refused(source: Path, tmp_path: Path) -> None:
    for cut, message in (
        (Cut(draws=5), "--draws 5: the cache holds 4"),
        (Cut(documents=11), "--documents 11: the cache holds 10"),
        (Cut(k=5), "--k 5: the cache holds 4"),
        (Cut(contexts=("other",)), "holds the contexts compdemo, plain"),
    ):
        with pytest.raises(TidecacheError, match=message):
            slice_cache(source, tmp_path / "slice", cut)
    assert not (tmp_path / "slice").exists()
    for out in (source, source / "inside", source.parent):
        with pytest.raises(TidecacheError, match="a folder of its own"):
            slice_cache(source, out, Cut(draws=1))
    slice_cache(source, tmp_path / "slice", Cut(drop_topk=True, draws=1))
    with pytest.raises(TidecacheError, match="no topk lane"):
        slice_cache(tmp_path / "slice", tmp_path / "k", Cut(k=1))
    with pytest.raises(TidecacheError, match=r"another spec .*lanes"):
        slice_cache(source, tmp_path / "slice", Cut(draws=1))
    with pytest.raises(TidecacheError, match="not part of this slice"):
        slice_cache(source, tmp_path / "slice", Cut(drop_topk=True, draws=1, documents=2))


def test_damage_is_found_and_not_passed_on(source: Path, tmp_path: Path) -> None:
    for name, data in snapshot(source).items():
        files.write(tmp_path / "source", name, data)
    victim = next((tmp_path / "source" / "shards").glob("*.likelihoods.parquet"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    for number, cut in enumerate((Cut(), Cut(k=1))):
        with pytest.raises(TidecacheError, match=r"expected the digest|no Parquet file"):
            slice_cache(tmp_path / "source", tmp_path / str(number), cut)
        assert verify(tmp_path / str(number)).problems == ()


@pytest.mark.slow
def test_killed_at_every_step_it_goes_on(tmp_path: Path) -> None:
    assert_goes_on("slice", tmp_path, 1)


def test_killed_at_some_steps_it_goes_on(tmp_path: Path) -> None:
    assert_goes_on("slice", tmp_path, 11)


def assert_goes_on(tool: str, tmp_path: Path, stride: int) -> None:
    """Whatever was killed where, the same command ends with the same bytes; every `stride`-th step is tried."""
    (tmp_path / "sources").mkdir()
    capture(tmp_path / "sources" / "a", 8, 4)
    capture(tmp_path / "sources" / "b", 12, 4, parts=(1,))
    capture(tmp_path / "sources" / "a" / "held-out", 3, 2, offset=HELD)
    command = [
        sys.executable,
        "-m",
        "tests.shared.cache.killed_tools",
        tool,
        str(tmp_path / "sources"),
        str(tmp_path),
        str(stride),
    ]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    steps = int(out.stdout)
    assert steps > 30
    whole = snapshot(tmp_path / "whole")
    for step in range(1, steps + 1, stride):
        assert snapshot(tmp_path / str(step)) == whole, f"killed at step {step}"


def test_the_command(source: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "slice")
    done = tidecache("cache", "slice", str(source), "--out", out, "--draws", "2", "--context", "plain", "--k", "2")
    assert done.returncode == 0, done.stderr
    assert "10 documents, 20 draws, 3 documents held out" in done.stdout
    done = tidecache("cache", "slice", str(source), "--out", out, "--drop-lane", "gold")
    assert (done.returncode, done.stderr) == (
        1, "error: --drop-lane: expected topk, found 'gold': the gold lane is always there\n",
    )  # fmt: skip
