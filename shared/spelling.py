"""Candidates as a student can spell them (DESIGN §5).

A filling of the topk lane is in the teacher's tokens. It becomes an event of the student if its bytes are valid UTF-8,
hold no special token, and tokenise in place of the gold, in context, to exactly as many student tokens as the chunk has,
with every other token left as it was. Retokenising the whole document for each candidate is exact and slow
(`spell_in_document`). `Speller` encodes a small window instead, between two places where a visible character meets white
space: there byte-level and SentencePiece tokenizers split the text whatever lies beyond. A window counts only if it
reproduces the document's tokens with the gold in place; otherwise it grows, up to the whole document.

Within one tokenizer nothing needs spelling: where student and teacher share their vocabulary, a chunk of one token on
both sides has the candidates' ids themselves as events, as the paper's KL over the shared vocabulary has.

Shape suffixes: Q scored own chunks of a draw, V ids that both vocabularies have, K candidates of a chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.cache.records import Draw
from shared.cache.vocabulary import TeacherVocabulary
from shared.documents import BoolArray, IntArray
from shared.own_chunks import OwnChunks, Scored
from shared.tokenization import IrreproducibleText, TextTokenizer

Spelling = tuple[int, ...] | None
SHARED_FROM = 0.99  # share of common ids that must spell the same for two vocabularies to be one
_SPACE = 0x20


def shared_ids(tokenizer: TextTokenizer, vocabulary: TeacherVocabulary) -> BoolArray | None:
    """Which ids mean the same to both, over those that both have; None unless nearly all do.

    Tokenizers of one family may differ in a few added tokens (WeDLM's and Qwen3's share 151,646 ids of 151,669).
    """
    common = min(len(tokenizer.token_bytes), len(vocabulary))
    same_V = np.array(
        [a == b for a, b in zip(tokenizer.token_bytes[:common], vocabulary.token_bytes[:common], strict=True)], np.bool_
    )
    same_V &= tokenizer.special[:common] == vocabulary.special_V[:common]
    longest = max(len(tokenizer.token_bytes), len(vocabulary))
    return same_V if same_V.sum() >= SHARED_FROM * longest else None


def spell_in_document(tokenizer: TextTokenizer, view: OwnChunks, own: int, candidate: bytes) -> Spelling:
    """The candidate's ids in place of own chunk `own`, by encoding the whole document again; None if it is no event."""
    stored = view.stored
    first = int(view.own_first_O[own])
    message = int(stored.chunks.message_C[first])
    content = stored.messages[message].content.encode()
    start = int(stored.chunks.start_C[first])
    stop = int(stored.chunks.stop_C[view.own_stop_O[own] - 1])
    try:
        text = (content[:start] + candidate + content[stop:]).decode()
        candidate.decode()
        messages = list(stored.messages)
        messages[message] = dataclasses.replace(messages[message], content=text)
        encoded = tokenizer.encode(tuple(messages), stored.chat, stored.cut)
    except (UnicodeDecodeError, IrreproducibleText):
        return None
    a, b = int(view.own_token_first_O[own]), int(view.own_token_stop_O[own])
    before, after = view.encoded.ids_L[:a].tolist(), view.encoded.ids_L[b:].tolist()
    middle = _middle(encoded.ids_L.tolist(), before, after, b - a)
    longer = len(candidate) - (stop - start)
    edges_stay = (
        middle is not None
        and encoded.edges[a] == view.encoded.edges[a]
        and encoded.edges[b] == view.encoded.edges[b] + longer
    )
    return middle if middle is not None and edges_stay and not tokenizer.special[list(middle)].any() else None


def _middle(ids: list[int], before: list[int], after: list[int], count: int) -> Spelling:
    """What stands between `before` and `after` in `ids`, if that is `count` tokens."""
    stop = len(before) + count
    if len(ids) != stop + len(after) or ids[: len(before)] != before or ids[stop:] != after:
        return None
    return tuple(ids[len(before) : stop])


@dataclass(frozen=True)
class _Window:
    """Tokens [first, stop) of a document around an own chunk, which reproduce it when encoded alone."""

    prefix: str
    suffix: str
    before: list[int]
    after: list[int]


