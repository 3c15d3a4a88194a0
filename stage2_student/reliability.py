"""How much a cache's teacher is worth at each timestep, from what the cache itself says (beyond the paper).

The curves of DESIGN §6 are the same for every teacher. The footers of a cache hold the teacher's likelihood of the gold
and its calibration by timestep, so that the weight can be measured instead: near 1 where the teacher knows much of what
is masked and its probabilities can be trusted, 0 where it knows no more than under the heaviest noise.

Shapes: B timestep bins of equal width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shared.cache.inspect import inspect_cache
from shared.cache.reader import Cache
from shared.cache.statistics import TIMESTEP_BINS, ContextStatistics
from shared.errors import TidecacheError

LEAST = 0.05  # of weights before they are scaled: below, all that differs is chance

Array = npt.NDArray[np.float64]


def reliability(statistics: ContextStatistics) -> Array:
    """weight_B = (1 − nll(t) / nll(noisiest)) · (1 − ECE(t)), at least 0 and scaled so that the largest is 1.

    nll: nats per scored teacher token; *noisiest*: the last bin that holds draws. ECE: expected calibration error of the
    best filling, 0 where the cache has no topk lane. Bins without draws take what lies between their neighbours'.

    Raises:
        TidecacheError: no bin is better than the noisiest one, by a twentieth at least.
    """
    there_B = statistics.tokens_B > 0
    if there_B.any():
        at = np.flatnonzero(there_B)
        nll = -statistics.gold_logp_B[at] / statistics.tokens_B[at]
        trust = 1.0 - np.nan_to_num(statistics.calibration_error_B[at])
        weight = np.maximum(0.0, 1.0 - nll / max(float(nll[-1]), 1e-12)) * trust
        if weight.max() > LEAST:
            return np.interp(np.arange(TIMESTEP_BINS), at, weight / weight.max())
    raise TidecacheError(
        "timestep_weight: measured takes the weights from how much better the teacher is at lighter noise, but by this cache's "
        "figures it is no better at any timestep than at the noisiest: pass --timestep-weight uniform or midrange"
    )


def measured_weights(caches: Sequence[Cache], shares: Sequence[float], context: str) -> str:
    """The weights by bin, as `TrainConfig.timestep_weight` takes them: the mean over the caches by their shares of the rows.

    Raises:
        TidecacheError: a footer is damaged, or as `reliability` says.
    """
    weight_B = np.zeros(TIMESTEP_BINS)
    for cache, share in zip(caches, shares, strict=True):
        weight_B += share * reliability(inspect_cache(str(cache.path), sample=0).statistics[context])
    return ",".join(f"{weight:.4g}" for weight in weight_B / weight_B.max())
