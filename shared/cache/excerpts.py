"""Documents with their masked chunks, as the reader of `cache inspect --html` shows them: a few, as plain JSON values.

A cache's text is anybody's: it may hold terminal escapes, controls that turn the direction of text round, and chunks
that end inside a character. `visible` makes all of these something that can be seen and does nothing: each is spelt out
between two marks, `MARK` and `END_MARK`, which the page shows in another style, and which text itself cannot hold.

Numbers are short (probabilities to three digits), candidates are numbered in one list of strings, and a long document is
shown up to a limit, so that a page stays a few megabytes whatever the cache.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared.cache.reader import Cache
from shared.cache.records import Draw, StoredDocument
from shared.cache.survey import document_ranges, gold_rank, spread
from shared.ragged import ranges

MARK, END_MARK = "\ue000", "\ue001"
HIDDEN = frozenset(["Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"])  # Unicode categories that can't be seen as they are
MAX_CHUNKS = 400  # of one document
MAX_DRAWS = 8
MAX_CANDIDATES = 8
MAX_REST = 1600  # bytes of text in no chunk, such as a prompt, shown in one go


def visible(data: bytes) -> str:
    """Bytes as text in which nothing is hidden: see the module. New lines and tabs stay as they are."""
    return "".join(_visible_character(c) for c in data.decode("utf-8", "surrogateescape"))


def _visible_character(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in HIDDEN:
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is no part of a character
        return f"{MARK}{code - 0xDC00:02X}{END_MARK}"
    return f"{MARK}{'ESC' if code == 0x1B else f'U+{code:04X}'}{END_MARK}"


def plain(text: str) -> str:
    """`visible`, for places where there is one style only: names, titles."""
    shown = visible(text.encode("utf-8", "surrogatepass")).replace("\n", "⏎").replace("\t", "⇥")
    return shown.replace(MARK, "⟨").replace(END_MARK, "⟩")


@dataclass
class _Strings:
    """Every string once; `number` gives its index."""

    numbers: dict[str, int]

    def number(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))


def read_excerpts(cache: Cache, documents: int) -> dict[str, Any]:
    """At most `documents` documents, evenly spaced over the cache, with up to `MAX_DRAWS` draws of each.

    Returns:
        `strings`, and `documents`, whose candidates are numbers of strings; the form is what `page_parts/page.js` reads.

    Raises:
        TidecacheError: a file is missing or damaged.
    """
    groups = document_ranges(cache)
    strings = _Strings({})
    shown = []
    wanted = spread(len(groups), documents) if documents else []
    for place, index in enumerate(wanted):
        share = documents // len(wanted) + (place < documents % len(wanted))
        shown += list(_of_range(cache, groups[index], share, strings))
    return {"strings": list(strings.numbers), "documents": shown}


def _of_range(cache: Cache, shards: Sequence[int], wanted: int, strings: _Strings) -> Iterator[dict[str, Any]]:
    """Some documents of one range, with their draws from all of its shards."""
    stored = cache.read_documents(shards[0])
    chosen = {stored[i].key: stored[i] for i in spread(len(stored), wanted)}
    draws: dict[str, list[Draw]] = {key: [] for key in chosen}
    for index in shards:
        if all(len(found) >= MAX_DRAWS for found in draws.values()):
            break
        for draw in cache.read_shard(index).draws:
            if draw.document in chosen:
                draws[draw.document].append(draw)
    for key, document in chosen.items():
        if draws[key]:
            first = sorted(draws[key], key=lambda d: d.draw)[:MAX_DRAWS]
            yield _excerpt(document, sorted(first, key=lambda d: d.timestep), strings)


def _excerpt(document: StoredDocument, draws: Sequence[Draw], strings: _Strings) -> dict[str, Any]:
    shown = min(len(document.chunks), MAX_CHUNKS)
    return {
        "name": plain(document.name),
        "position": document.position,
        "chat": document.chat,
        "cut": document.cut,
        "chunks": [shown, len(document.chunks)],
        "tokens": document.token_count_C[:shown].tolist(),
        "messages": list(_messages(document, shown)),
        "draws": [_draw(draw, shown, strings) for draw in draws],
    }


def _messages(document: StoredDocument, shown: int) -> Iterator[dict[str, Any]]:
    """Each message as [text, chunk] parts, chunk −1 for text that is in none; nothing after the last chunk shown."""
    chunks = document.chunks
    last = int(chunks.message_C[shown - 1]) if shown else len(document.messages) - 1
    for number, message in enumerate(document.messages[: last + 1]):
        content = document.contents[number]
        parts: list[list[Any]] = []
        end = 0
        for chunk in np.flatnonzero(chunks.message_C[:shown] == number).tolist():
            start, stop = int(chunks.start_C[chunk]), int(chunks.stop_C[chunk])
            parts += [[text, -1] for text in _rest(content[end:start])]
            parts.append([visible(content[start:stop]), chunk])
            end = stop
        if number < last or shown == len(document.chunks):
            parts += [[text, -1] for text in _rest(content[end:])]
        yield {"role": plain(message.role), "trainable": message.trainable, "parts": parts}


def _rest(content: bytes) -> list[str]:
    """Text in no chunk, shortened in its middle."""
    if len(content) <= MAX_REST:
        return [visible(content)] if content else []
    head = content[: MAX_REST // 2].decode("utf-8", "ignore").encode()
    tail = content[-MAX_REST // 2 :].decode("utf-8", "ignore").encode()
    left_out = f"{MARK}{len(content) - len(head) - len(tail):,} bytes left out{END_MARK}"
    return [visible(head) + left_out + visible(tail)]


def _draw(draw: Draw, shown: int, strings: _Strings) -> dict[str, Any]:
    """One draw's masked chunks among the first `shown`, and for each context their scores."""
    count = int((draw.chunks < shown).sum())
    contexts = {name: _scores(draw, name, count, strings) for name in draw.scores}
    return {
        "draw": draw.draw,
        "t": round(draw.timestep, 3),
        "masked": draw.chunks[:count].tolist(),
        "split": draw.split[:count].astype(int).tolist(),
        "contexts": contexts,
    }


