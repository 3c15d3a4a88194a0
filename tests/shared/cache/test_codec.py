"""Whole packed caches through writer, reader, streams, verify and training, beside raw ones of the same scores."""

from __future__ import annotations

import dataclasses
import shutil
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.cache import codec, columns, format, open_cache
from shared.cache.inspect import inspect_cache
from shared.cache.records import ContextScores, Draw
from shared.cache.slicing import Cut, slice_cache
from shared.cache.stream import DrawStream
from shared.cache.verify import verify
from shared.errors import TidecacheError
from tests.shared.cache import resealed, synthetic

SHAPE = {"contexts": ("compdemo", "plain"), "temperatures": (1.0, 2.0, 0.5), "k": 16, "tail_samples": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("caches")
    for name in ("raw", "packed"):
        synthetic.build(root / name, codec=name, **SHAPE)
    return root


def of(folder) -> list[Draw]:
    return list(open_cache(folder).iter_draws())


def test_ids_and_gold_are_those_of_the_raw_lane_and_the_rest_is_near(folders):
    raw, packed = of(folders / "raw"), of(folders / "packed")
    assert len(raw) == len(packed) > 20
    for a, b in zip(raw, packed, strict=True):
        assert (a.document, a.draw, a.timestep) == (b.document, b.draw, b.timestep)
        for context in ("compdemo", "plain"):
            x, y = a.scores[context], b.scores[context]
            for name in ("gold_logp_N", "topk_ids", "tail_ids", "tail_logp"):
                np.testing.assert_array_equal(getattr(x, name), getattr(y, name))
                assert getattr(x, name).dtype == getattr(y, name).dtype
            assert np.abs(x.topk_logp_MK - y.topk_logp_MK).max(initial=0) < 0.1
            assert (y.topk_logp_MK.dtype, y.log_z_MT.dtype) == (np.float32, np.float32)
            np.testing.assert_array_equal(y.log_z_MT[:, 0], 0.0)
            for index, t in enumerate((1.0, 2.0, 0.5)):
                masses = [np.exp(s.topk_logp_MK.astype(np.float64) / t - s.log_z_MT[:, [index]]).sum(1) for s in (x, y)]
                np.testing.assert_allclose(masses[1], masses[0], atol=0.01)
                assert (masses[1] <= np.maximum(masses[0], 1.0) + 1e-6).all()


def test_what_comes_back_is_what_was_to_be_stored_to_the_bit(folders):
    spec = open_cache(folders / "packed").spec
    for draw in of(folders / "packed"):
        prepared = synthetic.document(draw.stored.position)
        record = synthetic.draw(spec, draw.stored.position, prepared, draw.draw)
        for context in spec.contexts:
            expected = format.stored_scores(spec, record.contexts[context])
            again = format.stored_scores(spec, expected)
            for field in dataclasses.fields(ContextScores):
                found = getattr(draw.scores[context], field.name)
                np.testing.assert_array_equal(found, getattr(expected, field.name))
                np.testing.assert_array_equal(found, getattr(again, field.name))


def test_fewer_fillings_of_a_packed_cache_are_exact(folders):
    """A slice of a cache encodes what it has read: the first fillings, unchanged."""
    cache = open_cache(folders / "packed")
    fewer = dataclasses.replace(cache.spec, k=5)
    for draw in cache.iter_draws():
        scores = draw.scores["plain"]
        starts = 16 * (np.cumsum(draw.token_count_M) - draw.token_count_M)
        ids = [scores.topk_ids[a : a + 5 * n] for a, n in zip(starts, draw.token_count_M, strict=True)]
        cut = dataclasses.replace(
            scores, topk_ids=np.concatenate([np.zeros(0, np.int32), *ids]), topk_logp_MK=scores.topk_logp_MK[:, :5]
        )
        stored = format.stored_scores(fewer, cut)
        np.testing.assert_array_equal(stored.topk_logp_MK, scores.topk_logp_MK[:, :5])
        np.testing.assert_array_equal(stored.log_z_MT, scores.log_z_MT)
        np.testing.assert_array_equal(stored.topk_ids, cut.topk_ids)


def test_slices_of_a_packed_cache_keep_their_values(folders, tmp_path):
    sliced = tmp_path / "slice"
    slice_cache(folders / "packed", sliced, Cut(k=3, draws=2, contexts=("plain",)))
    assert verify(sliced).problems == ()
    whole = {(d.document, d.draw): d for d in of(folders / "packed")}
    draws = of(sliced)
    assert 0 < len(draws) < len(whole)
    for draw in draws:
        found, expected = draw.scores["plain"], whole[draw.document, draw.draw].scores["plain"]
        np.testing.assert_array_equal(found.topk_logp_MK, expected.topk_logp_MK[:, :3])
        np.testing.assert_array_equal(found.log_z_MT, expected.log_z_MT)
        texts = [[text for text, _ in c] for c in draw.candidates]
        whole_draw = dataclasses.replace(whole[draw.document, draw.draw], context="plain")
        assert texts == [[text for text, _ in c[:3]] for c in whole_draw.candidates]


def test_a_packed_cache_is_smaller_and_inspect_says_so(folders):
    raw, packed = (inspect_cache(folders / name) for name in ("raw", "packed"))
    assert 0 < packed.lane_bytes["plain topk"] < raw.lane_bytes["plain topk"]
    assert packed.lane_bytes["plain gold"] == raw.lane_bytes["plain gold"]


def test_verify_and_streams_read_it(folders):
    assert verify(folders / "packed").problems == ()
    stream = DrawStream([open_cache(folders / "packed")], seed=3, together=2, context="plain")
    raw = DrawStream([open_cache(folders / "raw")], seed=3, together=2, context="plain")
    for number in range(60):
        a, b = raw[number], stream[number]
        assert (a.document, a.draw) == (b.document, b.draw)
        np.testing.assert_array_equal(a.scores["plain"].topk_ids, b.scores["plain"].topk_ids)
        assert [[text for text, _ in c] for c in a.candidates] == [[text for text, _ in c] for c in b.candidates]


def test_the_gold_lane_alone_is_read_without_decoding(folders, monkeypatch):
    monkeypatch.setattr(codec, "of_columns", None)
    draw = DrawStream([open_cache(folders / "packed")], topk=False)[0]
    assert draw.scores["compdemo"].topk_ids is None


def test_a_row_is_decoded_from_its_own_columns(folders):
    """One row out of a file, without any document, gives what the whole file gives."""
    cache = open_cache(folders / "packed")
    table = pq.read_table(folders / "packed" / cache.shards[0].likelihoods[0].path)
    draws = cache.read_shard(0).draws
    for row in (0, len(draws) // 2, len(draws) - 1):
        scores = draws[row].scores["plain"]
        counts = [len(draws[row].chunks)], [len(scores.gold_logp_N)]
        [topk] = codec.of_columns(cache.spec, "plain", table.slice(row, 1), *counts)
        np.testing.assert_array_equal(topk.ids, scores.topk_ids)
        np.testing.assert_array_equal(topk.logp_MK, scores.topk_logp_MK)
        np.testing.assert_array_equal(topk.log_z_MT, scores.log_z_MT)
        assert topk.count_M.tolist() == draws[row].token_count_M.tolist()


def packed_table(folders) -> tuple[pa.Table, dict, format.CaptureSpec]:
    cache = open_cache(folders / "packed")
    table = pq.read_table(folders / "packed" / cache.shards[0].likelihoods[0].path)
    return table, {d.key: d for d in cache.read_documents(0)}, cache.spec


def with_packed(table: pa.Table, change) -> pa.Table:
    values = table["plain_topk_packed"].to_pylist()
    index = table.schema.get_field_index("plain_topk_packed")
    return table.set_column(index, "plain_topk_packed", pa.array(change(values), pa.binary()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: [v[1], *v[1:]], "row 0: its head says"),
        (lambda v: [*v[:-1], None], "nulls"),
        (lambda v: [v[0][:-1], *v[1:]], "row 0"),
        (lambda v: [v[0] + b"\x00", *v[1:]], "row 0: .*after the end"),
        (lambda v: [b"", *v[1:]], "row 0: its head"),
    ],
    ids=["another draw's", "null", "cut", "longer", "empty"],
)
def test_wrong_bytes_are_refused(folders, change, message):
    table, documents, spec = packed_table(folders)
    with pytest.raises(ValueError, match=message):
        format.draws_of(with_packed(table, change), spec, documents, "plain", synthetic.vocabulary())


def test_another_document_s_chunks_are_refused(folders):
    """The same numbers of chunks and tokens, parted otherwise: the earlier codec's silent mistake."""
    table, documents, spec = packed_table(folders)
    refused = 0
    for key, document in documents.items():
        turned = dataclasses.replace(document, token_count_C=document.token_count_C[::-1])
        if np.array_equal(turned.token_count_C, document.token_count_C):
            continue
        rows = [i for i, d in enumerate(table["document"].to_pylist()) if d == key]
        for row in rows:
            part = table.slice(row, 1)
            masked_C = np.array(part["masked"][0].as_py())
            if np.array_equal(turned.token_count_C[masked_C], document.token_count_C[masked_C]):
                continue
            same = turned.token_count_C[masked_C].sum() == document.token_count_C[masked_C].sum()
            with pytest.raises(
                ValueError, match="other tokens per chunk in|one per sample" if same else "one per token"
            ):
                format.draws_of(part, spec, {key: turned}, "plain", synthetic.vocabulary())
            refused += same
    assert refused


def test_bytes_that_were_changed_in_agreement_with_every_digest(folders, tmp_path):
    """Made to do harm: refused in one line, or other values in their bounds, which `verify` finds by the content digest."""
    rng = np.random.default_rng(0)
    refused = 0
    for number in range(25):

        def changed(table: pa.Table) -> pa.Table:
            def other(values: list[bytes]) -> list[bytes]:
                row = max(range(len(values)), key=lambda r: len(values[r]))
                data = bytearray(values[row])
                at = rng.integers(0, len(data) if rng.random() < 0.5 else 60)
                data[at] ^= 1 + rng.integers(255)
                return [*values[:row], bytes(data), *values[row + 1 :]]

            return with_packed(table, other)

        root = resealed.rows(folders / "packed", tmp_path / str(number), "likelihoods", changed)
        assert resealed.outcome(resealed.WAYS["verify"], root) is not None
        try:
            draws = list(open_cache(root).iter_draws(context="plain"))
        except TidecacheError as error:
            assert "plain_topk_packed, row" in str(error)
            refused += 1
            continue
        for draw in draws:
            ids = draw.scores["plain"].topk_ids
            assert len(ids) == 16 * draw.token_count_M.sum()
            assert 0 <= ids.min(initial=0) <= ids.max(initial=0) < synthetic.VOCABULARY
            assert (np.diff(draw.scores["plain"].topk_logp_MK) <= 0).all()
    assert 0 < refused < 25


def test_more_ids_than_a_file_may_have_are_refused_before_memory_is_taken():
    """Gold lists of a few MB under a spec with a huge k."""
    spec = dataclasses.replace(synthetic.spec(codec="packed"), k=1 << 20)
    table = pa.table({"compdemo_topk_packed": pa.array([b""], pa.binary())})
    tracemalloc.start()
    with pytest.raises(ValueError, match="more than a file can have"):
        codec.of_columns(spec, "compdemo", table, [1], [1 << 10])
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_bytes_are_asked_for():
    table = pa.table({"x": pa.array(["text"])})
    with pytest.raises(ValueError, match="expected bytes, found string"):
        columns.binaries(table, "x")


def test_bit_flips_never_pass(folders, tmp_path):
    """200 bits of the packed columns' pages: an error that names the file, and verify finds each."""
    cache = open_cache(folders / "packed")
    record = cache.shards[0].likelihoods[0]
    source = folders / "packed" / record.path
    data = source.read_bytes()
    group = pq.ParquetFile(source).metadata.row_group(0)
    columns_ = [group.column(i) for i in range(group.num_columns)]
    spans = [
        (c.data_page_offset, c.data_page_offset + c.total_compressed_size)
        for c in columns_
        if c.path_in_schema.endswith("topk_packed")
    ]
    assert len(spans) == 2
    rng = np.random.default_rng(0)
    root = tmp_path / "copy"
    shutil.copytree(folders / "packed", root)
    for _ in range(200):
        first, stop = spans[rng.integers(2)]
        damaged = bytearray(data)
        damaged[rng.integers(first, stop)] ^= 1 << rng.integers(8)
        (root / record.path).write_bytes(damaged)
        with pytest.raises(TidecacheError, match=source.name):
            open_cache(root).read_shard(0)
        with pytest.raises(Exception, match=r".+"):  # what others have: the pages' checksums
            pq.read_table(root / record.path, page_checksum_verification=True)
    assert len(verify(root).problems) == 1
