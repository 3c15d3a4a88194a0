"""How a request lies in the pages of a paged key/value cache, and which keys each of its tokens sees (DESIGN §7).

vLLM's attention kernels know requests: consecutive queries that see a run of pages. A diffusion layout is none of that,
but every block of it is: its queries see a prefix of the text. So each block becomes a *span*, a virtual request over
the pages of the real one, and the stock kernels run on spans without causality.

`block-causal` needs no more. `bd3lm` lays x_0 first, padded to whole pages, then x_t block by block, each block in pages
of its own: its keys are the pages of x_0 before it, then its own pages. Where a block does not start at a page's border,
the x_0 tokens between the border and the block are repeated in front of it (and, being repeated, are computed again to
the same values). x_0's pages are thus the same for every draw of a document, and are computed once.

            pages of x_0                  a page for each block of x_t          (page 4, blocks of 2, L = 6)
    x0 x1 x2 x3 | x4 x5 -- --    t0 t1 -- -- | x0 x1 t2 t3 | t4 t5
                                 sees        | sees own    | sees x0..x3 and
                                 own page    | page        | own page

Shapes: L tokens of a text, S spans, R requests of a batch, P tokens of a prompt, W pages that a span may see.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from shared.ragged import ranges, within

Ints = npt.NDArray[np.int64]
CLEAN, NOISY, PADDING = 0, 1, 2


@dataclass(frozen=True)
class Spans:
    """Runs of queries in the order of the prompt, which they tile without a gap. Each field is an int64 array of S."""

    offset_S: Ints  # where the span starts in its prompt
    count_S: Ints  # its queries
    position_S: Ints  # position in the text of its first query
    keys_S: Ints  # it sees the positions 0..keys-1 ...
    shared_S: Ints  # ... the first of them in so many pages from the prompt's start ...
    page_S: Ints  # ... the others in the pages from this one on
    kind_S: Ints  # CLEAN, NOISY or PADDING

    @property
    def positions_P(self) -> Ints:
        """Position in the text of every token of the prompt."""
        return np.repeat(self.position_S - self.offset_S, self.count_S) + np.arange(self.count_S.sum())


def _spans(**columns: Ints | int) -> Spans:
    size = max(np.size(column) for column in columns.values())
    return Spans(**{name: np.broadcast_to(np.asarray(c, dtype=np.int64), (size,)) for name, c in columns.items()})


def _joined(parts: list[Spans]) -> Spans:
    return Spans(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Spans)))


def _blocks(length: int, block: int, kind: int) -> Spans:
    """The spans of a block-causal text that starts at the prompt's start."""
    first_S = np.arange(0, length, block)
    stop_S = np.minimum(first_S + block, length)
    return _spans(
        offset_S=first_S, count_S=stop_S - first_S, position_S=first_S, keys_S=stop_S, shared_S=0, page_S=0, kind_S=kind
    )


@dataclass(frozen=True)
class Placement:
    """One text in pages: its spans and, for each position of x_t, where that token stands in the prompt."""

    spans: Spans
    noisy_L: Ints
    clean_pages: int  # pages at the prompt's start that hold x_0 alone; 0 where the layout has no x_0

    @property
    def size(self) -> int:
        """Tokens of the prompt."""
        return int(self.spans.offset_S[-1] + self.spans.count_S[-1])

    def prompt(self, token_L: Ints, clean_L: Ints) -> Ints:
        """The ids of the prompt; padding is token 0, which nothing sees."""
        kind_P = np.repeat(self.spans.kind_S, self.spans.count_S)
        position_P = np.minimum(self.spans.positions_P, len(token_L) - 1)
        clean_P = clean_L[position_P] if len(clean_L) else 0
        return np.where(kind_P == NOISY, token_L[position_P], np.where(kind_P == CLEAN, clean_P, 0))


