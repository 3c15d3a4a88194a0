"""What a plan is learned from: the whole corpus' sizes, some whole shards prepared, and a few documents scored.

A plan must not cost what a capture costs, and must not guess. So it looks three times, each time at less and closer:

1. **Scan.** The corpus streams by once, deduplicated and split as a capture does it; each document leaves its length.
2. **Runs.** Documents of some shards, evenly spaced over the corpus, are tokenised, aligned and drawn: chunks, masks and
   scored tokens are then exact for these, and their documents files are encoded as they will be, neighbours together,
   for text compresses better beside its own kind.
3. **Scores.** Of the runs' documents a few, evenly spaced, go through the teacher, in groups, after one group that
   counts as warm-up. Their likelihoods are encoded in files with as many rows as a row group of a shard has, since
   zstd's ratio depends on that.

Shapes: D documents of a slice.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from shared.cache.encoding import encode_documents, encode_shard
from shared.cache.format import stored_document
from shared.cache.manifest import Receipt
from shared.cache.parquet import ROW_GROUP_ROWS, column_bytes, encode, footer_of
from shared.cache.records import DrawRecord, ShardRange
from shared.cache.survey import spread
from shared.corpus import deduplicated, held_out_rule, in_held_out
from shared.documents import PreparedDocument, RawDocument
from shared.errors import TidecacheError
from shared.spec import CaptureSpec
from stage1_teacher.backends import Teacher
from stage1_teacher.capture import Extent
from stage1_teacher.compdemo import Subject, plan_draw, records_of, requests_of
from stage1_teacher.pipeline import Job, score_shard
from stage1_teacher.planning import Segment
from stage1_teacher.shards import ShardMaker

REMOTE_SCAN = 10_000  # documents read of a corpus that would have to be downloaded whole
PREPARED = 1024  # documents of all runs
RUN_DOCUMENTS = 128  # of one run; a shard of more is looked at in part
RUN_DRAWS = 8  # draws planned of each document: every prefix of draws covers the timesteps evenly
SCORED_DRAWS = 4
BATCHES_PER_GROUP = 3  # so that a last batch that isn't full costs little
GROUPS = 4  # at least, to know how far they differ

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Slice:
    """The training documents of a corpus, or the held-out ones: bytes of all text, of trainable text, and of the text
    before the first that is trainable.
    """

    total_D: IntArray
    trainable_D: IntArray
    leading_D: IntArray

    def shards(self, extent: Extent) -> list[tuple[int, int]]:
        """Positions [first, stop) of the shards of the extent's part."""
        size = extent.documents_per_shard
        firsts = range(0, len(self.total_D), size)
        return [(a, min(a + size, len(self.total_D))) for a in firsts if extent.part.holds(a, size)]

    def reach(self, first: int, stop: int, cap: float) -> float:
        """Trainable bytes at these positions that a limit of `cap` bytes of text leaves, in expectation."""
        leading = self.leading_D[first:stop]
        after = np.maximum(self.total_D[first:stop] - leading, 1)
        return float((self.trainable_D[first:stop] * np.clip((cap - leading) / after, 0.0, 1.0)).sum())


@dataclass(frozen=True)
class Scan:
    """`slices` by whether they are held out; `complete`: the corpus was read to its end."""

    slices: Mapping[bool, Slice]
    complete: bool


def scan(extent: Extent, spec: CaptureSpec) -> Scan:
    """Read the corpus once.

    Raises:
        TidecacheError: the corpus is broken, or nothing of it is for training.
    """
    most = None if extent.is_here or extent.limit is not None else REMOTE_SCAN
    sizes: dict[bool, list[tuple[int, int, int]]] = {False: [], True: []}
    documents = _split(extent, spec)
    for held_out, raw in itertools.islice(documents, most):
        sizes[held_out].append(_lengths(raw))
    if not sizes[False]:
        raise TidecacheError(
            f"the corpus {extent.corpus} has no documents to train on: give a larger corpus or limit, or --held-out none"
        )
    arrays = {held_out: np.array(rows, dtype=np.int64).reshape(-1, 3) for held_out, rows in sizes.items()}
    slices = {held_out: Slice(*a.T) for held_out, a in arrays.items() if len(a)}
    return Scan(slices, complete=most is None or next(documents, None) is None)


def _lengths(raw: RawDocument) -> tuple[int, int, int]:
    """As in `Slice`."""
    lengths = [(len(m.content.encode(errors="surrogatepass")), m.trainable) for m in raw.messages]
    leading = itertools.takewhile(lambda item: not item[1], lengths)
    return sum(n for n, _ in lengths), sum(n for n, trainable in lengths if trainable), sum(n for n, _ in leading)


def _split(extent: Extent, spec: CaptureSpec) -> Iterator[tuple[bool, RawDocument]]:
    """The deduplicated corpus, each document with whether it is held out."""
    rule, share = held_out_rule(spec.held_out)
    return ((in_held_out(raw, share, rule), raw) for raw in deduplicated(extent.open()))


