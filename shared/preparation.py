"""From raw documents to prepared ones: one normal form, cut to the limits, with chunks (DESIGN §4).

All tokenizers must see the same bytes of a content, so what any of them would change is done once, up front: Unicode
normalisation (if one tokenizer applies NFC, all get NFC), and stripping of outer white space where a chat template
trims. What still cannot be spelt is dropped, with a reason that the capture counts.

A document that exceeds a limit is cut where a chunk ends, and encoded again, since a prefix may tokenise otherwise than
the whole; if it then still exceeds a limit or is not reproducible (a template trims the new end), an earlier chunk end
is taken. Preparation is a pure function of the document, the tokenizers, the limits and the normal form; batches only
make it faster.
"""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from shared.alignment import chunks_of
from shared.documents import Chunks, Dropped, Encoded, IntArray, Message, PreparedDocument, RawDocument
from shared.tokenization import IrreproducibleText, TextTokenizer

IRREPRODUCIBLE = "irreproducible bytes"
NO_BOUNDARY = "no common boundary"
NOTHING_TRAINABLE = "nothing trainable within the limit"
EMPTY = "empty"

Messages = tuple[Message, ...]
Encodings = tuple[Encoded, ...]


@dataclass(frozen=True)
class Limits:
    """The longest sequences, in tokens: of the teacher, and of each student in the order of the spec."""

    teacher: int
    students: tuple[int, ...]


@dataclass(frozen=True)
class _Candidate:
    """A document on its way: `cut` is set as soon as something was taken off its end."""

    raw: RawDocument
    messages: Messages
    cut: bool


def common_normal_form(tokenizers: Sequence[TextTokenizer]) -> Literal["none", "NFC"]:
    """The one form for all: NFC as soon as one tokenizer applies it, else none."""
    return "NFC" if any(tokenizer.normal_form == "NFC" for tokenizer in tokenizers) else "none"


