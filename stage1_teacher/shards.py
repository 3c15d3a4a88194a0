"""A shard before and after the teacher: documents prepared and their draws planned, then scores encoded.

Neither needs the teacher or the cache's folder, only the spec and the tokenizers: so both happen wherever the teacher is,
in this process (`LocalEngine`) or on another machine (`stage1_teacher.ray_engine`), and give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from shared.cache.encoding import EncodedShard, encode_shard
from shared.documents import Dropped, PreparedDocument, RawDocument
from shared.preparation import Limits, Preparer
from shared.spec import CaptureSpec
from shared.tokenization import TextTokenizer
from stage1_teacher.backends import Scores, Teacher
from stage1_teacher.compdemo import Subject, plan_draw, records_of, requests_of, without_unpredictable
from stage1_teacher.pipeline import Job, Pipeline, Timing, Watcher
from stage1_teacher.planning import Listed, Segment


@dataclass(frozen=True)
class FinishedShard:
    """An encoded shard with what people are told about it; `tokens`: scored, over all contexts."""

    encoded: EncodedShard
    chunks: int
    tokens: int
    dropped: tuple[Dropped, ...]


class Engine(Protocol):
    """Whatever has the teacher's side of shards done. `timing` adds up all runs, in seconds per teacher."""

    timing: Timing

    def run(self, segments: Iterator[Segment], commit: Callable[[FinishedShard], None], watcher: Watcher) -> None:
        """Do the missing draws of every segment, and hand each shard to `commit`, in any order, one at a time.

        Raises:
            TidecacheError: whatever `segments`, the teacher or `commit` raise; no later shard is begun.
        """


class ShardMaker:
    """Makes jobs for the teacher, and shards of its scores. `students` in the order of the spec."""

    def __init__(self, spec: CaptureSpec, tokenizer: TextTokenizer, students: Sequence[TextTokenizer]) -> None:
        limits = Limits(spec.length_limit, tuple(s.length_limit for s in spec.students))
        self.spec = spec
        self._preparer = Preparer(tokenizer, students, limits, spec.normal_form)

    @property
    def k(self) -> int:
        """Candidates that the teacher is asked for."""
        return self.spec.k if "topk" in self.spec.lanes else 1

    def prepare(self, documents: Sequence[Listed]) -> list[PreparedDocument | Dropped]:
        """Documents of the corpus, ready for the teacher or with the reason why not; one result for each, in order."""
        return self._preparer.prepare_many(cast(Sequence[RawDocument], documents))

    def jobs(self, segment: Segment) -> Iterator[Job]:
        """Prepare the segment's documents, and plan each range of draws that is missing."""
        prepared = [without_unpredictable(d, self.spec.teacher.logit_shift) for d in self.prepare(segment.documents)]
        numbered = list(enumerate(prepared, segment.first))
        subjects = tuple(Subject(position, d) for position, d in numbered if not isinstance(d, Dropped))
        dropped = tuple((position, d) for position, d in numbered if isinstance(d, Dropped))
        for shard in segment.shards:
            draws = tuple(
                plan_draw(self.spec, subject, draw)
                for subject in subjects
                for draw in range(shard.first_draw, shard.draw_stop)
            )
            requests = tuple(requests_of(self.spec, draws))
            yield Job(shard, segment.corpus_digest, subjects, dropped, draws, requests)

    def finish(self, job: Job, scores: Scores, budget: int) -> FinishedShard:
        """Find fillings and encode; `budget` in tokens, which the scores were made with."""
        encoded = encode_shard(
            self.spec,
            job.shard,
            [(subject.position, subject.document) for subject in job.subjects],
            job.dropped,
            records_of(self.spec, job.draws, scores),
            job.corpus_digest,
            budget,
        )
        return FinishedShard(encoded, job.chunks, job.positions, tuple(d for _, d in job.dropped))


class LocalEngine:
    """The teacher in this process (`stage1_teacher.pipeline`)."""

    def __init__(self, teacher: Teacher, maker: ShardMaker) -> None:
        self._teacher = teacher
        self._maker = maker
        self.timing = Timing()

    def run(self, segments: Iterator[Segment], commit: Callable[[FinishedShard], None], watcher: Watcher) -> None:
        """See `Engine`; shards are committed in the order of the segments."""
        pipeline = Pipeline(self._teacher, self._maker.k, watcher, self.timing)
        jobs = (job for segment in segments for job in self._maker.jobs(segment))
        pipeline.run(jobs, lambda job, scores, budget: commit(self._maker.finish(job, scores, budget)))
