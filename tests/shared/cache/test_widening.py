"""Widening a cache: the result is the cache that one capture with the wider spec would have written, kills or no kills."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.cache import open_cache
from shared.cache.inspect import inspect_cache
from shared.cache.manifest import read_manifest
from shared.cache.records import ShardRange
from shared.cache.verify import verify
from shared.cache.widening import Widening
from shared.cache.writer import CacheWriter
from shared.errors import TidecacheError
from shared.spec import CaptureSpec
from tests.conftest import ROOT
from tests.shared import test_spec
from tests.shared.cache import synthetic
from tests.shared.cache.test_writer import snapshot, words_of
from tests.shared.cache.widened import NARROW, WIDE, widen

GOLD = {"lanes": ("gold",)}
PACKED = {"codec": "packed"}
BOTH = {"contexts": ("compdemo", "plain")}
STEPS = [
    ({}, BOTH),
    (GOLD, {}),
    (GOLD, {"k": 7, "temperatures": (1.0, 0.5, 2.0)}),
    ({}, {"k": 9}),
    ({}, {"temperatures": (1.0, 2.0, 0.5)}),
    ({}, {"temperatures": (0.5, 1.0, 2.0)}),
    ({}, {"tail_samples": 3}),
    ({"tail_samples": 1}, {"tail_samples": 3, "k": 5}),
    ({"contexts": ("plain",)}, BOTH),
    (GOLD | BOTH, BOTH),
    (GOLD, {"codec": "packed"}),
    (PACKED, PACKED | BOTH),
    (PACKED, PACKED | {"k": 9}),
    (PACKED, PACKED | {"temperatures": (1.0, 2.0, 0.5)}),
    (PACKED, PACKED | {"tail_samples": 2}),
    (GOLD | {"contexts": ("plain",)}, BOTH | {"k": 6, "tail_samples": 2, "temperatures": (1.0, 2.0, 4.0)}),
]


def assert_same_cache(a: Path, b: Path) -> None:
    """The same content, rows, counts and figures, whatever the files."""
    left, right = open_cache(a), open_cache(b)
    assert left.spec == right.spec
    assert left.manifest.content == right.manifest.content
    assert dataclasses.replace(left.manifest.totals, size_bytes=0) == dataclasses.replace(
        right.manifest.totals, size_bytes=0
    )
    assert [r.content for r in left.shards] == [r.content for r in right.shards]
    assert verify(a).problems == ()
    figures = [inspect_cache(x).to_json() for x in (a, b)]
    for name in ("timesteps", "calibration", "sample", "compdemo_against_plain"):
        assert figures[0][name] == figures[1][name]
    for context in left.spec.contexts:
        for low, high in ((0.0, 1.0), (0.3, 0.6)):
            for x, y in zip(left.iter_draws(low, high, context), right.iter_draws(low, high, context), strict=True):
                assert (x.document, x.draw, x.gold_logp.tolist()) == (y.document, y.draw, y.gold_logp.tolist())
                if "topk" in left.spec.lanes:
                    assert x.candidates == y.candidates


@pytest.mark.parametrize(("before", "after"), STEPS, ids=str)
def test_a_widened_cache_is_the_one_captured_at_once(tmp_path: Path, before: dict, after: dict) -> None:
    synthetic.build(tmp_path / "grown", **before)
    old = snapshot(tmp_path / "grown")
    widen(tmp_path / "grown", synthetic.spec(**after))
    synthetic.build(tmp_path / "once", **after)
    assert_same_cache(tmp_path / "grown", tmp_path / "once")
    new = snapshot(tmp_path / "grown")
    for name, data in old.items():  # no data file is touched
        assert new[name] == data or name.endswith(".json")
    assert not [name for name in new if "widening" in name or name.endswith(".tmp")]
    assert read_manifest(tmp_path / "grown").widened_from == (synthetic.spec(**before).fingerprint,)


def test_what_is_not_new_is_not_stored_again(tmp_path: Path) -> None:
    """Another context brings only its own columns; a temperature only log Z; a larger k no gold."""
    for after, expected in (
        (BOTH, {"plain_gold_logp", "plain_topk_ids", "plain_topk_logp", "plain_log_z"}),
        ({"temperatures": (1.0, 2.0, 3.0)}, {"compdemo_log_z"}),
        ({"k": 5}, {"compdemo_topk_ids", "compdemo_topk_logp"}),
        (PACKED | {"tail_samples": 1}, {"compdemo_tail_ids", "compdemo_tail_logp"}),
        (PACKED | {"temperatures": (1.0, 2.0, 3.0)}, {"compdemo_topk_packed"}),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        synthetic.build(folder, documents=4, codec=after.get("codec", "raw"))
        widen(folder, synthetic.spec(**after))
        [receipt] = read_manifest(folder).shards
        first, second = receipt.likelihoods
        assert set(second.columns) == {"document", "draw", "timestep"} | expected
        assert not set(first.columns) & expected
        assert receipt.fingerprint == synthetic.spec(**after).fingerprint


def test_widened_again_and_again(tmp_path: Path) -> None:
    """Each time something else; the file of the first larger k is then read by nobody."""
    specs = [
        synthetic.spec(**changes)
        for changes in (
            GOLD,
            {},
            BOTH,
            BOTH | {"k": 6},
            BOTH | {"k": 8, "tail_samples": 1},
            BOTH | {"k": 8, "tail_samples": 1, "temperatures": (1.0, 2.0, 3.0)},
        )
    ]
    folder = tmp_path / "grown"
    synthetic.build(folder, **GOLD)
    for spec in specs[1:]:
        widen(folder, spec)
        assert verify(folder).problems == ()
    writer = CacheWriter.open(tmp_path / "once", specs[-1], synthetic.vocabulary())
    for first in range(0, 12, 4):
        synthetic.write(writer, ShardRange(first, first + 4, 0, 4), drop=(2,))
    writer.finish()
    assert_same_cache(folder, tmp_path / "once")
    assert read_manifest(folder).widened_from == tuple(s.fingerprint for s in specs[:-1])
    assert max(len(r.likelihoods) for r in open_cache(folder).shards) == 4
    before = snapshot(folder)
    widen(folder, specs[-1])  # nothing left to do
    assert snapshot(folder) == before


def test_growth_after_widening(tmp_path: Path) -> None:
    """More draws of widened documents and more documents, under the wider spec alone."""
    synthetic.build(tmp_path / "grown", documents=4, draws=2)
    widen(tmp_path / "grown", synthetic.spec(**BOTH))
    with pytest.raises(TidecacheError, match=r"contexts: the cache has \['compdemo', 'plain'\].*has widened it since"):
        CacheWriter.open(tmp_path / "grown", synthetic.spec(), synthetic.vocabulary())
    writer = CacheWriter.open(tmp_path / "grown", synthetic.spec(**BOTH), synthetic.vocabulary())
    for shard in (ShardRange(0, 4, 2, 4), ShardRange(4, 8, 0, 4)):
        synthetic.write(writer, shard, drop=(2,))
    writer.finish()
    synthetic.build(tmp_path / "once", documents=8, **BOTH)
    assert verify(tmp_path / "grown").problems == ()
    assert read_manifest(tmp_path / "grown").content == read_manifest(tmp_path / "once").content
    widen(tmp_path / "grown", synthetic.spec(**BOTH, k=6))  # shards of both ages
    synthetic.build(tmp_path / "twice", documents=8, **BOTH, k=6)
    assert read_manifest(tmp_path / "grown").content == read_manifest(tmp_path / "twice").content


def test_a_capture_with_a_wider_spec_is_told_of_extend(tmp_path: Path) -> None:
    synthetic.build(tmp_path / "cache", documents=4)
    with pytest.raises(TidecacheError, match=r"k: the cache has 4, this capture 8.*`tidecache teacher extend .* adds"):
        CacheWriter.open(tmp_path / "cache", synthetic.spec(k=8), synthetic.vocabulary())


# --- refusals ----------------------------------------------------------------------------------------------------


def is_addition(field: str, spec: CaptureSpec) -> bool:
    return (field == "contexts" and set(spec.contexts) > set(test_spec.SPEC.contexts)) or field == "tail_samples"


@pytest.mark.parametrize(("field", "other"), test_spec.mutations(), ids=[name for name, _ in test_spec.mutations()])
def test_every_other_change_is_refused_and_named(tmp_path: Path, field: str, other: CaptureSpec) -> None:
    """Any one field of the spec, its teacher and its students; `test_spec` makes sure that none is forgotten."""
    ours = test_spec.SPEC
    CacheWriter.open(tmp_path, ours, words_of(ours))
    before = snapshot(tmp_path)
    if is_addition(field, other):
        Widening.begin(tmp_path, other)
        return
    with pytest.raises(TidecacheError) as refused:
        Widening.begin(tmp_path, other)
    value, wanted = ours, other
    for part in field.split("."):
        value, wanted = (x[int(part)] if part.isdigit() else getattr(x, part) for x in (value, wanted))
    for expected in (f"{field}: the cache has", repr(_plain(value)), repr(_plain(wanted)), str(tmp_path)):
        assert expected in str(refused.value)
    assert "\n" not in str(refused.value)
    assert snapshot(tmp_path) == before


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize(
    ("before", "after", "field"),
    [
        (BOTH, {}, "contexts"),
        (BOTH, {"contexts": ("plain",)}, "contexts"),
        ({}, GOLD, "lanes"),
        ({}, {"k": 3}, "k"),
        ({}, PACKED, "codec"),
        (PACKED, {}, "codec"),
        (GOLD, GOLD | PACKED, "codec"),
        (GOLD, GOLD | {"k": 9}, "k"),
        (GOLD, GOLD | {"temperatures": (1.0, 2.0, 3.0)}, "temperatures"),
        ({}, {"temperatures": (1.0, 3.0)}, "temperatures"),
        ({}, {"temperatures": (2.0, 1.0)}, "temperatures"),
        ({"tail_samples": 2}, {}, "tail_samples"),
        ({}, BOTH | {"seed": 1}, "seed"),
    ],
    ids=str,
)
def test_nothing_is_taken_away(tmp_path: Path, before: dict, after: dict, field: str) -> None:
    synthetic.build(tmp_path, documents=4, **before)
    with pytest.raises(TidecacheError, match=rf"\({field}: the cache has"):
        Widening.begin(tmp_path, synthetic.spec(**after))


# --- in between --------------------------------------------------------------------------------------------------


def test_readers_see_the_narrower_cache_until_all_is_ready(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    synthetic.build(folder)
    before = open_cache(folder)
    expected = [d.candidates for d in before.iter_draws()]
    wider = synthetic.spec(k=6)
    widen(folder, wider, at_most=2)
    assert read_manifest(folder) == before.manifest
    assert verify(folder).problems == ()
    assert CacheWriter.open(folder, synthetic.spec(), synthetic.vocabulary()).finish() == before.manifest
    asked = widen(folder, wider)
    assert asked == 1  # of three shards: two were ready
    assert [d.candidates for d in before.iter_draws()] == expected  # a reader that was open all the time
    assert read_manifest(folder).spec == wider


def test_a_capture_at_work_meanwhile(tmp_path: Path) -> None:
    """What it finishes in time is widened too; after the switch it is refused, and what it left behind is done anew."""
    folder = tmp_path / "cache"
    narrow = synthetic.build(folder, documents=4)
    wider = synthetic.spec(**BOTH)
    widen(folder, wider, at_most=1)
    synthetic.write(narrow, ShardRange(4, 8, 0, 4))
    widen(folder, wider)
    assert read_manifest(folder).totals.documents == 7
    narrow._manifest_written = time.monotonic()  # it does not look at the manifest after each shard
    synthetic.write(narrow, ShardRange(8, 12, 0, 4))
    with pytest.raises(TidecacheError, match="has extended this cache while this capture was at work"):
        narrow.finish()
    assert read_manifest(folder).spec == wider
    again = CacheWriter.open(folder, wider, synthetic.vocabulary())
    assert [r.range.first_document for r in again.completed] == [0, 4]
    synthetic.write(again, ShardRange(8, 12, 0, 4))
    again.finish()
    synthetic.build(tmp_path / "once", **BOTH)
    assert_same_cache(folder, tmp_path / "once")


def test_a_switch_that_was_killed_is_finished_by_whoever_comes_next(tmp_path: Path) -> None:
    """The manifest is the wider one, the receipts are not yet: `verify` says what to do, and a capture puts it right."""
    folder = tmp_path / "cache"
    synthetic.build(folder)
    receipts = {p: p.read_bytes() for p in (folder / "shards").glob("*.json")}
    widen(folder, synthetic.spec(k=6))
    whole = snapshot(folder)
    for path, data in list(receipts.items())[:2]:
        path.write_bytes(data)
    assert len([d for d in open_cache(folder).iter_draws() if len(d.candidates) and len(d.candidates[0]) == 6]) > 20
    problems = verify(folder).problems
    assert len(problems) == 2
    assert all("run the extension again" in problem for problem in problems)
    CacheWriter.open(folder, synthetic.spec(k=6), synthetic.vocabulary())
    assert snapshot(folder) == whole


def test_the_advice_for_a_damaged_further_file_works(tmp_path: Path) -> None:
    """Remove the receipt, capture again: the shard is done anew under the wider spec, in one file."""
    folder = tmp_path / "cache"
    synthetic.build(folder)
    widen(folder, synthetic.spec(k=6))
    path = next((folder / "shards").glob("00000004*widened*"))
    path.write_bytes(path.read_bytes()[:-9])
    [problem] = verify(folder).problems
    Path(problem.split("remove ")[1].split(" and run")[0]).unlink()
    synthetic.build(folder, k=6)
    synthetic.build(tmp_path / "once", k=6)
    assert_same_cache(folder, tmp_path / "once")


def test_a_lost_manifest_is_derived_again(tmp_path: Path) -> None:
    """`verify` advises to remove it with a damaged vocabulary; the earlier fingerprints stand in the files' footers."""
    folder = tmp_path / "cache"
    synthetic.build(folder)
    widen(folder, synthetic.spec(k=6))
    before = read_manifest(folder)
    (folder / "manifest.json").unlink()
    CacheWriter.open(folder, synthetic.spec(k=6), synthetic.vocabulary())
    assert read_manifest(folder) == before