class Preparer:
    """Turns raw documents into prepared ones for one teacher tokenizer and the declared student tokenizers."""

    def __init__(
        self, teacher: TextTokenizer, students: Sequence[TextTokenizer], limits: Limits, normal_form: str
    ) -> None:
        """`normal_form`: `none` or `NFC`, see `common_normal_form`.

        Raises:
            ValueError: limits and students differ in number.
        """
        if len(students) != len(limits.students):
            raise ValueError(f"{len(students)} student tokenizers, but limits for {len(limits.students)}")
        self._tokenizers = (teacher, *students)
        self._limits = (limits.teacher, *limits.students)
        self._normal_form = normal_form
        # More bytes than this exceed some limit whatever they are; no need to tokenise a whole book to find that out.
        self._most_bytes = min(
            limit * tokenizer.longest_token for limit, tokenizer in zip(self._limits, self._tokenizers, strict=True)
        )

    def prepare(self, raw: RawDocument) -> PreparedDocument | Dropped:
        """One document; see `prepare_many`."""
        return self.prepare_many([raw])[0]

    def prepare_many(self, raws: Sequence[RawDocument]) -> list[PreparedDocument | Dropped]:
        """Prepare documents, tokenised in batches; one result for each, in order.

        Raises:
            TidecacheError: a chat, and some tokenizer has no chat template.
        """
        candidates = [self._candidate(raw) for raw in raws]
        filled = [c for c in candidates if any(m.content for m in c.messages)]
        encoded = dict(zip(map(id, filled), self._encode(filled), strict=True))
        # A template that trims spoils contents with outer white space, and only these: strip them for all tokenizers.
        spoilt = [c for c in filled if c.raw.chat and isinstance(encoded[id(c)], IrreproducibleText)]
        stripped = {id(c): dataclasses.replace(c, messages=_stripped(c.messages)) for c in spoilt}
        changed = [c for c in spoilt if stripped[id(c)].messages != c.messages]
        encoded |= dict(zip(map(id, changed), self._encode([stripped[id(c)] for c in changed]), strict=True))
        return [
            self._finish(stripped.get(id(c), c), encoded[id(c)])
            if id(c) in encoded
            else Dropped(c.raw.key, c.raw.name, EMPTY, "no content has any text")
            for c in candidates
        ]

    def _candidate(self, raw: RawDocument) -> _Candidate:
        messages = raw.messages
        if self._normal_form != "none":
            messages = tuple(
                dataclasses.replace(m, content=unicodedata.normalize("NFC", m.content)) for m in raw.messages
            )
        kept: list[Message] = []
        room = self._most_bytes
        for message in messages:
            size = len(message.content) if message.content.isascii() else len(_bytes(message.content))
            if size > room:
                content = _bytes(message.content)[:room].decode(errors="ignore")
                return _Candidate(raw, (*kept, dataclasses.replace(message, content=content)), cut=True)
            kept.append(message)
            room -= size
        return _Candidate(raw, messages, cut=False)

    def _encode(self, candidates: Sequence[_Candidate]) -> list[Encodings | IrreproducibleText]:
        """Per document its encodings, teacher first, or the first exception among them."""
        documents = [(c.messages, c.raw.chat, c.cut) for c in candidates]
        columns = [tokenizer.encode_many(documents) for tokenizer in self._tokenizers]
        results: list[Encodings | IrreproducibleText] = []
        for row in zip(*columns, strict=True):
            good = tuple(item for item in row if isinstance(item, Encoded))
            bad = [item for item in row if isinstance(item, IrreproducibleText)]
            results.append(bad[0] if bad else good)
        return results

    def _fits(self, encodings: Encodings) -> bool:
        return all(len(e.ids_L) <= limit for e, limit in zip(encodings, self._limits, strict=True))

    def _finish(self, candidate: _Candidate, encodings: Encodings | IrreproducibleText) -> PreparedDocument | Dropped:
        raw = candidate.raw
        if isinstance(encodings, IrreproducibleText):
            return Dropped(raw.key, raw.name, IRREPRODUCIBLE, encodings.detail)
        trainable = _trainable(candidate.messages)
        if not trainable:
            detail = "no trainable message has any text"
            return Dropped(
                raw.key, raw.name, NOTHING_TRAINABLE, f"{detail} within the limit" if candidate.cut else detail
            )
        chunks = chunks_of(encodings, trainable)
        if not len(chunks):
            return Dropped(raw.key, raw.name, NO_BOUNDARY, "the tokenizers share no two boundaries in it")
        if self._fits(encodings):
            return _prepared(candidate, encodings, chunks)
        return self._cut(candidate, encodings, chunks)

    def _cut(self, candidate: _Candidate, encodings: Encodings, chunks: Chunks) -> PreparedDocument | Dropped:
        raw = candidate.raw
        ends = self._cut_points(candidate.messages, encodings, chunks)
        for position in _backwards(len(ends)):
            end = ends[position]
            shorter = _cut_at(candidate, int(chunks.message_C[end]), int(chunks.stop_C[end]))
            result = self._encode([shorter])[0]
            if isinstance(result, IrreproducibleText) or not self._fits(result):
                continue
            fitting = chunks_of(result, _trainable(shorter.messages))
            if len(fitting):
                return _prepared(shorter, result, fitting)
        sizes = ", ".join(f"{t.name} {limit}" for t, limit in zip(self._tokenizers, self._limits, strict=True))
        return Dropped(raw.key, raw.name, NOTHING_TRAINABLE, f"no chunk ends within the limits (tokens: {sizes})")

    def _cut_points(self, messages: Messages, encodings: Encodings, chunks: Chunks) -> IntArray:
        """The chunks whose ends are within every limit (before encoding again) and between two characters."""
        usable_C = np.ones(len(chunks), dtype=np.bool_)
        for encoded, limit in zip(encodings, self._limits, strict=True):
            _, stop_C = encoded.token_ranges(chunks)
            usable_C &= stop_C <= limit
        for message in np.unique(chunks.message_C[usable_C]):
            content = np.frombuffer(_bytes(messages[message].content) + b" ", dtype=np.uint8)
            inside = chunks.message_C == message
            usable_C[inside] &= (content[chunks.stop_C[inside]] & 0xC0) != 0x80
        return np.flatnonzero(usable_C)


def _bytes(content: str) -> bytes:
    """UTF-8, lone surrogates kept (the tokenizers refuse them, with the reason)."""
    return content.encode(errors="surrogatepass")


def _stripped(messages: Messages) -> Messages:
    return tuple(dataclasses.replace(m, content=m.content.strip()) for m in messages)


def _trainable(messages: Messages) -> list[int]:
    return [number for number, message in enumerate(messages) if message.trainable and message.content]


def _cut_at(candidate: _Candidate, message: int, stop: int) -> _Candidate:
    """Keep the bytes before `stop` of this message's content, and the messages before it."""
    last = candidate.messages[message]
    content = _bytes(last.content)[:stop].decode()
    kept = (*candidate.messages[:message], dataclasses.replace(last, content=content))
    return dataclasses.replace(candidate, messages=kept, cut=True)


def _backwards(count: int) -> Iterator[int]:
    """count − 1, then 1, 2, 4, … before that, and 0: few encodings even where many would fail."""
    step = 1
    position = count - 1
    while position > 0:
        yield position
        position = count - 1 - step
        step *= 2
    if count:
        yield 0


def _prepared(candidate: _Candidate, encodings: Encodings, chunks: Chunks) -> PreparedDocument:
    teacher, *students = encodings
    raw = candidate.raw
    return PreparedDocument(
        key=raw.key,
        name=raw.name,
        messages=candidate.messages,
        chat=raw.chat,
        cut=candidate.cut,
        chunks=chunks,
        teacher=teacher,
        students=tuple(students),
    )
