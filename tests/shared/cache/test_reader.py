"""The reader: order, filters, contexts, added lanes, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from shared.cache import manifest as manifests
from shared.cache import open_cache
from shared.cache.manifest import FileRecord, seal
from shared.cache.parquet import encode, footer_of
from shared.cache.records import ShardRange
from shared.cache.verify import verify
from shared.cache.writer import CacheWriter
from shared.errors import TidecacheError
from tests.shared.cache import synthetic

BOTH = ("compdemo", "plain")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache")
    synthetic.build(path, contexts=BOTH)
    return path


def test_draws_come_by_document_then_draw(folder):
    keys = [(d.stored.position, d.draw) for d in open_cache(folder).iter_draws()]
    assert keys == [(p, k) for p in range(12) if p != 2 for k in range(4)]


def test_order_does_not_depend_on_shards(tmp_path, folder):
    writer = CacheWriter.open(tmp_path, synthetic.spec(contexts=BOTH), synthetic.vocabulary())
    for shard in (ShardRange(0, 6, 2, 4), ShardRange(6, 12, 0, 4), ShardRange(0, 3, 0, 2), ShardRange(3, 6, 0, 2)):
        synthetic.write(writer, shard, drop=(2,))
    writer.finish()
    a, b = list(open_cache(tmp_path).iter_draws()), list(open_cache(str(folder)).iter_draws())
    assert [(d.document, d.draw, d.timestep) for d in a] == [(d.document, d.draw, d.timestep) for d in b]
    for left, right in zip(a, b, strict=True):
        np.testing.assert_array_equal(left.gold_logp, right.gold_logp)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.3), (0.3, 0.6), (0.9, 1.0), (0.5, 0.5)])
def test_timestep_filter(folder, low, high):
    cache = open_cache(folder)
    expected = [(d.document, d.draw) for d in cache.iter_draws() if low <= d.timestep <= high]
    assert [(d.document, d.draw) for d in cache.iter_draws(low, high)] == expected


def test_timestep_filter_keeps_the_bounds(folder):
    cache = open_cache(folder)
    t = next(iter(cache.iter_draws())).timestep
    assert [d.timestep for d in cache.iter_draws(t, t)] == [t]


def test_contexts(folder):
    cache = open_cache(folder)
    assert cache.default_context == "compdemo"
    for a, b in zip(cache.iter_draws(), cache.iter_draws(context="plain"), strict=True):
        np.testing.assert_array_equal(a.gold_logp, a.gold_logp_of("compdemo"))
        np.testing.assert_array_equal(a.gold_logp_of("plain"), b.gold_logp)
        if len(a.chunks):
            assert a.candidates != b.candidates
    with pytest.raises(TidecacheError, match="compdemo, plain"):
        next(cache.iter_draws(context="demo"))


def test_stored_documents_are_the_prepared_ones(folder):
    shard = open_cache(folder).read_shard(1)
    assert [d.position for d in shard.documents] == [4, 5, 6, 7]
    for document in shard.documents:
        prepared = synthetic.document(document.position)
        assert (document.key, document.name, document.cut) == (prepared.key, prepared.name, prepared.cut)
        assert document.messages == prepared.messages
        assert (
            b"".join(document.chunk_bytes(c) for c in range(len(document.chunks)))
            == prepared.messages[0].content.encode()
        )
        np.testing.assert_array_equal(document.token_ids_N, prepared.teacher.ids_L)


def test_vocabulary(folder):
    words, ours = open_cache(folder).vocabulary(), synthetic.vocabulary()
    assert (words.name, words.digest, list(words.token_bytes)) == (ours.name, ours.digest, list(ours.token_bytes))
    np.testing.assert_array_equal(words.special_V, ours.special_V)


def test_no_candidates_without_a_topk_lane(tmp_path):
    synthetic.build(tmp_path, documents=4, lanes=("gold",))
    draw = next(iter(open_cache(tmp_path).iter_draws()))
    assert len(draw.gold_logp) == len(draw.chunks)
    with pytest.raises(TidecacheError, match="no topk lane"):
        _ = draw.candidates


def test_a_lane_in_a_file_of_its_own(tmp_path):
    """Format v1: a lane that is added later comes as another likelihoods file, under the widened spec."""
    synthetic.build(tmp_path / "whole", documents=4, draws=4)
    writer = synthetic.build(tmp_path / "split", documents=4, draws=4)
    root, receipt = tmp_path / "split", writer.completed[0]
    path = root / receipt.likelihoods[0].path
    table = pq.read_table(path)
    late = [c for c in table.column_names if "topk" in c or "log_z" in c]
    gold = [c for c in table.column_names if c not in late]
    metadata = footer_of(pq.read_metadata(path).metadata)
    records = []
    for name, columns, print_ in (
        (receipt.likelihoods[0].path, gold, "0" * 32),
        (f"shards/{receipt.range.name}.topk.parquet", ["document", "draw", "timestep", *late], metadata["fingerprint"]),
    ):
        data = encode(table.select(columns), {**metadata, "fingerprint": print_})
        (root / name).write_bytes(data)
        records.append(FileRecord.of(name, data, table.num_rows, columns))
    split = manifests.Receipt(**{**vars(receipt), "likelihoods": tuple(records)})
    manifests.write_receipt(root, split)
    whole = manifests.read_manifest(root)
    derived = manifests.derive(whole.spec, whole.vocabulary, [split], widened_from=("0" * 32,))
    (root / "manifest.json").write_bytes(seal(derived.to_json()))
    for low, high in ((0.0, 1.0), (0.2, 0.7)):
        for a, b in zip(
            open_cache(tmp_path / "whole").iter_draws(low, high), open_cache(root).iter_draws(low, high), strict=True
        ):
            assert (a.document, a.draw, a.candidates) == (b.document, b.draw, b.candidates)
            np.testing.assert_array_equal(a.gold_logp, b.gold_logp)
    assert verify(root).problems == ()
    (root / "manifest.json").write_bytes(seal({**derived.to_json(), "widened_from": []}))
    with pytest.raises(TidecacheError, match="belongs to another cache"):
        list(open_cache(root).iter_draws())


# --- refusals ----------------------------------------------------------------------------------------------------


def edited(folder, tmp_path, change):
    """A manifest of which `change` has edited the JSON, with a digest that agrees with it."""
    data = json.loads((folder / "manifest.json").read_text())
    change(data)
    (tmp_path / "manifest.json").write_bytes(seal(data))
    return tmp_path


@pytest.mark.parametrize(
    "path",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "shards/../../x",
        "shards\\..\\x",
        "C:x",
        "",
        "a//b",
        "./a",
        ".hidden",
        "a\x00b",
        7,
        None,
    ],
)
@pytest.mark.parametrize("where", ["vocabulary", "documents", "likelihoods"])
def test_paths_that_lead_out_are_refused(folder, tmp_path, path, where):
    def change(data):
        record = data["vocabulary"] if where == "vocabulary" else data["shards"][0][where]
        (record[0] if isinstance(record, list) else record)["path"] = path

    with pytest.raises(TidecacheError, match="lead out of it"):
        open_cache(edited(folder, tmp_path, change))


def test_a_huge_manifest_is_refused_unread(tmp_path):
    with open(tmp_path / "manifest.json", "wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(TidecacheError, match="expected at most"):
        open_cache(tmp_path)


def test_totals_that_do_not_follow_are_refused(folder, tmp_path):
    with pytest.raises(TidecacheError, match="do not follow"):
        open_cache(edited(folder, tmp_path, lambda data: data["totals"].update(draws=45)))


def test_an_edited_manifest_is_refused(folder, tmp_path):
    text = (folder / "manifest.json").read_text().replace('"seed": 0', '"seed": 1')
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(TidecacheError, match="own digest"):
        open_cache(tmp_path)


def test_overlapping_shards_are_refused(folder, tmp_path):
    def change(data):
        data["shards"][1]["range"]["documents"] = [2, 8]

    with pytest.raises(TidecacheError, match="hold the same draws"):
        open_cache(edited(folder, tmp_path, change))


@pytest.mark.parametrize("field", ["spec", "shards", "vocabulary", "widened_from", "content"])
def test_missing_fields_are_refused(folder, tmp_path, field):
    with pytest.raises(TidecacheError):
        open_cache(edited(folder, tmp_path, lambda data: data.pop(field)))


def test_what_is_no_cache(tmp_path, folder):
    with pytest.raises(TidecacheError, match="found nothing"):
        open_cache(tmp_path / "missing")
    with pytest.raises(TidecacheError, match=r"without manifest\.json"):
        open_cache(tmp_path)
    with pytest.raises(TidecacheError, match=f"name one of them .*{folder.name}"):
        open_cache(folder.parent)
    (tmp_path / "file").write_text("")
    with pytest.raises(TidecacheError, match="found a file"):
        open_cache(tmp_path / "file")
