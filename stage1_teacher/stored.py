"""Documents that a cache holds, ready for the teacher again: without the corpus, and for more draws or another context.

What the teacher is asked about is all in the cache: a document's contents as they were normalised and cut, its chunks,
its draws' masks and splits. Only the tokens between the chunks are not; the tokenizer gives them again, and the
document's digest shows that it is the same tokenizer and the same document. The law `token` also needs the declared
student's tokenizer, for new draws alone.

Shapes as in `stage1_teacher.compdemo`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.cache import format
from shared.cache.copying import dropped_of
from shared.cache.manifest import HELD_OUT_FOLDER, MANIFEST_FILE
from shared.cache.reader import Cache
from shared.cache.records import Draw, StoredDocument
from shared.documents import Dropped, Encoded, PreparedDocument
from shared.errors import TidecacheError
from shared.spec import CaptureSpec
from shared.tokenization import TextTokenizer
from stage1_teacher.capture import Extent
from stage1_teacher.compdemo import PlannedDraw, Subject
from stage1_teacher.planning import Listed
from stage1_teacher.shards import ShardMaker


class StoredMaker(ShardMaker):
    """A `ShardMaker` for documents as a cache holds them. `students` may be empty where the mask law is `chunk`."""

    def __init__(self, spec: CaptureSpec, tokenizer: TextTokenizer, students: Sequence[TextTokenizer]) -> None:
        self.spec = spec
        self._tokenizers = (tokenizer, *students)

    def prepare(self, documents: Sequence[Listed]) -> list[PreparedDocument | Dropped]:
        """Stored documents as they were when they were captured; dropped ones as they are.

        Raises:
            TidecacheError: a tokenizer spells a document otherwise than the capture's did.
        """
        stored = [d for d in documents if isinstance(d, StoredDocument)]
        columns = [t.encode_many([(d.messages, d.chat, d.cut) for d in stored]) for t in self._tokenizers]
        found = (self._prepared(d, row) for d, row in zip(stored, zip(*columns, strict=True), strict=True))
        return [next(found) if isinstance(d, StoredDocument) else _dropped(d) for d in documents]

    def _prepared(self, stored: StoredDocument, encodings: Sequence[object]) -> PreparedDocument:
        good = [e for e in encodings if isinstance(e, Encoded)]
        if len(good) == len(encodings):
            prepared = PreparedDocument(
                key=stored.key,
                name=stored.name,
                messages=stored.messages,
                chat=stored.chat,
                cut=stored.cut,
                chunks=stored.chunks,
                teacher=good[0],
                students=tuple(good[1:]),
            )
            again = format.stored_document(stored.position, prepared)
            if format.document_digest(again) == format.document_digest(stored):
                return prepared
        raise TidecacheError(
            f"document {stored.name} ({stored.key}): the tokenizer {self._tokenizers[0].name} spells it otherwise than at its "
            f"capture: use the versions of tokenizers and transformers that the cache was captured with"
        )

    def subjects(self, documents: Sequence[StoredDocument]) -> dict[str, Subject]:
        """Stored documents by key, see `prepare`."""
        prepared = zip(documents, self.prepare(documents), strict=True)
        return {d.key: Subject(d.position, p) for d, p in prepared if isinstance(p, PreparedDocument)}


def _dropped(document: Listed) -> Dropped:
    assert isinstance(document, Dropped)
    return document


def stored_draw(subject: Subject, draw: Draw) -> PlannedDraw:
    """A stored draw as it was planned, but for the split of chunks that are not masked, which nobody asks for."""
    split_C = np.zeros(len(draw.stored.chunks), dtype=np.bool_)
    split_C[draw.chunks] = draw.split
    return PlannedDraw(subject, draw.draw, draw.timestep, draw.masked_C, split_C)


@dataclass(frozen=True)
class StoredExtent(Extent):
    """The documents of a cache in the place of its corpus, which names the cache's folder."""

    def stream(self, spec: CaptureSpec, held_out: bool) -> Iterator[Listed]:
        """All stored and dropped documents of the cache, or of its held-out part, by position.

        Raises:
            TidecacheError: positions are missing, or a file is damaged.
        """
        folder = held_out_folder(Path(self.corpus)) if held_out else Path(self.corpus)
        if not (folder / MANIFEST_FILE).exists():
            return
        cache = Cache.open(folder)
        position = 0
        for index, receipt in enumerate(cache.shards):
            first, stop = receipt.range.first_document, receipt.range.document_stop
            if first > position:
                raise TidecacheError(
                    f"{folder}: the shards of the documents {position} to {first - 1} are missing, so the capture is not "
                    f"complete: give its --corpus, or finish it with `tidecache teacher capture` first"
                )
            if stop <= position:
                continue
            numbered: list[tuple[int, Listed]] = [(d.position, d) for d in cache.read_documents(index)]
            numbered += dropped_of(cache, receipt)
            yield from (d for place, d in sorted(numbered, key=lambda item: item[0]) if place >= position)
            position = stop

    def count(self, spec: CaptureSpec, stop: threading.Event) -> dict[bool, int] | None:
        """See `Extent.count`."""
        counts = {}
        for held_out in (False, True):
            folder = held_out_folder(Path(self.corpus)) if held_out else Path(self.corpus)
            shards = Cache.open(folder).shards if (folder / MANIFEST_FILE).exists() else ()
            counts[held_out] = max((r.range.document_stop for r in shards), default=0)
        return counts


def held_out_folder(folder: Path) -> Path:
    """Where the held-out part of a cache lies, if it has one."""
    return folder / HELD_OUT_FOLDER
