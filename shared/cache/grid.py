"""Log-likelihoods as whole numbers: the grid of the packed codec, whose values are exact in float32 (docs/cache-format.md).

One unit is 2^-15 nats. A chunk's best filling has log-likelihood −first units, the i-th one −(first + level_i · step ·
scale) units, log Z_T is a whole number of units. Levels are the gaps to the best filling, rounded to nearest, and
`scale` is the largest of 1, 2, 3, 4 for which that costs at most `WITHIN` nats of KL at each temperature. `first` and log Z are
then chosen so that the mass of all fillings is what it was: rounded to the largest power of two for which that costs at
most `BETWEEN` nats of KL between fillings and *other*, and where none does, up to a whole unit, so that the fillings' mass
grows by no more than *other* has.

Why this holds: let the fillings' levels be off by δ_i, p_i their shares of their own mass. Then their part of the KL is
log Σ p e^δ − Σ p δ, which is at most step² / 8 by Hoeffding's lemma (δ lies within a step), 6.9e-5 at scale = 1; for
larger ones it is measured. Mass that falls from P to P·e^−x costs at most P·x, so at most one unit if x is at most one.

Values that lie on a grid already (what a packed cache gives back, and its first fillings) stay what they are.

Shapes: M chunks, K fillings, T temperatures, H temperatures other than 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.errors import TidecacheError

UNIT = 2.0**-15  # nats
STEP = 768  # units: 0.0234 nats
SCALES = (1, 2, 3, 4)
SHIFTS = (0, 3, 6, 8)  # `first` and log Z are multiples of 2^shift units, the largest that the mass allows
MAX_FIRST = 1 << 23  # units: the best filling, and how far others may lie below it
MAX_VALUE = 1 << 24  # units: what float32 holds exactly
WITHIN = 6.7e-5  # nats; measured to second order, which is right to 3 %
BETWEEN = UNIT
SLACK = 1e-4  # a sum of probabilities above 1 by no more than this is 1: float32 was added up

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Levels:
    """A draw's log-likelihoods on the grid. `level_MK`: ascending from 0."""

    step: int
    scale_M: IntArray
    first_M: IntArray
    level_MK: IntArray
    log_z_MH: IntArray

    @property
    def logp_MK(self) -> npt.NDArray[np.float32]:
        """Log-likelihoods of the fillings, nats."""
        units_MK = self.first_M[:, None] + self.level_MK * (self.step * self.scale_M)[:, None]
        return (units_MK * -UNIT).astype(np.float32) + np.float32(0.0)  # no negative zero

    @property
    def log_z(self) -> npt.NDArray[np.float32]:
        """log Z (M, H), nats."""
        return (self.log_z_MH * UNIT).astype(np.float32)


def step_of(temperatures: Sequence[float]) -> int:
    """Units of a level at scale = 1; smaller where a temperature below 1 makes errors larger."""
    return max(1, int(STEP * min(1.0, *temperatures)))


def quantise(logp_MK: npt.NDArray[np.floating], log_z_MH: npt.NDArray[np.floating], hot_H: Sequence[float]) -> Levels:
    """The grid's values for finite log-likelihoods, descending in each row, and log Z at the temperatures `hot_H`.

    Raises:
        ValueError: not in descending order.
        TidecacheError: a log Z that lies beyond the grid.
    """
    exact_MK: Array = logp_MK.astype(np.float64)
    exact_MH: Array = log_z_MH.astype(np.float64)
    if (exact_MK[:, 1:] > exact_MK[:, :-1]).any():
        raise ValueError("expected the fillings best first")
    step = step_of((1.0, *hot_H))
    chunks, k = exact_MK.shape
    levels = Levels(
        step,
        *(np.empty(shape, np.int64) for shape in ((chunks,), (chunks,), (chunks, k), exact_MH.shape)),
    )
    whole = np.flatnonzero(_is_whole(exact_MK[:, : min(k, 2)] / -UNIT).all(1))  # others need no closer look
    known = whole[_on_grid(exact_MK[whole], exact_MH[whole], levels, whole)]
    new_M = np.ones(chunks, dtype=np.bool_)
    new_M[known] = False
    new = np.flatnonzero(new_M)
    if len(new):
        nearest = _nearest(exact_MK[new], exact_MH[new], np.array((1.0, *hot_H)), step)
        for name in ("scale_M", "first_M", "level_MK", "log_z_MH"):
            getattr(levels, name)[new] = getattr(nearest, name)
    return levels


def _is_whole(values: Array) -> npt.NDArray[np.bool_]:
    return np.asarray(np.rint(values) == values)


