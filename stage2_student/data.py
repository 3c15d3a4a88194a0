"""The student's view of a cache: stored documents in its own tokens, and draws as rows of a batch (DESIGN §4).

One rule serves declared and undeclared student tokenizers: a student token that overlaps masked bytes is masked, and
the student's *own chunks* carry the teacher's score where `shared.own_chunks` says so; what is lost is counted
(`Coverage`).

Shape suffixes: L tokens of one row, C cache chunks and O own chunks of one document, Q own chunks of one row that carry
a score, M masked cache chunks of one draw.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from shared import noise
from shared.cache.records import Draw, StoredDocument
from shared.documents import BoolArray, IntArray
from shared.errors import TidecacheError
from shared.own_chunks import OwnChunks, own_chunks, scored_own_chunks
from shared.spec import CaptureSpec
from shared.spelling import Speller
from shared.tokenization import IrreproducibleText, TextTokenizer
from stage2_student.events import Events, chunk_events

FRESH_DRAWS_FROM = 2**20  # fresh rows number their draws from here, far above any stored draw
VIEWS_KEPT = 2048  # encoded documents in memory; about 20 KB each at a thousand bytes of text
SPELLINGS_KEPT = 400_000  # candidates whose spelling is remembered, over all documents; about 300 bytes each


@dataclass(frozen=True, kw_only=True)
class View(OwnChunks):
    """One stored document as the student reads it. `ids_L` ends with the EOS filling, which `trainable_L` includes.

    Token i lies in block (i + offset) // block_size; `offset` is 0 where blocks count from the sequence's start.
    """

    ids_L: IntArray
    trainable_L: BoolArray
    rest_L: BoolArray  # trainable tokens that overlap no cache chunk
    offset: int = 0


def view_document(
    tokenizer: TextTokenizer, stored: StoredDocument, block_size: int, block_start: str = "sequence"
) -> View:
    """Encode a stored document and align the cache's chunks with the student's tokens.

    Unless the document was cut, EOS tokens fill its last block. `block_start` is `sequence`, or `response`: then the
    first trainable token starts a block, and the first block of the prompt may be short.

    Raises:
        IrreproducibleText: this tokenizer cannot reproduce the document's bytes.
        TidecacheError: the document needs filling and the tokenizer has no end token.
    """
    own = own_chunks(tokenizer, stored)
    encoded = own.encoded
    offset = 0
    if block_start == "response" and encoded.trainable_L.any():
        offset = -int(np.argmax(encoded.trainable_L)) % block_size
    filling = 0 if stored.cut else -(len(encoded.ids_L) + offset) % block_size
    if filling and tokenizer.end_id is None:
        raise TidecacheError(
            f"tokenizer {tokenizer.name} has no end-of-sequence token, which fills the last block of a document: "
            "set eos_token in its tokenizer_config.json"
        )
    trainable_L = np.concatenate([encoded.trainable_L, np.ones(filling, np.bool_)])
    return View(
        **{field.name: getattr(own, field.name) for field in fields(own)},
        ids_L=np.concatenate([encoded.ids_L, np.full(filling, tokenizer.end_id or 0, np.int64)]),
        trainable_L=trainable_L,
        rest_L=trainable_L & ~_covered(own.token_first_C, own.token_stop_C, len(trainable_L)),
        offset=offset,
    )


def _covered(first: IntArray, stop: IntArray, length: int) -> BoolArray:
    """covered_L: whether a token lies in one of the ranges [first, stop)."""
    change = np.zeros(length + 1, np.int64)
    np.add.at(change, first, 1)
    np.add.at(change, stop, -1)
    return np.asarray(np.cumsum(change[:-1]) > 0)


@dataclass(frozen=True)
class Coverage:
    """How much of the teacher's work a student can use: masked cache chunks, and those within scored own chunks."""

    masked: int = 0
    usable: int = 0

    def __add__(self, other: Coverage) -> Coverage:
        return Coverage(self.masked + other.masked, self.usable + other.usable)

    @property
    def share(self) -> float:
        """Usable over masked; 1 where nothing is masked."""
        return self.usable / self.masked if self.masked else 1.0


@dataclass(frozen=True)
class Row:
    """One (document, draw) ready for collation. Log-likelihoods in nats at temperature 1.

    A fresh row, or one whose document the tokenizer cannot reproduce (then L = 0), has no scored chunks.
    """

    document: str
    name: str
    draw: int
    fresh: bool
    timestep: float
    ids_L: IntArray
    masked_L: BoolArray
    trainable: int
    token_first_Q: IntArray
    token_stop_Q: IntArray
    bytes_Q: IntArray
    teacher_logp_Q: npt.NDArray[np.float32]
    events: Events | None
    coverage: Coverage
    offset: int = 0


def _sums(values: npt.NDArray[np.float32], first: IntArray, stop: IntArray) -> npt.NDArray[np.float32]:
    """Sums of values[first:stop] in float64, so that long documents lose no digits."""
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return np.asarray(total[stop] - total[first], dtype=np.float32)


