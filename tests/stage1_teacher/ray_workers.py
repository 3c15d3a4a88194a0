"""Workers that fail in every way, for the tests of Ray actors; apart, since actors import nothing else for them."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from shared.errors import TidecacheError


@dataclass
class Doubler:
    """Doubles numbers; notes every try in `folder`. `die`, `raise_`, `refuse`: tasks at which it does, so many times."""

    folder: Path
    die: dict[int, int]
    raise_: dict[int, int]
    refuse: dict[int, int]
    company: int = 1  # processes that must have come before any of them works

    def start(self) -> str:
        """The same everywhere."""
        return "a doubler"

    def work(self, task: int) -> tuple[int, int]:
        """(twice the task, the process)."""
        tries = len(list(self.folder.glob(f"{task}-*")))
        (self.folder / f"{task}-{tries}").touch()
        come = self.folder / "processes"
        come.mkdir(exist_ok=True)
        (come / str(os.getpid())).touch()
        while len(list(come.iterdir())) < self.company:
            time.sleep(0.01)
        if tries < self.die.get(task, 0):
            os.kill(os.getpid(), signal.SIGKILL)
        if tries < self.raise_.get(task, 0):
            raise RuntimeError("an illegal memory access was encountered")
        if tries < self.refuse.get(task, 0):
            raise TidecacheError(f"{task} cannot be doubled")
        return 2 * task, os.getpid()


@dataclass
class NeverStarts:
    """Does not come so far as to work: dies, or refuses."""

    dies: bool

    def start(self) -> str:
        """Never returns."""
        if self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        raise TidecacheError("the weights are not here")

    def work(self, task: int) -> int:
        """Never called."""
        return task


class Individual:
    """Says something else on every actor."""

    def start(self) -> int:
        """Its process."""
        return os.getpid()

    def work(self, task: int) -> int:
        """The task."""
        return task
