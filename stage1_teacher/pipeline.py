"""Shards through the teacher: prepare the next, score this one, write the last, side by side (DESIGN §7).

Each step is one shard ahead of the next: one thread reads, tokenises and aligns the coming shard, the main thread runs
the teacher on this one, and one thread finds fillings, encodes and writes the last one. At most three shards are in
memory. An exception in either thread is raised here at the next shard; nobody waits for a thread that is gone.

What a shard's scores are is decided by the shard and the teacher's batch budget alone: batches are made within one
shard, and one that ran out of memory is done again from its start.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from shared.cache.manifest import Receipt
from shared.cache.records import ShardRange
from shared.documents import Dropped
from stage1_teacher.backends import OutOfDeviceMemoryError, ScoreRequest, Scores, Teacher
from stage1_teacher.compdemo import PlannedDraw, Subject


class Watcher(Protocol):
    """Hears how far a capture is; called from its threads."""

    def skipped(self, documents: int) -> None:
        """So many documents have all their draws already."""

    def begun(self, documents: int, chunks: int, positions: int) -> None:
        """The teacher starts on a shard that will complete so many documents and chunks (each context counted once)."""

    def scored(self, positions: int) -> None:
        """So many more positions of that shard are scored."""

    def narrowed(self, batch_tokens: int) -> None:
        """The device ran out of memory; the shard is done again from its start with this smaller budget."""

    def written(self, receipt: Receipt) -> None:
        """A shard is complete."""


@dataclass
class Timing:
    """Seconds of the main thread: in the teacher, and waiting for the thread before it and the one after it."""

    teacher: float = 0.0
    preparing: float = 0.0
    writing: float = 0.0

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time of the block to the field `name`."""
        begin = time.monotonic()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.monotonic() - begin)


@dataclass(frozen=True)
class Job:
    """One shard on its way to the teacher."""

    shard: ShardRange
    corpus_digest: str
    subjects: tuple[Subject, ...]
    dropped: tuple[tuple[int, Dropped], ...]
    draws: tuple[PlannedDraw, ...]
    requests: tuple[ScoreRequest, ...]

    @property
    def chunks(self) -> int:
        """Masked chunks, counted once however many contexts."""
        return sum(int(d.masked_C.sum()) for d in self.draws)

    @property
    def positions(self) -> int:
        """Tokens to score, over all contexts."""
        return sum(len(r.positions) for r in self.requests)


class Pipeline:
    """A teacher, the number of candidates `k` that it is asked for, and who hears of it; runs add to `timing`."""

    def __init__(self, teacher: Teacher, k: int, watcher: Watcher, timing: Timing | None = None) -> None:
        self._teacher = teacher
        self._k = k
        self._watcher = watcher
        self.timing = timing or Timing()

    def run(self, jobs: Iterator[Job], write: Callable[[Job, Scores, int], None]) -> None:
        """Score every job and hand it to `write` with the batch budget that it was scored with, in order.

        Raises:
            TidecacheError: whatever `jobs`, the teacher or `write` raise; no later job is begun.
        """
        with (
            ThreadPoolExecutor(1, "prepare") as preparing,
            ThreadPoolExecutor(1, "write") as writing,
        ):
            coming: Future[Job | None] = preparing.submit(next, jobs, None)
            last: Future[None] | None = None
            while True:
                with self.timing.measure("preparing"):
                    job = coming.result()
                if job is None:
                    break
                coming = preparing.submit(next, jobs, None)
                documents = job.shard.document_stop - job.shard.first_document
                self._watcher.begun(documents, job.chunks, job.positions)
                with self.timing.measure("teacher"):
                    scores, budget = score_shard(self._teacher, self._k, job, self._watcher)
                if last is not None:
                    with self.timing.measure("writing"):
                        last.result()
                last = writing.submit(write, job, scores, budget)
            if last is not None:
                with self.timing.measure("writing"):
                    last.result()


def score_shard(teacher: Teacher, k: int, job: Job, watcher: Watcher) -> tuple[Scores, int]:
    """The shard's scores and the batch budget that they were made with: halved until the device can do it.

    Raises:
        TidecacheError: the teacher's, such as a device too small for the longest sequence alone.
    """
    wanted = teacher.batch_tokens
    longest = max((len(request.token_ids) for request in job.requests), default=0)
    try:
        while True:
            done: list[int] = []

            def heard(positions: int, done: list[int] = done) -> None:
                done.append(positions)
                watcher.scored(positions)

            try:
                return teacher.score(job.requests, k, heard), teacher.batch_tokens
            except OutOfDeviceMemoryError:
                if teacher.batch_tokens <= longest:
                    raise
                watcher.scored(-sum(done))
                teacher.batch_tokens //= 2
                watcher.narrowed(teacher.batch_tokens)
    finally:
        # The next shard starts from the spec's budget again: what a shard is made with depends on nothing before it.
        teacher.batch_tokens = wanted
