"""`tidecache teacher extend`: the cache that one capture with all of it would have written, from what is missing alone."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from shared.cache import open_cache
from shared.cache.merging import merge_caches
from shared.cache.slicing import Cut, slice_cache
from shared.cache.verify import verify
from shared.errors import TidecacheError
from shared.spec import TeacherSpec
from stage1_teacher import extend_command
from stage1_teacher.commands import app, capture, extend
from stage1_teacher.extend import Additions
from tests.conftest import ROOT, TINY_STUDENT, TINY_TEACHER
from tests.shared import test_spec
from tests.shared.cache.test_writer import snapshot
from tests.stage1_teacher.captures import TEACHER_VOCABULARY, make_spec, write_corpus
from tests.stage1_teacher.models import save_model
from tests.stage1_teacher.test_commands import COMMAND, ENVIRONMENT, _defaults, contents

DOCUMENTS = 14
GOLD = {"lanes": "gold", "draws": 2}
SLOW = pytest.mark.slow
EVERYTHING = {"context": "both", "draws": 3, "k": 5, "temperatures": "1,2,4"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "random", vocabulary=TEACHER_VOCABULARY, tokenizer=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "small.jsonl", DOCUMENTS)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captures that more than one test begins with."""
    return tmp_path_factory.mktemp("shelf")


@pytest.fixture
def captured(teacher: Path, corpus: Path, shelf: Path, tmp_path: Path):
    """A cache in a folder of this name, captured with these options besides or instead."""

    def run(name: str, **options: object) -> Path:
        given = {
            "teacher": str(teacher), "corpus": str(corpus), "held_out": "0.2", "length": 128, "documents_per_shard": 4,
        } | options  # fmt: skip
        folder, kept = tmp_path / name, shelf / hashlib.sha256(repr(sorted(given.items())).encode()).hexdigest()
        if folder.exists():
            capture(**_defaults(capture) | given | {"out": folder})
            return folder
        if not kept.exists():
            capture(**_defaults(capture) | given | {"out": kept})
        shutil.copytree(kept, folder)
        return folder

    return run


@pytest.fixture
def extended(teacher: Path, tmp_path: Path):
    """Extend a cache by these options; gives what the summary says."""

    def run(folder: Path, **options: object) -> dict:
        given = {"cache": folder, "teacher": str(teacher), "json_file": tmp_path / "summary.json"}
        (tmp_path / "summary.json").unlink(missing_ok=True)
        extend(**_defaults(extend) | given | options)
        path = tmp_path / "summary.json"
        return json.loads(path.read_text()) if path.exists() else {}

    return run


def assert_same_caches(a: Path, b: Path) -> None:
    """Documents, draws, masks and splits exactly; likelihoods to 2e-5 and what storage rounds; candidates but for ties."""
    for part in ("", "held-out"):
        left, right = open_cache(a / part), open_cache(b / part)
        assert left.spec == right.spec
        totals = [dataclasses.replace(x.manifest.totals, size_bytes=0, chunks=0) for x in (left, right)]
        assert totals[0] == totals[1]
        assert verify(a).problems == ()
        compared = 0
        for x, y in zip(left.iter_draws(), right.iter_draws(), strict=True):
            assert (x.document, x.draw, x.timestep) == (y.document, y.draw, y.timestep)
            assert np.array_equal(x.chunks, y.chunks)
            assert np.array_equal(x.split, y.split)
            assert x.scores.keys() == y.scores.keys() == set(left.spec.contexts)
            for context, scores in x.scores.items():
                for field in ("gold_logp_N", "topk_logp_MK", "log_z_MT"):
                    ours, theirs = getattr(scores, field), getattr(y.scores[context], field)
                    np.testing.assert_allclose(ours, theirs, rtol=2**-10, atol=2e-5)
                same = (scores.topk_ids == y.scores[context].topk_ids).mean() if len(x.chunks) else 1.0
                assert same > 0.98
                compared += len(scores.gold_logp_N)
        assert compared > 100