def _on_grid(logp_MK: Array, log_z_MH: Array, levels: Levels, at: IntArray) -> npt.NDArray[np.bool_]:
    """Which of these chunks' values all lie on a grid; the levels of those at their places `at`."""
    units_MK, units_MH = logp_MK / -UNIT, log_z_MH / UNIT
    gap_MK = units_MK - units_MK[:, :1]
    level_MK = np.rint(gap_MK * (1.0 / levels.step))
    on_grid_M = (
        _is_whole(units_MK[:, 0])
        & (units_MK[:, 0] >= 0)
        & (units_MK[:, 0] < MAX_FIRST)
        & (gap_MK[:, -1] <= MAX_FIRST)
        & (level_MK * levels.step == gap_MK).all(1)
        & (_is_whole(units_MH) & (np.abs(units_MH) < MAX_VALUE)).all(1)
    )
    found, at = np.flatnonzero(on_grid_M), at[on_grid_M]
    whole_MK = level_MK[found].astype(np.int64)
    bits_M = np.bitwise_or.reduce(whole_MK, axis=1)
    thirds_M = (whole_MK.astype(np.int32) % 3 == 0).all(1)
    scale_M = np.select([bits_M & 3 == 0, thirds_M, bits_M & 1 == 0], [4, 3, 2], 1)
    levels.scale_M[at] = scale_M
    levels.first_M[at] = units_MK[found, 0].astype(np.int64)
    levels.level_MK[at] = np.rint(whole_MK * (1.0 / scale_M)[:, None]).astype(np.int64)
    levels.log_z_MH[at] = units_MH[found].astype(np.int64)
    return np.asarray(on_grid_M)


def _nearest(logp_MK: Array, log_z_MH: Array, temperature_T: Array, step: int) -> Levels:
    """Levels for any values; see the module."""
    logp_MK = np.minimum(logp_MK, 0.0)
    best_M = np.maximum(logp_MK[:, 0], (1 - MAX_FIRST) * UNIT)
    gap_MK = np.minimum(logp_MK[:, :1] - logp_MK, (MAX_FIRST - 4 * step) * UNIT)
    log_z_MT = np.concatenate([np.zeros((len(best_M), 1)), log_z_MH], axis=1)
    shares, log_mass = [], []
    for t, log_z_M in zip(temperature_T, log_z_MT.T, strict=True):
        weight_MK = np.exp(-gap_MK / t)
        total_M = weight_MK.sum(1)
        shares.append(weight_MK / total_M[:, None])
        log_mass_M = best_M / t + np.log(total_M) - log_z_M
        log_mass.append(np.where((log_mass_M > 0) & (log_mass_M <= SLACK), 0.0, log_mass_M))
    scale_M = np.ones(len(best_M), dtype=np.int64)
    coarse_MK, shares = gap_MK.astype(np.float32), [share_MK.astype(np.float32) for share_MK in shares]
    for scale in SCALES[1:]:
        width = np.float32(step * scale * UNIT)
        error_MK = np.rint(coarse_MK * (1 / width)) * width - coarse_MK
        fits_M = np.ones(len(best_M), dtype=np.bool_)
        for t, share_MK in zip(temperature_T, shares, strict=True):
            mean_M = np.einsum("mk,mk->m", share_MK, error_MK)
            fits_M &= np.einsum("mk,mk,mk->m", share_MK, error_MK, error_MK) - mean_M**2 <= 2 * WITHIN * t * t
        scale_M[fits_M] = scale
    level_MK = np.rint(gap_MK / (step * scale_M * UNIT)[:, None])
    gap_MK = level_MK * (step * scale_M * UNIT)[:, None]
    first_M = np.zeros(len(best_M), dtype=np.int64)
    log_z: list[IntArray] = []
    for t, log_mass_M in zip(temperature_T, log_mass, strict=True):
        log_weight_M = np.log(np.exp(-gap_MK / t).sum(1)) - log_mass_M
        if t == 1.0:
            first_M = np.clip(_rounded(log_weight_M, log_mass_M), 0, MAX_FIRST - 1)
        else:
            log_z.append(_rounded(log_weight_M - first_M * UNIT / t, log_mass_M))
    log_z_units_MH = np.stack(log_z, axis=1) if log_z else np.zeros((len(best_M), 0), dtype=np.int64)
    if (np.abs(log_z_units_MH) >= MAX_VALUE).any():
        found = float(np.abs(log_z_MH).max())
        raise TidecacheError(
            f"a log Z of {found:.0f} nats is more than the codec `packed` can store ({MAX_VALUE * UNIT:.0f}): leave out "
            f"temperatures near 0, or capture with --codec raw"
        )
    return Levels(step, scale_M, first_M, level_MK.astype(np.int64), log_z_units_MH)


def _rounded(value_M: Array, log_mass_M: Array) -> IntArray:
    """Units near `value_M` nats; a fillings' mass of exp(`log_mass_M`) falls by what they are more."""
    units_M = value_M / UNIT
    result_M = np.ceil(units_M)
    mass_M = np.exp(np.minimum(log_mass_M, 0.0))
    other_M = -np.expm1(np.minimum(log_mass_M, 0.0))
    for shift in SHIFTS[1:]:
        near_M = np.rint(units_M / (1 << shift)) * (1 << shift)
        lost_M = (near_M - units_M) * UNIT
        other_after_M = other_M - mass_M * np.expm1(-lost_M)
        with np.errstate(divide="ignore", invalid="ignore"):
            gained_M = np.where(other_M > 0, other_M * np.log(other_M / other_after_M), 0.0)
        fits_M = (gained_M + mass_M * lost_M <= BETWEEN) & (other_after_M >= 0)
        result_M = np.where(fits_M, near_M, result_M)
    return np.clip(result_M, -2 * MAX_VALUE, 2 * MAX_VALUE).astype(np.int64)
