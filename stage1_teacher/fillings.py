"""The k most likely fillings of a chunk, from the top-k lists of its tokens (DESIGN §5, topk lane).

Given the context, a diffusion model's masked tokens are independent: a filling's log-likelihood is the sum of its
tokens'. So the k best fillings of n tokens are the k best sums over n lists, and they are found exactly by merging one
list after the other: the k best of n tokens extend the k best of n − 1. When two descending lists are merged, a pair
(i, j) has (i + 1)(j + 1) pairs at least as good, itself among them, so only pairs with (i + 1)(j + 1) ≤ k are looked at.

Order: by log-likelihood, descending; where equal, by ids, the smaller first.

Shapes: M chunks, n tokens of a chunk, N tokens of all chunks in order, K candidates, P pairs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IdArray = npt.NDArray[np.int64]
IntArray = npt.NDArray[np.int64]


def best_fillings(
    topk_ids_NK: IdArray, topk_logp_NK: npt.NDArray[np.floating], count_M: IntArray
) -> tuple[npt.NDArray[np.int32], FloatArray]:
    """The K best fillings of M chunks, chunk m having the next count_M[m] ≥ 1 rows of the two tables.

    Rows are descending in log-probability, equal ones ascending in id.

    Returns:
        ids: flat int32; for each chunk K fillings of n ids, filling after filling, best first (K·N ids in all).
        logp_MK: float64, nats, descending.
    """
    k = topk_ids_NK.shape[1] if topk_ids_NK.ndim == 2 else 0
    start_M = np.cumsum(count_M) - count_M
    logp_MK = np.empty((len(count_M), k))
    flat = np.empty(int(count_M.sum()) * k, dtype=np.int32)
    for n in np.unique(count_M).tolist():
        chosen = np.flatnonzero(count_M == n)
        row_Mn = start_M[chosen][:, None] + np.arange(n)
        ids_MKn, logp_MK[chosen] = _merge_all(topk_ids_NK[row_Mn], topk_logp_NK[row_Mn].astype(np.float64))
        place = start_M[chosen][:, None] * k + np.arange(n * k)
        flat[place] = ids_MKn.reshape(len(chosen), n * k)
    return flat, logp_MK


def _merge_all(ids_MnK: IdArray, logp_MnK: FloatArray) -> tuple[IdArray, FloatArray]:
    """(ids_MKn, logp_MK) for M chunks of the same n tokens."""
    _, tokens, k = ids_MnK.shape
    first_P, second_P = np.nonzero(np.outer(np.arange(1, k + 1), np.arange(1, k + 1)) <= k)
    best_MK, filling_MKn = logp_MnK[:, 0], ids_MnK[:, 0, :, None]
    rank_MK = _rank(ids_MnK[:, 0])  # a filling's place among the K in the order of its ids, to break ties
    for token in range(1, tokens):
        sum_MP = best_MK[:, first_P] + logp_MnK[:, token, second_P]
        tie_MP = rank_MK[:, first_P] * (1 << 32) + ids_MnK[:, token, second_P]
        order_MK = np.lexsort((tie_MP, -sum_MP), axis=1)[:, :k]
        best_MK = np.take_along_axis(sum_MP, order_MK, 1)
        rank_MK = _rank(np.take_along_axis(tie_MP, order_MK, 1))
        prefix_MKn = np.take_along_axis(filling_MKn, first_P[order_MK][:, :, None], 1)
        last_MK = np.take_along_axis(ids_MnK[:, token], second_P[order_MK], 1)
        filling_MKn = np.concatenate([prefix_MKn, last_MK[:, :, None]], axis=2)
    return filling_MKn, best_MK


def _rank(key_MK: IdArray) -> IntArray:
    """The rank of each entry within its row."""
    return np.argsort(np.argsort(key_MK, axis=1), axis=1)
