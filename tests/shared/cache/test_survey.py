"""What `inspect` learns from rows: against slow loops over the same draws, and against distributions that are known."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.cache import open_cache
from shared.cache import survey as survey_module
from shared.cache.inspect import inspect_cache, pairs
from shared.cache.records import ShardRange
from shared.cache.survey import entropy_range, gold_rank, length_at, spread, survey_cache
from shared.errors import TidecacheError
from tests.shared.cache import synthetic


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two draw ranges over the same documents, both contexts."""
    path = tmp_path_factory.mktemp("cache")
    writer = synthetic.build(path, documents=20, contexts=("compdemo", "plain"))
    for first in range(0, 20, 4):
        synthetic.write(writer, ShardRange(first, first + 4, 4, 24), (2,))
    writer.finish()
    return path


def by_bin(draws, value):
    """Σ value(draw, m) over masked chunks, by timestep bin."""
    sums = np.zeros(10)
    for d in draws:
        for m in range(len(d.chunks)):
            sums[min(int(d.timestep * 10), 9)] += value(d, m)
    return sums


@pytest.fixture(params=[256, 5], autouse=True)
def block(request, monkeypatch):
    """Blocks that cut through the draws of a document give the same."""
    monkeypatch.setattr(survey_module, "DRAWS_AT_ONCE", request.param)


def test_the_whole_cache_agrees_with_a_loop_over_its_draws(folder):
    cache = open_cache(folder)
    survey = survey_cache(cache, 100)
    draws = list(cache.iter_draws())
    documents = {d.document: d.stored for d in draws}
    assert (survey.documents, survey.draws) == (len(documents), len(draws))
    lengths = [len(d.chunk_bytes(c)) for d in documents.values() for c in range(len(d.chunks))]
    assert survey.chunk_bytes == sum(lengths)
    assert survey.byte_lengths.tolist() == [lengths.count(n) for n in range(1, 33)]
    tokens = [int(n) for d in documents.values() for n in d.token_count_C]
    assert survey.token_lengths.tolist() == [tokens.count(n) for n in range(1, 9)]
    assert survey.trainable_bytes == sum(len(m.content.encode()) for d in documents.values() for m in d.messages)
    for context in ("compdemo", "plain"):
        draws = list(cache.iter_draws(context=context))
        fillings = {(d.document, d.draw): d.candidates for d in draws}

        def among(d, m, fillings=fillings):
            gold = d.stored.chunk_bytes(int(d.chunks[m]))
            return gold in [filling for filling, _ in fillings[d.document, d.draw][m]]

        gold_among_B = by_bin(draws, among)
        assert gold_among_B.sum() > 0
        assert survey.contexts[context].gold_among_k_B == pytest.approx(gold_among_B)
        assert survey.contexts[context].chunks_B == pytest.approx(by_bin(draws, lambda d, m: 1))


def test_pairs_agree_with_a_loop_and_a_textbook_error(folder):
    cache = open_cache(folder)
    pair = survey_cache(cache, 100).pair
    sums = {}
    for d in cache.iter_draws():
        gain = d.gold_logp_of("compdemo").astype(float) - d.gold_logp_of("plain")
        total = sums.setdefault((min(int(d.timestep * 10), 9), d.document), [0.0, 0, 0])
        total[0] += gain.sum()
        total[1] += len(gain)
        total[2] += (gain > 0).sum()
    for b in range(10):
        gain_D, chunks_D, better_D = np.array([v for (x, _), v in sums.items() if x == b]).T
        mean = gain_D.sum() / chunks_D.sum()
        assert pair.mean_B[b] == pytest.approx(mean, rel=1e-5)
        error = np.sqrt(((gain_D - mean * chunks_D) ** 2).sum()) / chunks_D.sum()
        assert pair.error_B[b] == pytest.approx(error, rel=1e-4, abs=1e-6)
        assert pair.better_B[b] == better_D.sum()
    entries = pairs(inspect_cache(folder).survey)
    assert entries[-1]["from"] == 0.0
    assert entries[-1]["chunks"] == sum(e["chunks"] for e in entries[:-1])
    exact = inspect_cache(folder).to_json()["timesteps"]
    for entry in entries[:-1]:  # the footers' exact sums say the same
        means = [next(r for r in exact[x] if r["from"] == pytest.approx(entry["from"])) for x in ("compdemo", "plain")]
        difference = means[0]["gold_logp_per_chunk"] - means[1]["gold_logp_per_chunk"]
        assert entry["gain_per_chunk"] == pytest.approx(difference, abs=5e-3)


@given(
    st.integers(1, 3),
    st.integers(1, 6),
    st.floats(0.02, 20.0),
    st.sampled_from([(1.0,), (1.0, 2.0), (1.5, 1.0), (0.5, 1.0)]),
    st.integers(0, 1 << 32),
)
def test_the_range_holds_the_entropy_of_a_known_distribution(tokens, k, concentration, temperatures, seed):
    """All fillings of a few tokens over a tiny vocabulary, the exact entropy by summing over them."""
    rng = np.random.default_rng(seed)
    vocabulary = 7
    p_NV = rng.dirichlet(np.full(vocabulary, concentration), tokens) + 1e-12
    p_NV /= p_NV.sum(1, keepdims=True)
    p_F = np.array([np.prod(x) for x in itertools.product(*p_NV)])
    exact = -(p_F * np.log(p_F)).sum()
    log_z_1T = np.array([[np.log((p_NV ** (1 / t)).sum(1)).sum() for t in temperatures]])
    logp_1K = np.log(np.sort(p_F)[::-1][:k])[None]
    spec = synthetic.spec(temperatures=temperatures, k=k)
    spec = type(spec)(
        **{**vars(spec), "teacher": type(spec.teacher)(**{**vars(spec.teacher), "vocabulary": vocabulary})}
    )
    low_M, high_M = entropy_range(spec, np.array([tokens]), logp_1K, log_z_1T)
    assert low_M[0] - 1e-9 <= exact <= high_M[0] + 1e-9
    if k >= len(p_F):
        assert high_M[0] == pytest.approx(exact, abs=1e-6)


