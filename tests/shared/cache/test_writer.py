"""The writer: commits, resumption, growth, refusals, full disks."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shared.cache import files, open_cache
from shared.cache import writer as writer_module
from shared.cache.manifest import read_manifest, seal
from shared.cache.records import ShardRange
from shared.cache.verify import verify
from shared.cache.vocabulary import TeacherVocabulary
from shared.cache.writer import CacheWriter
from shared.errors import TidecacheError
from shared.spec import differences
from tests.conftest import ROOT
from tests.shared import test_spec
from tests.shared.cache import synthetic


def content(folder) -> str:
    return read_manifest(Path(folder)).content


def snapshot(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def test_a_cache_is_complete_and_in_order(tmp_path):
    synthetic.build(tmp_path)
    totals = read_manifest(tmp_path).totals
    assert (totals.documents, totals.draws, totals.dropped) == (11, 44, {"empty": 1})
    assert sum(totals.timesteps) == 44
    assert totals.size_bytes == sum(p.stat().st_size for p in tmp_path.rglob("*.parquet"))
    assert verify(tmp_path).problems == ()


def test_equal_captures_give_equal_bytes(tmp_path):
    synthetic.build(tmp_path / "a")
    synthetic.build(tmp_path / "b")
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def test_content_does_not_depend_on_shards_or_order(tmp_path):
    synthetic.build(tmp_path / "a", per_shard=4)
    synthetic.build(tmp_path / "b", per_shard=12)
    writer = CacheWriter.open(tmp_path / "c", synthetic.spec(), synthetic.vocabulary())
    for first in (8, 0, 4):
        for draws in ((2, 4), (0, 2)):
            synthetic.write(writer, ShardRange(first, first + 4, *draws), drop=(2,))
    writer.finish()
    assert content(tmp_path / "a") == content(tmp_path / "b") == content(tmp_path / "c")
    assert verify(tmp_path / "c").problems == ()


def test_content_depends_on_the_rows(tmp_path):
    synthetic.build(tmp_path / "a")
    synthetic.build(tmp_path / "b", draws=3)
    synthetic.build(tmp_path / "c", seed=1)
    assert len({content(tmp_path / name) for name in "abc"}) == 3


def test_growing_equals_capturing_at_once(tmp_path):
    synthetic.build(tmp_path / "once", documents=8, draws=4)
    writer = synthetic.build(tmp_path / "grown", documents=4, draws=2)
    before = snapshot(tmp_path / "grown")
    for shard in (ShardRange(0, 4, 2, 4), ShardRange(4, 8, 0, 2), ShardRange(4, 8, 2, 4)):
        synthetic.write(writer, shard, drop=(2,))
    writer.finish()
    assert content(tmp_path / "once") == content(tmp_path / "grown")
    after = snapshot(tmp_path / "grown")
    assert all(after[name] == data for name, data in before.items() if name != "manifest.json")
    assert len(list((tmp_path / "grown" / "shards").glob("*.documents.parquet"))) == 2
    assert read_manifest(tmp_path / "grown").totals.documents == 7


def test_a_complete_shard_is_not_written_again(tmp_path):
    writer = synthetic.build(tmp_path)
    before = {p: p.stat().st_ino for p in tmp_path.rglob("*") if p.is_file()}
    again = CacheWriter.open(tmp_path, synthetic.spec(), synthetic.vocabulary())
    synthetic.write(again, ShardRange(0, 4, 0, 4), drop=(2,))
    again.finish()
    assert {p: p.stat().st_ino for p in tmp_path.rglob("*") if p.is_file()} == before
    assert again.completed == writer.completed
    assert [r.corpus for r in again.completed] == [f"corpus {r.range.documents_name}" for r in again.completed]


def test_the_manifest_follows_from_the_receipts(tmp_path):
    synthetic.build(tmp_path)
    expected = (tmp_path / "manifest.json").read_bytes()
    empty = CacheWriter.open(tmp_path / "empty", synthetic.spec(), synthetic.vocabulary())
    (tmp_path / "manifest.json").write_bytes((empty.folder / "manifest.json").read_bytes())
    CacheWriter.open(tmp_path, synthetic.spec(), synthetic.vocabulary())
    assert (tmp_path / "manifest.json").read_bytes() == expected


def words_of(spec) -> TeacherVocabulary:
    size = spec.teacher.vocabulary
    return TeacherVocabulary("words", spec.teacher.tokenizer, [b"x"] * size, np.zeros(size, bool))


@pytest.mark.parametrize(("field", "other"), test_spec.mutations(), ids=[name for name, _ in test_spec.mutations()])
def test_another_spec_is_refused_and_the_field_named(tmp_path, field, other):
    ours = test_spec.SPEC
    CacheWriter.open(tmp_path, ours, words_of(ours))
    before = snapshot(tmp_path)
    with pytest.raises(TidecacheError) as refused:
        CacheWriter.open(tmp_path, other, words_of(other))
    [(name, mine, theirs)] = differences(ours, other)
    assert name == field
    for part in (field, repr(mine), repr(theirs), str(tmp_path)):
        assert part in str(refused.value)
    assert "\n" not in str(refused.value)
    assert snapshot(tmp_path) == before


def test_all_differing_fields_are_named(tmp_path):
    synthetic.build(tmp_path, documents=4)
    with pytest.raises(TidecacheError, match=r"seed: the cache has 0, this capture 5.*|k: the cache has 4") as refused:
        CacheWriter.open(tmp_path, synthetic.spec(seed=5, k=8), synthetic.vocabulary())
    assert "seed" in str(refused.value)
    assert "k:" in str(refused.value)


def test_a_newer_format_is_refused(tmp_path):
    synthetic.build(tmp_path, documents=4)
    data = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_bytes(seal({**data, "format": 2, "novelty": True}))
    for opened in (
        lambda: open_cache(tmp_path),
        lambda: CacheWriter.open(tmp_path, synthetic.spec(), synthetic.vocabulary()),
    ):
        with pytest.raises(TidecacheError, match="newer tidecache"):
            opened()


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("valuable")
    with pytest.raises(TidecacheError, match=r"thesis\.tex"):
        CacheWriter.open(tmp_path, synthetic.spec(), synthetic.vocabulary())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.tex"]
    with pytest.raises(TidecacheError, match="found a file"):
        CacheWriter.open(tmp_path / "thesis.tex", synthetic.spec(), synthetic.vocabulary())


def test_another_process_may_create_the_cache_between_two_looks(tmp_path, monkeypatch):
    """One looks for the manifest, another writes it, the first looks at what else is in the folder."""
    look = writer_module.refuse_foreign_folder

    def meanwhile(root):
        monkeypatch.setattr(writer_module, "refuse_foreign_folder", look)
        CacheWriter.open(root, synthetic.spec(), synthetic.vocabulary())
        look(root)

    monkeypatch.setattr(writer_module, "refuse_foreign_folder", meanwhile)
    writer = CacheWriter.open(tmp_path / "new", synthetic.spec(), synthetic.vocabulary())
    assert read_manifest(tmp_path / "new").spec == writer.spec


def test_overlapping_shards_are_refused(tmp_path):
    writer = synthetic.build(tmp_path, documents=4)
    with pytest.raises(TidecacheError, match="documents-per-shard"):
        synthetic.write(writer, ShardRange(2, 6, 0, 4), drop=(2,))
    assert verify(tmp_path).problems == ()


def test_a_large_shard_is_refused_and_a_smaller_one_goes_on(tmp_path, monkeypatch):
    writer = CacheWriter.open(tmp_path, synthetic.spec(), synthetic.vocabulary())
    synthetic.write(writer, ShardRange(0, 2, 0, 2))
    size = sum(r.size_bytes for r in (writer.completed[0].documents, *writer.completed[0].likelihoods))
    monkeypatch.setattr("shared.cache.encoding.MAX_SHARD_BYTES", size + size // 5)
    with pytest.raises(TidecacheError, match=r"run the capture again with --documents-per-shard [1-4];"):
        synthetic.write(writer, ShardRange(2, 12, 0, 2))
    synthetic.write(writer, ShardRange(2, 4, 0, 2))
    assert [r.range for r in writer.finish().shards] == [ShardRange(0, 2, 0, 2), ShardRange(2, 4, 0, 2)]
    assert verify(tmp_path).problems == ()


def test_other_documents_at_the_same_positions_are_refused(tmp_path):
    writer = synthetic.build(tmp_path, documents=4, draws=2)
    with pytest.raises(TidecacheError, match="differ from those of this corpus"):
        synthetic.write(writer, ShardRange(0, 4, 2, 4), drop=(2,), chunks=13)
    assert verify(tmp_path).problems == ()


def test_an_empty_shard_and_an_empty_draw(tmp_path):
    writer = CacheWriter.open(tmp_path, synthetic.spec(), synthetic.vocabulary())
    synthetic.write(writer, ShardRange(0, 2, 0, 2), drop=(0, 1))
    synthetic.write(writer, ShardRange(2, 6, 0, 8), chunks=1)  # many draws without a masked chunk
    writer.finish()
    draws = list(open_cache(tmp_path).iter_draws())
    assert len(draws) == 32
    assert any(not len(d.chunks) and d.candidates == [] and len(d.gold_logp) == 0 for d in draws)
    assert verify(tmp_path).problems == ()


@pytest.mark.parametrize("value", [np.nan, -np.inf, 1.0])
@pytest.mark.parametrize("field", ["gold_logp_N", "topk_logp_MK"])
def test_bad_likelihoods_name_the_teacher(tmp_path, value, field):
    writer = CacheWriter.open(tmp_path, synthetic.spec(), synthetic.vocabulary())
    prepared = synthetic.document(0)
    record = synthetic.draw(writer.spec, 0, prepared, 1)
    getattr(record.contexts["compdemo"], field).flat[0] = value
    with pytest.raises(TidecacheError, match="the teacher synthetic gave"):
        writer.write_shard(ShardRange(0, 1, 1, 2), [(0, prepared)], [], [record], "corpus", 4096)
    assert writer.completed == ()


def test_records_that_do_not_fit_are_a_defect_of_the_caller(tmp_path):
    writer = CacheWriter.open(tmp_path, synthetic.spec(), synthetic.vocabulary())
    prepared = synthetic.document(0)
    record = synthetic.draw(writer.spec, 0, prepared, 0)
    shard = ShardRange(0, 1, 0, 1)
    scores = record.contexts["compdemo"]
    wrong = [
        [],
        [record, record],
        [dataclasses.replace(record, draw=3)],
        [dataclasses.replace(record, masked_C=record.masked_C[:-1])],
        [dataclasses.replace(record, split_M=np.append(record.split_M, True))],
        [dataclasses.replace(record, contexts={"plain": scores})],
        [
            dataclasses.replace(
                record, contexts={"compdemo": dataclasses.replace(scores, gold_logp_N=scores.gold_logp_N[:-1])}
            )
        ],
        [
            dataclasses.replace(
                record, contexts={"compdemo": dataclasses.replace(scores, topk_ids=scores.topk_ids[:-1])}
            )
        ],
    ]
    for draws in wrong:
        with pytest.raises(ValueError):  # noqa: PT011 - several sentences
            writer.write_shard(shard, [(0, prepared)], [], draws, "corpus", 4096)
    assert writer.completed == ()


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    writer = synthetic.build(tmp_path, documents=8)
    before = snapshot(tmp_path)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(TidecacheError, match="disk is full") as refused:
        synthetic.write(writer, ShardRange(8, 12, 0, 4))
    assert "run the same command again" in str(refused.value)
    assert snapshot(tmp_path) == before
    monkeypatch.undo()
    synthetic.write(writer, ShardRange(8, 12, 0, 4))
    writer.finish()
    synthetic.build(tmp_path / "other")
    assert content(tmp_path) == content(tmp_path / "other")


def test_a_real_limit_on_file_size_loses_nothing(tmp_path):
    code = f"""