def gold(folder: Path) -> dict:
    return {(d.document, d.draw): d.scores["compdemo"].gold_logp_N.tolist() for d in open_cache(folder).iter_draws()}


def test_everything_at_once_and_everything_later(captured, extended, teacher: Path, corpus: Path) -> None:
    """Half of the documents, gold alone, two draws; then all else in one extension with the corpus given again."""
    folder = captured("grown", **GOLD, limit=DOCUMENTS // 2)
    before = gold(folder)
    summary = extended(folder, **EVERYTHING, lanes="gold,topk", corpus=str(corpus))
    assert_same_caches(folder, captured("once", **EVERYTHING))
    after = gold(folder)
    assert all(after[key] == values for key, values in before.items())
    assert summary["train"]["totals"]["draws"] == open_cache(folder).manifest.totals.draws
    assert extended(folder, **EVERYTHING) == {}  # nothing left to do: no teacher, no summary


@pytest.mark.slow
def test_one_after_the_other(captured, extended) -> None:
    folder = captured("grown", **GOLD)
    for addition in ({"context": "plain"}, {"lanes": "topk"}, {"k": 20}, {"temperatures": "4"}, {"draws": 3}):
        extended(folder, **addition)
        assert verify(folder).problems == ()
    assert open_cache(folder).spec.temperatures == (1.0, 2.0, 4.0)
    assert_same_caches(folder, captured("once", **EVERYTHING | {"k": 20}))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"lanes": "gold"}, {"lanes": "gold,topk", "codec": "packed"}),
        pytest.param({"k": 3}, {"k": 40}, marks=SLOW),
        pytest.param(
            {"context": "both", "lanes": "gold"},
            {"context": "both", "lanes": "gold,topk", "temperatures": "1,2,4"},
            marks=SLOW,
        ),
        pytest.param({}, {"temperatures": "1,2,0.5"}, marks=SLOW),
        pytest.param({}, {"tail_samples": 3}, marks=SLOW),
        pytest.param({"tail_samples": 3}, {"tail_samples": 3, "k": 20}, marks=SLOW),
    ],
    ids=str,
)
def test_the_same_requests_give_the_same_cache(captured, extended, before: dict, after: dict) -> None:
    """Where the batches are those of a capture at once, so is every bit."""
    folder = captured("grown", draws=2, **before)
    extended(folder, **after)
    assert contents(folder) == contents(captured("once", draws=2, **after))


def test_only_what_is_missing_goes_to_the_teacher(captured, extended) -> None:
    folder = captured("grown", draws=2)
    tokens = open_cache(folder).manifest.totals.scored_tokens
    summary = extended(folder, context="plain")
    assert summary["train"]["run"]["tokens_scored"] == tokens  # one context of two
    summary = extended(folder, k=20)
    assert summary["train"]["run"]["tokens_scored"] == 2 * tokens
    summary = extended(folder, draws=3)
    assert summary["train"]["run"]["tokens_scored"] == 2 * (open_cache(folder).manifest.totals.scored_tokens - tokens)


MIXED = [
    {"messages": [{"role": "user", "content": "naïve?"}, {"role": "assistant", "content": " 日本語 yes, quetzal\n"}]},
    {"text": "bad \ud800 surrogate"},
    {"text": ""},
    {"text": "def long(): " + "return xylophones " * 90},
    *({"text": f"{i} in range, yield {i}"} for i in range(12)),
]