def test_another_target_starts_anew_and_old_leftovers_go(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    synthetic.build(folder)
    widen(folder, synthetic.spec(k=6), at_most=2)
    widen(folder, synthetic.spec(k=7))
    synthetic.build(tmp_path / "once", k=7)
    assert_same_cache(folder, tmp_path / "once")
    left = [p for p in folder.rglob("*") if synthetic.spec(k=6).fingerprint[:16] in str(p)]
    assert len(left) == 5  # two files, two receipts, their folder: perhaps somebody is at work on them
    for path in left:
        os.utime(path, (0, 0))
    widen(folder, synthetic.spec(k=8))
    assert not any(p.exists() for p in left)
    assert verify(folder).problems == ()


def test_a_damaged_waiting_receipt_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    synthetic.build(folder)
    widen(folder, synthetic.spec(k=6), at_most=3)
    first, second, _ = sorted((folder / "widening").glob("*/*.json"))
    first.write_bytes(first.read_bytes()[:100])
    next((folder / "shards").glob(f"{second.stem}.widened-*")).unlink()
    assert widen(folder, synthetic.spec(k=6)) == 2
    assert verify(folder).problems == ()


def test_a_full_disk_leaves_the_narrower_cache(tmp_path: Path) -> None:
    code = f"""
import resource
from tests.shared.cache import synthetic
from tests.shared.cache.widened import widen
from shared.errors import TidecacheError
synthetic.build({str(tmp_path / "cache")!r}, documents=4)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
try:
    widen({str(tmp_path / "cache")!r}, synthetic.spec(k=64))
except TidecacheError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "limit on file sizes" in out.stdout
    assert read_manifest(tmp_path / "cache").spec == synthetic.spec()
    assert verify(tmp_path / "cache").problems == ()
    widen(tmp_path / "cache", synthetic.spec(k=64))
    assert verify(tmp_path / "cache").problems == ()


def test_two_extensions_of_one_cache_by_mistake(tmp_path: Path) -> None:
    """To the same spec at the same time: both run to the end, and every byte is that of one."""
    for name in ("one", "both"):
        synthetic.build(tmp_path / name, documents=16, per_shard=2, **NARROW)
    widen(tmp_path / "one", synthetic.spec(**WIDE))
    command = [sys.executable, "-m", "tests.shared.cache.widened", "widen", str(tmp_path / "both")]
    both = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)
    ]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in both:
        process.communicate(timeout=120)
        assert process.returncode == 0
    assert snapshot(tmp_path / "both") == snapshot(tmp_path / "one")


def test_kills_at_every_step_on_the_disk(tmp_path: Path) -> None:
    """Every fsync, rename, link and removal in turn is the last thing that an extension does not do."""
    command = [sys.executable, "-m", "tests.shared.cache.widened", "steps", str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    steps = int(out.stdout)
    assert steps > 25
    whole = snapshot(tmp_path / "whole")
    for step in range(1, steps + 1):
        assert snapshot(tmp_path / str(step)) == whole, f"killed at step {step}"
    shutil.rmtree(tmp_path / "whole")