@lru_cache(maxsize=4096)
def place(layout: str, length: int, block: int, page: int) -> Placement:
    """Where a text of `length` tokens goes.

    Raises:
        ValueError: a layout that has no placement.
    """
    if layout == "full":
        whole = _spans(offset_S=0, count_S=length, position_S=0, keys_S=length, shared_S=0, page_S=0, kind_S=NOISY)
        return Placement(whole, np.arange(length), 0)
    if layout == "block-causal":
        return Placement(_blocks(length, block, NOISY), np.arange(length), 0)
    if layout != "bd3lm":
        raise ValueError(f"layout {layout!r}: expected full, block-causal or bd3lm")
    clean = -(-length // page) * page
    parts = [_blocks(length, block, CLEAN)]
    if clean > length:
        parts.append(_padding(length, clean))
    noisy, start_B, border_B = _noisy_blocks(length, block, page, clean)
    position_L = np.arange(length)
    block_L = position_L // block
    return Placement(_joined([*parts, noisy]), start_B[block_L] + position_L - border_B[block_L], clean // page)


def _padding(first: int, stop: int) -> Spans:
    return _spans(
        offset_S=first, count_S=stop - first, position_S=first, keys_S=stop, shared_S=0, page_S=0, kind_S=PADDING
    )


def _noisy_blocks(length: int, block: int, page: int, clean: int) -> tuple[Spans, Ints, Ints]:
    """The spans of x_t's blocks; where each block's pages start in the prompt, and at which position of the text."""
    first_B = np.arange(0, length, block)
    stop_B = np.minimum(first_B + block, length)
    border_B = first_B // page * page
    size_B = -(-(stop_B - border_B) // page) * page
    size_B[-1] = stop_B[-1] - border_B[-1]
    start_B = clean + np.concatenate([[0], np.cumsum(size_B[:-1])])

    # Per block: the repeated clean tokens, by the blocks that they belong to; the block itself; padding to a whole page.
    repeated_B = first_B // block - border_B // block
    padded_B = (border_B + size_B > stop_B).astype(np.int64)
    spans_B = repeated_B + 1 + padded_B
    of_S = np.repeat(np.arange(len(first_B)), spans_B)
    place_S = within(spans_B)
    after_S = place_S - repeated_B[of_S]  # < 0: repeated, 0: the block, 1: padding
    earlier_S = border_B[of_S] // block + place_S
    begin_S = np.select(
        [after_S < 0, after_S == 0], [np.maximum(border_B[of_S], earlier_S * block), first_B[of_S]], stop_B[of_S]
    )
    end_S = np.select(
        [after_S < 0, after_S == 0], [(earlier_S + 1) * block, stop_B[of_S]], border_B[of_S] + size_B[of_S]
    )
    spans = _spans(
        offset_S=start_B[of_S] + begin_S - border_B[of_S],
        count_S=end_S - begin_S,
        position_S=begin_S,
        keys_S=end_S,
        shared_S=border_B[of_S] // page,
        page_S=start_B[of_S] // page,
        kind_S=np.select([after_S < 0, after_S == 0], [CLEAN, NOISY], PADDING),
    )
    return spans, start_B, border_B


def prompt_sizes(layout: str, longest: int, block: int, page: int) -> Ints:
    """Tokens of the prompt for each length 1..longest of the text; strictly ascending."""
    length_L = np.arange(1, longest + 1)
    if layout != "bd3lm":
        return length_L
    first_B = np.arange(0, longest, block)
    size_B = -(-(first_B + block - first_B // page * page) // page) * page
    before_B = np.concatenate([[0], np.cumsum(size_B)])
    last_L = (length_L - 1) // block
    sizes: Ints = -(-length_L // page) * page + before_B[last_L] + length_L - first_B[last_L] // page * page
    return sizes


@dataclass(frozen=True)
class Batch:
    """The spans of a batch that are to be computed: those of its requests, less what is cached."""

    request_S: Ints
    count_S: Ints
    position_S: Ints
    keys_S: Ints
    shared_S: Ints
    page_S: Ints

    @property
    def positions_P(self) -> Ints:
        """Position in its text of every token that is computed."""
        return ranges(self.position_S, self.count_S)

    @property
    def columns_SW(self) -> Ints:
        """Which pages of its request each span sees, in order; beyond its keys anything that exists."""
        pages = int((-(-self.keys_S // self.page)).max())
        column_W = np.arange(pages)[None]
        shared_S1 = self.shared_S[:, None]
        return np.where(column_W < shared_S1, column_W, column_W - shared_S1 + self.page_S[:, None])

    page: int = 0


def spans_of_batch(placements: list[Placement], cached_R: Ints, page: int) -> Batch:
    """Spans of requests whose first `cached_R` tokens need not be computed any more."""
    spans = _joined([placement.spans for placement in placements])
    request_S = np.repeat(np.arange(len(placements)), [len(placement.spans.count_S) for placement in placements])
    skip_S = np.clip(cached_R[request_S] - spans.offset_S, 0, spans.count_S)
    left = skip_S < spans.count_S
    return Batch(
        request_S=request_S[left],
        count_S=(spans.count_S - skip_S)[left],
        position_S=(spans.position_S + skip_S)[left],
        keys_S=spans.keys_S[left],
        shared_S=spans.shared_S[left],
        page_S=spans.page_S[left],
        page=page,
    )
