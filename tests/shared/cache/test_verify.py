"""Damage: whatever happens to a file, `verify` finds it and no reader takes it for data."""

from __future__ import annotations

import dataclasses
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.cache import codec, open_cache, parquet, unpacking
from shared.cache import manifest as manifests
from shared.cache.inspect import inspect_cache
from shared.cache.manifest import FileRecord
from shared.cache.verify import verify
from shared.cache.writer import CacheWriter
from shared.errors import TidecacheError
from tests.shared.cache import synthetic


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache")
    synthetic.build(path, documents=4, per_shard=2, draws=2, drop=())
    return path


def content(cache) -> list[tuple]:
    """All that an iteration yields, comparable."""
    return [
        (d.document, d.draw, d.timestep, d.chunks.tolist(), d.gold_logp.tolist(), d.candidates)
        for d in cache.iter_draws()
    ]


def finds(path: Path) -> str | None:
    """What `verify` finds first."""
    try:
        problems = verify(path).problems
    except TidecacheError as error:
        return str(error)
    return problems[0] if problems else None


def reads_or_refuses(path: Path, expected: list[tuple]) -> None:
    """A reader gives the right rows or a clear error of one line."""
    try:
        found = content(open_cache(path))
    except TidecacheError as error:
        message = str(error)
    else:
        assert found == expected
        return
    assert "\n" not in message
    assert str(path) in message


def test_a_sound_cache_has_no_problems(folder):
    report = verify(folder)
    assert report.problems == ()
    assert report.files == sum(1 for p in folder.rglob("*") if p.is_file())
    assert report.draws == 8


def test_200_bit_flips(folder, tmp_path):
    """Each over all files' bits: found by `verify`, and in no reader's rows."""
    expected = content(open_cache(folder))
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    randomness = random.Random(0)
    for _ in range(200):
        path = copy / randomness.choice(files)
        original = path.read_bytes()
        changed = bytearray(original)
        bit = randomness.randrange(8 * len(changed))
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        assert finds(copy), f"bit {bit} of {path.name}"
        reads_or_refuses(copy, expected)
        path.write_bytes(original)
    assert finds(copy) is None