def _scores(draw: Draw, context: str, count: int, strings: _Strings) -> dict[str, Any]:
    """`gold`: log-likelihoods, nats; `best`: for each chunk its candidates as string, probability, string, …;
    `rank`: the gold's place among all k stored, −1 where it is none of them.
    """
    scores = draw.scores[context]
    found: dict[str, Any] = {"gold": [round(float(x), 3) for x in draw.gold_logp_of(context)[:count]]}
    if scores.topk_ids is None or scores.topk_logp_MK is None or not count:
        return found
    k = scores.topk_logp_MK.shape[1]
    document = draw.stored
    first_C = np.cumsum(document.token_count_C) - document.token_count_C
    gold_ids_N = document.token_ids_N[ranges(first_C[draw.chunks], draw.token_count_M)]
    rank_M = gold_rank(gold_ids_N, scores.topk_ids, draw.token_count_M, k)[:count]
    start_M = k * (np.cumsum(draw.token_count_M) - draw.token_count_M)
    best = []
    for m, (start, tokens) in enumerate(zip(start_M[:count].tolist(), draw.token_count_M.tolist(), strict=False)):
        row: list[Any] = []
        for j, logp in enumerate(scores.topk_logp_MK[m, :MAX_CANDIDATES].tolist()):
            ids = scores.topk_ids[start + j * tokens : start + (j + 1) * tokens].tolist()
            row += [strings.number(visible(draw.vocabulary.spell(ids))), float(f"{np.exp(logp):.3g}")]
        best.append(row)
    return {**found, "best": best, "rank": [int(r) if r < k else -1 for r in rank_M]}