class Speller:
    """Spells candidates in context through windows, with each document's answers kept in `OwnChunks.spelled`."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self._length_V = np.array([len(spelled) for spelled in tokenizer.token_bytes], np.int64)
        self._known = frozenset(tokenizer.token_bytes)
        self._special_ids = frozenset(np.flatnonzero(tokenizer.special).tolist())
        self._shared: tuple[TeacherVocabulary, BoolArray | None] | None = None

    def shared_ids(self, vocabulary: TeacherVocabulary) -> BoolArray | None:
        """`shared_ids` of this tokenizer, remembered for the last vocabulary."""
        if self._shared is None or self._shared[0] is not vocabulary:
            self._shared = (vocabulary, shared_ids(self.tokenizer, vocabulary))
        return self._shared[1]

    def _may_be(self, candidate: bytes, count: int) -> bool:
        """Whether `count` tokens can spell the candidate at all; a cheap no for one or two, which most chunks have."""
        if count == 1:
            return candidate in self._known
        if count == 2:
            return any(
                candidate[:at] in self._known and candidate[at:] in self._known for at in range(1, len(candidate))
            )
        return True

    def spell(self, view: OwnChunks, wanted: Sequence[tuple[int, bytes]]) -> list[Spelling]:
        """The ids of each (own chunk, candidate bytes); None for those that are no events."""
        spelled = view.spelled
        new = [key for key in dict.fromkeys(wanted) if key not in spelled]
        count_O = (view.own_token_stop_O - view.own_token_first_O).tolist()
        ids_L, size_L = view.encoded.ids_L, np.diff(view.encoded.edges)
        bytes_are_spelled = bool((self._length_V[ids_L] == size_L).all())  # no implied spaces, no offsets
        splits_O = self._splits_characters(view)
        possible = []
        for key in new:
            own, candidate = key
            text = None if bytes_are_spelled and not self._may_be(candidate, count_O[own]) else _decoded(candidate)
            if text is None or splits_O[own]:
                spelled[key] = None
            else:
                possible.append((key, text))
        windows = self._windows(view, sorted({own for (own, _), _ in possible}))
        texts, keys = [], []
        for key, text in possible:
            window = windows[key[0]]
            if window is None:
                spelled[key] = spell_in_document(self.tokenizer, view, *key)
            else:
                texts.append(window.prefix + text + window.suffix)
                keys.append(key)
        token_bytes = self.tokenizer.token_bytes
        for key, ids in zip(keys, self.tokenizer.encode_text_batch(texts), strict=True):
            own, candidate = key
            window = windows[own]
            assert window is not None
            middle = _middle(ids, window.before, window.after, count_O[own])
            if middle is not None:
                if not self._special_ids.isdisjoint(middle):
                    middle = None
                elif b"".join([token_bytes[token] for token in middle]) != candidate:
                    # Changed by a normaliser, or by tokens that do not spell their bytes: rare, not for windows.
                    middle = spell_in_document(self.tokenizer, view, own, candidate)
            spelled[key] = middle
        return [spelled[key] for key in wanted]

    @staticmethod
    def _splits_characters(view: OwnChunks) -> list[bool]:
        """Per own chunk, whether it begins or ends within a character: then no text can stand in its place."""
        text, edges = np.frombuffer(view.rendering + b" ", np.uint8), view.encoded.edges
        within = (text[edges] & 0xC0) == 0x80
        splits: list[bool] = (within[view.own_token_first_O] | within[view.own_token_stop_O]).tolist()
        return splits

    def _windows(self, view: OwnChunks, owns: Sequence[int]) -> dict[int, _Window | None]:
        """A window for each own chunk; None where only the whole document will do."""
        edges = view.encoded.edges
        safe = _safe_edges(view.rendering, edges)
        safe_byte = edges[safe]
        # A special token parts the text before anything else is done to it, so a window may start or end there.
        stops = np.flatnonzero(self.tokenizer.special[view.encoded.ids_L])
        found: dict[int, _Window | None] = dict.fromkeys(owns)
        pending = list(owns)
        # How many safe edges to go out (the end of the text and a special token are always one), and whether the first
        # space is left to the tokenizer, as those that put one before every text need it.
        for reach, implied_space in ((1, False), (1, True), (4, False), (4, True)):
            spans, texts = [], []
            for own in pending:
                a, b = int(view.own_token_first_O[own]), int(view.own_token_stop_O[own])
                special = int(np.searchsorted(stops, a))
                low = int(stops[special - 1]) + 1 if special else 0
                high = int(stops[special]) if special < len(stops) else len(edges) - 1
                # Whatever makes an edge safe lies outside the chunk: on the left the white space after it, on the right
                # the visible character before it.
                at = int(np.searchsorted(safe_byte, edges[a] - 1, side="right")) - reach
                first = max(low, int(safe[at])) if at >= 0 else low
                at = int(np.searchsorted(safe, b, side="right")) - 1 + reach
                last = min(high, int(safe[at])) if at < len(safe) else high
                begin = int(edges[first]) + (implied_space and view.rendering[edges[first]] == _SPACE)
                spans.append((own, begin, first, a, b, last))
                texts.append(_decoded(view.rendering[begin : edges[last]]) or "")
            pending = []
            for (own, begin, first, a, b, last), ids in zip(
                spans, self.tokenizer.encode_text_batch(texts), strict=True
            ):
                if ids != view.encoded.ids_L[first:last].tolist():
                    pending.append(own)
                    continue
                found[own] = _Window(
                    prefix=view.rendering[begin : edges[a]].decode(),
                    suffix=view.rendering[edges[b] : edges[last]].decode(),
                    before=view.encoded.ids_L[first:a].tolist(),
                    after=view.encoded.ids_L[b:last].tolist(),
                )
        return found


def _decoded(text: bytes) -> str | None:
    """The text; None where it starts or ends within a character."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return None


