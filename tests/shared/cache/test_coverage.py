"""`tidecache cache coverage`: its counts are those that training has, for declared and undeclared tokenizers."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers

from shared.cache import commands_tools
from shared.cache.coverage import FATES, CoverageReport, StudentCoverage, lengths, measure, render, sample
from shared.cache.reader import Cache
from shared.errors import TidecacheError
from shared.tokenization import TextTokenizer, byte_alphabet
from stage2_student.data import Coverage, RowMaker
from tests.conftest import TINY_STUDENT, TINY_TEACHER
from tests.shared.cache import synthetic as plain_synthetic
from tests.shared.test_cli import tidecache
from tests.stage2_student import synthetic

BLOCK = 32
EVERYTHING = 10_000


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """8 texts, 4 draws in two draw ranges, shards of 3 documents; both contexts."""
    folder = tmp_path_factory.mktemp("coverage") / "texts"
    return synthetic.make_cache(folder, synthetic.texts(8), draws=4, per_shard=3, draw_ranges=2)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.undeclared_tokenizer(tmp_path_factory.mktemp("other"))


def as_training_sees(cache: Cache, tokenizer: TextTokenizer, context: str) -> tuple[Coverage, int, int, Coverage]:
    """(coverage, candidate events, scored own chunks, coverage at t ≥ 0.5) over all stored draws."""
    maker = RowMaker(tokenizer, cache.spec, BLOCK, context, temperature=1.0)
    total, late, events, chunks = Coverage(), Coverage(), 0, 0
    for draw in cache.iter_draws(context=context):
        row = maker.cached_row(draw)
        total += row.coverage
        if draw.timestep >= 0.5:
            late += row.coverage
        events += 0 if row.events is None else len(row.events.chunk_E)
        chunks += len(row.teacher_logp_Q)
    return total, events - chunks, chunks, late


@pytest.mark.parametrize("context", ["compdemo", "plain"])
@pytest.mark.parametrize("kind", ["declared", "undeclared", "teacher"])
def test_training_sees_the_same(cache: Cache, other: Path, kind: str, context: str) -> None:
    tokenizer = TextTokenizer.load({"declared": TINY_STUDENT, "undeclared": other, "teacher": TINY_TEACHER}[kind])
    report = measure(cache.path, [tokenizer], EVERYTHING, context)
    [found] = report.students
    coverage, events, chunks, late = as_training_sees(cache, tokenizer, context)
    assert (report.documents, report.draws) == (8, 32)
    assert Coverage(found.masked, found.by_fate["usable"]) == coverage
    assert found.share == coverage.share
    half = found.chunks_BR[5:]
    assert Coverage(int(half.sum()), int(half[:, FATES.index("usable")].sum())) == late
    assert found.candidates is not None
    assert (found.candidates.spelled, found.candidates.chunks) == (events, chunks)
    assert found.declared == (kind == "declared")
    if kind == "declared":
        assert found.share == 1.0
    if kind == "undeclared":
        assert found.by_fate["unmasked"] > 0
        assert (found.by_fate["split"] > 0) == (context == "compdemo")
        assert found.candidates.without > 0
        assert 0 < found.candidates.spelled_mass < found.candidates.spelled_mass + found.candidates.lost_mass


def test_chunk_lengths_are_those_of_the_stored_chunks(cache: Cache) -> None:
    [found] = measure(cache.path, [TextTokenizer.load(TINY_STUDENT)], EVERYTHING, topk=False).students
    stored = [d for index in range(0, len(cache.shards), 2) for d in cache.read_documents(index)]
    sizes = np.concatenate([d.chunks.stop_C - d.chunks.start_C for d in stored])
    assert sorted(found.bytes_O.elements()) == sorted(sizes.tolist())
    tokens = np.concatenate([d.token_count_C for d in stored])
    assert sorted(found.teacher_tokens_O.elements()) == sorted(tokens.tolist())
    summary = lengths(found.bytes_O)
    assert summary is not None
    assert summary["mean"] == pytest.approx(sizes.mean())
    assert summary["p95"] == np.quantile(sizes, 0.95, method="inverted_cdf")
    assert found.candidates is None


def test_documents_that_a_tokenizer_cannot_reproduce_are_lost(cache: Cache) -> None:
    """A tokenizer without some of the bytes leaves them out of what it spells."""
    letters = [c for c, byte in byte_alphabet().items() if byte not in b"~%"]
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = TextTokenizer(backend, "lossy")
    [found] = measure(cache.path, [tokenizer], EVERYTHING, topk=False).students
    maker = RowMaker(tokenizer, cache.spec, 1, "compdemo")
    coverage = sum((maker.cached_row(draw).coverage for draw in cache.iter_draws()), Coverage())
    assert 0 < found.irreproducible < 8
    assert found.by_fate["irreproducible"] > 0
    assert Coverage(found.masked, found.by_fate["usable"]) == coverage
    assert 0 < len(found.reasons) <= 3


def test_a_sample_is_spread_and_no_larger_than_asked_for(tmp_path: Path) -> None:
    plain_synthetic.build(tmp_path, documents=60, per_shard=3, draws=2, drop=(2, 3, 4, 5, 33))
    cache = Cache.open(tmp_path)
    for wanted in (1, 7, 20, 54, 55, 100):
        chosen = [(d.position, len(draws)) for d, draws in sample(cache, wanted, "compdemo", False)]
        assert len(chosen) == len(set(chosen)) == min(wanted, 55)
        assert all(count == 2 for _, count in chosen)
        if wanted == 20:
            assert chosen[0][0] < 10
            assert chosen[-1][0] > 50


def test_the_tables_say_it_all(cache: Cache, other: Path) -> None:
    students = [TextTokenizer.load(TINY_STUDENT), TextTokenizer.load(other, "evil\x1b[31m [bold]name")]
    report = measure(cache.path, students, 6)
    stream = io.StringIO()
    render(report, Console(file=stream, width=120, highlight=False))
    text = stream.getvalue()
    assert "\x1b" not in text
    assert "evil\\x1b[31m [bold]name" in text
    assert "6 of 8 documents" in text
    assert "100.0%" in text
    assert f"{report.students[1].share:.1%}" in text


def test_a_cache_without_draws(tmp_path: Path) -> None:
    plain_synthetic.build(tmp_path, documents=0)
    report = measure(tmp_path, [TextTokenizer.load(TINY_STUDENT)], 5)
    assert (report.documents, report.students[0].share) == (0, 1.0)
    json.dumps(report.to_json(), allow_nan=False)
    render(report, Console(file=io.StringIO()))


def test_the_command(cache: Cache, other: Path) -> None:
    done = tidecache(
        "cache", "coverage", str(cache.path), "--student", "tiny", "--student", str(other), "--documents", "1", "--json"
    )
    assert done.returncode == 0, done.stderr
    declared, undeclared = json.loads(done.stdout)["students"]
    assert declared["usable_share"] == 1.0
    assert undeclared["usable_share"] < 1.0
    assert undeclared["masked_chunks"] == sum(undeclared[f"{fate}_chunks"] for fate in FATES)
    with pytest.raises(TidecacheError, match="no tokenizer could be loaded"):
        commands_tools.coverage(str(cache.path), [str(other / "nothing")], 1)


def test_an_unknown_context_is_refused(cache: Cache) -> None:
    with pytest.raises(TidecacheError, match="holds the contexts"):
        measure(cache.path, [TextTokenizer.load(TINY_STUDENT)], 5, "other")


def test_nothing_masked_counts_as_all_usable() -> None:
    assert StudentCoverage("a", "0", False).share == 1.0
    assert CoverageReport("a", "plain", 0, 0, 0, ()).to_json()["students"] == []
