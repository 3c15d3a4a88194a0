"""One sequence of the tokens that a step needs, with x_0 once per document (DESIGN §8, *clean half*).

Rows of a batch that are draws of one document, one after the other, form a *group* and share its clean half. What no
loss depends on is left out, exactly: padding; a noisy block without a masked token, since x_t's blocks see neither each
other nor are they seen by x_0; and the clean blocks from the last noisy one on, which no noisy block sees. A prompt
costs its clean half alone.

The pack holds the noisy tokens first, document by document, block by block and within a block draw by draw, then the
clean tokens, document by document. So the draws of a block are one slice of queries, their keys in x_0 another slice.
Where everything lies depends on lengths, offsets and the blocks in use alone: `Layout.of` remembers the last ones.

Shape suffixes: M draws of a group, L tokens, B blocks of a document, T tokens of the pack, X noisy ones (the first), N
masked tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from shared.documents import BoolArray, IntArray

CLEAN = -1  # `draw_T` of clean tokens
LAYOUTS_KEPT = 16


@dataclass(frozen=True)
class Group:
    """Draws of one document: token i lies in block (i + offset) // block_size of each."""

    offset: int
    masked_ML: BoolArray

    def edges(self, block_size: int) -> IntArray:
        """Where blocks start, and the length at the end; the first and the last block may be short."""
        length = self.masked_ML.shape[1]
        return np.append(np.arange(0, length + self.offset, block_size).clip(self.offset) - self.offset, length)


@dataclass(frozen=True)
class Span:
    """Queries [start, stop) of the pack and the keys [first, last) that they see, all of them."""

    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True)
class Run:
    """`count` noisy blocks of `size` tokens from `start` on, each of which sees itself."""

    start: int
    count: int
    size: int


@dataclass(frozen=True)
class Shape:
    """What a document's part of the layout depends on: edges of its blocks, and which of each draw are in use."""

    edges: tuple[int, ...]
    used: tuple[tuple[bool, ...], ...]


@dataclass(frozen=True, eq=False)
class Layout:
    """See the module."""

    noisy: int  # X
    row_T: Tensor  # row of the batch that holds the token; for clean ones the group's first
    column_T: Tensor
    document_T: Tensor
    draw_T: Tensor  # row of the batch, or CLEAN
    block_T: Tensor
    runs: tuple[Run, ...]  # noisy blocks see themselves …
    to_clean: tuple[Span, ...]  # … and x_0 of the blocks before
    within_clean: tuple[Span, ...]  # x_0 sees x_0 up to the end of the block
    documents: tuple[Span, ...]  # noisy and clean tokens of each document
    starts: tuple[IntArray, ...]  # by group [M, B]: where a block begins in the pack

    @classmethod
    def of(cls, groups: Sequence[Group], block_size: int, device: torch.device) -> Layout:
        """The layout of these groups; it has at least one token, whatever is masked."""
        edges = [group.edges(block_size) for group in groups]
        used = [np.logical_or.reduceat(g.masked_ML, e[:-1], axis=1) for g, e in zip(groups, edges, strict=True)]
        if not any(u.any() for u in used):
            used[0][0, 0] = True
        shapes = tuple(
            Shape(tuple(e.tolist()), tuple(map(tuple, u.tolist()))) for e, u in zip(edges, used, strict=True)
        )
        return _layout(shapes, device)

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.row_T)

    def places(self, groups: Sequence[Group], block_size: int) -> Tensor:
        """place_N: where each masked token lies in the pack; row by row."""
        found = [np.zeros(0, np.int64)]
        for group, start_MB in zip(groups, self.starts, strict=True):
            draw_N, column_N = np.nonzero(group.masked_ML)
            edges = group.edges(block_size)
            block_N = (column_N + group.offset) // block_size
            found.append(start_MB[draw_N, block_N] + column_N - edges[block_N])
        return torch.from_numpy(np.concatenate(found)).to(self.row_T.device, non_blocking=True)

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether tokens (numbers in the pack) see others (DESIGN §8)."""
        return sees(self.document_T, self.draw_T, self.block_T, query, key)

    @cached_property
    def memory(self) -> dict[object, object]:
        """What a kernel derives from the layout once (block masks)."""
        return {}


def sees(document_T: Tensor, draw_T: Tensor, block_T: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The rule of block diffusion for the tokens numbered `query` and `key`, broadcast against each other.

    Within a draw a block sees itself; every token sees clean tokens of the same document and of earlier blocks, a clean
    one also those of its own block.
    """
    clean_query, clean_key = draw_T[query] == CLEAN, draw_T[key] == CLEAN
    before = (block_T[key] < block_T[query]) | (clean_query & (block_T[key] == block_T[query]))
    to_clean = clean_key & before & (document_T[query] == document_T[key])
    itself = ~clean_key & (draw_T[query] == draw_T[key]) & (block_T[query] == block_T[key])
    return to_clean | itself


