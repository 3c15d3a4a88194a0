"""Rows become one batch of tensors (DESIGN §8).

Rows of different lengths are padded to the longest; padding never reaches the model, which runs on a pack of the tokens
that it needs (`packing`), where rows that are draws of one document, one after the other, share its clean half. Only
masked positions matter to the head, so the batch lists them (N), the tokens of scored chunks among them (M), and for
events the tokens of every event (P), all as flat indices: no dense [chunks × tokens] arrays.

Shape suffixes: B rows, L tokens, N masked tokens, C scored chunks, M tokens of scored chunks, E events per chunk at
most, P tokens of all events, S tail samples, W tail samples per chunk at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shared.documents import IntArray
from shared.ragged import ranges, within
from stage2_student.data import Coverage, Row
from stage2_student.packing import Group


class Movable:
    """A frozen dataclass of tensors, and of others of its kind; whatever else it holds stays as it is."""

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """Move every tensor."""
        return self._changed(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Copy into page-locked memory, as the loader asks on a GPU."""
        return self._changed(lambda value: value.pin_memory())

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Self:
        values = dict(vars(self))
        for name, value in values.items():
            if isinstance(value, Movable):
                values[name] = value._changed(change)
            elif isinstance(value, Tensor):
                values[name] = change(value)
        return type(self)(**values)


@dataclass(frozen=True)
class TailTensors(Movable):
    """Samples of the teacher's tail, as `objectives.tail_kl_loss` takes them; −inf in `log_share_CW` where there is none."""

    position_S: Tensor  # which of the N masked tokens
    id_S: Tensor
    slot_S: Tensor  # chunk · W + sample
    teacher_CW: Tensor
    log_share_CW: Tensor


@dataclass(frozen=True)
class EventTensors(Movable):
    """Log masses in nats at the recipe's temperature; invalid entries of `teacher_CE` are 0 and not `valid_CE`."""

    position_P: Tensor  # which of the N masked tokens
    id_P: Tensor
    event_P: Tensor  # chunk · E + event
    teacher_CE: Tensor
    valid_CE: Tensor
    tail: TailTensors | None = None


@dataclass(frozen=True)
class Batch(Movable):
    """See the module. Teacher log-likelihoods in nats at temperature 1; `len` is the number of rows."""

    noisy_BL: Tensor
    clean_BL: Tensor
    length_B: Tensor
    timestep_B: Tensor
    trainable_B: Tensor
    sample_N: Tensor  # row of each masked token
    column_N: Tensor
    target_N: Tensor
    sample_C: Tensor
    bytes_C: Tensor
    teacher_logp_C: Tensor
    position_M: Tensor  # which of the N masked tokens
    chunk_M: Tensor
    events: EventTensors | None
    groups: tuple[Group, ...]  # of rows that share their clean half
    documents: tuple[str, ...]  # names, for messages
    fresh: int  # rows with masks drawn in stage 2
    coverage: Coverage

    def __len__(self) -> int:
        return len(self.length_B)


@dataclass(frozen=True)
class Collator:
    """Makes batches; `mask_id` stands for masked tokens, `pad_id` fills rows up to the longest."""

    mask_id: int
    pad_id: int

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """Collate. Rows without tokens (irreproducible documents) are left out; if all are, a padded one stands in."""
        kept = [row for row in rows if len(row.ids_L)]
        length = max((len(row.ids_L) for row in kept), default=1)
        clean_BL = np.full((max(len(kept), 1), length), self.pad_id, np.int64)
        noisy_BL = clean_BL.copy()
        for clean_L, noisy_L, row in zip(clean_BL, noisy_BL, kept, strict=False):
            clean_L[: len(row.ids_L)] = row.ids_L
            noisy_L[: len(row.ids_L)] = np.where(row.masked_L, self.mask_id, row.ids_L)
        masked_BL = np.zeros(clean_BL.shape, np.bool_)
        for masked_L, row in zip(masked_BL, kept, strict=False):
            masked_L[: len(row.ids_L)] = row.masked_L
        sample_N, column_N = np.nonzero(masked_BL)
        number_BL = np.cumsum(masked_BL).reshape(masked_BL.shape) - 1  # of a masked token among the N

        first_C = _joined([number_BL[b][row.token_first_Q] for b, row in enumerate(kept)])
        count_C = _joined([row.token_stop_Q - row.token_first_Q for row in kept])
        position_M = ranges(first_C, count_C)
        return Batch(
            noisy_BL=torch.from_numpy(noisy_BL),
            clean_BL=torch.from_numpy(clean_BL),
            length_B=torch.tensor([len(row.ids_L) for row in kept] or [1]),
            timestep_B=torch.tensor([row.timestep for row in kept] or [1.0], dtype=torch.float32),
            trainable_B=torch.tensor([row.trainable for row in kept] or [0]),
            sample_N=torch.from_numpy(sample_N),
            column_N=torch.from_numpy(column_N),
            target_N=torch.from_numpy(clean_BL[sample_N, column_N]),
            sample_C=torch.from_numpy(np.repeat(np.arange(len(kept)), [len(row.token_first_Q) for row in kept])),
            bytes_C=torch.from_numpy(_joined([row.bytes_Q for row in kept])),
            teacher_logp_C=torch.from_numpy(_joined([row.teacher_logp_Q for row in kept]).astype(np.float32)),
            position_M=torch.from_numpy(position_M),
            chunk_M=torch.from_numpy(np.repeat(np.arange(len(first_C)), count_C)),
            events=_event_tensors(kept, first_C, count_C),
            groups=tuple(_groups(kept)) or (Group(0, np.zeros((1, 1), np.bool_)),),
            documents=tuple(row.name for row in rows),
            fresh=sum(row.fresh for row in rows),
            coverage=sum((row.coverage for row in rows), Coverage()),
        )