def _safe_edges(rendering: bytes, edges: IntArray) -> IntArray:
    """Numbers of the tokens, ascending, that start where the text is split whatever lies on either side.

    That is where a visible ASCII character is followed by white space. Only line ends after punctuation are left out:
    the splitting rules of cl100k and its like keep these together.
    """
    text = np.frombuffer(rendering + b"  ", np.uint8)
    start = edges[:-1]
    before, at = text[start - 1], text[start]  # for start 0: the space that was added
    alphanumeric = _among(before, b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    visible = (before > _SPACE) & (before < 0x7F)
    return np.flatnonzero((visible & _among(at, b" \t")) | (alphanumeric & _among(at, b"\n\r")))


def _among(byte: npt.NDArray[np.uint8], allowed: bytes) -> BoolArray:
    return np.isin(byte, np.frombuffer(allowed, np.uint8))


@dataclass(frozen=True)
class Candidates:
    """The candidates of a draw's scored own chunks, but for the gold; those with the same bytes are one.

    `spelled_Q`: per own chunk, (the student's ids, the teacher's log mass) of those that the student can spell;
    `lost_Q`: the log masses of the others. Where `union_Q`, an own chunk has several cache chunks, and the lane holds no
    candidates of their union; where `by_id_Q`, it is one token of a shared vocabulary, and ids are events.
    """

    spelled_Q: list[list[tuple[tuple[int, ...], float]]]
    lost_Q: list[list[float]]
    union_Q: BoolArray
    by_id_Q: BoolArray
    log_z_Q: npt.NDArray[np.float64]


def candidates_of(
    view: OwnChunks, draw: Draw, context: str, scored: Scored, temperature: float, column: int, speller: Speller
) -> Candidates:
    """The candidates of each scored own chunk at `temperature`, whose column in `log_z_MT` is `column`.

    Candidates with the same bytes are added up; those with the gold's bytes, other than the gold, count as *other*.
    """
    scores = draw.scores[context]
    assert scores.log_z_MT is not None
    assert scores.topk_ids is not None
    assert scores.topk_logp_MK is not None
    own_Q = scored.own_Q
    first_Q, stop_Q = scored.masked_before[view.own_first_O[own_Q]], scored.masked_before[view.own_stop_O[own_Q]]
    count_M = draw.token_count_M
    k = scores.topk_logp_MK.shape[1]
    start_M = np.concatenate([[0], np.cumsum(k * count_M)])
    log_z_total = np.concatenate([[0.0], np.cumsum(scores.log_z_MT[:, column], dtype=np.float64)])
    log_z_Q = log_z_total[stop_Q] - log_z_total[first_Q]
    ids = scores.topk_ids.tolist()
    special_V = draw.vocabulary.special_V
    special = set(np.flatnonzero(special_V).tolist()) if special_V[scores.topk_ids].any() else set()
    token_bytes = draw.vocabulary.token_bytes
    same_V = speller.shared_ids(draw.vocabulary)
    by_id_Q = _single_shared_tokens(view, draw, own_Q, first_Q, stop_Q, same_V)
    found = Candidates([[] for _ in own_Q], [[] for _ in own_Q], stop_Q - first_Q > 1, by_id_Q, log_z_Q)

    wanted: list[tuple[int, bytes]] = []
    mass: list[float] = []
    chunk: list[int] = []
    for q, (own, m, stop) in enumerate(zip(own_Q.tolist(), first_Q.tolist(), stop_Q.tolist(), strict=True)):
        if stop - m != 1:
            continue
        a, b = view.own_token_first_O[own], view.own_token_stop_O[own]
        gold = view.rendering[view.encoded.edges[a] : view.encoded.edges[b]]
        n, begin = int(count_M[m]), int(start_M[m])
        log_z = float(log_z_Q[q])
        if by_id_Q[q]:
            assert same_V is not None
            gold_id = int(view.encoded.ids_L[a])
            for token, logp in zip(ids[begin : begin + k], scores.topk_logp_MK[m].tolist(), strict=True):
                if token == gold_id:
                    continue
                if token < len(same_V) and same_V[token]:
                    found.spelled_Q[q].append(((token,), logp / temperature - log_z))
                else:
                    found.lost_Q[q].append(logp / temperature - log_z)
            continue
        by_bytes: dict[bytes, float] = {}
        for logp in scores.topk_logp_MK[m].tolist():
            filling = ids[begin : begin + n]
            begin += n
            scaled = logp / temperature - log_z
            if special and not special.isdisjoint(filling):
                found.lost_Q[q].append(scaled)
                continue
            spelling = b"".join([token_bytes[token] for token in filling])
            if spelling == gold:
                continue
            if spelling in by_bytes:
                scaled = float(np.logaddexp(by_bytes[spelling], scaled))
            by_bytes[spelling] = scaled
        wanted += [(own, spelling) for spelling in by_bytes]
        mass += by_bytes.values()
        chunk += [q] * len(by_bytes)

    for q, spelling_ids, scaled in zip(chunk, speller.spell(view, wanted), mass, strict=True):
        if spelling_ids is None:
            found.lost_Q[q].append(scaled)
        else:
            found.spelled_Q[q].append((spelling_ids, scaled))
    return found


def _single_shared_tokens(
    view: OwnChunks, draw: Draw, own_Q: IntArray, first_Q: IntArray, stop_Q: IntArray, same_V: BoolArray | None
) -> BoolArray:
    """Which own chunks are one masked chunk of one token, the same id on both sides."""
    if same_V is None:
        return np.zeros(len(own_Q), np.bool_)
    stored, chunk_Q = draw.stored, view.own_first_O[own_Q]
    token_first_C = np.cumsum(stored.token_count_C) - stored.token_count_C
    teacher_Q = stored.token_ids_N[token_first_C[chunk_Q]].astype(np.int64)
    first_token_Q = view.own_token_first_O[own_Q]
    single_Q = (stored.token_count_C[chunk_Q] == 1) & (stop_Q - first_Q == 1)
    single_Q &= view.own_token_stop_O[own_Q] - first_token_Q == 1
    return np.asarray(single_Q & (view.encoded.ids_L[first_token_Q] == teacher_Q))
