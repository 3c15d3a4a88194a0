"""The rows of a training run in their order, each a pure function of caches, configuration and row number (DESIGN §8).

The order is that of `shared.cache.stream`: stored draws of one or several caches, each used once before any is used
twice. A share `fresh` of the rows, spread evenly, is drawn here with masks of its own, in a second stream over the same
documents. With `together` > 1 all of this happens in groups of that many rows, aligned at its multiples: a group is
fresh or cached as a whole, of one cache, and its rows are draws of one document, so that a collator can let them share
its clean half. Since row n needs nothing but n, a run resumes at the exact row, any number of loader workers or ranks
sees the same rows, and a longer run begins with the shorter one's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from torch.utils.data import Dataset, get_worker_info

from shared.cache.stream import DocumentStream, DrawStream
from shared.errors import TidecacheError
from shared.noise import stream_key
from stage2_student.config import VIEWS
from stage2_student.data import Row, RowMaker

T = TypeVar("T")


class TrainingRows(Dataset[Row]):
    """Rows 0 … count − 1 of a run (see the module). Sequential access is fast; any access is right.

    `makers`: one for each cache of `draws`, in their order. `halves`: a stored draw masks all of its chunks when it is first
    used, one half of them the second time, the other the third, all again the fourth, and so on; which half comes first is
    drawn for each draw. With compdemo the teacher has scored just that.
    """

    def __init__(
        self, draws: DrawStream, makers: Sequence[RowMaker], fresh: float, count: int, halves: bool = False
    ) -> None:
        self.draws = draws
        self.documents = DocumentStream(draws)
        self.makers = tuple(makers)
        self.fresh = fresh
        self.count = count
        self.halves = halves

    def __len__(self) -> int:
        return self.count

    def place(self, number: int) -> tuple[str, int]:
        """(`fresh` or `cached`, number within that stream) of row `number`; fresh rows are spread evenly."""
        group, within = divmod(number, self.draws.together)
        fresh_before = int(np.floor(group * self.fresh + 1e-9))
        is_fresh = int(np.floor((group + 1) * self.fresh + 1e-9)) > fresh_before
        before = fresh_before if is_fresh else group - fresh_before
        return "fresh" if is_fresh else "cached", before * self.draws.together + within

    def __getitem__(self, number: int) -> Row:
        """The row.

        Raises:
            TidecacheError: a file of a cache is missing or damaged.
        """
        if not 0 <= number < self.count:
            raise IndexError(number)
        stream, within = self.place(number)
        if stream == "cached":
            cache, draw = self.draws.located(within)
            maker = self.makers[cache]
            view = 0
            if self.halves:
                view = view_of(self.draws.seed, draw.document, draw.draw, self.draws.uses(within))
            return maker.cached_row(draw.half(view == 1, maker.spec.demo_ratio) if view else draw)
        turn, repeat = divmod(within, self.draws.together)
        visit = self.documents[turn]
        return self.makers[visit.cache].fresh_row(visit.stored, visit.times * self.draws.together + repeat)

    def __getitems__(self, numbers: Sequence[int]) -> list[Row] | list[Failure]:
        """The rows of one batch, as a DataLoader asks for them; within a loader process an error comes as a value."""
        try:
            return [self[number] for number in numbers]
        except TidecacheError as error:
            if get_worker_info() is None:
                raise
            return [Failure(str(error))]


def view_of(seed: int, document: str, draw: int, uses: int) -> int:
    """What a draw masks that was used so often before, with halves. 0: all of its chunks; 1: half A; 2: half B."""
    view = uses % VIEWS
    b_first = stream_key(seed, document, "half", draw) % 2
    return VIEWS - view if view and b_first else view


@dataclass(frozen=True)
class Failure:
    """A `TidecacheError` on its way out of a loader process: raised there, torch would raise something else here, with a
    traceback for its text.
    """

    message: str


@dataclass(frozen=True)
class OrFailure(Generic[T]):
    """A collator that hands a `Failure` through."""

    collate: Callable[[Sequence[Row]], T]

    def __call__(self, rows: Sequence[Row] | Sequence[Failure]) -> T | Failure:
        """The batch, or what went wrong with it."""
        failed = [row for row in rows if isinstance(row, Failure)]
        return failed[0] if failed else self.collate([row for row in rows if isinstance(row, Row)])
