"""`tidecache teacher capture --engine ray` as a person runs it: the same cache, whoever is killed in the middle.

A real local Ray in real subprocesses. Slow: each actor loads a teacher.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shared.cache import open_cache
from shared.cache.verify import verify
from stage1_teacher.draft import Draft
from stage1_teacher.options import CaptureOptions
from stage1_teacher.planning import segments
from stage1_teacher.ray_engine import ShardWorker
from stage1_teacher.shards import FinishedShard, LocalEngine, ShardMaker
from tests.stage1_teacher.captures import write_corpus
from tests.stage1_teacher.models import save_model
from tests.stage1_teacher.test_capture import Silent
from tests.stage1_teacher.test_commands import COMMAND, ENVIRONMENT, arguments, capture, contents, refuse

TWO_ACTORS = ("--engine", "ray", "--actors", "2", "--cpus-per-actor", "0.5")
ACTOR = b"ray::_Host"  # what Ray calls the process


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "random", vocabulary=8192, tokenizer=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "small.jsonl", 80)


def actors_of(mark: str) -> list[int]:
    """The actors of the capture that was started with this in its environment."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if ACTOR in (process / "cmdline").read_bytes() and mark.encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
        except (OSError, ValueError):
            continue
    return found


@pytest.mark.slow
def test_an_actor_killed_in_the_middle_changes_nothing(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    whole, folder, mark = tmp_path / "whole", tmp_path / "cache", uuid.uuid4().hex
    assert capture(teacher, corpus, whole, "--context", "both").returncode == 0
    process = subprocess.Popen(
        arguments(teacher, corpus, folder, "--context", "both", *TWO_ACTORS, "--json", str(tmp_path / "summary.json")),
        env={**ENVIRONMENT, "TIDECACHE_TEST": mark}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while len(list(folder.glob("shards/*.json"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    victims = actors_of(mark)
    assert len(victims) == 2, "both actors are at work"
    os.kill(victims[0], signal.SIGKILL)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "Traceback" not in output + errors
    assert contents(folder) == contents(whole)
    assert verify(folder).problems == ()
    ours, theirs = open_cache(folder), open_cache(whole)
    assert [s.range for s in ours.shards] == [s.range for s in theirs.shards]
    draws = [(d.document, d.draw) for d in ours.iter_draws()]
    assert len(draws) == len(set(draws)) == len(list(theirs.iter_draws()))
    run = json.loads((tmp_path / "summary.json").read_text())
    assert sum(run[part]["run"]["shards_written"] for part in ("train", "held_out")) == sum(
        len(open_cache(folder / part).shards) for part in ("", "held-out")
    )
    assert 0 < run["teacher_seconds"] < run["seconds"]
    assert actors_of(mark) == []


@pytest.mark.slow
def test_a_shard_that_always_fails_and_then_does_not(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    """The actor's process dies at one document of the corpus, every time: named after the attempts, the others are kept."""
    folder = tmp_path / "cache"
    program = (
        "import stage1_teacher.ray_engine as engine; from tests.stage1_teacher.ray_poison import Poisoned; "
        "engine.ShardWorker = Poisoned; from shared.cli import main; main()"
    )
    options = arguments(teacher, corpus, folder, *TWO_ACTORS, "--held-out", "none")[len(COMMAND) :]
    command = [sys.executable, "-c", program, "teacher", "capture", *options]
    environment = {**ENVIRONMENT, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(
        r"error: the shard .*8.* failed 3 times on Ray actors, the last time alone: .*what is complete is kept", last
    )
    assert "Traceback" not in done.stderr
    complete = len(open_cache(folder).shards)
    assert complete >= 2
    assert verify(folder).problems == ()
    done = capture(teacher, corpus, folder, "--held-out", "none")  # goes on in this process
    assert done.returncode == 0, done.stderr
    assert len(open_cache(folder).shards) == 20 > complete


def test_two_shards_in_one_worker_at_a_time(teacher: Path, corpus: Path) -> None:
    """As an actor with a GPU does it: the bytes of a shard do not depend on what is beside it."""
    draft = Draft.of(CaptureOptions(teacher=str(teacher), corpus=str(corpus), held_out="none", limit=24))
    todo = list(segments(draft.extent.stream(draft.spec, held_out=False), (), 2, 4, Path()))
    worker = pickle.loads(pickle.dumps(ShardWorker(draft)))  # as Ray sends it
    spec = worker.start()
    with ThreadPoolExecutor(2) as threads:
        delivered = list(threads.map(worker.work, todo))
    expected: list[FinishedShard] = []
    loaded, same = draft.load()
    assert spec == same
    LocalEngine(loaded, ShardMaker(spec, draft.tokenizer, draft.students)).run(iter(todo), expected.append, Silent())
    assert len(expected) == 6
    assert [d.shard for d in delivered] == expected
    assert all(d.documents == 4 and d.seconds > 0 and not d.narrowed for d in delivered)


def test_ray_is_not_installed(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    program = "import sys; sys.modules['ray'] = None; from shared.cli import main; main()"
    command = [sys.executable, "-c", program, *arguments(teacher, corpus, tmp_path / "out", *TWO_ACTORS)[3:]]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    refuse(done, r"pip install 'tidecache\[ray\]'")
    assert not (tmp_path / "out").exists()


def test_options_that_mean_nothing(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    for options, words in (
        (("--engine", "spark"), "--engine: expected local or ray, found 'spark'"),
        (("--actors", "2"), "--actors and --gpus-per-actor are of Ray's actors: add --engine ray"),
    ):
        refuse(capture(teacher, corpus, tmp_path / "out", *options), words)
