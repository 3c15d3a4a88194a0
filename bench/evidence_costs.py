"""What a cache costs beside the teacher in the loop, for `bench/evidence.py`: seconds, bytes and peak memory.

Every figure comes from a process of its own (this file as a script) with one thread, so that its peak memory is its own;
caches to train from are made before, in another. *Online* loads the teacher, trains as from a cache, and then scores the
masks that the training used: the work of a teacher in the loop, without what a loop would add.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from evidence_cells import CROSS_ENTROPY, DEFAULT, SCALES, CacheChoice, events, offline
from evidence_work import Pair, Workshop
from rich.console import Console

from stage1_teacher.draft import Draft
from stage1_teacher.options import CaptureOptions

CAPTURED = (1, 2)
K = 16
ONLINE = "online"
TRAINED = {
    "cross-entropy": CROSS_ENTROPY,
    "default": DEFAULT,
    "halves": offline(2, 0.0, "halves"),
    "cache": events(),
    ONLINE: events(),
}


def costs_of(folder: Path, scale: str) -> dict[str, Any]:
    """Run each measurement in a new folder inside `folder`: `captures` by draws, `trains` by kind, with their seconds, peak megabytes
    and bytes.
    """
    folder = folder / "costs"
    shutil.rmtree(folder, ignore_errors=True)  # what is found done would take no time

    def child(*what: str) -> dict[str, Any]:
        command = [sys.executable, __file__, "--out", str(folder), "--scale", scale, *what]
        found = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        result: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
        return result

    child("train", "prepare")
    draws = dict.fromkeys([*CAPTURED, SCALES[scale].draws])
    return {
        "captures": {str(count): child("capture", str(count)) for count in draws},
        "trains": {kind: child("train", kind) for kind in TRAINED},
    }


def captured(work: Workshop, draws: int, name: str = "costs") -> dict[str, Any]:
    """Capture the training texts in the recipe's context alone."""
    took = work.capture(f"{name}-{draws}", work.corpora["train"], CacheChoice(k=K), draws, "compdemo")
    return {"seconds": took.seconds, "bytes": took.bytes, "teacher_seconds": took.teacher_seconds}


def trained(work: Workshop, kind: str) -> dict[str, Any]:
    """Train one student; `online` with the teacher in memory, and its time added; `prepare`: only make the cache."""
    if kind == "prepare":
        return {"caches": [str(work.cache_of(one.cache)) for one in TRAINED.values()]}
    if kind != ONLINE:
        return {"seconds": work.train(TRAINED[kind])}
    teacher, _ = Draft.of(CaptureOptions(teacher=Pair().teacher, corpus=str(work.corpora["train"]), limit=1)).load()
    alone = work.train(TRAINED[kind])
    teacher_seconds = captured(work, work.scale.draws, ONLINE)["teacher_seconds"]
    return {"seconds": alone + teacher_seconds, "teacher_seconds": teacher_seconds, "teacher": teacher.name}


def main() -> None:
    """One measurement, as one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scale", choices=list(SCALES), required=True)
    parser.add_argument("what", choices=["capture", "train"])
    parser.add_argument("which")
    options = parser.parse_args()
    work = Workshop(options.out, SCALES[options.scale], Console(stderr=True))
    found = captured(work, int(options.which)) if options.what == "capture" else trained(work, options.which)
    print(json.dumps({**found, "peak_mb": peak_mb()}))


def peak_mb() -> float:
    """Of this process since it began; `ru_maxrss` would begin with its parent's on Linux."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)


if __name__ == "__main__":
    main()