# --- runs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One shard's first documents, prepared. Counts are over the draws planned of each document; `document_bytes`: of
    the documents file without its footer, which has `footer_bytes`.
    """

    held_out: bool
    first: int
    stop: int
    subjects: tuple[Subject, ...]
    text_bytes: int  # of the chunks
    text_tokens: int
    chunks: int
    masked_chunks: int
    scored_tokens: int
    document_bytes: int
    footer_bytes: int
    seconds: float


def prepare_runs(extent: Extent, spec: CaptureSpec, maker: ShardMaker, found: Scan) -> list[Run]:
    """Read the corpus again and prepare the first documents of some shards, evenly spaced over all of them.

    Raises:
        TidecacheError: the corpus is broken, or not one document of the runs can be captured.
    """
    shards = [(held_out, *shard) for held_out, s in found.slices.items() for shard in s.shards(extent)]
    if not shards:
        raise TidecacheError("--part: there are fewer shards than parts, so this part has none: nothing to plan")
    runs = -(-PREPARED // min(extent.documents_per_shard, RUN_DOCUMENTS))
    chosen = [shards[i] for i in spread(len(shards), runs)]
    wanted = {(held_out, first): min(stop, first + RUN_DOCUMENTS) for held_out, first, stop in chosen}
    seen = {False: 0, True: 0}
    open_runs: dict[bool, tuple[int, int, list[RawDocument]]] = {}
    done: list[Run] = []
    for held_out, raw in _split(extent, spec):
        position = seen[held_out]
        seen[held_out] += 1
        if (held_out, position) in wanted:
            open_runs[held_out] = (position, wanted[held_out, position], [])
        if held_out not in open_runs:
            continue
        first, stop, raws = open_runs[held_out]
        raws.append(raw)
        if position + 1 == stop:
            del open_runs[held_out]
            done.append(_run(spec, maker, extent.draws, held_out, first, raws))
            if len(done) == len(wanted):
                break
    if not any(run.subjects for run in done):
        raise TidecacheError(
            f"not one of {sum(r.stop - r.first for r in done)} documents of {extent.corpus} could be captured: check the corpus, "
            f"the length limits, and whether the students' tokenizers share boundaries with the teacher's"
        )
    return done


def _run(
    spec: CaptureSpec, maker: ShardMaker, draws: int, held_out: bool, first: int, raws: Sequence[RawDocument]
) -> Run:
    begin = time.monotonic()
    segment = Segment(first, tuple(raws), ((0, min(draws, RUN_DRAWS)),), corpus_digest="")
    [job] = maker.jobs(segment)
    seconds = time.monotonic() - begin
    stored = [stored_document(s.position, s.document) for s in job.subjects]
    (record, data), _ = encode_documents(spec, job.shard, stored, job.dropped)
    columns = sum(column_bytes(pq.read_metadata(pa.BufferReader(data))).values())
    return Run(
        held_out,
        first,
        first + len(raws),
        job.subjects,
        text_bytes=sum(int((d.chunks.stop_C - d.chunks.start_C).sum()) for d in stored),
        text_tokens=sum(int(d.token_count_C.sum()) for d in stored),
        chunks=sum(len(d.chunks) for d in stored),
        masked_chunks=job.chunks,
        scored_tokens=sum(int(d.subject.token_count_C[d.masked_C].sum()) for d in job.draws),
        document_bytes=columns,
        footer_bytes=record.size_bytes - columns,
        seconds=seconds,
    )


# --- scores ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Some documents through the teacher: positions over all contexts, seconds in the teacher (by the clock, and of this
    process' CPUs) and for fillings and encoding, and bytes of the columns in a file of their own.
    """

    positions: int
    seconds: float
    cpu_seconds: float
    encoding_seconds: float
    size_bytes: int


@dataclass(frozen=True)
class Scored:
    """The scored documents. Sums over all pieces: bytes of each column, of the rest of a file with one row group
    (`footer_bytes`, a mean), and of each further row group (`group_bytes`).
    """

    documents: int
    draws: int
    groups: tuple[Group, ...]
    column_bytes: Mapping[str, int]
    footer_bytes: float
    group_bytes: float
    rows: int
    chunks: int  # of all rows, masked or not
    scored_tokens: int


class Unheard:
    """A `Watcher` that tells nobody."""

    def skipped(self, documents: int) -> None:
        """See `Watcher`."""

    def begun(self, documents: int, chunks: int, positions: int) -> None:
        """See `Watcher`."""

    def scored(self, positions: int) -> None:
        """See `Watcher`."""

    def narrowed(self, batch_tokens: int) -> None:
        """See `Watcher`."""

    def written(self, receipt: Receipt) -> None:
        """See `Watcher`."""