import resource, sys
from tests.shared.cache import synthetic
from shared.errors import TidecacheError
from shared.cache.records import ShardRange
writer = synthetic.build({str(tmp_path / "cache")!r}, documents=4)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
try:
    synthetic.write(writer, ShardRange(4, 8, 0, 4))
except TidecacheError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "limit on file sizes" in out.stdout
    assert not list((tmp_path / "cache").rglob(".*.tmp"))
    assert verify(tmp_path / "cache").problems == ()
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4000


def test_only_leftovers_of_the_dead_are_removed(tmp_path):
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    machine, shards = files._machine(), tmp_path / "shards"
    shards.mkdir()
    alive, own_past = (
        shards / f".a.{machine}-{os.getppid()}-01234567-0.tmp",
        shards / f".b.{machine}-{os.getpid()}-01234567-0.tmp",
    )
    own, gone = (
        shards / f".c.{machine}-{os.getpid()}-{files._TOKEN}-0.tmp",
        shards / f".d.{machine}-{int(dead.stdout)}-01234567-0.tmp",
    )
    elsewhere, elsewhere_old = shards / ".e.00000000-1-01234567-0.tmp", shards / ".f.00000000-1-01234567-0.tmp"
    stranger = shards / ".notes.tmp"
    for path in (alive, own_past, own, gone, elsewhere, elsewhere_old, stranger):
        path.write_text("half a shard")
    os.utime(elsewhere_old, (0, 0))
    CacheWriter.open(tmp_path, synthetic.spec(), synthetic.vocabulary())
    assert sorted(shards.iterdir()) == sorted([alive, own, elsewhere, stranger])


def test_two_creators_agree_on_one_spec(tmp_path):
    """The first manifest is created exclusively: of two captures with different specs one is refused."""
    code = """
import sys
from tests.shared.cache import synthetic
from shared.cache.writer import CacheWriter
from shared.errors import TidecacheError
sys.stdin.readline()
try:
    CacheWriter.open(sys.argv[1], synthetic.spec(seed=int(sys.argv[2])), synthetic.vocabulary())
    print("opened")
except TidecacheError as error:
    print(error)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "cache")]
    both = [
        subprocess.Popen([*command, seed], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for seed in "12"
    ]
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = sorted(process.communicate()[0].strip() for process in both)
    assert answers.count("opened") == 1
    assert "seed" in "".join(answers)
