"""A capture of a synthetic cache as a process of its own, for tests that kill it.

python -m tests.shared.cache.killed_capture run FOLDER PART PARTS   write every PARTS-th shard from PART on, after a
                                                                    line on stdin
python -m tests.shared.cache.killed_capture steps FOLDER            kill a capture at each of its steps on the disk
                                                                    in turn, resume it, print the number of steps
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from shared.cache import files
from shared.cache.records import ShardRange
from shared.cache.writer import CacheWriter
from tests.shared.cache import synthetic

SHARDS = [ShardRange(first, first + 2, draw, draw + 2) for draw in (0, 2) for first in range(0, 24, 2)]
FEW_SHARDS = [ShardRange(0, 2, 0, 2), ShardRange(0, 2, 2, 4), ShardRange(2, 4, 0, 2)]
DROP = (2,)


def capture(folder: Path, shards: list[ShardRange]) -> None:
    """What a capture does: open, skip what is there, write the rest, finish."""
    writer = CacheWriter.open(folder, synthetic.spec(), synthetic.vocabulary())
    done = {r.range for r in writer.completed}
    for shard in shards:
        if shard not in done:
            synthetic.write(writer, shard, DROP)
    writer.finish()


def run_forked(work: Callable[[], None], kill_at: int) -> bool:
    """Work in a child that kills itself before its `kill_at`-th step on the disk (0: never); whether it was killed."""
    child = os.fork()
    if child == 0:
        arm(kill_at)
        work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def arm(kill_at: int) -> None:
    """Kill this process before its `kill_at`-th step on the disk."""
    steps = 0

    def counted(function):
        def step(*arguments, **keywords):
            nonlocal steps
            steps += 1
            if steps == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)

        return step

    for name in ("fsync", "replace", "link", "rmdir"):
        setattr(files.os, name, counted(getattr(os, name)))
    files.fsync_folder = counted(files.fsync_folder)


def main() -> None:
    mode, folder = sys.argv[1], Path(sys.argv[2])
    if mode == "run":
        part, parts = int(sys.argv[3]), int(sys.argv[4])
        print("ready", flush=True)
        sys.stdin.readline()
        capture(folder, SHARDS[part::parts])
        return
    capture(folder / "whole", FEW_SHARDS)  # in this process, so that its children start warm
    step = 1
    while run_forked(partial(capture, folder / f"{step}", FEW_SHARDS), step):
        run_forked(partial(capture, folder / f"{step}", FEW_SHARDS), 0)
        step += 1
    print(step - 1)


if __name__ == "__main__":
    main()
