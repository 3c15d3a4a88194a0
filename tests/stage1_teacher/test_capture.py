"""The capture driver: the same cache whatever the shard size, the batches, the interruptions and the order of growth."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest

from shared.cache import open_cache
from shared.cache.writer import CacheWriter
from shared.documents import Message, RawDocument
from shared.errors import TidecacheError
from stage1_teacher import capture as driver
from stage1_teacher.backends import Scores, Teacher, load
from stage1_teacher.capture import Capture, Extent
from stage1_teacher.planning import ShardPart
from stage1_teacher.shards import LocalEngine, ShardMaker
from tests.stage1_teacher.captures import HashTeacher, make_spec, texts, tokenizers, write_corpus
from tests.stage1_teacher.models import save_model

TEACHER, STUDENT = tokenizers()
SPEC = make_spec(contexts=("compdemo", "plain"), held_out="hash:0.2", k=3, batch_tokens=400)


class Silent:
    """A watcher that only keeps count."""

    def __init__(self) -> None:
        self.documents = self.positions = self.shards = self.passed = 0

    def skipped(self, documents: int) -> None:
        self.passed += documents

    def begun(self, documents: int, chunks: int, positions: int) -> None:
        self.documents += documents

    def scored(self, positions: int) -> None:
        self.positions += positions

    def written(self, receipt: object) -> None:
        self.shards += 1


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    folder = save_model(tmp_path_factory.mktemp("models") / "random", vocabulary=TEACHER.vocabulary, tokenizer=True)
    return load(folder, batch_tokens=SPEC.batch_tokens)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_corpus(tmp_path_factory.mktemp("corpus") / "small.jsonl", 30))


def run(
    teacher: object,
    folder: Path,
    corpus: str,
    spec=SPEC,
    draws: int = 2,
    size: int = 8,
    watcher: object = None,
    **extent,
):
    engine = LocalEngine(teacher, ShardMaker(spec, TEACHER, [STUDENT]))
    return Capture(engine, TEACHER, spec, Extent(corpus, draws, size, **extent), folder, watcher or Silent()).run()


def rows(folder: Path) -> dict:
    """Everything of a cache by (document, draw)."""
    return {(d.document, d.draw): d for d in open_cache(folder).iter_draws()}


def assert_same_draws(a: dict, b: dict, tolerance: float) -> None:
    """Equal documents, timesteps, masks, splits; likelihoods within the tolerance and what storage rounds."""
    assert a.keys() == b.keys()
    for key, x in a.items():
        y = b[key]
        assert x.timestep == y.timestep
        assert np.array_equal(x.chunks, y.chunks)
        assert np.array_equal(x.split, y.split)
        assert np.array_equal(x.stored.token_ids_N, y.stored.token_ids_N)
        assert x.stored.position == y.stored.position
        for context, scores in x.scores.items():
            other = y.scores[context]
            np.testing.assert_allclose(scores.gold_logp_N, other.gold_logp_N, rtol=2**-10, atol=tolerance)
            np.testing.assert_allclose(scores.topk_logp_MK, other.topk_logp_MK, rtol=2**-10, atol=tolerance)


@pytest.fixture(scope="module")
def whole(teacher: Teacher, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "cache"
    run(teacher, folder, corpus)
    return folder


def test_what_is_stored_is_what_the_teacher_says(teacher: Teacher, corpus: str, whole: Path) -> None:
    """Each stored draw, asked for again by itself."""
    from stage1_teacher.compdemo import Subject, plan_draw, records_of, requests_of
    from tests.stage1_teacher.captures import prepared

    stored = rows(whole)
    assert {d.timestep for d in stored.values()} != {0}
    checked = 0
    for (_, draw), found in list(stored.items())[::7]:
        document = prepared(found.stored.messages[0].content)
        assert document.key == found.document
        planned = plan_draw(SPEC, Subject(0, document), draw)
        (expected,) = records_of(SPEC, [planned], teacher.score(requests_of(SPEC, [planned]), SPEC.k))
        assert np.array_equal(np.flatnonzero(expected.masked_C), found.chunks)
        for context in SPEC.contexts:
            a, b = expected.contexts[context], found.scores[context]
            np.testing.assert_allclose(b.gold_logp_N, a.gold_logp_N, rtol=2**-10, atol=2e-5)
            checked += len(a.gold_logp_N)
    assert checked > 100


def test_held_out_is_a_cache_of_its_own_with_the_same_spec(corpus: str, whole: Path) -> None:
    train, held_out = open_cache(whole), open_cache(whole / "held-out")
    assert train.spec == held_out.spec == SPEC
    a = {d.document for d in train.iter_draws()}
    b = {d.document for d in held_out.iter_draws()}
    assert a
    assert b
    assert not a & b
    assert len(a | b) == 30
    assert Extent(corpus, 2, 8).count(SPEC, threading.Event()) == {False: len(a), True: len(b)}


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_shard_sizes_agree(teacher: Teacher, corpus: str, whole: Path, tmp_path: Path, size: int) -> None:
    run(teacher, tmp_path / "other", corpus, size=size)
    assert_same_draws(rows(tmp_path / "other"), rows(whole), 2e-5)
    documents = len({d.document for d in open_cache(whole).iter_draws()})
    assert len(open_cache(tmp_path / "other").shards) == -(-documents // size)


@pytest.mark.parametrize("budget", [1, 100_000])
def test_batch_budgets_agree(corpus: str, teacher: Teacher, whole: Path, tmp_path: Path, budget: int) -> None:
    other = load(teacher.folder, batch_tokens=budget)
    run(other, tmp_path / "other", corpus, spec=dataclasses.replace(SPEC, batch_tokens=budget))
    assert_same_draws(rows(tmp_path / "other"), rows(whole), 2e-5)


def test_a_finished_capture_has_nothing_left_to_do(corpus: str, teacher: Teacher, whole: Path) -> None:
    before = open_cache(whole).manifest
    files = {p: p.stat().st_mtime_ns for p in whole.rglob("*.parquet")}
    watcher = Silent()
    report = run(teacher, whole, corpus, watcher=watcher)
    assert (watcher.documents, watcher.positions, watcher.shards, watcher.passed) == (0, 0, 0, 30)
    assert report.train.shards_written == 0
    assert open_cache(whole).manifest == before
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*.parquet")} == files


class Failing:
    """A teacher that stops working after so many shards."""

    def __init__(self, teacher: Teacher, shards: int, error: BaseException) -> None:
        self._teacher, self._left, self._error = teacher, shards, error
        self.batch_tokens = teacher.batch_tokens

    def score(self, *arguments: object) -> Scores:
        self._left -= 1
        if self._left < 0:
            raise self._error
        return self._teacher.score(*arguments)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), TidecacheError("NaN")])
@pytest.mark.parametrize("shards", [0, 2, 3])
def test_interruptions_change_nothing(
    teacher: Teacher, corpus: str, whole: Path, tmp_path: Path, shards: int, error: BaseException
) -> None:
    """Bit for bit the uninterrupted cache, and nothing is scored twice."""
    folder = tmp_path / "cache"
    with pytest.raises(type(error)):
        run(Failing(teacher, shards, error), folder, corpus)
    assert len(open_cache(folder).shards) == min(shards, 3)  # entered in the manifest all the same
    watcher = Silent()
    run(teacher, folder, corpus, watcher=watcher)
    for part in ("", "held-out"):
        assert open_cache(folder / part).manifest.content == open_cache(whole / part).manifest.content
    everything = Silent()
    run(teacher, tmp_path / "again", corpus, watcher=everything)
    assert watcher.shards == everything.shards - shards


def test_growth_in_documents_and_draws(teacher: Teacher, corpus: str, whole: Path, tmp_path: Path) -> None:
    """First few documents and one draw, then more of either: the cache that one run would have made."""
    folder = tmp_path / "cache"
    run(teacher, folder, corpus, draws=1, limit=11)
    few = rows(folder)
    run(teacher, folder, corpus, draws=2, limit=20)
    run(teacher, folder, corpus, draws=2)
    assert_same_draws(rows(folder), rows(whole), 2e-5)
    grown = rows(folder)
    for key, draw in few.items():  # what was there is there still, bit for bit
        assert np.array_equal(draw.scores["plain"].gold_logp_N, grown[key].scores["plain"].gold_logp_N)
    run(teacher, folder, corpus, draws=1, limit=5)  # a smaller extent takes nothing away
    assert rows(folder).keys() == grown.keys()


@pytest.mark.parametrize("shared", [True, False])
def test_parts_are_one_capture(teacher: Teacher, corpus: str, tmp_path: Path, shared: bool) -> None:
    """One job's files, byte for byte, written by three; progress counts each job's own documents."""
    run(teacher, tmp_path / "one", corpus, size=4)
    expected = {p.relative_to(tmp_path / "one"): p.read_bytes() for p in (tmp_path / "one").rglob("shards/*")}
    folders, documents = [], 0
    for number in (3, 1, 2):
        folders.append(tmp_path / ("parts" if shared else f"part{number}"))
        part, watcher = ShardPart(number, 3), Silent()
        report = run(teacher, folders[-1], corpus, size=4, watcher=watcher, part=part)
        counts = Extent(corpus, 2, 4, part=part).count(SPEC, threading.Event())
        assert report.held_out
        assert (counts[False], counts[True]) == (report.train.documents_seen, report.held_out.documents_seen)
        assert watcher.documents == sum(counts.values())
        documents += watcher.documents
    assert documents == 30
    assert {p.relative_to(f): p.read_bytes() for f in folders for p in f.rglob("shards/*")} == expected
    if shared:
        for part in ("", "held-out"):
            one, parts = (open_cache(tmp_path / name / part).manifest for name in ("one", "parts"))
            assert one.content == parts.content
            assert one.totals == parts.totals


def test_more_parts_than_shards(teacher: Teacher, corpus: str, tmp_path: Path) -> None:
    report = run(teacher, tmp_path / "cache", corpus, size=1000, part=ShardPart(2, 2))
    assert (report.train.documents_seen, len(report.train.manifest.shards)) == (0, 0)


def test_another_spec_is_refused_field_by_field(teacher: Teacher, corpus: str, whole: Path) -> None:
    with pytest.raises(
        TidecacheError, match=r"another spec .*seed: the cache has 0, this capture 9.*k: the cache has 3"
    ) as error:
        run(teacher, whole, corpus, spec=dataclasses.replace(SPEC, k=5, seed=9))
    assert str(whole) in str(error.value)


def test_another_corpus_is_refused(teacher: Teacher, whole: Path, tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other.jsonl", 30, seed=1)
    before = open_cache(whole).manifest
    with pytest.raises(TidecacheError, match="not those that the cache holds"):
        run(teacher, whole, str(other), draws=4)
    assert open_cache(whole).manifest == before


def test_duplicates_dropped_and_cut_documents_are_counted(tmp_path: Path) -> None:
    import json

    good = texts(3)
    lines = [*good, good[0], "", "bad \ud800 surrogate", " ".join(texts(40, seed=5))]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    spec = dataclasses.replace(SPEC, held_out="none")
    report = run(HashTeacher(TEACHER.vocabulary), tmp_path / "cache", str(path), spec=spec)
    totals = report.train.manifest.totals
    assert report.held_out is None
    assert totals.documents == 4
    assert totals.cut == 1
    assert totals.dropped == {"empty": 1, "irreproducible bytes": 1}
    assert set(report.train.examples) == set(totals.dropped)
    assert report.train.documents_seen == 6
    assert report.to_json()["train"]["totals"]["dropped"] == {"empty": 1, "irreproducible bytes": 1}
    assert [d.position for d in open_cache(tmp_path / "cache").read_documents(0)] == [0, 1, 2, 5]


def test_a_corpus_of_which_nothing_remains(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(TidecacheError, match=r"not one document could be captured \(1 × empty"):
        run(
            HashTeacher(TEACHER.vocabulary),
            tmp_path / "a",
            str(tmp_path / "empty.jsonl"),
            dataclasses.replace(SPEC, held_out="none"),
        )
    (tmp_path / "nothing.jsonl").write_text("")
    with pytest.raises(TidecacheError, match="is empty"):
        run(HashTeacher(TEACHER.vocabulary), tmp_path / "b", str(tmp_path / "nothing.jsonl"))
    held = dataclasses.replace(SPEC, held_out="hash:0.999999")
    with pytest.raises(TidecacheError, match="all of them are held out"):
        run(HashTeacher(TEACHER.vocabulary), tmp_path / "c", str(write_corpus(tmp_path / "few.jsonl", 3)), held)


def test_a_failing_writer_stops_the_teacher(tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error comes out, at the latest two shards on; nobody waits for ever."""

    def full(*_: object) -> None:
        raise TidecacheError("the disk is full")

    monkeypatch.setattr(CacheWriter, "commit", full)
    teacher, calls = HashTeacher(TEACHER.vocabulary), []
    original = teacher.score
    teacher.score = lambda *a: (calls.append(1), original(*a))[1]  # type: ignore[method-assign]
    with pytest.raises(TidecacheError, match="disk is full"):
        run(teacher, tmp_path / "cache", corpus, size=1)
    assert len(calls) <= 2


