"""A reader by docs/cache-format.md alone, with pyarrow, json and hashlib; and the plain columns in other tools.

Nothing that reads, here and in `packed_by_the_page.py`, may import from `shared.cache`: only the comparison at the end of
each test does.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from shared.cache import open_cache
from tests.shared.cache import synthetic
from tests.shared.cache.packed_by_the_page import unpack
from tests.shared.cache.widened import widen

PATH_RULE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")


def build(path: Path, **changes) -> Path:
    synthetic.build(path, documents=8, contexts=("compdemo", "plain"), temperatures=(1.0, 2.0, 0.5), **changes)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return build(tmp_path_factory.mktemp("cache"), codec="packed", k=20)


@pytest.fixture(scope="module")
def widened(tmp_path_factory):
    """The same cache, which got a context, a larger k and a temperature later."""
    path = tmp_path_factory.mktemp("widened")
    synthetic.build(path, documents=8, k=3, temperatures=(1.0, 2.0))
    widen(path, synthetic.spec(k=4, temperatures=(1.0, 2.0, 0.5)))
    widen(path, synthetic.spec(contexts=("compdemo", "plain"), temperatures=(1.0, 2.0, 0.5)))
    return path


# --- the stranger's reader ---------------------------------------------------------------------------------------


def blake(data: bytes, size: int = 16) -> str:
    return hashlib.blake2b(data, digest_size=size).hexdigest()


def compact(value) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode()


def read_json(path: Path) -> dict:
    data = json.loads(path.read_text())
    assert data["format"] == 1
    assert blake(compact({k: v for k, v in data.items() if k != "digest"})) == data["digest"]
    return data


def read_parquet(folder: Path, record: dict) -> tuple[list[dict], dict]:
    assert PATH_RULE.fullmatch(record["path"])
    data = (folder / record["path"]).read_bytes()
    assert (len(data), blake(data)) == (record["size_bytes"], record["digest"])
    table = pq.read_table(folder / record["path"], page_checksum_verification=True)
    assert table.num_rows == record["rows"]
    footer = {k.decode(): json.loads(v) for k, v in table.schema.metadata.items() if k.startswith(b"tidecache.")}
    return table.select(record["columns"]).to_pylist(), footer


def joined_rows(folder: Path, records: list[dict]) -> list[dict]:
    """The rows of a shard, each column from the file that lists it."""
    rows, *others = (read_parquet(folder, record)[0] for record in records)
    for further in others:
        for row, more in zip(rows, further, strict=True):
            assert all(row[key] == more[key] for key in ("document", "draw", "timestep"))
            assert len(row.keys() & more.keys()) == 3
            row |= more
    return rows


def frames(*parts: bytes) -> bytes:
    return hashlib.blake2b(b"".join(struct.pack("<Q", len(p)) + p for p in parts), digest_size=32).digest()


def int32(values) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


def float32(values) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def document_bytes(row: dict) -> bytes:
    messages = [[m["role"], m["content"], m["trainable"]] for m in row["messages"]]
    head = json.dumps([row["document"], row["chat"], row["cut"], messages], ensure_ascii=True, separators=(",", ":"))
    names = ("chunk_message", "chunk_start", "chunk_stop", "token_count", "token_ids")
    return frames(head.encode(), *(int32(row[n]) for n in names))


def row_number(document: bytes, row: dict, contexts: list[str]) -> int:
    parts = [document, int32([row["draw"]]), float32([row["timestep"]]), bytes(row["masked"]), bytes(row["split"])]
    for context in sorted(contexts):
        for name in ("gold_logp", "topk_ids", "topk_logp", "log_z", "tail_ids", "tail_logp"):
            column = f"{context}_{name}"
            if column in row:
                parts += [column.encode(), (int32 if name.endswith("_ids") else float32)(row[column])]
    return int.from_bytes(frames(*parts), "little")


def draws_of(folder: Path):
    """Every draw as (document, draw, timestep, chunks, gold per chunk by context, fillings, log Z by temperature)."""
    manifest = read_json(folder / "manifest.json")
    spec, total = manifest["spec"], 0
    assert blake(compact(spec)) == manifest["fingerprint"]
    words = [r["bytes"] for r in read_parquet(folder, manifest["vocabulary"])[0]]
    hot = [t for t in spec["temperatures"] if t != 1.0]
    for receipt in manifest["shards"]:
        (first, stop), (low, high) = receipt["range"]["documents"], receipt["range"]["draws"]
        own = read_json(folder / f"shards/{first:08d}-{stop:08d}.draws-{low:04d}-{high:04d}.json")
        assert {k: v for k, v in own.items() if k not in ("format", "digest")} == receipt
        rows, footer = read_parquet(folder, receipt["documents"])
        assert receipt["fingerprint"] == manifest["fingerprint"]
        assert footer["tidecache.fingerprint"] in (manifest["fingerprint"], *manifest["widened_from"])
        documents = {r["document"]: r for r in rows}
        digests = {key: document_bytes(r) for key, r in documents.items()}
        assert sum(int.from_bytes(d, "little") for d in digests.values()) % 2**256 == int(
            footer["tidecache.content"], 16
        )
        for row in joined_rows(folder, receipt["likelihoods"]):
            for context in spec["contexts"] if spec["codec"] == "packed" else ():
                row |= unpack(context, row.pop(f"{context}_topk_packed"))
            total += row_number(digests[row["document"]], row, spec["contexts"])
            yield read_draw(row, documents[row["document"]], spec, words, hot)
    assert f"{total % 2**256:064x}" == manifest["content"]


def read_draw(row: dict, document: dict, spec: dict, words: list[bytes], hot: list[float]) -> dict:
    chunks = [c for c, masked in enumerate(row["masked"]) if masked]
    counts = [document["token_count"][c] for c in chunks]
    gold, fillings, log_z = {}, {}, {}
    for context in spec["contexts"]:
        logps, ids, at = (
            iter(row[f"{context}_gold_logp"]),
            iter(row[f"{context}_topk_ids"]),
            iter(row[f"{context}_topk_logp"]),
        )
        gold[context] = [math.fsum(next(logps) for _ in range(n)) for n in counts]
        fillings[context] = [
            [(b"".join(words[next(ids)] for _ in range(n)), next(at)) for _ in range(spec["k"])] for n in counts
        ]
        values = iter(row[f"{context}_log_z"])
        log_z[context] = [{1.0: 0.0, **{t: next(values) for t in hot}} for _ in counts]
    return {
        "key": (row["document"], row["draw"]),
        "timestep": row["timestep"],
        "chunks": chunks,
        "split": row["split"],
        "gold": gold,
        "fillings": fillings,
        "log_z": log_z,
    }


# --- the comparison ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["folder", "widened", "packed"])
def test_the_page_is_enough(which, request):
    folder = request.getfixturevalue(which)
    cache = open_cache(folder)
    ours = list(cache.iter_draws())
    theirs = list(draws_of(folder))
    assert len(ours) == len(theirs) == 28
    for a, b in zip(ours, theirs, strict=True):
        assert ((a.document, a.draw), a.timestep) == (b["key"], b["timestep"])
        assert (a.chunks.tolist(), a.split.tolist()) == (b["chunks"], b["split"])
        assert a.candidates == b["fillings"]["compdemo"]
        for context in ("compdemo", "plain"):
            np.testing.assert_allclose(a.gold_logp_of(context), b["gold"][context], rtol=1e-6)
            log_z = [[z[t] for t in cache.spec.temperatures] for z in b["log_z"][context]]
            np.testing.assert_array_equal(a.scores[context].log_z_MT, np.array(log_z).reshape(-1, 3))


def test_the_page_says_how_chunks_are_spelled(folder):
    manifest = read_json(folder / "manifest.json")
    words = [r["bytes"] for r in read_parquet(folder, manifest["vocabulary"])[0]]
    for receipt in manifest["shards"]:
        for row in read_parquet(folder, receipt["documents"])[0]:
            ids = iter(row["token_ids"])
            for message, start, stop, n in zip(
                row["chunk_message"], row["chunk_start"], row["chunk_stop"], row["token_count"], strict=True
            ):
                content = row["messages"][message]["content"].encode()
                assert b"".join(words[next(ids)] for _ in range(n)) == content[start:stop]


def test_the_page_says_how_draws_are_made(folder):
    """SplitMix64 from BLAKE2b, with Python's own integers."""
    manifest = read_json(folder / "manifest.json")
    spec = manifest["spec"]

    def uniforms(document: str, purpose: str, draw: int, count: int) -> list[float]:
        text = b"\x00".join(str(x).encode() for x in (spec["seed"], document, purpose, draw))
        state = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
        values = []
        for _ in range(count):
            state = (state + 0x9E3779B97F4A7C15) % 2**64
            z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
            values.append(((z ^ (z >> 31)) >> 11) / 2**53)
        return values

    for receipt in manifest["shards"]:
        for row in read_parquet(folder, receipt["likelihoods"][0])[0]:
            k, count = row["draw"], len(row["masked"])
            u = uniforms(row["document"], "timestep", 0, 1)[0]
            phi = int(f"{k:016b}"[::-1], 2) / 2**16
            t = spec["epsilon"] + (1 - spec["epsilon"]) * ((phi + u) % 1.0)
            assert row["timestep"] == struct.unpack("<f", struct.pack("<f", t))[0]
            assert row["masked"] == [v < row["timestep"] for v in uniforms(row["document"], "mask", k, count)]
            split = [v < spec["demo_ratio"] for v in uniforms(row["document"], "split", k, count)]
            assert row["split"] == [s for s, m in zip(split, row["masked"], strict=True) if m]