@pytest.mark.parametrize("law", ["chunk", "token"])
def test_more_draws_without_the_corpus(captured, extended, tmp_path: Path, law: str) -> None:
    """The files that a capture with the corpus writes, to the byte; chats, cut and dropped documents among them."""
    chats, texts = tmp_path / "chats.jsonl", tmp_path / "texts.jsonl"
    chats.write_text("".join(json.dumps(line) + "\n" for line in MIXED if "messages" in line))
    texts.write_text("".join(json.dumps(line) + "\n" for line in MIXED if "text" in line))
    for path in (chats, texts):
        options = {"corpus": str(path), "held_out": "none", "mask_law": law, "length": 96}
        folder = captured(f"{path.stem}-grown", draws=1, **options)
        extended(folder, draws=3)
        other = captured(f"{path.stem}-once", draws=1, **options)
        captured(other.name, draws=3, **options)
        assert snapshot(folder) == snapshot(other)
    totals = open_cache(folder).manifest.totals
    assert totals.dropped == {"empty": 1, "irreproducible bytes": 1}
    assert totals.cut == 1


def test_the_held_out_part_is_extended_by_the_next_run(captured, extended) -> None:
    """A kill between the two: `verify` says what to do, a capture is told, and the same command does it."""
    folder = captured("cache", draws=1)
    shutil.copytree(folder / "held-out", folder.parent / "held-out")
    extended(folder, context="plain")
    whole = contents(folder)
    shutil.rmtree(folder / "held-out")
    shutil.copytree(folder.parent / "held-out", folder / "held-out")
    [problem] = verify(folder).problems
    assert re.search(r"held-out: its spec differs from the cache's \(contexts\).*run it again", problem)
    with pytest.raises(TidecacheError, match=rf"held-out holds a cache.*`tidecache teacher extend {folder}` adds"):
        captured(folder.name, draws=1, context="both")
    extended(folder, context="plain")
    assert contents(folder) == whole


def test_a_slice_takes_an_extension_back(captured, extended, tmp_path: Path) -> None:
    """And a merge puts the rows of its several files into one file again."""
    folder = captured("grown", draws=1, k=3)
    before = contents(folder)
    extended(folder, draws=2, k=5)
    merge_caches([folder], tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(folder) != before
    assert {len(r.likelihoods) for r in open_cache(tmp_path / "merged").shards} == {1}
    slice_cache(folder, tmp_path / "slice", Cut(draws=1, k=3))
    assert contents(tmp_path / "slice") == before
    assert verify(tmp_path / "slice").problems == verify(tmp_path / "merged").problems == ()


def test_an_extended_cache_is_found_by_its_spec(captured, extended, teacher: Path, corpus: Path, monkeypatch) -> None:
    """Without --out: the folder keeps its name, and a capture with the wider settings goes on in it."""
    folder = captured("random-0123", draws=1)
    extended(folder, context="plain")
    before = contents(folder)
    monkeypatch.setenv("TIDECACHE_HOME", str(folder.parent))
    given = {"teacher": str(teacher), "corpus": str(corpus), "held_out": "0.2", "length": 128, "documents_per_shard": 4}
    capture(**_defaults(capture) | given | {"draws": 1, "context": "both"})
    assert [p.name for p in folder.parent.iterdir() if p.is_dir()] == [folder.name]
    assert contents(folder) == before


def test_a_capture_that_is_not_complete_needs_its_corpus(captured, extended) -> None:
    folder = captured("part", draws=1, part="2/2")
    with pytest.raises(TidecacheError, match=r"documents 0 to 3 are missing.*give its --corpus"):
        extended(folder, draws=2)
    extended(folder, context="plain")  # what is there can be widened all the same
    assert verify(folder).problems == ()


def test_parts_share_an_extension(captured, extended) -> None:
    """Each makes its shards ready; the last one switches."""
    folder = captured("parts", draws=1)
    before = open_cache(folder).manifest
    extended(folder, context="plain", part="1/2")
    assert open_cache(folder).manifest == before
    extended(folder, context="plain", part="2/2")
    assert open_cache(folder).spec.contexts == open_cache(folder / "held-out").spec.contexts == ("compdemo", "plain")
    whole = captured("whole", draws=1)
    extended(whole, context="plain")
    assert contents(folder) == contents(whole)


# --- refusals ----------------------------------------------------------------------------------------------------


def test_another_teacher_is_refused_and_the_field_named(captured, extended, teacher: Path, tmp_path: Path) -> None:
    folder = captured("cache", draws=1)
    before = contents(folder)
    other = save_model(tmp_path / "other" / "random", vocabulary=TEACHER_VOCABULARY, tokenizer=True, seed=5)
    weights = open_cache(folder).spec.teacher.weights
    with pytest.raises(TidecacheError, match=rf"teacher.weights: the cache has '{weights}', found '[0-9a-f]+'\)"):
        extended(folder, context="plain", teacher=str(other))
    shutil.copytree(teacher, tmp_path / "renamed")
    with pytest.raises(TidecacheError, match=r"teacher.name: the cache has 'random', found 'renamed'"):
        extended(folder, context="plain", teacher=str(tmp_path / "renamed"))
    with pytest.raises(TidecacheError, match=r"captured with random, which is no preset: say where"):
        extended(folder, context="plain", teacher=None)
    with pytest.raises(TidecacheError, match=r"teacher.tokenizer: the cache has '[0-9a-f]+', found '[0-9a-f]+'"):
        extended(folder, context="plain", teacher=str(_with_another_tokenizer(teacher, tmp_path)))
    assert contents(folder) == before


def _with_another_tokenizer(teacher: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer" / "random"
    shutil.copytree(teacher, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_STUDENT / name, folder / name)
    return folder


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(TeacherSpec)])
def test_each_of_the_teachers_fields(field: str, tmp_path: Path) -> None:
    """Generated from the fields: a new one is refused, too, as soon as it is there."""
    spec = make_spec()
    other = test_spec.OTHER_TEACHER[field]
    found = dataclasses.replace(spec, teacher=dataclasses.replace(spec.teacher, **{field: other}))
    ours = getattr(spec.teacher, field)
    with pytest.raises(TidecacheError, match=rf"teacher\.{field}: the cache has {ours!r}, found {other!r}"):
        extend_command._refuse_another_teacher(tmp_path, spec, found)