def test_a_failing_corpus_keeps_what_is_complete(tmp_path: Path, teacher: Teacher) -> None:
    path = write_corpus(tmp_path / "torn.jsonl", 30)
    documents = Extent(str(path), 1, 8).count(SPEC, threading.Event())[False]
    path.write_text(path.read_text() + '{"text": \n')
    with pytest.raises(TidecacheError, match=r"torn\.jsonl:31 is not valid JSON"):
        run(teacher, tmp_path / "cache", str(path), size=8, draws=1)
    assert len(open_cache(tmp_path / "cache").shards) == documents // 8 > 0


def test_documents_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more of the corpus in memory than three shards."""
    read, most = 0, 0

    def endless(*_: object, **__: object):
        nonlocal read
        for number in range(200):
            read += 1
            yield RawDocument(str(number), (Message("text", f"number {number}\n", True),), chat=False)

    monkeypatch.setattr(driver, "open_corpus", endless)
    teacher = HashTeacher(TEACHER.vocabulary)

    class Watch(Silent):
        def begun(self, documents: int, chunks: int, positions: int) -> None:
            nonlocal most
            most = max(most, read - self.documents)
            super().begun(documents, chunks, positions)

    run(
        teacher,
        tmp_path / "cache",
        "endless",
        spec=dataclasses.replace(SPEC, held_out="none"),
        draws=1,
        size=4,
        watcher=Watch(),
    )
    assert read == 200
    assert most <= 13


def test_the_token_law_end_to_end(tmp_path: Path, corpus: str) -> None:
    spec = make_spec(mask_law="token", held_out="none", lanes=("gold",))
    run(HashTeacher(TEACHER.vocabulary), tmp_path / "cache", corpus, spec=spec)
    assert len(rows(tmp_path / "cache")) == 60
