"""`tidecache cache inspect`: the figures are right, and readable."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from shared.cache import open_cache
from shared.cache.inspect import inspect_cache
from shared.cache.inspect_text import render
from shared.cache.records import ShardRange
from shared.cache.writer import CacheWriter
from tests.shared.cache import synthetic


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache")
    synthetic.build(path, contexts=("compdemo", "plain"), temperatures=(1.0, 2.0))
    synthetic.build(path / "held-out", documents=4, contexts=("compdemo", "plain"))
    return path


def text_of(path, width: int = 80, sample: int = 16) -> str:
    stream = io.StringIO()
    render(inspect_cache(path, sample), Console(file=stream, width=width, highlight=False))
    return stream.getvalue()


def test_lanes_add_up_to_the_files(folder):
    inspection = inspect_cache(folder)
    files = [p for p in folder.rglob("*.parquet") if "held-out" not in p.parts]
    assert sum(inspection.lane_bytes.values()) == sum(p.stat().st_size for p in files)
    assert sum(inspection.lane_bytes.values()) == inspection.manifest.totals.size_bytes
    assert list(inspection.lane_bytes) == [
        "vocabulary",
        "documents",
        "timestep, masked, split",
        "compdemo gold",
        "compdemo topk",
        "plain gold",
        "plain topk",
        "footers",
    ]


@pytest.mark.parametrize("context", ["compdemo", "plain"])
def test_figures_by_timestep_are_those_of_the_rows(folder, context):
    """The footers' statistics come from exact scores; the rows' from rounded ones."""
    rows = inspect_cache(folder).to_json()["timesteps"][context]
    draws = list(open_cache(folder).iter_draws(context=context))
    assert sum(r["draws"] for r in rows) == len(draws)
    for row in rows:
        inside = [d for d in draws if row["from"] <= d.timestep < row["to"]]
        assert len(inside) == row["draws"]
        gold = np.concatenate([d.gold_logp for d in inside])
        assert len(gold) == row["chunks"]
        if not len(gold):
            assert row["tail_mass"] is None
            continue
        assert row["gold_logp_per_chunk"] == pytest.approx(gold.mean(), rel=1e-3)
        assert row["gold_logp_per_token"] == pytest.approx(
            gold.sum() / sum(d.token_count_M.sum() for d in inside), rel=1e-3
        )
        topk = [(d.scores[context].topk_logp_MK, d.scores[context].log_z_MT) for d in inside]
        for i, t in enumerate((1.0, 2.0)):
            tails = np.concatenate([1 - np.exp(p / t - z[:, i : i + 1]).sum(1) for p, z in topk])
            assert row["tail_mass"][i] == pytest.approx(tails.mean(), abs=2e-3)
        best = [c[0][0] == d.stored.chunk_bytes(m) for d in inside for c, m in zip(d.candidates, d.chunks, strict=True)]
        assert row["best_is_gold"] == pytest.approx(np.mean(best))
        assert 0.0 <= row["calibration_error"] <= 1.0


def test_rounding_costs_less_than_a_ten_thousandth_nat(folder):
    for rows in inspect_cache(folder).to_json()["timesteps"].values():
        for row in rows:
            for kl in row["stored_kl"] or []:
                assert 0.0 <= kl < 1e-4


def test_calibration_error_of_a_known_teacher(tmp_path):
    """A best filling with probability 0.8 that is the gold in half of the chunks: the error is 0.3."""
    writer = CacheWriter.open(tmp_path, synthetic.spec(k=1, temperatures=(1.0,)), synthetic.vocabulary())
    prepared = synthetic.document(0, 200)
    record = synthetic.draw(writer.spec, 0, prepared, 1)
    scores = record.contexts["compdemo"]
    scores.topk_logp_MK[:] = np.log(0.8)
    first_C, stop_C = prepared.teacher.token_ranges(prepared.chunks)
    gold = [prepared.teacher.ids_L[a:b] for a, b, m in zip(first_C, stop_C, record.masked_C, strict=True) if m]
    fillings = [ids if i % 2 else (ids + 1) % 300 for i, ids in enumerate(gold)]
    scores.topk_ids[:] = np.concatenate(fillings)
    writer.write_shard(ShardRange(0, 1, 1, 2), [(0, prepared)], [], [record], "corpus", 4096)
    writer.finish()
    [row] = inspect_cache(tmp_path).to_json()["timesteps"]["compdemo"]
    hits = (len(gold) // 2) / len(gold)
    assert row["best_is_gold"] == pytest.approx(hits)
    assert row["calibration_error"] == pytest.approx(0.8 - hits, abs=1e-6)
    assert row["tail_mass"] == [pytest.approx(0.2, abs=1e-6)]


@pytest.mark.parametrize("sample", [16, 0, 1])
def test_the_tables_fit_80_columns_and_cut_nothing(folder, sample):
    text = text_of(folder, sample=sample)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    tables = text.split("Bytes")[1]
    assert "…" not in tables
    for part in (
        "11 (3 cut",
        "1 empty dropped",
        "44 (4 per document)",
        "3 documents, 12 draws",
        "compdemo topk",
        "context plain",
    ):
        assert part in text
    assert ("of 3 document ranges" in text) == (sample == 1)
    assert ("Chunk lengths" in text.split("Calibration")[0]) == ("compdemo minus plain" in text) == (sample > 0)


def test_without_a_topk_lane(tmp_path):
    synthetic.build(tmp_path, documents=4, lanes=("gold",))
    text = text_of(tmp_path)
    assert "tail" not in text
    assert inspect_cache(tmp_path).to_json()["timesteps"]["compdemo"][0]["calibration_error"] is None


def test_a_cache_without_shards_says_so(tmp_path):
    CacheWriter.open(tmp_path, synthetic.spec(), synthetic.vocabulary())
    assert "No shard is complete yet" in text_of(tmp_path)
    json.dumps(inspect_cache(tmp_path).to_json(), allow_nan=False)


def test_json_has_no_nan(folder):
    json.dumps(inspect_cache(folder).to_json(), allow_nan=False)