def test_more_fillings_and_a_temperature_narrow_the_range():
    p_V = np.sort(np.random.default_rng(1).dirichlet(np.full(500, 0.05)))[::-1] + 1e-15
    logp_V = np.log(p_V / p_V.sum())
    widths = []
    for k, temperatures in ((4, (1.0,)), (4, (1.0, 2.0)), (32, (1.0, 2.0))):
        spec = synthetic.spec(temperatures=temperatures, k=k)
        log_z = np.array([[np.log(np.exp(logp_V / t).sum()) for t in temperatures]])
        low_M, high_M = entropy_range(spec, np.array([1]), logp_V[None, :k], log_z)
        widths.append(high_M[0] - low_M[0])
    assert widths[0] > 1.5 * widths[1] > 4 * widths[2] > 0


@given(st.lists(st.integers(1, 3), min_size=1, max_size=6), st.integers(1, 4), st.integers(0, 1 << 32))
def test_rank_of_the_gold_against_a_loop(counts, k, seed):
    rng = np.random.default_rng(seed)
    count_M = np.array(counts)
    gold_N = rng.integers(0, 2, count_M.sum()).astype(np.int32)
    ids = rng.integers(0, 2, k * count_M.sum()).astype(np.int32)
    expected, start = [], 0
    for n in counts:
        gold = gold_N[start : start + n].tolist()
        fillings = [ids[k * start + j * n : k * start + (j + 1) * n].tolist() for j in range(k)]
        expected.append(fillings.index(gold) if gold in fillings else k)
        start += n
    assert gold_rank(gold_N, ids, count_M, k).tolist() == expected


def test_a_sample_is_spread_over_the_cache_and_says_so(folder):
    assert spread(5, 9) == [0, 1, 2, 3, 4]
    assert spread(100, 4) == [12, 37, 62, 87]
    survey = survey_cache(open_cache(folder), 2)
    assert (survey.ranges_read, survey.ranges_total, survey.documents) == (2, 5, 8)
    assert survey.draws == 8 * 24  # both draw ranges of each
    assert inspect_cache(folder, sample=2).to_json()["sample"]["of_document_ranges"] == 5
    assert inspect_cache(folder, sample=0).to_json()["sample"] is None


def test_only_the_sample_is_read(folder, tmp_path):
    """A damaged shard outside of the sample stays unseen; inside, it is refused."""
    synthetic.build(tmp_path, documents=12, per_shard=4)
    victim = tmp_path / "shards" / "00000000-00000004.documents.parquet"
    victim.write_bytes(b"x" * victim.stat().st_size)
    assert inspect_cache(tmp_path, sample=1).survey.documents == 4
    with pytest.raises(TidecacheError, match=victim.name):
        inspect_cache(tmp_path, sample=3)


def test_a_footer_without_fitting_statistics_is_refused(tmp_path):
    """A file whose digest is right and whose footer is not what a capture writes."""
    import pyarrow.parquet as pq

    from shared.cache.manifest import FileRecord, derive, read_manifest, seal
    from shared.cache.parquet import encode, footer_of

    synthetic.build(tmp_path, documents=4)
    manifest = read_manifest(tmp_path)
    [receipt] = manifest.shards
    path = tmp_path / receipt.likelihoods[0].path
    footer = footer_of(pq.read_metadata(path).metadata)
    for statistics in ({}, {"compdemo": {"chunks_B": 3}}, {"compdemo": [1, 2]}, []):
        data = encode(pq.read_table(path), {**footer, "statistics": statistics})
        path.write_bytes(data)
        old = receipt.likelihoods[0]
        changed = replace(receipt, likelihoods=(FileRecord.of(old.path, data, old.rows, old.columns),))
        made = derive(manifest.spec, manifest.vocabulary, [changed])
        (tmp_path / "manifest.json").write_bytes(seal(made.to_json()))
        with pytest.raises(TidecacheError, match="no statistics that fit"):
            inspect_cache(tmp_path)


def test_percentiles_of_lengths():
    counts = np.array([1, 0, 3])
    assert [length_at(counts, x) for x in (0.2, 0.25, 0.26, 0.5, 1.0)] == [1, 1, 3, 3, 3]


def test_a_cache_of_one_context_has_no_pairs_and_one_of_one_lane_no_entropy(tmp_path):
    synthetic.build(tmp_path, documents=4, lanes=("gold",))
    inspection = inspect_cache(tmp_path)
    assert pairs(inspection.survey) is None
    assert {row["entropy_per_chunk"] for row in inspection.timesteps("compdemo")} == {None}
