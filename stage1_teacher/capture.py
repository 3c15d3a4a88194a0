"""The capture driver: corpus → documents → draws → teacher → shards, resumable at any instant (DESIGN §1, §7).

Three things run side by side, each one shard ahead of the next: one thread reads, tokenises and aligns the coming
shard, the main thread runs the teacher on this one, and one thread finds fillings, encodes and writes the last one. At
most three shards are in memory. An exception in either thread is raised here at the next shard; a shard is complete or
absent, so whatever stops a capture, the same command goes on from the last complete shard.

What a shard holds is decided by its documents and the spec alone: draws are counter-based, and teacher batches are made
within one shard. The held-out slice of the corpus is a cache of its own with the same spec, in `held-out` beside the
shards.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from shared.cache.manifest import HELD_OUT_FOLDER, Manifest, Receipt
from shared.cache.records import ShardRange
from shared.cache.vocabulary import TeacherVocabulary
from shared.cache.writer import CacheWriter
from shared.corpus import deduplicated, held_out_rule, in_held_out, open_corpus
from shared.documents import Dropped, RawDocument
from shared.errors import TidecacheError
from shared.preparation import NO_BOUNDARY, Limits, Preparer
from shared.spec import CaptureSpec
from shared.tokenization import TextTokenizer
from stage1_teacher.backends import OutOfDeviceMemoryError, ScoreRequest, Scores, Teacher
from stage1_teacher.compdemo import PlannedDraw, Subject, plan_draw, records_of, requests_of, without_unpredictable
from stage1_teacher.planning import Segment, segments


@dataclass(frozen=True)
class Extent:
    """What a capture covers; no part of the spec. `limit`: of documents before deduplication and split."""

    corpus: str
    draws: int
    documents_per_shard: int
    text_column: str | None = None
    split: str = "train"
    limit: int | None = None

    def open(self) -> Iterator[RawDocument]:
        """The corpus as it is, from its start."""
        return open_corpus(self.corpus, text_column=self.text_column, limit=self.limit, split=self.split)

    def stream(self, spec: CaptureSpec, held_out: bool) -> Iterator[RawDocument]:
        """The deduplicated corpus' training documents, or its held-out ones."""
        rule, share = held_out_rule(spec.held_out)
        return (raw for raw in deduplicated(self.open()) if in_held_out(raw, share, rule) == held_out)


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