@pytest.mark.parametrize("damage", ["missing", "empty", "half", "longer"])
def test_truncated_and_missing_files(folder, tmp_path, damage):
    expected = content(open_cache(folder))
    for name in sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file()):
        shutil.copytree(folder, tmp_path / "copy")
        path = tmp_path / "copy" / name
        data = path.read_bytes()
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes({"empty": b"", "half": data[: len(data) // 2], "longer": data + b"\x00"}[damage])
        problem = finds(tmp_path / "copy")
        assert problem is not None, name
        assert name.name in problem
        reads_or_refuses(tmp_path / "copy", expected)
        shutil.rmtree(tmp_path / "copy")


def test_the_advice_for_a_damaged_shard_works(folder, tmp_path):
    """Remove the receipt, run the capture again: only that shard is done anew."""
    shutil.copytree(folder, tmp_path / "copy")
    [path] = (tmp_path / "copy" / "shards").glob("00000002*likelihoods.parquet")
    path.write_bytes(path.read_bytes()[:100])
    [problem] = verify(tmp_path / "copy").problems
    receipt = Path(problem.split("remove ")[1].split(" and run")[0])
    assert receipt.exists()
    receipt.unlink()
    synthetic.build(tmp_path / "copy", documents=4, per_shard=2, draws=2, drop=())
    assert verify(tmp_path / "copy").problems == ()
    assert content(open_cache(tmp_path / "copy")) == content(open_cache(folder))


def test_pages_are_checked_by_other_readers_too(folder, tmp_path):
    """A flipped bit in a page is found by pyarrow's own checksum verification."""
    [path] = (folder / "shards").glob("00000000*likelihoods.parquet")
    column = pq.read_metadata(path).row_group(0).column(8)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size - 5] ^= 1
    (tmp_path / "flipped.parquet").write_bytes(data)
    with pytest.raises(OSError, match="CRC"):
        pq.read_table(tmp_path / "flipped.parquet", page_checksum_verification=True)


@pytest.mark.parametrize(("limit", "value"), [("MAX_VALUES", 10), ("MAX_UNCOMPRESSED", 100), ("MAX_FOOTER_BYTES", 100)])
def test_bombs_are_refused(folder, monkeypatch, limit, value):
    monkeypatch.setattr(unpacking, limit, value)
    with pytest.raises(TidecacheError, match="refused"):
        content(open_cache(folder))


def test_a_complete_shard_that_the_manifest_lacks(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    empty = CacheWriter.open(tmp_path / "empty", synthetic.spec(), synthetic.vocabulary())
    shutil.copy(empty.folder / "manifest.json", tmp_path / "copy" / "manifest.json")
    assert len(verify(tmp_path / "copy").problems) == 2
    assert "manifest lacks" in verify(tmp_path / "copy").problems[0]


def test_a_damaged_held_out_cache_is_found(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    shutil.copytree(folder, tmp_path / "copy" / "held-out")
    assert len(verify(tmp_path / "copy").paths) == 2
    [path] = (tmp_path / "copy" / "held-out" / "shards").glob("00000002*documents.parquet")
    path.unlink()
    assert "held-out" in str(finds(tmp_path / "copy"))


# --- a cache that is sound to the bit and yet wrong: every digest is made anew ------------------------------------


def rewritten(folder: Path, tmp_path: Path, which: str, change) -> Path:
    """A copy whose first shard has one table changed, with records, receipt and manifest that agree with it."""
    root = tmp_path / "copy"
    shutil.copytree(folder, root)
    manifest = manifests.read_manifest(root)
    receipt = manifest.shards[0]
    record = receipt.documents if which == "documents" else receipt.likelihoods[0]
    table = pq.read_table(root / record.path)
    changed = change(table)
    data = parquet.encode(changed, parquet.footer_of(table.schema.metadata))
    (root / record.path).write_bytes(data)
    fresh = FileRecord.of(record.path, data, changed.num_rows, record.columns)
    receipt = dataclasses.replace(receipt, **{which: fresh if which == "documents" else (fresh,)})
    manifests.write_receipt(root, receipt)
    again = manifests.derive(manifest.spec, manifest.vocabulary, [receipt, *manifest.shards[1:]])
    (root / "manifest.json").write_bytes(manifests.seal(again.to_json()))
    return root


def edit(column: str, function):
    """Change one column's values, row by row."""

    def change(table: pa.Table) -> pa.Table:
        rows = [function(v) for v in table[column].to_pylist()]
        field = table.schema.field(column)
        return table.set_column(table.schema.get_field_index(column), field, pa.array(rows, field.type))

    return change


@pytest.mark.parametrize(
    ("which", "change", "finding"),
    [
        ("likelihoods", edit("timestep", lambda t: t / 2), "timestep or split"),
        ("likelihoods", edit("split", lambda v: [not x for x in v]), "timestep or split"),
        ("likelihoods", edit("compdemo_gold_logp", lambda v: [x * 2 for x in v]), "content digest"),
        ("likelihoods", edit("compdemo_gold_logp", lambda v: [float("nan")] * len(v)), "finite"),
        ("likelihoods", edit("compdemo_gold_logp", lambda v: [1.0] * len(v)), "finite"),
        ("likelihoods", edit("compdemo_gold_logp", lambda v: [*v, -1.0]), "one per token"),
        ("likelihoods", edit("compdemo_topk_logp", lambda v: v[::-1]), "descending"),
        ("likelihoods", edit("compdemo_topk_logp", lambda v: v[1:]), "do not fit"),
        ("likelihoods", edit("compdemo_topk_ids", lambda v: [100_000] * len(v)), "ids of the vocabulary"),
        ("likelihoods", edit("compdemo_topk_ids", lambda v: v[1:]), "k per token"),
        ("likelihoods", edit("compdemo_gold_logp", lambda v: [None] * len(v)), "nulls"),
        ("likelihoods", edit("draw", lambda k: 1 - k), "not in order"),
        ("likelihoods", edit("document", lambda d: "0" * 32), "has no document"),
        ("likelihoods", lambda table: table.slice(1), "each draw"),
        ("documents", edit("position", lambda p: p + 99), "position"),
        ("documents", edit("token_count", lambda v: [0, *v[1:]]), "without bytes or tokens"),
        ("documents", edit("token_ids", lambda v: v[::-1]), "do not spell"),
        ("documents", edit("chunk_stop", lambda v: [x + 1 for x in v]), "not within its message"),
        ("documents", edit("chunk_stop", lambda v: [*(x + 1 for x in v[:-1]), v[-1]]), "overlap"),
        ("documents", edit("name", lambda v: v + "!"), None),
        ("documents", edit("cut", lambda v: True), "counts"),
    ],
)
def test_invariants_of_rows(folder, tmp_path, which, change, finding):
    root = rewritten(folder, tmp_path, which, change)
    if finding is None:  # a name is no part of a document's identity
        assert finds(root) is None
        return
    assert finding in str(finds(root))
    assert len(verify(root).problems) == 1


def test_masks_follow_from_the_seed(folder, tmp_path):
    def turned(table: pa.Table) -> pa.Table:
        return edit("masked", lambda v: v[::-1])(table)

    assert finds(rewritten(folder, tmp_path, "likelihoods", turned)) is not None


def test_stored_values_keep_to_the_stated_precision(folder):
    """What the files hold is already rounded: rounding again changes nothing."""
    for draw in open_cache(folder).iter_draws():
        scores = draw.scores["compdemo"]
        np.testing.assert_array_equal(codec.round_significant(scores.gold_logp_N, codec.LOGP_BITS), scores.gold_logp_N)


def test_a_held_out_part_that_was_only_begun_is_none(tmp_path):
    """A capture that was killed before the manifest of its held-out documents was there."""
    synthetic.build(tmp_path)
    (tmp_path / "held-out").mkdir()
    (tmp_path / "held-out" / "teacher_vocab.parquet").write_bytes(b"")
    assert verify(tmp_path).problems == ()
    assert inspect_cache(tmp_path).held_out is None