def score_sample(
    teacher: Teacher, spec: CaptureSpec, maker: ShardMaker, extent: Extent, runs: Sequence[Run], documents: int
) -> Scored:
    """Score `documents` documents of the runs, evenly spaced, and encode what comes out as a capture would.

    Raises:
        TidecacheError: the teacher's, such as a device too small for one sequence.
    """
    pool = [subject.document for run in runs for subject in run.subjects]
    subjects = [Subject(i, pool[place]) for i, place in enumerate(spread(len(pool), documents))]
    draws = min(extent.draws, SCORED_DRAWS)
    size = _group_size(spec, extent, subjects, draws)
    jobs = [_job(spec, subjects[a : a + size], draws) for a in range(0, len(subjects), size)]
    score_shard(teacher, maker.k, jobs[0], Unheard())  # warm-up: first kernels, allocations, compilation
    groups, records = [], []
    for job in jobs:
        begin, cpu_begin = time.monotonic(), time.process_time()
        scores, _ = score_shard(teacher, maker.k, job, Unheard())
        middle, cpu_seconds = time.monotonic(), time.process_time() - cpu_begin
        found = records_of(spec, job.draws, scores)
        data = _likelihoods(spec, job.subjects, draws, found)
        end = time.monotonic()
        records += found
        size_bytes = sum(column_bytes(pq.read_metadata(pa.BufferReader(data))).values())
        groups.append(Group(job.positions, middle - begin, cpu_seconds, end - middle, size_bytes))
    return _encoded(spec, extent, subjects, draws, records, tuple(groups))


def _group_size(spec: CaptureSpec, extent: Extent, subjects: Sequence[Subject], draws: int) -> int:
    """Documents per group: some full batches, no more than a shard has, and enough groups to compare."""
    passes = sum(2 if context == "compdemo" else 1 for context in spec.contexts)
    length = float(np.mean([len(s.document.teacher.ids_L) for s in subjects]))
    full = int(np.ceil(BATCHES_PER_GROUP * spec.batch_tokens / (draws * passes * length)))
    return max(1, min(full, extent.documents_per_shard, -(-len(subjects) // GROUPS)))


def _job(spec: CaptureSpec, subjects: Sequence[Subject], draws: int) -> Job:
    planned = tuple(plan_draw(spec, subject, draw) for subject in subjects for draw in range(draws))
    shard = ShardRange(subjects[0].position, subjects[-1].position + 1, 0, draws)
    return Job(shard, "", tuple(subjects), (), planned, tuple(requests_of(spec, planned)))


def _likelihoods(spec: CaptureSpec, subjects: Sequence[Subject], draws: int, records: Sequence[DrawRecord]) -> bytes:
    """The bytes of the likelihoods file of some documents."""
    shard = ShardRange(subjects[0].position, subjects[-1].position + 1, 0, draws)
    numbered: list[tuple[int, PreparedDocument]] = [(s.position, s.document) for s in subjects]
    return encode_shard(spec, shard, numbered, [], records, "", spec.batch_tokens).files[1][1]


def _encoded(
    spec: CaptureSpec,
    extent: Extent,
    subjects: Sequence[Subject],
    draws: int,
    records: Sequence[DrawRecord],
    groups: tuple[Group, ...],
) -> Scored:
    """All scored draws in files with the rows of a shard's row group; a last file with fewer rows is left out."""
    rows = min(ROW_GROUP_ROWS, extent.documents_per_shard * extent.draws)
    size = max(1, min(rows // draws, len(subjects)))
    pieces = [range(a, a + size) for a in range(0, len(subjects) - size + 1, size)]
    total: dict[str, int] = {}
    rest: list[int] = []
    for piece in pieces:
        chosen = records[piece.start * draws : piece.stop * draws]
        data = _likelihoods(spec, subjects[piece.start : piece.stop], draws, chosen)
        sizes = column_bytes(pq.read_metadata(pa.BufferReader(data)))
        total = {name: total.get(name, 0) + size for name, size in sizes.items()}
        rest.append(len(data) - sum(sizes.values()))
    used = records[: len(pieces) * size * draws]
    tokens = sum(len(next(iter(r.contexts.values())).gold_logp_N) for r in used)
    return Scored(
        documents=len(subjects),
        draws=draws,
        groups=groups,
        column_bytes=total,
        footer_bytes=float(np.mean(rest)),
        group_bytes=_group_bytes(data),
        rows=len(used),
        chunks=sum(len(r.masked_C) for r in used),
        scored_tokens=tokens,
    )


def _group_bytes(data: bytes) -> float:
    """What a further row group adds to a file beside its columns: those of the same rows twice, minus once."""
    table = pq.read_table(pa.BufferReader(data))
    footer = footer_of(pq.read_metadata(pa.BufferReader(data)).metadata)
    full = pa.concat_tables([table] * -(-ROW_GROUP_ROWS // max(len(table), 1))).slice(0, ROW_GROUP_ROWS)
    sizes = []
    for groups in (1, 2):
        written = encode(pa.concat_tables([full] * groups), footer)
        sizes.append(len(written) - sum(column_bytes(pq.read_metadata(pa.BufferReader(written))).values()))
    return float(sizes[1] - sizes[0])