@dataclass
class Part:
    """What became of one slice: the cache it is in, and what this run added. `examples`: one dropped document per reason."""

    folder: Path
    manifest: Manifest
    documents_seen: int = 0
    shards_written: int = 0
    chunks_scored: int = 0
    tokens_scored: int = 0  # over all contexts
    examples: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The numbers, for --json: `totals` of the whole cache, `run` of this run."""
        totals = self.manifest.to_json()["totals"]
        names = ("documents_seen", "shards_written", "chunks_scored", "tokens_scored")
        run = {name: getattr(self, name) for name in names}
        return {"folder": str(self.folder), "content": self.manifest.content, "totals": totals, "run": run}


@dataclass(frozen=True)
class Report:
    """A whole capture. `held_out` is None where the corpus has no held-out documents."""

    spec: CaptureSpec
    train: Part
    held_out: Part | None
    seconds: float
    timing: Timing

    def to_json(self) -> dict[str, Any]:
        """What --json writes; bytes, tokens, seconds."""
        return {
            "fingerprint": self.spec.fingerprint,
            "spec": self.spec.to_json(),
            "train": self.train.to_json(),
            "held_out": self.held_out.to_json() if self.held_out else None,
            "seconds": round(self.seconds, 3),
            "teacher_seconds": round(self.timing.teacher, 3),
            "preparing_seconds": round(self.timing.preparing, 3),
            "writing_seconds": round(self.timing.writing, 3),
        }


@dataclass(frozen=True)
class Job:
    """One shard on its way to the teacher."""

    shard: ShardRange
    corpus_digest: str
    subjects: tuple[Subject, ...]
    dropped: tuple[tuple[int, Dropped], ...]
    draws: tuple[PlannedDraw, ...]
    requests: tuple[ScoreRequest, ...]


class Capture:
    """One capture into one folder; `run` does it.

    `tokenizer` is the teacher's, `students` the declared ones in the order of the spec.
    """

    def __init__(
        self,
        teacher: Teacher,
        tokenizer: TextTokenizer,
        students: Sequence[TextTokenizer],
        spec: CaptureSpec,
        extent: Extent,
        folder: Path,
        watcher: Watcher,
    ) -> None:
        self._teacher = teacher
        self._spec = spec
        self._extent = extent
        self._folder = folder
        self._watcher = watcher
        limits = Limits(spec.length_limit, tuple(s.length_limit for s in spec.students))
        self._preparer = Preparer(tokenizer, students, limits, spec.normal_form)
        self._vocabulary = TeacherVocabulary(tokenizer.name, tokenizer.digest, tokenizer.token_bytes, tokenizer.special)
        self.timing = Timing()

    def run(self) -> Report:
        """Capture what is missing, training documents first.

        Raises:
            TidecacheError: anything a user can mend; complete shards stay, and the same command goes on from them.
        """
        begin = time.monotonic()
        train = self._slice(self._folder, held_out=False)
        if train is None:
            raise TidecacheError(
                f"the corpus {self._extent.corpus} has no documents to train on: all of them are held out "
                f"(held_out: {self._spec.held_out}); give a larger corpus or limit, or --held-out none"
            )
        held_out = None
        if self._spec.held_out != "none":
            held_out = self._slice(self._folder / HELD_OUT_FOLDER, held_out=True)
        return Report(self._spec, train, held_out, time.monotonic() - begin, self.timing)

    def _slice(self, folder: Path, held_out: bool) -> Part | None:
        stream = self._extent.stream(self._spec, held_out)
        first = next(stream, None)
        if first is None:
            return None
        writer = CacheWriter.open(folder, self._spec, self._vocabulary)
        part = Part(folder, writer.finish())
        todo = segments(
            itertools.chain([first], stream),
            writer.completed,
            self._extent.draws,
            self._extent.documents_per_shard,
            folder,
        )
        try:
            self._shards(writer, self._jobs(todo, part), part)
        except BaseException:  # interrupted, or an error: what is complete is entered in the manifest all the same
            with contextlib.suppress(TidecacheError):
                writer.finish()
            raise
        part.manifest = writer.finish()
        _refuse_nothing_captured(part, self._spec)
        return part

    def _jobs(self, todo: Iterator[Segment], part: Part) -> Iterator[Job]:
        """Prepare the documents of each segment that lacks draws, and plan these."""
        for segment in todo:
            part.documents_seen += len(segment.documents)
            if not segment.missing:
                self._watcher.skipped(len(segment.documents))
                continue
            prepared = [
                without_unpredictable(d, self._spec.teacher.logit_shift)
                for d in self._preparer.prepare_many(segment.documents)
            ]
            numbered = list(enumerate(prepared, segment.first))
            subjects = tuple(Subject(position, d) for position, d in numbered if not isinstance(d, Dropped))
            dropped = tuple((position, d) for position, d in numbered if isinstance(d, Dropped))
            for _, d in dropped:
                part.examples.setdefault(d.reason, f"{d.name}: {d.detail}")
            for shard in segment.shards:
                draws = tuple(
                    plan_draw(self._spec, subject, draw)
                    for subject in subjects
                    for draw in range(shard.first_draw, shard.draw_stop)
                )
                requests = tuple(requests_of(draws, self._spec.teacher.mask_id))
                yield Job(shard, segment.corpus_digest, subjects, dropped, draws, requests)

    def _shards(self, writer: CacheWriter, jobs: Iterator[Job], part: Part) -> None:
        k = self._spec.k if "topk" in self._spec.lanes else 1
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
                positions = sum(len(r.positions) for r in job.requests)
                chunks = sum(int(d.masked_C.sum()) for d in job.draws)
                self._watcher.begun(job.shard.document_stop - job.shard.first_document, chunks, positions)
                with self.timing.measure("teacher"):
                    scores, budget = self._score(job, k)
                part.chunks_scored += chunks
                part.tokens_scored += positions
                if last is not None:
                    with self.timing.measure("writing"):
                        last.result()
                last = writing.submit(self._write, writer, job, scores, budget, part)
            if last is not None:
                with self.timing.measure("writing"):
                    last.result()

    def _score(self, job: Job, k: int) -> tuple[Scores, int]:
        """The shard's scores and the batch budget that they were made with: halved until the device can do it."""
        wanted = self._teacher.batch_tokens
        longest = max((len(request.token_ids) for request in job.requests), default=0)
        try:
            while True:
                done: list[int] = []

                def heard(positions: int, done: list[int] = done) -> None:
                    done.append(positions)
                    self._watcher.scored(positions)

                try:
                    return self._teacher.score(job.requests, k, heard), self._teacher.batch_tokens
                except OutOfDeviceMemoryError:
                    if self._teacher.batch_tokens <= longest:
                        raise
                    self._watcher.scored(-sum(done))
                    self._teacher.batch_tokens //= 2
                    self._watcher.narrowed(self._teacher.batch_tokens)
        finally:
            # The next shard starts from the spec's budget again: what a shard is made with depends on nothing before
            # it.
            self._teacher.batch_tokens = wanted

    def _write(self, writer: CacheWriter, job: Job, scores: Scores, budget: int, part: Part) -> None:
        receipt = writer.write_shard(
            job.shard,
            [(subject.position, subject.document) for subject in job.subjects],
            job.dropped,
            records_of(self._spec, job.draws, scores),
            job.corpus_digest,
            budget,
        )
        part.shards_written += 1
        self._watcher.written(receipt)


def _refuse_nothing_captured(part: Part, spec: CaptureSpec) -> None:
    """A cache of no documents is a mistake somewhere; say which, from the reasons that documents were dropped for."""
    totals = part.manifest.totals
    if totals.documents:
        return
    reasons = ", ".join(f"{count} × {reason}" for reason, count in totals.dropped.items())
    example = next(iter(part.examples.values()), "")
    advice = "check the corpus and the length limits"
    if set(totals.dropped) == {NO_BOUNDARY}:
        names = ", ".join(s.name for s in spec.students)
        advice = f"the student tokenizers ({names}) and the teacher's share no boundary: declare others with --students"
    raise TidecacheError(
        f"{part.folder}: not one document could be captured ({reasons}; for example {example}): {advice}"
    )


def count_documents(extent: Extent, spec: CaptureSpec, stop: Any) -> dict[bool, int] | None:
    """Documents by whether they are held out, for the remaining time; None where counting would mean downloading, or
    when the event `stop` is set meanwhile.
    """
    if extent.corpus != "stdlib" and not Path(extent.corpus).expanduser().exists():
        return None
    rule, share = held_out_rule(spec.held_out)
    counts: Counter[bool] = Counter()
    with contextlib.suppress(TidecacheError):  # the capture itself reads the same corpus and says what is wrong
        for raw in deduplicated(extent.open()):
            counts[in_held_out(raw, share, rule)] += 1
            if stop.is_set():
                return None
    return {False: counts[False], True: counts[True] if rule != "none" else 0}
