"""The documents of a cache: what a corpus yields, what the tokenizers make of it, and what is stored (DESIGN §2, §4).

`RawDocument` comes from a corpus. `Preparer.prepare` (in `shared.preparation`, kept apart because it needs the
tokenizers) turns it into a `PreparedDocument`: normalised, cut to the length limits on a chunk boundary, with the
teacher's tokens and the chunks common to all declared tokenizers.

Shapes: L tokens of one sequence, C chunks of one document. Byte offsets of chunks count in the UTF-8 bytes of one
message's content; edges count in the UTF-8 bytes of the whole rendering.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Message:
    """One content span: a message of a chat, or the whole text (role `text`)."""

    role: str
    content: str
    trainable: bool


@dataclass(frozen=True)
class RawDocument:
    """A document as a corpus yields it. `held_out` is None where the corpus does not say (then a hash decides)."""

    name: str
    messages: tuple[Message, ...]
    chat: bool
    held_out: bool | None = None

    @property
    def key(self) -> str:
        """The document's id: 32 hexadecimal digits of its content; names and sources play no part."""
        return document_key(self.messages, self.chat)


def document_key(messages: tuple[Message, ...], chat: bool) -> str:
    """BLAKE2b over the canonical JSON of (chat, [(role, content, trainable)])."""
    text = json.dumps(
        [chat, [[m.role, m.content, m.trainable] for m in messages]], ensure_ascii=True, separators=(",", ":")
    )
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def corpus_digest(keys: Iterable[str]) -> str:
    """BLAKE2b-16 over the keys of consecutive documents: what a complete shard remembers of its corpus."""
    return hashlib.blake2b("".join(keys).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Encoded:
    """One tokenizer's view of a document: token i covers bytes [edges[i], edges[i + 1]) of its rendering.

    `trainable_L` marks the tokens a student may be asked for: those whose first byte lies in a trainable content, in
    what the template puts between the generation prompt and that content, or in the end of its turn. A token that
    straddles the end of the generation prompt belongs to the prompt.
    """

    ids_L: IntArray
    edges: IntArray  # L + 1
    spans: tuple[tuple[int, int], ...]  # (start, stop) in bytes of the rendering, one per message
    trainable_L: BoolArray

    def boundaries(self, message: int) -> IntArray:
        """Ascending byte offsets inside the message's content (ends included) at which a token starts or ends."""
        start, stop = self.spans[message]
        first, last = np.searchsorted(self.edges, (start, stop + 1))
        inside = self.edges[first:last]
        new = np.ones(len(inside), dtype=np.bool_)
        new[1:] = inside[1:] > inside[:-1]  # a token without bytes repeats its edge
        return np.asarray(inside[new] - start)

    def token_ranges(self, chunks: Chunks) -> tuple[IntArray, IntArray]:
        """(first_C, stop_C): the tokens [first, stop) that spell each chunk. Chunk ends must be token boundaries."""
        offset_C = np.array([s for s, _ in self.spans], dtype=np.int64)[chunks.message_C]
        first_C = np.searchsorted(self.edges[:-1], offset_C + chunks.start_C, side="right") - 1
        stop_C = np.searchsorted(self.edges[1:], offset_C + chunks.stop_C, side="left") + 1
        return first_C, stop_C


@dataclass(frozen=True)
class Chunks:
    """The C trainable chunks of a document, in order: bytes [start, stop) of the content of `message`."""

    message_C: IntArray
    start_C: IntArray
    stop_C: IntArray

    def __len__(self) -> int:
        return len(self.start_C)


@dataclass(frozen=True)
class PreparedDocument:
    """A document ready for capture. `cut`: it exceeded a limit; nothing after its last content byte is rendered."""

    key: str
    name: str
    messages: tuple[Message, ...]
    chat: bool
    cut: bool
    chunks: Chunks
    teacher: Encoded
    students: tuple[Encoded, ...]  # in the order of the spec


@dataclass(frozen=True)
class Dropped:
    """A document that cannot be captured, and why; `reason` is one of a few fixed words, for counting."""

    key: str
    name: str
    reason: str
    detail: str
