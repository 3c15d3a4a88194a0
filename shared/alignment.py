"""Chunks: the byte ranges between boundaries that all tokenizers share (DESIGN §4).

Each tokenizer cuts a content into tokens at its own byte offsets. Where all of them cut, likelihoods can be compared:
between two consecutive common boundaries every tokenizer spells the same bytes with whole tokens. For two tokenizers
these are the minimal chunks, the ones that a greedy two-pointer alignment finds, here for any number of them and in
array operations only, at some tens of megabytes of text per second.

Shapes: C chunks of one document.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shared.documents import Chunks, Encoded, IntArray


def common_chunks(*boundaries: Sequence[int] | npt.NDArray[np.integer]) -> IntArray:
    """The ascending offsets that occur in every one of `boundaries`; the chunks lie between consecutive ones.

    Args:
        boundaries: per tokenizer, ascending boundary offsets in bytes of one content span, the span's start included
            where it is a boundary. Lists or integer arrays; at least one.

    Raises:
        ValueError: no boundaries are given.
    """
    if not boundaries:
        raise ValueError("common_chunks needs the boundaries of at least one tokenizer")
    common, *others = sorted((np.asarray(b, dtype=np.int64) for b in boundaries), key=len)
    for other in others:
        if not len(common):
            return common
        place = np.searchsorted(other, common)
        common = common[other[np.minimum(place, len(other) - 1)] == common]
    return common


def chunks_of(encodings: Sequence[Encoded], messages: Sequence[int]) -> Chunks:
    """The chunks of the contents of `messages` (their numbers, ascending) that all `encodings` of a document share.

    Bytes before the first and after the last common boundary of a content are in no chunk: a token that straddles the
    start of a content costs that chunk and no other.
    """
    parts = []
    for message in messages:
        common = common_chunks(*(encoding.boundaries(message) for encoding in encodings))
        parts.append((np.full(max(len(common) - 1, 0), message, dtype=np.int64), common[:-1], common[1:]))
    if not parts:
        parts.append((np.empty(0, dtype=np.int64),) * 3)
    message_C, start_C, stop_C = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Chunks(message_C=message_C, start_C=start_C, stop_C=stop_C)
