"""A program that trains, is killed at many places, and goes on: real processes and SIGKILL, forked from a warm one.

    python -m tests.stage2_student.killed_training job.json

The job: recipe, overrides, cache, base, folder; `losses`: kill when the n-th micro-batch's loss is computed; `opens`:
when the n-th file of checkpoints is opened or renamed. Each gets a folder of its own, `loss-N` or `open-N`; `whole` is
never killed. Every run is resumed until it ends, and each child is one process.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from stage2_student import checkpoints, run
from stage2_student.config import load_recipe
from stage2_student.trainer import StudentTrainer


def kill_at_loss(number: int) -> None:
    count = 0
    original = StudentTrainer.compute_loss

    def counted(self: StudentTrainer, *args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args, **options)

    StudentTrainer.compute_loss = counted  # type: ignore[method-assign]


def kill_at_open(number: int) -> None:
    count = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        writes = (event == "open" and "w" in str(arguments[1])) or event in ("os.rename", "shutil.rmtree")
        if writes and checkpoints.UNFINISHED in str(arguments[0]):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def child(work: Any) -> int:
    """Run `work` in a forked process; its wait status."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text())
    config = load_recipe(job["recipe"], job["overrides"])

    def train(out: Path, resume: bool) -> None:
        run.train(config, job["cache"], job["base"], out, resume=resume, console=Console(file=io.StringIO(), width=120))

    kinds = [("loss", kill_at_loss, n) for n in job["losses"]] + [("open", kill_at_open, n) for n in job["opens"]]
    whole = Path(job["folder"]) / "whole"
    assert child(lambda: train(whole, False)) == 0
    for kind, kill, number in kinds:
        out = Path(job["folder"]) / f"{kind}-{number}"

        def killed(out: Path = out, kill: Any = kill, number: int = number) -> None:
            kill(number)
            train(out, False)

        status = child(killed)
        killed_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        assert killed_by == signal.SIGKILL, (kind, number, status)
        left = checkpoints.last(out)
        print(json.dumps({"run": out.name, "after": None if left is None else left.name}), flush=True)
        if left is None:  # as a person does where nothing was saved yet
            shutil.rmtree(out, ignore_errors=True)
        status = child(lambda: train(out, left is not None))  # noqa: B023
        assert status == 0, (kind, number, status)


if __name__ == "__main__":
    main()