def test_other_students_are_refused(captured, extended, corpus: Path) -> None:
    folder = captured("cache", draws=1)
    with pytest.raises(TidecacheError, match=r"students\.0\.tokenizer: the cache has '[0-9a-f]+', found '[0-9a-f]+'"):
        extended(folder, corpus=str(corpus), students=[str(TINY_TEACHER)])
    with pytest.raises(TidecacheError, match=r"students\.1\.name: the cache has None"):
        extended(folder, corpus=str(corpus), students=[str(TINY_STUDENT), str(TINY_TEACHER)])


def test_what_makes_no_sense(captured, extended, corpus: Path, tmp_path: Path) -> None:
    folder = captured("cache", draws=1, limit=8, lanes="gold")
    for options, words in (
        ({"limit": 5}, "give the --corpus"),
        ({"k": 20}, "the cache has none: add --lanes topk"),
        ({"lanes": "topk", "k": 3, "cache": tmp_path / "nothing"}, "expected the folder of a cache"),
        ({"lanes": "middle"}, "lanes: expected gold, and topk or not"),
        ({"context": "demo"}, "--context: expected one of"),
        ({"corpus": str(tmp_path / "nowhere.jsonl")}, "there is no corpus"),
        ({"lanes": "topk", "tail_samples": 2, "backend": "vllm"}, "only the backend transformers samples the tail"),
    ):
        with pytest.raises(TidecacheError, match=words):
            extended(folder, **options)
    extended(folder, lanes="topk", k=9)
    with pytest.raises(TidecacheError, match=r"k: the cache has 9, asked for 8.*nothing else can change"):
        extended(folder, k=8)
    other = write_corpus(tmp_path / "other.jsonl", 30, seed=1)
    with pytest.raises(TidecacheError, match="not those that the cache holds"):
        extended(folder, corpus=str(other))