class RowMaker:
    """Turns draws into rows for one student tokenizer; keeps the documents it encoded last.

    `context`: whose scores the rows carry; None: none, and every fully masked own chunk counts, as evaluation wants.
    `temperature`: that of the event masses; None where no events are wanted. `seed` and `timesteps` are for fresh rows.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        spec: CaptureSpec,
        block_size: int,
        context: str | None,
        temperature: float | None = None,
        seed: int = 0,
        timesteps: tuple[float, float] = (0.0, 1.0),
        block_start: str = "sequence",
    ) -> None:
        self.tokenizer = tokenizer
        self.spec = spec
        self.block_size = block_size
        self.block_start = block_start
        self.context = context
        self.temperature = temperature
        self.seed = seed
        self.timesteps = timesteps
        self.speller = Speller(tokenizer)
        self._views: OrderedDict[str, View | None] = OrderedDict()
        self._spellings = 0

    def view(self, stored: StoredDocument) -> View | None:
        """The document in the student's tokens; None if its bytes cannot be reproduced."""
        if stored.key in self._views:
            self._views.move_to_end(stored.key)
            return self._views[stored.key]
        try:
            view = view_document(self.tokenizer, stored, self.block_size, self.block_start)
        except IrreproducibleText:
            view = None
        self._views[stored.key] = view
        while len(self._views) > VIEWS_KEPT or (self._spellings > SPELLINGS_KEPT and len(self._views) > 1):
            _, oldest = self._views.popitem(last=False)
            self._spellings -= len(oldest.spelled) if oldest is not None else 0
        return view

    def cached_row(self, draw: Draw) -> Row:
        """A stored draw: its masks, and for each usable own chunk the teacher's score (0 with context None)."""
        stored = draw.stored
        view = self.view(stored)
        if view is None:
            return _empty_row(stored, draw.draw, False, draw.timestep, Coverage(len(draw.chunks), 0))
        masked_L = self._masked_tokens(view, draw.masked_C, self.spec.seed, draw.draw, draw.timestep)
        scored = scored_own_chunks(view, draw, self.context)
        own_Q = scored.own_Q
        if self.context is None:
            teacher_logp_Q = np.zeros(len(own_Q), np.float32)
        else:
            # An own chunk's cache chunks are all masked here, so they are consecutive among the masked ones.
            first_Q, stop_Q = (
                scored.masked_before[view.own_first_O[own_Q]],
                scored.masked_before[view.own_stop_O[own_Q]],
            )
            teacher_logp_Q = _sums(draw.gold_logp_of(self.context), first_Q, stop_Q)
        events = None
        if self.temperature is not None and self.context is not None:
            column = self.spec.temperatures.index(self.temperature)
            known = len(view.spelled)
            events = chunk_events(
                view, draw, self.context, scored, teacher_logp_Q, self.temperature, column, self.speller, self.spec
            )
            self._spellings += len(view.spelled) - known
        return Row(
            document=stored.key,
            name=stored.name,
            draw=draw.draw,
            fresh=False,
            timestep=draw.timestep,
            ids_L=view.ids_L,
            masked_L=masked_L,
            trainable=int(view.trainable_L.sum()),
            token_first_Q=view.own_token_first_O[own_Q],
            token_stop_Q=view.own_token_stop_O[own_Q],
            bytes_Q=view.own_bytes_O[own_Q],
            teacher_logp_Q=teacher_logp_Q,
            events=events,
            coverage=Coverage(len(draw.chunks), int((view.own_stop_O - view.own_first_O)[own_Q].sum())),
            offset=view.offset,
        )

    def fresh_row(self, stored: StoredDocument, number: int) -> Row:
        """A draw made here, under the training seed: draw FRESH_DRAWS_FROM + number; cross-entropy only."""
        draw = FRESH_DRAWS_FROM + number
        t = noise.timestep(self.seed, stored.key, draw, self.spec.epsilon)
        lowest, highest = max(self.timesteps[0], self.spec.epsilon), self.timesteps[1]
        t = lowest + (t - self.spec.epsilon) / (1.0 - self.spec.epsilon) * (highest - lowest)
        t = float(np.float32(t))
        view = self.view(stored)
        if view is None:
            return _empty_row(stored, draw, True, t, Coverage())
        count = len(stored.chunks)
        if self.spec.mask_law == "token":
            masked_L = noise.mask_tokens(self.seed, stored.key, draw, t, len(view.ids_L))
            masked_C = noise.chunks_with_masked_token(masked_L, view.token_first_C, view.token_stop_C)
        else:
            masked_C = noise.mask_chunks(self.seed, stored.key, draw, t, count)
        none = np.zeros(0, np.int64)
        return Row(
            document=stored.key,
            name=stored.name,
            draw=draw,
            fresh=True,
            timestep=t,
            ids_L=view.ids_L,
            masked_L=self._masked_tokens(view, masked_C, self.seed, draw, t),
            trainable=int(view.trainable_L.sum()),
            token_first_Q=none,
            token_stop_Q=none,
            bytes_Q=none,
            teacher_logp_Q=np.zeros(0, np.float32),
            events=None,
            coverage=Coverage(),
            offset=view.offset,
        )

    def _masked_tokens(self, view: View, masked_C: BoolArray, seed: int, draw: int, t: float) -> BoolArray:
        """masked_L: tokens that overlap a masked chunk, and those of the rest that chance takes."""
        rest_L = view.rest_L & noise.mask_rest(seed, view.stored.key, draw, t, len(view.ids_L))
        return _covered(view.token_first_C[masked_C], view.token_stop_C[masked_C], len(view.ids_L)) | rest_L


def _empty_row(stored: StoredDocument, draw: int, fresh: bool, t: float, coverage: Coverage) -> Row:
    """A row without tokens, in place of a document that the tokenizer cannot reproduce; the order of rows stays."""
    none = np.zeros(0, np.int64)
    return Row(
        stored.key, stored.name, draw, fresh, t, none, none.astype(np.bool_), 0, none, none, none,
        np.zeros(0, np.float32), None, coverage,
    )  # fmt: skip
