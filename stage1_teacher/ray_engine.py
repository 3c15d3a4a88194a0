"""A capture's teachers on Ray actors: shards go out as text, and come back as encoded files.

An actor prepares, scores and encodes whole shards exactly as `LocalEngine` does, so the cache is the same. The calling
process reads the corpus and commits: no machine but its own has to see the corpus or the cache's folder. Each
machine needs tidecache and the teacher's weights, at the same path or as the same hub id; teachers that differ are refused.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator

from shared.cache.manifest import Receipt
from shared.errors import TidecacheError
from shared.spec import CaptureSpec, differences
from stage1_teacher.actors import Actors
from stage1_teacher.draft import Draft
from stage1_teacher.pipeline import Timing, Watcher, score_shard
from stage1_teacher.planning import Segment
from stage1_teacher.shards import FinishedShard, ShardMaker


@dataclasses.dataclass(frozen=True)
class Delivery:
    """A finished shard as an actor hands it over."""

    shard: FinishedShard
    documents: int
    narrowed: tuple[int, ...]  # batch budgets that it was done again with
    seconds: float  # in the teacher


class _Listener:
    """A `Watcher` in an actor: keeps only what is told later."""

    def __init__(self) -> None:
        self.budgets: list[int] = []

    def skipped(self, documents: int) -> None:
        """Nothing is skipped here."""

    def begun(self, documents: int, chunks: int, positions: int) -> None:
        """Told when the shard is delivered."""

    def scored(self, positions: int) -> None:
        """Told when the shard is delivered."""

    def narrowed(self, batch_tokens: int) -> None:
        """See `Watcher`."""
        self.budgets.append(batch_tokens)

    def written(self, receipt: Receipt) -> None:
        """Nothing is written here."""


class ShardWorker:
    """Loads the draft's teacher and makes shards with it; while one is scored, another may be prepared or encoded."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft

    def start(self) -> CaptureSpec:
        """Load the teacher; the whole spec."""
        self._teacher, spec = self._draft.load()
        self._maker = ShardMaker(spec, self._draft.tokenizer, self._draft.students)
        self._preparing, self._scoring = threading.Lock(), threading.Lock()
        return spec

    def work(self, segment: Segment) -> Delivery:
        """Do the one range of draws that the segment lacks."""
        listener = _Listener()
        with self._preparing:
            (job,) = self._maker.jobs(segment)
        with self._scoring:
            begin = time.monotonic()
            scores, budget = score_shard(self._teacher, self._maker.k, job, listener)
            seconds = time.monotonic() - begin
        shard = self._maker.finish(job, scores, budget)
        return Delivery(shard, len(segment.documents), tuple(listener.budgets), seconds)


class RayEngine:
    """See `stage1_teacher.shards.Engine`; `actors` are at work already."""

    def __init__(self, actors: Actors[Segment, Delivery]) -> None:
        self._actors = actors
        self.timing = Timing()

    def run(self, segments: Iterator[Segment], commit: Callable[[FinishedShard], None], watcher: Watcher) -> None:
        """See `Engine`; shards are committed here, as they come."""
        watcher.begun(0, 0, 0)  # time runs from now on
        tasks = (dataclasses.replace(s, missing=(missing,)) for s in segments for missing in s.missing)
        for delivery in self._actors.run(tasks):
            for budget in delivery.narrowed:
                watcher.narrowed(budget)
            watcher.begun(delivery.documents, delivery.shard.chunks, delivery.shard.tokens)
            watcher.scored(delivery.shard.tokens)
            with self.timing.measure("writing"):
                commit(delivery.shard)
            self.timing.teacher += delivery.seconds / self._actors.count


def shard_name(segment: Segment) -> str:
    """What a task of the engine is called."""
    return f"the shard {segment.shards[0].name}"


def same_spec(ours: CaptureSpec, theirs: CaptureSpec) -> None:
    """Two actors' teachers must be one.

    Raises:
        TidecacheError: they are not; names the fields.
    """
    if changed := differences(ours, theirs):
        fields = "; ".join(f"{name}: {one!r} and {other!r}" for name, one, other in changed)
        raise TidecacheError(
            f"two Ray actors have loaded different teachers ({fields}): put the same weights on every machine"
        )