def test_additions_keep_the_order_of_a_capture_at_once() -> None:
    base = make_spec(contexts=("plain",), lanes=("gold",), temperatures=(1.0, 2.0))
    wider = Additions(("compdemo",), ("topk", "gold"), 9, (3.0, 1.0), 2).to(base)
    assert (wider.contexts, wider.lanes, wider.k) == (("compdemo", "plain"), ("gold", "topk"), 9)
    assert (wider.temperatures, wider.tail_samples) == ((1.0, 2.0, 3.0), 2)
    assert Additions().to(wider) == Additions(("plain",), ("topk",), 9, (2.0,), 2).to(wider) == wider


# --- kills -------------------------------------------------------------------------------------------------------


def check_random_kills(tmp_path: Path, kills: int) -> None:
    """Forked processes with a made-up teacher: every cache that came to its end has the content of the uninterrupted."""
    command = [sys.executable, "-m", "tests.stage1_teacher.killed_extension", str(tmp_path), str(kills)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == kills
    ends = [tmp_path / "killed", *tmp_path.glob("done *")]
    for folder in ends:
        assert contents(folder) == contents(tmp_path / "whole")
        assert verify(folder).problems == ()
        assert not [
            p for p in folder.rglob("*") if p.name.endswith(".tmp") or (p.suffix == ".json" and "widening" in p.parts)
        ]


def test_random_kills(tmp_path: Path) -> None:
    check_random_kills(tmp_path, 6)


@pytest.mark.slow
def test_fifty_random_kills(tmp_path: Path) -> None:
    check_random_kills(tmp_path, 50)


@pytest.mark.slow
def test_the_command_is_killed_and_goes_on(captured, teacher: Path) -> None:
    """When half of the shards are ready: bit for bit the uninterrupted extension, and what was ready stays."""
    whole = captured("whole", draws=1)
    folder = whole.with_name("killed")
    shutil.copytree(whole, folder)
    options = ["--context", "plain", "--k", "20", "--draws", "2", "--teacher", str(teacher)]
    command = [*COMMAND[:-1], "extend", str(folder), *options]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(folder.glob("widening/*/*.json")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    ready = {p: p.stat().st_ino for p in folder.glob("shards/*widened*")}
    assert open_cache(folder).spec == open_cache(whole).spec
    for path in (folder, whole):
        done = subprocess.run(
            [*COMMAND[:-1], "extend", str(path), *options], env=ENVIRONMENT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert contents(folder) == contents(whole)
    assert {p: p.stat().st_ino for p in ready} == ready


def test_help_names_the_options() -> None:
    from typer.testing import CliRunner

    text = CliRunner().invoke(app, ["extend", "--help"]).output
    for option in ("--context", "--lanes", "--k", "--temperatures", "--draws", "--corpus"):
        assert option in text


def test_what_training_advises_is_a_command(tmp_path: Path) -> None:
    """The errors of `student train` that name `tidecache teacher extend` name options that it has."""
    import typer

    from stage2_student.config import TrainConfig, require

    spec = make_spec()
    parse = typer.main.get_command(app).commands["extend"].make_context  # type: ignore[attr-defined]
    for config, has in (
        (TrainConfig(context="plain"), spec),
        (TrainConfig(objective="kl"), dataclasses.replace(spec, lanes=("gold",))),
        (TrainConfig(objective="kl", temperature=3.0), spec),
    ):
        with pytest.raises(TidecacheError) as refused:
            require(config, has, str(tmp_path))
        [command] = re.findall(r"`tidecache teacher (extend [^`]*)`", str(refused.value))
        given = parse("extend", command.split()[1:]).params
        assert given["cache"] == tmp_path
        wider = Additions(
            contexts=(given["context"],) if given["context"] else (),
            lanes=(given["lanes"],) if given["lanes"] else (),
            temperatures=tuple(map(float, (given["temperatures"] or "").split(","))) if given["temperatures"] else (),
        ).to(has)
        require(config, wider, "here")
