"""Extensions that are killed at random points, each in a process of its own that is forked from a warm one.

python -m tests.stage1_teacher.killed_extension FOLDER KILLS   prints how many kills hit a process at work
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from shared.cache import open_cache
from stage1_teacher.capture import Capture, Extent
from stage1_teacher.extend import Extension
from stage1_teacher.shards import LocalEngine, ShardMaker
from stage1_teacher.stored import StoredExtent, StoredMaker
from tests.stage1_teacher.captures import HashTeacher, make_spec, tokenizers, write_corpus
from tests.stage1_teacher.test_capture import Silent

TEACHER, STUDENT = tokenizers()
NARROW = make_spec(lanes=("gold",), held_out="hash:0.3", k=3)
WIDE = make_spec(contexts=("compdemo", "plain"), held_out="hash:0.3", k=3)


def capture(folder: Path, corpus: Path) -> None:
    engine = LocalEngine(HashTeacher(TEACHER.vocabulary), ShardMaker(NARROW, TEACHER, [STUDENT]))
    Capture(engine, TEACHER, NARROW, Extent(str(corpus), 1, 2), folder, Silent()).run()


def extend(folder: Path) -> None:
    """Two contexts, candidates, and another draw."""
    teacher, maker = HashTeacher(TEACHER.vocabulary), StoredMaker(WIDE, TEACHER, [])
    extension = Extension(folder, WIDE)
    assert extension.widen(teacher, maker, Silent())
    extent = StoredExtent(str(folder), 2, 2)
    extension.grow(Capture(LocalEngine(teacher, maker), TEACHER, WIDE, extent, folder, Silent()))


def forked(folder: Path, kill_after: float | None) -> bool:
    """Extend in a child, which is killed after so many seconds; whether it was."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            extend(folder)
            status = 0
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def main() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not be there in a child
    torch.set_num_threads(1)
    root, kills = Path(sys.argv[1]), int(sys.argv[2])
    corpus = write_corpus(root / "corpus.jsonl", 10, longest=12)
    capture(root / "whole", corpus)
    begin = time.monotonic()
    capture(root / "killed", corpus)
    forked(root / "whole", None)
    seconds = time.monotonic() - begin
    randomness, hits, since = random.Random(), 0, 0
    while hits < kills:
        if not forked(root / "killed", randomness.uniform(0.0, seconds / 2)):  # it was done: begin anew
            since += 1
            os.rename(root / "killed", root / f"done {since}")
            capture(root / "killed", corpus)
            continue
        hits += 1
        for part in ("", "held-out"):
            cache = open_cache(root / "killed" / part)
            assert cache.spec in (NARROW, WIDE)
            assert all(set(d.scores) == set(cache.spec.contexts) for d in cache.iter_draws())
    assert not forked(root / "killed", None)
    print(hits)


if __name__ == "__main__":
    main()
