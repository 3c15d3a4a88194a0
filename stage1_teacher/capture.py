"""The capture driver: corpus → documents → draws → teacher → shards, resumable at any instant (DESIGN §1, §7).

Documents are prepared and scored shard by shard by an engine (`stage1_teacher.shards`), and each shard is committed here.
A shard is complete or absent, so whatever stops a capture, the same command goes on from the last complete shard.

What a shard holds is decided by its documents and the spec alone: draws are counter-based, and teacher batches are made
within one shard. The held-out slice of the corpus is a cache of its own with the same spec, in `held-out` beside the
shards.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from shared.cache.manifest import HELD_OUT_FOLDER, Manifest
from shared.cache.vocabulary import TeacherVocabulary
from shared.cache.writer import CacheWriter
from shared.corpus import deduplicated, held_out_rule, in_held_out, open_corpus
from shared.documents import RawDocument
from shared.errors import TidecacheError
from shared.preparation import NO_BOUNDARY
from shared.spec import CaptureSpec
from shared.tokenization import TextTokenizer
from stage1_teacher.pipeline import Timing, Watcher
from stage1_teacher.planning import WHOLE, Listed, Segment, ShardPart, segments
from stage1_teacher.shards import Engine, FinishedShard


@dataclass(frozen=True)
class Extent:
    """What a capture covers; no part of the spec. `limit`: of documents before deduplication and split; `part`: the
    share of the shards that this run does.
    """

    corpus: str
    draws: int
    documents_per_shard: int
    text_column: str | None = None
    split: str = "train"
    limit: int | None = None
    part: ShardPart = WHOLE

    @property
    def is_here(self) -> bool:
        """Whether the corpus can be read from its start to its end without downloading it."""
        return self.corpus == "stdlib" or Path(self.corpus).expanduser().exists()

    def open(self) -> Iterator[RawDocument]:
        """The corpus as it is, from its start."""
        return open_corpus(self.corpus, text_column=self.text_column, limit=self.limit, split=self.split)

    def stream(self, spec: CaptureSpec, held_out: bool) -> Iterator[Listed]:
        """The deduplicated corpus' training documents, or its held-out ones."""
        rule, share = held_out_rule(spec.held_out)
        return (raw for raw in deduplicated(self.open()) if in_held_out(raw, share, rule) == held_out)

    def count(self, spec: CaptureSpec, stop: threading.Event) -> dict[bool, int] | None:
        """The part's documents by whether they are held out, for the remaining time; None where counting would mean
        downloading, or when the event `stop` is set meanwhile.
        """
        if not self.is_here:
            return None
        rule, share = held_out_rule(spec.held_out)
        seen: Counter[bool] = Counter()
        counts: Counter[bool] = Counter()
        with contextlib.suppress(TidecacheError):  # the capture itself reads the same corpus and says what is wrong
            for raw in deduplicated(self.open()):
                held_out = in_held_out(raw, share, rule)
                counts[held_out] += self.part.holds(seen[held_out], self.documents_per_shard)
                seen[held_out] += 1
                if stop.is_set():
                    return None
        return {False: counts[False], True: counts[True] if rule != "none" else 0}


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

    def add(self, shard: FinishedShard) -> None:
        """Count a shard that this run has written."""
        self.shards_written += 1
        self.chunks_scored += shard.chunks
        self.tokens_scored += shard.tokens
        for d in shard.dropped:
            self.examples.setdefault(d.reason, f"{d.name}: {d.detail}")

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


class Capture:
    """One capture into one folder; `run` does it. `engine` has the teacher, and `tokenizer` is the teacher's."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: TextTokenizer,
        spec: CaptureSpec,
        extent: Extent,
        folder: Path,
        watcher: Watcher,
    ) -> None:
        self._engine = engine
        self._spec = spec
        self._extent = extent
        self._folder = folder
        self._watcher = watcher
        self._vocabulary = TeacherVocabulary(tokenizer.name, tokenizer.digest, tokenizer.token_bytes, tokenizer.special)

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
        return Report(self._spec, train, held_out, time.monotonic() - begin, self._engine.timing)

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
            self._extent.part,
        )
        try:
            self._engine.run(self._missing(todo, part), partial(self._commit, writer, part), self._watcher)
        except BaseException:  # interrupted, or an error: what is complete is entered in the manifest all the same
            with contextlib.suppress(TidecacheError):
                writer.finish()
            raise
        part.manifest = writer.finish()
        _refuse_nothing_captured(part, self._spec)
        return part

    def _missing(self, todo: Iterator[Segment], part: Part) -> Iterator[Segment]:
        """The segments that lack draws; all are counted."""
        for segment in todo:
            part.documents_seen += len(segment.documents)
            if segment.missing:
                yield segment
            else:
                self._watcher.skipped(len(segment.documents))

    def _commit(self, writer: CacheWriter, part: Part, shard: FinishedShard) -> None:
        receipt = writer.commit(shard.encoded)
        part.add(shard)
        self._watcher.written(receipt)


def _refuse_nothing_captured(part: Part, spec: CaptureSpec) -> None:
    """A cache of no documents is a mistake somewhere; say which, from the reasons that documents were dropped for.

    Only where documents were seen: a part of more than there are shards has none.
    """
    totals = part.manifest.totals
    if totals.documents or not part.documents_seen:
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