def _groups(rows: Sequence[Row]) -> Iterator[Group]:
    """Rows with the same tokens in the same blocks, one after the other."""
    first = 0
    for stop in range(1, len(rows) + 1):
        one = rows[first]
        if stop < len(rows) and rows[stop].offset == one.offset and np.array_equal(rows[stop].ids_L, one.ids_L):
            continue
        yield Group(one.offset, np.stack([row.masked_L for row in rows[first:stop]]))
        first = stop


def _joined(arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)


def _event_tensors(rows: Sequence[Row], first_C: IntArray, count_C: IntArray) -> EventTensors | None:
    """Events of all rows side by side; None where no row carries any."""
    if not any(row.events is not None for row in rows):
        return None
    chunk, mass, ids, offset = [], [], [], 0
    for row in rows:
        if row.events is not None:
            chunk.append(row.events.chunk_E + offset)
            mass.append(row.events.log_mass_E)
            ids.append(row.events.ids_P)
        offset += len(row.token_first_Q)
    chunk_X, mass_X = np.concatenate(chunk), np.concatenate(mass)  # X: all events of the batch, chunk by chunk
    events_C = np.bincount(chunk_X, minlength=len(first_C))
    number_X = within(events_C)
    width = int(events_C.max(initial=1))
    teacher_CE = np.zeros((len(first_C), width), np.float32)
    valid_CE = np.zeros((len(first_C), width), np.bool_)
    teacher_CE[chunk_X, number_X] = mass_X
    valid_CE[chunk_X, number_X] = True
    count_X = count_C[chunk_X]
    return EventTensors(
        position_P=torch.from_numpy(ranges(first_C[chunk_X], count_X)),
        id_P=torch.from_numpy(np.concatenate(ids)),
        event_P=torch.from_numpy(np.repeat(chunk_X * width + number_X, count_X)),
        teacher_CE=torch.from_numpy(teacher_CE),
        valid_CE=torch.from_numpy(valid_CE),
        tail=_tail_tensors(rows, first_C),
    )


def _tail_tensors(rows: Sequence[Row], first_C: IntArray) -> TailTensors | None:
    """Tail samples of all rows; None where no row has any. Their chunks have one token each."""
    offset_R = np.cumsum([0, *(len(row.token_first_Q) for row in rows)])
    found = [
        (row.events.tail, offset)
        for row, offset in zip(rows, offset_R.tolist(), strict=False)
        if row.events is not None and row.events.tail is not None
    ]
    if not found:
        return None
    chunk_S = np.concatenate([tail.chunk_S + offset for tail, offset in found])
    samples_C = np.bincount(chunk_S, minlength=len(first_C))
    number_S = within(samples_C)
    width = max(1, int(samples_C.max(initial=0)))
    teacher_CW = np.zeros((len(first_C), width), np.float32)
    log_share_CW = np.full((len(first_C), width), -np.inf, np.float32)
    teacher_CW[chunk_S, number_S] = np.concatenate([tail.logp_S for tail, _ in found])
    log_share_CW[chunk_S, number_S] = np.concatenate([tail.log_share_S for tail, _ in found])
    return TailTensors(
        position_S=torch.from_numpy(first_C[chunk_S]),
        id_S=torch.from_numpy(np.concatenate([tail.id_S for tail, _ in found])),
        slot_S=torch.from_numpy(chunk_S * width + number_S),
        teacher_CW=torch.from_numpy(teacher_CW),
        log_share_CW=torch.from_numpy(log_share_CW),
    )
