"""The events on which teacher and student are compared (DESIGN §5).

For each scored own chunk: the gold, and those candidates of the topk lane that the student can spell in its place
(`shared.spelling`). The tail samples of the cache, if it has any, say what *other* is made of, within one tokenizer.

Shape suffixes: Q scored own chunks of a row, E events of a row, P tokens of all events in order, S tail samples of a row,
V ids that both vocabularies have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from shared.documents import IntArray
from shared.own_chunks import Scored
from shared.spec import TAIL_TEMPERATURE
from shared.spelling import Candidates, Speller, candidates_of

if TYPE_CHECKING:
    from shared.cache.records import Draw
    from shared.spec import CaptureSpec
    from stage2_student.data import View


@dataclass(frozen=True)
class Events:
    """The events of a row's scored chunks, but for *other*: chunk by chunk, the gold first.

    Event e belongs to chunk `chunk_E[e]` of the row and has the student's ids `ids_P[start_E[e] : start_E[e] + n]`, n
    being the chunk's number of student tokens; the teacher gives it `log_mass_E` nats at the temperature asked for.
    """

    chunk_E: IntArray
    start_E: IntArray
    ids_P: IntArray
    log_mass_E: npt.NDArray[np.float32]
    tail: TailSamples | None = None


@dataclass(frozen=True)
class TailSamples:
    """Samples of the teacher's tail: the student's id, its chunk of the row, log p at the temperature asked for, and the
    log of its share of the tail at that temperature (over each chunk's samples the shares sum to 1).
    """

    chunk_S: IntArray
    id_S: IntArray
    logp_S: npt.NDArray[np.float32]
    log_share_S: npt.NDArray[np.float32]


def chunk_events(
    view: View,
    draw: Draw,
    context: str,
    scored: Scored,
    teacher_logp_Q: npt.NDArray[np.float32],
    temperature: float,
    temperature_column: int,
    speller: Speller,
    spec: CaptureSpec,
) -> Events:
    """The events of each scored own chunk of a draw, with the teacher's log masses at `temperature` (DESIGN §5).

    `temperature_column` is the column of `temperature` in `log_z_MT`. An own chunk of several cache chunks has the gold
    alone: the lane holds no fillings of their union.
    """
    candidates = candidates_of(view, draw, context, scored, temperature, temperature_column, speller)
    own_Q = scored.own_Q
    gold_mass_Q = teacher_logp_Q.astype(np.float64) / temperature - candidates.log_z_Q
    chunk_E: list[int] = []
    start_E: list[int] = []
    ids_P: list[int] = []
    log_mass_E: list[float] = []
    for q, own in enumerate(own_Q.tolist()):
        gold_ids = view.ids_L[view.own_token_first_O[own] : view.own_token_stop_O[own]].tolist()
        for event_ids, log_mass in [(tuple(gold_ids), float(gold_mass_Q[q])), *candidates.spelled_Q[q]]:
            chunk_E.append(q)
            start_E.append(len(ids_P))
            ids_P.extend(event_ids)
            log_mass_E.append(log_mass)
    return Events(
        np.array(chunk_E, np.int64),
        np.array(start_E, np.int64),
        np.array(ids_P, np.int64),
        np.array(log_mass_E, np.float32),
        _tail(draw, context, view, scored, candidates, speller, temperature, spec),
    )


def _tail(
    draw: Draw,
    context: str,
    view: View,
    scored: Scored,
    candidates: Candidates,
    speller: Speller,
    temperature: float,
    spec: CaptureSpec,
) -> TailSamples | None:
    """The tail samples of the chunks that have ids as events; those that are the gold, or no shared id, left out.

    They were drawn in proportion to p at TAIL_TEMPERATURE, so at T each has a share in proportion to
    exp(L / T − L / TAIL_TEMPERATURE) of what they stand for.
    """
    scores, same_V = draw.scores[context], speller.shared_ids(draw.vocabulary)
    if scores.tail_ids is None or scores.tail_logp is None or same_V is None or not candidates.by_id_Q.any():
        return None
    single_M = np.cumsum(draw.token_count_M == 1) - 1  # of a chunk of one token among these
    chosen_Q = np.flatnonzero(candidates.by_id_Q)
    own_Q, log_z_Q = scored.own_Q, candidates.log_z_Q
    row_Q = single_M[scored.masked_before[view.own_first_O[own_Q[chosen_Q]]]]
    id_QS = scores.tail_ids.reshape(-1, spec.tail_samples)[row_Q].astype(np.int64)
    logp_QS = scores.tail_logp.reshape(-1, spec.tail_samples)[row_Q].astype(np.float64)
    gold_Q = view.ids_L[view.own_token_first_O[own_Q[chosen_Q]]]
    kept_QS = (id_QS != gold_Q[:, None]) & (id_QS < len(same_V))
    kept_QS &= same_V[np.minimum(id_QS, len(same_V) - 1)]
    log_weight_QS = np.where(kept_QS, logp_QS * (1.0 / temperature - 1.0 / TAIL_TEMPERATURE), -np.inf)
    largest_Q = np.max(log_weight_QS, axis=1, initial=-1e30, keepdims=True)
    with np.errstate(divide="ignore"):
        log_total_Q = largest_Q + np.log(np.exp(log_weight_QS - largest_Q).sum(axis=1, keepdims=True))
    where_q, where_s = np.nonzero(kept_QS)
    return TailSamples(
        chunk_S=chosen_Q[where_q],
        id_S=id_QS[where_q, where_s],
        logp_S=(logp_QS / temperature - log_z_Q[chosen_Q][:, None])[where_q, where_s].astype(np.float32),
        log_share_S=(log_weight_QS[where_q, where_s] - log_total_Q[where_q, 0]).astype(np.float32),
    )
