"""Tools that make caches, as processes that are killed: before each of their steps on the disk in turn.

python -m tests.shared.cache.killed_tools slice|merge SOURCES FOLDER STRIDE   writes FOLDER/whole and, for every
STRIDE-th step n, FOLDER/n: killed there, then run again; prints the last such step
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from shared.cache.merging import merge_caches
from shared.cache.slicing import Cut, slice_cache
from tests.shared.cache.killed_capture import run_forked

CUT = Cut(documents=5, draws=3, contexts=("plain",), k=2)


def slice_(sources: Path, out: Path) -> None:
    slice_cache(sources / "a", out, CUT)


def merge(sources: Path, out: Path) -> None:
    merge_caches([sources / "a", sources / "b"], out)


def main() -> None:
    work = {"slice": slice_, "merge": merge}[sys.argv[1]]
    sources, folder = Path(sys.argv[2]), Path(sys.argv[3])
    work(sources, folder / "whole")  # in this process, so that its children start warm
    step, stride = 1, int(sys.argv[4])
    while run_forked(partial(work, sources, folder / f"{step}"), step):
        run_forked(partial(work, sources, folder / f"{step}"), 0)
        step += stride
    print(step - stride)


if __name__ == "__main__":
    main()
