"""Hidden states at every noisy token, by the project's packed pass."""

from __future__ import annotations

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from stage2_student.attention import masked_hidden
from stage2_student.packing import Group


def noisy_hidden(
    model: PreTrainedModel,
    noisy_BKL: Tensor,
    clean_BL: Tensor,
    length_B: Tensor,
    block_size: int,
    offset_B: Tensor | None = None,
) -> Tensor:
    """hidden_BKLD of K draws of each of B padded documents, all tokens taken as masked; 0 at padding."""
    rows, draws, length = noisy_BKL.shape
    offsets = [0] * rows if offset_B is None else offset_B.tolist()
    lengths = length_B.tolist()
    groups = [Group(offset, np.ones((draws, real), np.bool_)) for offset, real in zip(offsets, lengths, strict=True)]
    clean = clean_BL.repeat_interleave(draws, dim=0)
    hidden_ND = masked_hidden(model, noisy_BKL.flatten(0, 1), clean, groups, block_size)
    found = hidden_ND.new_zeros(rows, draws, length, hidden_ND.shape[1])
    at = 0
    for row, real in enumerate(lengths):
        for draw in range(draws):
            found[row, draw, :real] = hidden_ND[at : at + real]
            at += real
    return found
