"""`tidecache teacher plan` against the capture that follows it, on a random tiny teacher and on the embedded one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from shared.cache.inspect import inspect_cache
from shared.corpus import deduplicated, held_out_rule, in_held_out
from shared.errors import TidecacheError
from stage1_teacher import plan_sample
from stage1_teacher.capture import Capture
from stage1_teacher.commands import app
from stage1_teacher.draft import Draft
from stage1_teacher.options import CaptureOptions
from stage1_teacher.plan import Plan, make_plan
from stage1_teacher.plan_sample import Slice, Unheard, scan
from stage1_teacher.planning import ShardPart
from stage1_teacher.shards import LocalEngine, ShardMaker
from tests.stage1_teacher.captures import WORDS, texts
from tests.stage1_teacher.models import save_model


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return str(save_model(tmp_path_factory.mktemp("models") / "random", vocabulary=8192, tokenizer=True))


def write_uneven(path: Path, count: int) -> Path:
    """Short documents first, then ever longer ones, some far above the length limit; repeats, and documents to drop."""
    rng = np.random.default_rng(3)
    rows = []
    for i in range(count):
        words = int(np.exp(rng.uniform(1.5, 3 + 4 * i / count)))
        rows.append({"text": f"{i} " + " ".join(rng.choice(WORDS, words)) + "\n"})
        if i % 7 == 6:
            rows.append(rows[-3])
        if i % 9 == 8:
            rows.append({"text": ""})
        if i % 11 == 10:
            rows.append({"text": f"{i} \ud800 is no text"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def planned_and_captured(options: CaptureOptions, documents: int) -> tuple[Plan, list]:
    """The plan, and the manifests of the training documents and the held-out ones."""
    draft = Draft.of(options)
    found = make_plan(draft, documents)
    assert not Path(options.out).exists()
    loaded, spec = draft.load()
    assert found.spec == spec
    engine = LocalEngine(loaded, ShardMaker(spec, draft.tokenizer, draft.students))
    report = Capture(engine, draft.tokenizer, spec, draft.extent, options.out, Unheard()).run()
    return found, [part.manifest for part in (report.train, report.held_out) if part is not None]


def agree(found: Plan, manifests: list, off: float, tokens_off: float) -> None:
    """Documents, draws and shards to within what dropping leaves open; tokens and bytes within the given shares."""
    totals = [m.totals for m in manifests]
    assert found.shards == sum(len(m.shards) for m in manifests)
    assert found.scored_tokens == pytest.approx(sum(t.scored_tokens for t in totals), rel=tokens_off)
    assert found.masked_chunks == pytest.approx(sum(t.masked_chunks for t in totals), rel=max(tokens_off, 1e-9))
    assert found.size_bytes == pytest.approx(sum(t.size_bytes for t in totals), rel=off)
    assert 0 < found.error < 0.2
    assert 0 < found.seconds[0] < found.seconds[1]


SMALL = [
    {"lanes": "gold", "context": "plain", "draws": 4},
    {"lanes": "gold", "context": "compdemo", "draws": 1, "documents_per_shard": 7},
    {"context": "both", "draws": 2, "k": 4},
    {"context": "both", "draws": 9, "k": 2, "documents_per_shard": 100, "codec": "packed"},
    {"context": "plain", "draws": 2, "k": 4, "tail_samples": 3, "temperatures": "1,2,3"},
    {"context": "plain", "draws": 2, "k": 4, "held_out": "none", "part": "2/3"},
]


@pytest.mark.parametrize("changes", SMALL, ids=str)
def test_a_small_corpus_leaves_only_the_teacher_to_be_estimated(teacher, tmp_path, changes):
    """All shards are prepared, so documents, draws and tokens are exact; of the documents only some are scored."""
    corpus = write_uneven(tmp_path / "corpus.jsonl", 60)
    given = {"documents_per_shard": 16, "held_out": "0.2", "length": 96, **changes}
    options = CaptureOptions(teacher=teacher, corpus=str(corpus), out=tmp_path / "cache", **given)
    found, manifests = planned_and_captured(options, 32)
    exact = min(options.draws, plan_sample.RUN_DRAWS) == options.draws
    agree(found, manifests, off=0.06, tokens_off=0 if exact else 0.03)
    totals = [m.totals for m in manifests]
    assert found.documents == sum(t.documents for t in totals)
    assert found.dropped == sum(sum(t.dropped.values()) for t in totals) > 0
    assert found.draws == sum(t.draws for t in totals)
    lanes: dict[str, int] = {}
    for folder in (tmp_path / "cache", tmp_path / "cache" / "held-out"):
        for name, size in inspect_cache(folder).lane_bytes.items() if folder.is_dir() else ():
            lanes[name] = lanes.get(name, 0) + size
    assert list(found.lane_bytes) == list(lanes)
    assert found.lane_bytes["vocabulary"] == lanes["vocabulary"]
    assert found.lane_bytes["documents"] == pytest.approx(lanes["documents"], rel=0.001)
    for name, size in lanes.items():
        assert found.lane_bytes[name] == pytest.approx(size, rel=0.1, abs=0.01 * found.size_bytes), name


@pytest.mark.parametrize("size", [4, pytest.param(24, marks=pytest.mark.slow)])
def test_of_a_large_corpus_some_shards_are_prepared(teacher, tmp_path, monkeypatch, size):
    monkeypatch.setattr(plan_sample, "PREPARED", 96)
    monkeypatch.setattr(plan_sample, "RUN_DOCUMENTS", 12)
    corpus = write_uneven(tmp_path / "corpus.jsonl", 300)
    options = CaptureOptions(
        teacher=teacher, corpus=str(corpus), out=tmp_path / "cache", documents_per_shard=size, length=96, draws=2, k=4
    )
    found, manifests = planned_and_captured(options, 32)
    assert found.measured["documents_prepared"] < 0.35 * found.documents
    agree(found, manifests, off=0.1, tokens_off=0.1)
    actual = sum(m.totals.size_bytes for m in manifests)
    assert abs(found.size_bytes / actual - 1) <= found.error
    assert found.error > 0.015  # and it says that it isn't sure


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"lanes": "gold"}, {}], ids=["gold", "topk"])
def test_the_embedded_teacher_in_both_contexts(tmp_path, changes):
    options = CaptureOptions(limit=72, draws=2, context="both", out=tmp_path / "cache", **changes)
    found, manifests = planned_and_captured(options, 24)
    agree(found, manifests, off=0.1, tokens_off=0)
    assert {u.recipe: u.unlocked for u in found.unlocks}["events"] == ("lanes" not in changes)


def test_the_scan_sees_the_documents_that_a_capture_sees(tmp_path):
    corpus = write_uneven(tmp_path / "corpus.jsonl", 50)
    draft = Draft.of(CaptureOptions(corpus=str(corpus), held_out="0.3"))
    found = scan(draft.extent, draft.spec)
    rule, share = held_out_rule("hash:0.3")
    for held_out, part in found.slices.items():
        raws = [r for r in deduplicated(draft.extent.open()) if in_held_out(r, share, rule) == held_out]
        assert part.total_D.tolist() == [len(r.messages[0].content.encode(errors="surrogatepass")) for r in raws]
    assert found.complete


def test_a_corpus_that_would_be_downloaded_is_read_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_sample, "REMOTE_SCAN", 10)
    monkeypatch.setattr("stage1_teacher.capture.Extent.is_here", False)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts(30)))
    draft = Draft.of(CaptureOptions(corpus=str(corpus), held_out="none"))
    found = scan(draft.extent, draft.spec)
    assert not found.complete
    assert len(found.slices[False].total_D) == 10
    assert scan(replace(draft.extent, limit=20), draft.spec).complete  # a limit says how much is meant


def test_shards_and_reach_of_a_slice():
    part = Slice(np.array([10, 40, 0, 20, 20]), np.array([10, 20, 0, 20, 5]), np.array([0, 0, 0, 0, 15]))
    extent = Draft.of(CaptureOptions(documents_per_shard=2)).extent
    assert part.shards(extent) == [(0, 2), (2, 4), (4, 5)]
    assert part.shards(replace(extent, part=ShardPart(2, 2))) == [(2, 4)]
    assert part.reach(0, 5, 1000.0) == 55
    assert part.reach(0, 5, 20.0) == pytest.approx(10 + 10 + 0 + 20 + 5)
    assert part.reach(0, 5, 16.0) == pytest.approx(10 + 8 + 0 + 16 + 1)
    assert part.reach(4, 5, 10.0) == 0


def test_the_command_says_it_and_writes_no_cache(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("TIDECACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setenv("COLUMNS", "100")
    corpus = write_uneven(tmp_path / "corpus.jsonl", 40)
    given = ["plan", "--teacher", teacher, "--corpus", str(corpus), "--sample", "8", "--draws", "2", "--k", "4"]
    done = CliRunner().invoke(app, [*given, "--json", str(tmp_path / "plan.json")])
    assert done.exit_code == 0, done.output
    data = json.loads((tmp_path / "plan.json").read_text())
    assert f"{data['scored_tokens']:,} teacher tokens" in " ".join(done.output.split())
    assert "tide-cross" in done.output
    assert "lacks context plain" in done.output
    assert data["size_bytes"] == sum(data["lane_bytes"].values())
    assert [u["recipe"] for u in data["unlocks"] if u["unlocked"]] == [
        "reverse-calm-tidal", "tide-shared-x", "tide-shared", "events", "cross-entropy"
    ]  # fmt: skip
    assert not (tmp_path / "caches").exists()
    assert "free where" not in done.output
    out = tmp_path / "there"
    draft = Draft.of(CaptureOptions(teacher=teacher, corpus=str(corpus), draws=2, k=4, limit=4, out=out))
    loaded, spec = draft.load()
    Capture(
        LocalEngine(loaded, ShardMaker(spec, draft.tokenizer, draft.students)),
        draft.tokenizer, spec, draft.extent, out, Unheard(),
    ).run()  # fmt: skip
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    again = " ".join(CliRunner().invoke(app, [*given, "--limit", "4", "--out", str(out)]).output.split())
    assert "has 1 shard already" in again
    assert "1.0 kB free where" in again


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([{"text": ""}] * 2, {}, "could be captured"),
        ([{"text": "some words here"}], {"part": "3/3"}, "this part has none"),
    ],
)
def test_what_cannot_be_planned_is_said(teacher, tmp_path, rows, changes, message):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    draft = Draft.of(CaptureOptions(teacher=teacher, corpus=str(corpus), held_out="none", **changes))
    with pytest.raises(TidecacheError, match=message):
        make_plan(draft, 4)