def all_ids(folder) -> list[int]:
    """Every candidate's ids in a row, by our own reader."""
    return [i for d in open_cache(folder).iter_draws() for i in d.scores["plain"].topk_ids.tolist()]


def sums(folder):
    """{(document, draw): sum of the gold log-likelihoods} for timesteps below one half, by our own reader."""
    return {(d.document, d.draw): float(d.gold_logp.sum()) for d in open_cache(folder).iter_draws() if d.timestep < 0.5}


def assert_same_sums(found, folder):
    expected = sums(folder)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-5)


def test_pyarrow_filters_by_timestep(folder):
    rows = [
        row
        for path in (folder / "shards").glob("*.likelihoods.parquet")
        for row in pq.read_table(path, filters=[("timestep", "<", 0.5)], page_checksum_verification=True).to_pylist()
    ]
    assert_same_sums({(r["document"], r["draw"]): sum(r["compdemo_gold_logp"]) for r in rows}, folder)


def test_duckdb_reads_the_plain_columns(folder):
    duckdb = pytest.importorskip("duckdb")
    found = duckdb.sql(
        f"SELECT document, draw, coalesce(list_sum(compdemo_gold_logp), 0), list_sum(masked::INT[]), len(split) "
        f"FROM '{folder}/shards/*.likelihoods.parquet' WHERE timestep < 0.5"
    ).fetchall()
    assert all(masked == split for *_, masked, split in found)
    assert_same_sums({(document, draw): value for document, draw, value, *_ in found}, folder)
    ids = duckdb.sql(
        f"SELECT plain_topk_ids FROM '{folder}/shards/*.likelihoods.parquet' ORDER BY position, draw"
    ).fetchall()
    assert [i for (row,) in ids for i in row] == all_ids(folder)
    roles = duckdb.sql(f"SELECT DISTINCT messages[1].role FROM '{folder}/shards/*.documents.parquet'").fetchall()
    assert roles == [("text",)]


def test_polars_reads_the_plain_columns(folder):
    pl = pytest.importorskip("polars")
    scan = pl.scan_parquet(folder / "shards" / "*.likelihoods.parquet").filter(pl.col("timestep") < 0.5)
    found = scan.select("document", "draw", pl.col("compdemo_gold_logp").list.sum()).collect()
    assert_same_sums({(d, k): value for d, k, value in found.rows()}, folder)
    rows = pl.read_parquet(folder / "shards" / "*.likelihoods.parquet").sort("position", "draw")
    assert [i for row in rows["plain_topk_ids"].to_list() for i in row] == all_ids(folder)
    documents = pl.read_parquet(folder / "shards" / "*.documents.parquet")
    assert documents["token_ids"].list.len().to_list() == documents["token_count"].list.sum().to_list()


def test_datasets_reads_the_plain_columns(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    found = datasets.load_dataset(
        "parquet", data_files=str(folder / "shards" / "*.likelihoods.parquet"), split="train", cache_dir=str(tmp_path)
    )
    rows = [r for r in found if r["timestep"] < 0.5]
    assert_same_sums({(r["document"], r["draw"]): sum(r["compdemo_gold_logp"]) for r in rows}, folder)
