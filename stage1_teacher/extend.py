"""Extending a cache: what it lacks of a wider spec or a larger extent goes to the teacher, what it has stays as it is.

First the stored draws are widened (`shared.cache.widening`): each shard's draws are asked for only in the contexts that
are new, or in all of them if the topk lane changes, and its gold columns are not touched. Then the cache grows under
the wider spec: by draws of the documents that it holds (`stage1_teacher.stored`), or, given the corpus, by documents as
well, which is a plain capture. Both are done for the training documents and for the held-out ones, whose cache is one of
its own. Whatever stops this, the same command goes on.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shared.cache.manifest import MANIFEST_FILE, Manifest, Receipt, read_manifest
from shared.cache.reader import Cache, Shard
from shared.cache.records import ShardRange
from shared.cache.widening import Widening
from shared.errors import TidecacheError
from shared.spec import CONTEXTS, LANES, CaptureSpec
from stage1_teacher.backends import Scores, Teacher
from stage1_teacher.capture import Capture, Part, Report
from stage1_teacher.compdemo import records_of, requests_of
from stage1_teacher.pipeline import Job, Pipeline, Timing, Watcher
from stage1_teacher.planning import WHOLE, ShardPart
from stage1_teacher.stored import StoredMaker, held_out_folder, stored_draw


@dataclass(frozen=True)
class Additions:
    """What a cache shall have besides what it has; None and empty: nothing more. See `CaptureSpec`."""

    contexts: tuple[str, ...] = ()
    lanes: tuple[str, ...] = ()
    k: int | None = None
    temperatures: tuple[float, ...] = ()
    tail_samples: int | None = None
    codec: str | None = None  # with the topk lane

    def to(self, base: CaptureSpec) -> CaptureSpec:
        """The spec with these additions, in the order in which a capture at once would have them.

        Raises:
            TidecacheError: a number would become smaller, or concerns a lane that is not there.
        """
        wider = dataclasses.replace(
            base,
            contexts=_joined(base.contexts, self.contexts, CONTEXTS),
            lanes=_joined(base.lanes, self.lanes, LANES),
            k=self.k or base.k,
            temperatures=(*base.temperatures, *(t for t in self.temperatures if t not in base.temperatures)),
            tail_samples=base.tail_samples if self.tail_samples is None else self.tail_samples,
            codec=self.codec or base.codec,
        )
        of_topk = (self.k, self.temperatures, self.tail_samples, self.codec)
        if "topk" not in wider.lanes and of_topk != (None, (), None, None):
            raise TidecacheError(
                "--k, --temperatures, --tail-samples and --codec concern the topk lane, and the cache has none: add --lanes "
                "topk"
            )
        return wider


def _joined(had: tuple[str, ...], more: tuple[str, ...], order: tuple[str, ...]) -> tuple[str, ...]:
    """Both, in the canonical order; unknown ones last, for the spec to refuse."""
    if not set(more) - set(had):
        return had
    return tuple(sorted({*had, *more}, key=lambda x: (order.index(x) if x in order else len(order), x)))


def slices(folder: Path) -> list[Path]:
    """The folders of a cache: its own, and the held-out part's where there is one."""
    return [f for f in (folder, held_out_folder(folder)) if f == folder or (f / MANIFEST_FILE).exists()]


def stored_draws(manifest: Manifest) -> int:
    """How many draws per document a cache has."""
    return max((r.range.draw_stop for r in manifest.shards), default=0)


def documents_per_shard(manifest: Manifest) -> int:
    """The width of a cache's first shard, in documents."""
    return next((r.range.document_stop - r.range.first_document for r in manifest.shards), 1)


def documents_of(cache: Cache, shards: Iterable[int] | None = None) -> int:
    """How many documents these shards are of, or all; a document counts in each of its draw ranges."""
    indices = range(len(cache.shards)) if shards is None else shards
    return sum(cache.shards[i].range.document_stop - cache.shards[i].range.first_document for i in indices)


