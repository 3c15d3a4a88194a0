"""A student's own chunks of a stored document, and which of them a draw scores (DESIGN §4).

Everything is derived from the stored text with the student's tokenizer alone; the teacher's tokens play no part except
as byte boundaries of the cache's chunks. An *own chunk* lies between two consecutive boundaries common to those chunks
and to the student's tokens: a union of whole cache chunks that the student can spell. It carries the teacher's score if
these are all masked and, in context compdemo, scored in the same pass (each pass sees what the other one scores, so a
sum over both would leak). For a declared tokenizer the own chunks are the cache's.

Training and `tidecache cache coverage` both read documents through this module, so that they cannot disagree.

Shapes: L tokens of a document, C cache chunks and O own chunks of it, M masked cache chunks of a draw, Q own chunks
that carry its score.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from shared.alignment import common_chunks
from shared.cache.records import Draw, StoredDocument
from shared.documents import BoolArray, Encoded, IntArray
from shared.tokenization import TextTokenizer


@dataclass(frozen=True, kw_only=True)
class OwnChunks:
    """A stored document in a student's tokens, with its own chunks. `spelled` remembers what `Speller` has found."""

    stored: StoredDocument
    encoded: Encoded
    rendering: bytes  # what the tokens cover: contents as they are, the template's bytes from its tokens
    token_first_C: IntArray  # tokens [first, stop) overlap the bytes of a cache chunk
    token_stop_C: IntArray
    own_first_O: IntArray  # cache chunks [first, stop) of an own chunk
    own_stop_O: IntArray
    own_token_first_O: IntArray  # tokens [first, stop) spell an own chunk
    own_token_stop_O: IntArray
    own_bytes_O: IntArray
    spelled: dict[tuple[int, bytes], tuple[int, ...] | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """What a draw scores of the own chunks. `masked_before[c]` counts its masked cache chunks before cache chunk c.

    `whole_O`: all cache chunks of the own chunk are masked; `one_pass_O`: the masked ones are scored in one pass.
    """

    masked_before: IntArray  # C + 1
    whole_O: BoolArray
    one_pass_O: BoolArray

    @property
    def own_Q(self) -> IntArray:
        """The numbers of the own chunks that carry a score."""
        return np.flatnonzero(self.whole_O & self.one_pass_O)


def own_chunks(tokenizer: TextTokenizer, stored: StoredDocument) -> OwnChunks:
    """Encode a stored document and align the cache's chunks with the student's tokens.

    Raises:
        IrreproducibleText: this tokenizer cannot reproduce the document's bytes.
        TidecacheError: a chat, and the tokenizer has no chat template.
    """
    encoded = tokenizer.encode(stored.messages, stored.chat, stored.cut)
    chunks = stored.chunks
    span_start = np.array([start for start, _ in encoded.spans], dtype=np.int64)
    start_C = span_start[chunks.message_C] + chunks.start_C
    stop_C = span_start[chunks.message_C] + chunks.stop_C
    token_first_C = np.searchsorted(encoded.edges[1:], start_C, side="right")
    token_stop_C = np.searchsorted(encoded.edges[:-1], stop_C, side="left")

    first, stop = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for message in np.unique(chunks.message_C):
        of_message = np.flatnonzero(chunks.message_C == message)
        edges = np.append(chunks.start_C[of_message], chunks.stop_C[of_message[-1]])
        common = np.asarray(common_chunks(edges, encoded.boundaries(int(message))), dtype=np.int64)
        number = of_message[0] + np.searchsorted(edges, common)
        first.append(number[:-1])
        stop.append(number[1:])
    own_first_O, own_stop_O = np.concatenate(first), np.concatenate(stop)
    return OwnChunks(
        stored=stored,
        encoded=encoded,
        rendering=_rendering(tokenizer, encoded, stored),
        token_first_C=token_first_C,
        token_stop_C=token_stop_C,
        own_first_O=own_first_O,
        own_stop_O=own_stop_O,
        own_token_first_O=token_first_C[own_first_O],
        own_token_stop_O=token_stop_C[own_stop_O - 1],
        own_bytes_O=chunks.stop_C[own_stop_O - 1] - chunks.start_C[own_first_O],
    )


def _rendering(tokenizer: TextTokenizer, encoded: Encoded, stored: StoredDocument) -> bytes:
    """The bytes that the tokens cover: contents as they are, the template's from its tokens, no implied spaces."""
    text = bytearray(b" " * int(encoded.edges[-1]))
    for token, start, stop in zip(
        encoded.ids_L.tolist(), encoded.edges[:-1].tolist(), encoded.edges[1:].tolist(), strict=True
    ):
        spelled = tokenizer.token_bytes[token]
        text[max(start, stop - len(spelled)) : stop] = spelled[-(stop - start) :] if stop > start else b""
    for (start, stop), message in zip(encoded.spans, stored.messages, strict=True):
        text[start:stop] = message.content.encode()
    return bytes(text[: int(encoded.edges[-1])])


def scored_own_chunks(own: OwnChunks, draw: Draw, context: str | None) -> Scored:
    """Which own chunks a draw scores in a context; with None, or in one pass, only their masks matter."""
    masked_C = draw.masked_C
    masked_before = _before(masked_C)
    masked_O = masked_before[own.own_stop_O] - masked_before[own.own_first_O]
    one_pass_O = np.ones(len(masked_O), np.bool_)
    if context == "compdemo":
        split_C = np.zeros(len(masked_C), np.bool_)
        split_C[draw.chunks] = draw.split
        split_before = _before(split_C)
        in_first_O = split_before[own.own_stop_O] - split_before[own.own_first_O]
        one_pass_O = (in_first_O == 0) | (in_first_O == masked_O)
    return Scored(masked_before, masked_O == own.own_stop_O - own.own_first_O, one_pass_O)


def _before(flag_C: BoolArray) -> IntArray:
    """How many are set before each place, and in all (C + 1)."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(flag_C)])
