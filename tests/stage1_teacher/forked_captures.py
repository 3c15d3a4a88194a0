"""Captures as processes of their own, forked from one that has everything loaded, so that fifty can be killed in a minute.

The whole path of a real capture but for the teacher, whose scores are a hash: corpus, preparation, draws, the three threads
of the pipeline, the writer. As a program, `python -m tests.stage1_teacher.forked_captures CORPUS MODE FOLDER …` prints one
JSON object:

kills FOLDER KILLS    kill captures at random instants, every second one while another works on the other part
race FOLDER           two captures at once into one folder: of equal options, of other shards, of another spec
once FOLDER           one capture, in this process; the error's text if it fails
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from shared.cache.manifest import read_manifest
from shared.cache.verify import verify
from shared.errors import TidecacheError
from stage1_teacher.planning import WHOLE, ShardPart
from tests.shared.cache.test_kills import assert_complete_or_absent
from tests.shared.cache.test_writer import snapshot
from tests.stage1_teacher.captures import HashTeacher
from tests.stage1_teacher.test_capture import SPEC, TEACHER, run

PER_FOLDER = 5  # kills before a capture may run to its end


def capture(corpus: str, folder: Path, part: ShardPart = WHOLE, size: int = 2, **spec: Any) -> None:
    run(HashTeacher(TEACHER.vocabulary), folder, corpus, dataclasses.replace(SPEC, **spec), size=size, part=part)


def start(corpus: str, folder: Path, **options: Any) -> int:
    """A child that captures; its exit code is 1 after an error, whose text it leaves in `FOLDER.PID.error`."""
    child = os.fork()
    if child:
        return child
    code = 0
    try:
        capture(corpus, folder, **options)
    except TidecacheError as error:
        Path(f"{folder}.{os.getpid()}.error").write_text(str(error))
        code = 1
    except BaseException as error:
        Path(f"{folder}.{os.getpid()}.error").write_text(f"CRASH {error!r}")
        code = 2
    os._exit(code)


def end(child: int, folder: Path) -> str | None:
    """Wait for a child; its error, None if it had none or was killed."""
    os.waitpid(child, 0)
    path = Path(f"{folder}.{child}.error")
    return path.read_text() if path.exists() else None


def kill(child: int) -> bool:
    """Whether it was still at work."""
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def wait_for_shards(folder: Path, child: int, more: int) -> None:
    """Until there are so many more receipts, or the child is about to end."""
    before = sum(1 for _ in folder.rglob("*.json"))
    while sum(1 for _ in folder.rglob("*.json")) < before + more:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.003)


def contents(folder: Path) -> list[str]:
    return [read_manifest(folder / part).content for part in ("", "held-out")]


def kills(corpus: str, folder: Path, wanted: int) -> dict[str, Any]:
    assert end(start(corpus, folder / "whole"), folder / "whole") is None
    whole, randomness = snapshot(folder / "whole"), random.Random(0)
    found: dict[str, Any] = {"kills": 0, "with_another": 0, "another_killed": 0, "folders": 0, "with_some_shards": 0}
    while found["kills"] < wanted:
        target = folder / f"killed {found['folders']}"
        for _ in range(PER_FOLDER):
            together = found["kills"] % 2 == 1
            parts = [ShardPart(1, 2), ShardPart(2, 2)] if together else [WHOLE]
            if randomness.random() < 0.5:
                parts.reverse()
            first, *others = [start(corpus, target, part=part) for part in parts]
            wait_for_shards(target, first, randomness.choice([0, 0, 1, 2]))
            time.sleep(randomness.uniform(0.0, 0.1))
            struck = kill(first)
            found["kills"] += struck
            found["with_another"] += struck and together
            found["with_some_shards"] += struck and any(target.glob("shards/*.json"))
            for other in others:  # it goes on, or is killed too
                if randomness.random() < 0.5:
                    found["another_killed"] += kill(other)
                else:
                    assert end(other, target) is None
            for part in ("", "held-out"):
                assert_complete_or_absent(target / part)
        assert end(start(corpus, target), target) is None
        assert verify(target).problems == ()
        assert contents(target) == contents(folder / "whole")
        assert snapshot(target) == whole, f"{target} differs"
        found["folders"] += 1
    return found


def race(corpus: str, folder: Path) -> dict[str, Any]:
    """The errors of two captures that begin at once, case by case; what is left must be sound, and complete after one more."""
    assert end(start(corpus, folder / "whole"), folder / "whole") is None
    found = {}
    for name, options in {
        "equal": ({}, {}),
        "parts": ({"part": ShardPart(1, 2)}, {"part": ShardPart(2, 2)}),
        "sizes": ({"size": 2}, {"size": 3}),
        "specs": ({"seed": 0}, {"seed": 1}),
    }.items():
        target = folder / name
        children = [start(corpus, target, **o) for o in options]
        errors = [end(child, target) for child in children]
        found[name] = errors
        for _ in range(20):  # do as the message says, until there is nothing to mend
            seed = read_seed(target)
            again = end(
                start(corpus, target, **(options[errors.index(None)] if None in errors else options[0])), target
            )
            if again is None:
                break
            assert "remove one of the two receipts" in again, again
            Path(target, "held-out" if "held-out" in again else "", again.split()[0]).unlink(missing_ok=True)
        assert verify(target).problems == (), name
        if seed == 0:
            assert contents(target) == contents(folder / "whole"), name
    return found


def read_seed(folder: Path) -> int:
    return read_manifest(folder).spec.seed


def main() -> None:
    corpus, mode, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    if mode == "kills":
        print(json.dumps(kills(corpus, folder, int(sys.argv[4]))))
    elif mode == "race":
        print(json.dumps(race(corpus, folder)))
    else:
        try:
            capture(corpus, folder)
            print(json.dumps(None))
        except TidecacheError as error:
            print(json.dumps(str(error)))


if __name__ == "__main__":
    main()