class Extension:
    """One extension of the cache in `folder` to `spec`; `widen` first, then `grow` if there is something to grow by."""

    def __init__(self, folder: Path, spec: CaptureSpec, part: ShardPart = WHOLE) -> None:
        self._folder = folder
        self._spec = spec
        self._part = part
        self._begin = time.monotonic()
        self._timing = Timing()
        manifests = {f: read_manifest(f) for f in slices(folder)}
        self._parts = {f: Part(f, m, documents_seen=m.totals.documents) for f, m in manifests.items()}

    def documents_to_widen(self) -> int:
        """For the progress of `widen`."""
        caches = [Cache(f, part.manifest) for f, part in self._parts.items() if part.manifest.spec != self._spec]
        return sum(map(documents_of, caches))

    def widen(self, teacher: Teacher, maker: StoredMaker, watcher: Watcher) -> bool:
        """Widen all shards of the part; whether the whole cache is of the wider spec now, other parts' shards too.

        Raises:
            TidecacheError: anything a user can mend; shards that are ready stay so, and the same command goes on.
        """
        for folder in slices(self._folder):
            widening = Widening.begin(folder, self._spec)
            if widening is not None:
                _Widener(widening, maker, self._part, self._parts[folder], watcher).run(teacher, self._timing)
            self._parts[folder].manifest = read_manifest(folder)
        return all(read_manifest(folder).spec == self._spec for folder in slices(self._folder))

    def grow(self, capture: Capture) -> None:
        """Run a capture under the wider spec, and add its figures to those of `widen`.

        Raises:
            TidecacheError: as `Capture.run`.
        """
        report = capture.run()
        for part in (report.train, report.held_out):
            if part is None:
                continue
            if (earlier := self._parts.get(part.folder)) is not None:
                part.shards_written += earlier.shards_written
                part.chunks_scored += earlier.chunks_scored
                part.tokens_scored += earlier.tokens_scored
            self._parts[part.folder] = part
        for name, seconds in vars(report.timing).items():
            setattr(self._timing, name, getattr(self._timing, name) + seconds)

    def report(self) -> Report:
        """What the cache holds now and what this run added."""
        train, held_out = (self._parts.get(f) for f in (self._folder, held_out_folder(self._folder)))
        assert train is not None
        return Report(self._spec, train, held_out, time.monotonic() - self._begin, self._timing)


class _Widener:
    """The shards of one cache through the teacher, for the columns that they lack."""

    def __init__(self, widening: Widening, maker: StoredMaker, part: ShardPart, done: Part, watcher: Watcher) -> None:
        self._widening = widening
        self._maker = maker
        self._part = part
        self._done = done
        self._watcher = watcher
        self._open: dict[ShardRange, tuple[Receipt, Shard]] = {}  # those between the threads of the pipeline

    def run(self, teacher: Teacher, timing: Timing) -> None:
        """Until no shard of the part waits, also none that another process has completed meanwhile; then switch."""
        asked = self._widening.step.asked
        pipeline = Pipeline(teacher, asked.k if "topk" in asked.lanes else 1, self._watcher, timing)
        first = True
        while (cache := self._widening.cache()) is not None:
            width = documents_per_shard(cache.manifest)
            waiting = self._widening.todo(cache)
            todo = [i for i in waiting if self._part.holds(cache.shards[i].range.first_document, width)]
            if first:
                self._watcher.skipped(documents_of(cache) - documents_of(cache, waiting))
                first = False
            if not todo:
                break
            pipeline.run(self._jobs(cache, todo), self._write)
        self._widening.commit()

    def _jobs(self, cache: Cache, todo: list[int]) -> Iterator[Job]:
        asked = self._widening.step.asked
        for index in todo:
            receipt, shard = cache.shards[index], cache.read_shard(index)
            subjects = self._maker.subjects(shard.documents)
            draws = tuple(stored_draw(subjects[d.document], d) for d in shard.draws)
            self._open[receipt.range] = (receipt, shard)
            requests = tuple(requests_of(asked, draws))
            yield Job(receipt.range, receipt.corpus, tuple(subjects.values()), (), draws, requests)

    def _write(self, job: Job, scores: Scores, budget: int) -> None:
        receipt, shard = self._open.pop(job.shard)
        records = records_of(self._widening.step.asked, job.draws, scores)
        wider = self._widening.write_shard(receipt, shard, [r.contexts for r in records], budget)
        self._done.shards_written += 1
        self._done.chunks_scored += job.chunks
        self._done.tokens_scored += job.positions
        self._watcher.written(wider)
