"""Score requests, checked: what every backend verifies before it asks the teacher (DESIGN §7, §11).

A position beyond the text, a gold id that the head does not have, or a missing x_0 would give numbers that look like
likelihoods and are none. So each request is turned into arrays and refused, by its number, if anything is amiss.

Shapes: L tokens of one request, N scored positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from shared.errors import TidecacheError
from stage1_teacher.backends import ScoreRequest

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Arrays:
    """A request's fields as int64 arrays; `clean_L` is empty where the request has no x_0."""

    token_L: Ids
    position_N: Ids
    gold_N: Ids
    clean_L: Ids


class Limits(Protocol):
    """What a request must fit: fields of `stage1_teacher.backends.Teacher`."""

    name: str
    layout: str
    logit_shift: bool
    vocabulary: int

    @property
    def length_limit(self) -> int | None:
        """In tokens."""


def as_ids(values: Any) -> Ids:
    """Integers from a sequence, an array or a tensor; none from None."""
    if values is None:
        return np.zeros(0, dtype=np.int64)
    if hasattr(values, "cpu"):
        values = values.cpu().numpy()
    return np.asarray(values, dtype=np.int64).reshape(-1)


def tail_samples(requests: Sequence[ScoreRequest], teacher: Limits) -> int:
    """How many tail samples each position gets: one number for all requests of a call.

    Raises:
        TidecacheError: the requests differ in it, or one has no chance for each of its positions.
    """
    wanted = requests[0].tail_samples if requests else 0
    for number, request in enumerate(requests):
        chances = 0 if request.tail_chances is None else len(request.tail_chances)
        expected = len(as_ids(request.positions)) if wanted else 0
        if request.tail_samples != wanted or chances != expected:
            raise TidecacheError(
                f"request {number} to the teacher {teacher.name}: expected {wanted} tail samples per position, as in "
                f"request 0, and {expected} chances for them; found {request.tail_samples} and {chances}"
            )
    return wanted


def checked(number: int, request: ScoreRequest, teacher: Limits, rows: int, needs_clean: bool) -> Arrays:
    """The request as arrays. `rows` is how many embeddings the teacher has.

    Raises:
        TidecacheError: the request cannot be scored; names its number, the field, and what was expected.
    """

    def refuse(what: str) -> TidecacheError:
        return TidecacheError(f"request {number} to the teacher {teacher.name}: {what}")

    a = Arrays(*map(as_ids, (request.token_ids, request.positions, request.gold_ids, request.clean_ids)))
    length = len(a.token_L)
    if not length:
        raise refuse("it has no tokens")
    if teacher.length_limit is not None and length > teacher.length_limit:
        raise refuse(f"it has {length} tokens, and the teacher positions for {teacher.length_limit}: cut the text")
    if len(a.position_N) != len(a.gold_N):
        raise refuse(f"{len(a.position_N)} positions, but {len(a.gold_N)} gold ids")
    first = int(teacher.logit_shift)
    if len(a.position_N) and not first <= a.position_N.min() <= a.position_N.max() < length:
        why = " (with the logit shift, position 0 cannot be predicted)" if teacher.logit_shift else ""
        raise refuse(
            f"positions must lie in [{first}, {length}){why}, found {a.position_N.min()} to {a.position_N.max()}"
        )
    for name, ids, limit in (
        ("token_ids", a.token_L, rows),
        ("clean_ids", a.clean_L, rows),
        ("gold_ids", a.gold_N, teacher.vocabulary),
    ):
        if len(ids) and not 0 <= ids.min() <= ids.max() < limit:
            raise refuse(f"{name} must lie in [0, {limit}), found {ids.min()} to {ids.max()}")
    if needs_clean and len(a.clean_L) != length:
        found = "none" if request.clean_ids is None else str(len(a.clean_L))
        raise refuse(f"the layout {teacher.layout} needs clean_ids, one for each of its {length} tokens, found {found}")
    return a
