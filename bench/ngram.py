"""A bidirectional n-gram model of masked tokens: the control that a neural teacher must beat.

A masked token is predicted from its visible neighbours through a chain of ever longer contexts, each smoothed with the
shorter one by a Dirichlet prior: P_c(w) = (count(w, c) + κ P_shorter(w)) / (count(c) + κ). The chain is unigram, one
token to the right, one to the left, two to the right, two to the left, both neighbours, two left and one right, one left
and two right; a context with a masked token in it is passed over. Each κ is chosen on text that is not scored.

Shapes: L tokens of a stream, N masked positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.ragged import ranges

Ints = npt.NDArray[np.int64]
# Offsets of the neighbours in each context, in the order of the chain.
CHAIN = ((), (1,), (-1,), (1, 2), (-2, -1), (-1, 1), (-2, -1, 1), (-1, 1, 2))
STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


@dataclass(frozen=True)
class Counts:
    """Sorted keys of contexts and of (context, token) pairs with their counts."""

    contexts: Ints
    context_counts: Ints
    pairs: Ints
    pair_counts: Ints


def _keys(stream: Ints, offsets: tuple[int, ...], positions: Ints, vocabulary: int) -> Ints:
    key = np.zeros(len(positions), np.int64)
    for offset in offsets:
        key = key * vocabulary + stream[positions + offset]
    return key


def _lookup(keys: Ints, counts: Ints, wanted: Ints) -> Ints:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, counts[at], 0)


class BidirectionalNgram:
    """Counts over training streams; `fit` chooses each level's strength; `gold_logp` scores masked tokens in nats."""

    def __init__(self, streams: list[Ints], vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.strengths = [3.0] * len(CHAIN)
        self.counts: list[Counts] = []
        for offsets in CHAIN:
            contexts, tokens = [], []
            for stream in streams:
                positions = np.arange(2, len(stream) - 2)
                contexts.append(_keys(stream, offsets, positions, vocabulary))
                tokens.append(stream[positions])
            context, token = np.concatenate(contexts), np.concatenate(tokens)
            self.counts.append(
                Counts(
                    *np.unique(context, return_counts=True),
                    *np.unique(context * vocabulary + token, return_counts=True),
                )
            )

    def gold_logp(self, ids: Ints, masked: npt.NDArray[np.bool_], levels: int = len(CHAIN)) -> npt.NDArray[np.float64]:
        """log p of the gold token at each masked position, from the visible ones. ids, masked: one sequence of L."""
        padded = np.concatenate([[0, 0], ids, [0, 0]])
        hidden = np.concatenate([[True, True], masked, [True, True]])  # beyond the ends nothing is visible
        positions = np.flatnonzero(masked) + 2
        gold = padded[positions]
        p = np.full(len(positions), 1.0 / self.vocabulary)
        for offsets, counts, strength in list(zip(CHAIN, self.counts, self.strengths, strict=True))[:levels]:
            visible = np.ones(len(positions), bool)
            for offset in offsets:
                visible &= ~hidden[positions + offset]
            context = _keys(padded, offsets, positions, self.vocabulary)
            total = _lookup(counts.contexts, counts.context_counts, context)
            hits = _lookup(counts.pairs, counts.pair_counts, context * self.vocabulary + gold)
            p = np.where(visible & (total > 0), (hits + strength * p) / (total + strength), p)
        return np.log(p)

    def distribution(
        self, ids: Ints, masked: npt.NDArray[np.bool_], positions: Ints, levels: int | None = None
    ) -> npt.NDArray[np.float64]:
        """p_NV of every token at these positions of one sequence, from the visible ones; see `gold_logp`."""
        padded = np.concatenate([[0, 0], ids, [0, 0]])
        hidden = np.concatenate([[True, True], masked, [True, True]])
        positions = positions + 2
        p_NV = np.full((len(positions), self.vocabulary), 1.0 / self.vocabulary)
        for offsets, counts, strength in list(zip(CHAIN, self.counts, self.strengths, strict=True))[:levels]:
            visible_N = np.ones(len(positions), bool)
            for offset in offsets:
                visible_N &= ~hidden[positions + offset]
            context_N = _keys(padded, offsets, positions, self.vocabulary)
            total_N = _lookup(counts.contexts, counts.context_counts, context_N)
            row_N = np.flatnonzero(visible_N & (total_N > 0))
            first_N = np.searchsorted(counts.pairs, context_N[row_N] * self.vocabulary)
            stop_N = np.searchsorted(counts.pairs, (context_N[row_N] + 1) * self.vocabulary)
            p_NV[row_N] *= strength
            pair = ranges(first_N, stop_N - first_N)
            token = counts.pairs[pair] % self.vocabulary
            p_NV[np.repeat(row_N, stop_N - first_N), token] += counts.pair_counts[pair]
            p_NV[row_N] /= (total_N[row_N] + strength)[:, None]
        return p_NV

    def fit(self, sequences: list[tuple[Ints, npt.NDArray[np.bool_]]]) -> None:
        """Choose the strengths one level after the other, each to the highest likelihood of these sequences."""
        for level in range(len(CHAIN)):
            scores = []
            for strength in STRENGTHS:
                self.strengths[level] = strength
                scores.append(sum(self.gold_logp(ids, masked, level + 1).sum() for ids, masked in sequences))
            self.strengths[level] = STRENGTHS[int(np.argmax(scores))]
