"""Widening synthetic caches: the shared half of `tidecache teacher extend`, with scores that need no teacher.

python -m tests.shared.cache.widened widen FOLDER   widen the cache in FOLDER after a line on stdin
python -m tests.shared.cache.widened steps FOLDER   kill a widening at each of its steps on the disk in turn, look at what a
                                                    reader finds, go on, print the number of steps
"""

from __future__ import annotations

import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np

from shared.cache import open_cache
from shared.cache.records import Draw
from shared.cache.verify import verify
from shared.cache.widening import Widening
from shared.spec import CONTEXTS, CaptureSpec
from tests.shared.cache import synthetic
from tests.shared.cache.killed_capture import run_forked

NARROW, WIDE = {"lanes": ("gold",), "contexts": ("plain",)}, {"contexts": ("compdemo", "plain")}


def fresh(asked: CaptureSpec, draw: Draw) -> dict:
    """What `synthetic.draw` says of the same draw."""
    return {
        x: synthetic.scores(
            np.random.default_rng([11, draw.stored.position, draw.draw, CONTEXTS.index(x)]), asked, draw.token_count_M
        )
        for x in asked.contexts
    }


def widen(folder: str | Path, wider: CaptureSpec, at_most: int | None = None) -> int:
    """Widen a synthetic cache, or get only so many shards ready; returns how many were."""
    one = Widening.begin(Path(folder), wider)
    if one is None:
        return 0
    cache = one.cache()
    if cache is None:  # another process was faster
        one.commit()
        return 0
    todo = one.todo(cache)[:at_most]
    for index in todo:
        shard = cache.read_shard(index)
        scores = [fresh(one.step.asked, d) for d in shard.draws]
        one.write_shard(cache.shards[index], shard, scores, wider.batch_tokens)
    if at_most is None:
        assert one.commit() is not None
    return len(todo)


def assert_one_of_both(folder: Path) -> None:
    """A reader finds the narrower cache or the wider one, whole."""
    cache = open_cache(folder)
    assert cache.spec in (synthetic.spec(**NARROW), synthetic.spec(**WIDE))
    draws = list(cache.iter_draws())
    assert len(draws) == 12
    assert all(set(d.scores) == set(cache.spec.contexts) for d in draws)
    if cache.spec == synthetic.spec(**WIDE):
        assert all(len(d.candidates) == len(d.chunks) for d in draws)


def main() -> None:
    root = Path(sys.argv[2])
    if sys.argv[1] == "widen":
        print("ready", flush=True)
        sys.stdin.readline()
        widen(root, synthetic.spec(**WIDE))
        return
    synthetic.build(root / "narrow", documents=4, per_shard=2, drop=(2,), **NARROW)
    shutil.copytree(root / "narrow", root / "whole")
    widen(root / "whole", synthetic.spec(**WIDE))
    step = 1
    while True:
        folder = root / f"{step}"
        shutil.copytree(root / "narrow", folder)
        if not run_forked(partial(widen, folder, synthetic.spec(**WIDE)), step):
            break
        assert_one_of_both(folder)
        run_forked(partial(widen, folder, synthetic.spec(**WIDE)), 0)
        assert verify(folder).problems == ()
        step += 1
    print(step - 1)


if __name__ == "__main__":
    main()