@lru_cache(LAYOUTS_KEPT)
def _layout(shapes: tuple[Shape, ...], device: torch.device) -> Layout:
    columns: tuple[list[IntArray], ...] = ([], [], [], [], [])
    row, column, document, draw, block = columns
    runs: list[Run] = []
    starts: list[IntArray] = []
    queries: list[tuple[int, int, int, int]] = []  # noisy tokens [start, stop) of a document's block
    noisy_of: list[tuple[int, int]] = []
    at = first_row = 0

    def add(of: int, row_: int, draw_: int, number: int, edges: tuple[int, ...]) -> None:
        nonlocal at
        size = edges[number + 1] - edges[number]
        row.append(np.full(size, row_))
        column.append(np.arange(edges[number], edges[number + 1]))
        document.append(np.full(size, of))
        draw.append(np.full(size, draw_))
        block.append(np.full(size, number))
        at += size

    for of, shape in enumerate(shapes):
        start_MB = np.full((len(shape.used), len(shape.edges) - 1), -1)
        began = at
        for number in range(len(shape.edges) - 1):
            block_began, size = at, shape.edges[number + 1] - shape.edges[number]
            for m, used_B in enumerate(shape.used):
                if used_B[number]:
                    start_MB[m, number] = at
                    add(of, first_row + m, first_row + m, number, shape.edges)
            if at > block_began:
                queries.append((of, number, block_began, at))
                if runs and runs[-1].size == size:
                    runs[-1] = Run(runs[-1].start, runs[-1].count + (at - block_began) // size, size)
                else:
                    runs.append(Run(block_began, (at - block_began) // size, size))
        starts.append(start_MB)
        noisy_of.append((began, at))
        first_row += len(shape.used)
    noisy = at

    clean_of: list[tuple[int, int]] = []
    within: list[Span] = []
    first_row = 0
    for of, shape in enumerate(shapes):
        began = at
        last_used = max((n for used_B in shape.used for n, used in enumerate(used_B) if used), default=0)
        for number in range(last_used):
            block_began = at
            add(of, first_row, CLEAN, number, shape.edges)
            within.append(Span(block_began, at, began, at))
        clean_of.append((began, at))
        first_row += len(shape.used)
    to_clean = [
        Span(start, stop, clean_of[of][0], clean_of[of][0] + shapes[of].edges[number])
        for of, number, start, stop in queries
        if shapes[of].edges[number]
    ]
    row_T, column_T, document_T, draw_T, block_T = (
        torch.from_numpy(np.concatenate(parts)).to(device, non_blocking=True) for parts in columns
    )
    return Layout(
        noisy, row_T, column_T, document_T, draw_T, block_T, tuple(runs), tuple(to_clean), tuple(within),
        tuple(Span(*a, *b) for a, b in zip(noisy_of, clean_of, strict=True) if a[0] < a[1]), tuple(starts),
    )  # fmt: skip
