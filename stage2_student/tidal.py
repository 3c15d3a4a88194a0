"""TIDAL: how strongly a sample is distilled, by training progress and by timestep (DESIGN §6).

A cache holds the teacher's likelihoods and nothing about when or how strongly they should count, so all of TIDAL lives
in stage 2. There are two modes. `interpolate` (the paper) mixes the student into the target with the strength λ that
`strength` returns, and weighs the loss with `timestep_weight`. `weight` (this project's) leaves the target alone and
multiplies the loss of a sample with `sample_weight`, whose mean over timesteps is the training strength, whatever axis
and timestep weight are chosen: so a change of the timestep axis is not a hidden change of the learning rate.

Shape suffix: B samples (rows of a batch, or draws when several are packed). Timesteps are in (0, 1), λ without unit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shared.errors import TidecacheError
from stage2_student.config import TIMESTEP_WEIGHTS as TIMESTEP_WEIGHTS
from stage2_student.config import bin_weights

AXES = ("both", "training", "timestep")
DECAYS = ("cosine", "linear")
MIDRANGE_WIDTH = 0.15  # standard deviation of the midrange bell, in units of t


def training_strength(
    progress: float, lambda_init: float = 0.1, lambda_max: float = 0.9, decay: str = "cosine"
) -> float:
    """Return λ_train = λ_init + (λ_max − λ_init)·g, the strength that training progress alone asks for (DESIGN §6).

    Args:
        progress: step / max(max_steps, 1); values outside 0 … 1 are cut, so that a step after the last keeps λ_max.
        lambda_init: λ at progress 0.
        lambda_max: λ at progress 1.
        decay: `cosine` (g = ½(1 − cos π·progress)) or `linear` (g = progress).

    Raises:
        TidecacheError: an unknown decay.
    """
    progress = min(max(progress, 0.0), 1.0)
    if decay == "cosine":
        growth = 0.5 * (1.0 - math.cos(math.pi * progress))
    elif decay == "linear":
        growth = progress
    else:
        raise _unknown("decay", decay, DECAYS)
    return lambda_init + (lambda_max - lambda_init) * growth


def strength(
    progress: float,
    timestep_B: Tensor,
    axis: str,
    lambda_init: float = 0.1,
    lambda_max: float = 0.9,
    decay: str = "cosine",
) -> Tensor:
    """Return λ per sample, the teacher's share of the target in `interpolate` mode (DESIGN §6).

    Args:
        progress: as in `training_strength`.
        timestep_B: timesteps.
        axis: `both`: λ_train·(1 − t); `training`: λ_train; `timestep`: λ_max·(1 − t).
        lambda_init: λ_train at progress 0.
        lambda_max: λ_train at progress 1.
        decay: `cosine` or `linear`.

    Returns:
        λ_B in the dtype and on the device of the timesteps.

    Raises:
        TidecacheError: an unknown axis or decay.
    """
    return _scale(progress, axis, lambda_init, lambda_max, decay) * _axis_factor(timestep_B, axis)


def timestep_weight(timestep_B: Tensor, kind: str) -> Tensor:
    """Return w(t): `uniform` = 1, `midrange` = exp(−(t − ½)² / (2·0.15²)) (DESIGN §6), or given by numbers.

    Numbers with commas between are w at the middles of as many bins of equal width, straight lines between, and constant
    before the first and after the last.

    Raises:
        TidecacheError: an unknown kind.
    """
    if kind == "uniform":
        return torch.ones_like(timestep_B)
    if kind == "midrange":
        return torch.exp(-((timestep_B - 0.5) ** 2) / (2.0 * MIDRANGE_WIDTH**2))
    weight_B = torch.tensor(bin_weights(kind), dtype=timestep_B.dtype, device=timestep_B.device)
    place_B = (timestep_B * len(weight_B) - 0.5).clamp(0.0, len(weight_B) - 1.0)
    left_B = place_B.long().clamp_max(len(weight_B) - 2)
    return torch.lerp(weight_B[left_B], weight_B[left_B + 1], place_B - left_B)


def sample_weight(
    progress: float,
    timestep_B: Tensor,
    axis: str,
    kind: str,
    lambda_init: float = 0.1,
    lambda_max: float = 0.9,
    decay: str = "cosine",
) -> Tensor:
    """Return the factor of each sample's loss in `weight` mode: λ·f(t) / E_t[f(t)], t uniform in (0, 1) (DESIGN §6).

    f is w(t) times what the axis asks for: (1 − t)·w(t) for `both` and `timestep`, w(t) for `training`; λ is λ_train,
    and λ_max for `timestep`. The mean over uniform timesteps is λ exactly.

    Raises:
        TidecacheError: an unknown axis, kind or decay.
    """
    factor_B = _axis_factor(timestep_B, axis) * timestep_weight(timestep_B, kind)
    return factor_B * (_scale(progress, axis, lambda_init, lambda_max, decay) / mean_factor(axis, kind))


def mean_factor(axis: str, kind: str) -> float:
    """Return E_t[f(t)] over t uniform in (0, 1), in closed form.

    `uniform` and `midrange` are symmetric about ½, so E[(1 − t)·w(t)] = ½·E[w(t)]; E[w] of the bell is a Gaussian integral.

    Raises:
        TidecacheError: an unknown axis or kind.
    """
    if axis not in AXES:
        raise _unknown("axis", axis, AXES)
    if kind not in TIMESTEP_WEIGHTS:
        return _mean_of_lines(bin_weights(kind), axis)
    mean = 1.0
    if kind == "midrange":
        mean = MIDRANGE_WIDTH * math.sqrt(2.0 * math.pi) * math.erf(0.5 / (MIDRANGE_WIDTH * math.sqrt(2.0)))
    return mean if axis == "training" else 0.5 * mean


def _mean_of_lines(weights: tuple[float, ...], axis: str) -> float:
    """E_t[f(t)] of straight lines between the middles of bins: Simpson's rule, exact for f of degree 2 piece by piece."""
    edges = [0.0, *((bin + 0.5) / len(weights) for bin in range(len(weights))), 1.0]
    values = [weights[0], *weights, weights[-1]]
    mean = 0.0
    for a, b, at_a, at_b in zip(edges, edges[1:], values, values[1:], strict=False):
        factors = (1.0, 1.0, 1.0) if axis == "training" else (1.0 - a, 1.0 - 0.5 * (a + b), 1.0 - b)
        points = (at_a * factors[0], 4.0 * 0.5 * (at_a + at_b) * factors[1], at_b * factors[2])
        mean += (b - a) / 6.0 * sum(points)
    return mean


def _axis_factor(timestep_B: Tensor, axis: str) -> Tensor:
    if axis not in AXES:
        raise _unknown("axis", axis, AXES)
    return torch.ones_like(timestep_B) if axis == "training" else 1.0 - timestep_B


def _scale(progress: float, axis: str, lambda_init: float, lambda_max: float, decay: str) -> float:
    """The part of the strength that all samples share; the axis `timestep` knows no training progress."""
    return lambda_max if axis == "timestep" else training_strength(progress, lambda_init, lambda_max, decay)


def _unknown(what: str, found: str, allowed: tuple[str, ...]) -> TidecacheError:
    return TidecacheError(f"TIDAL's {what}: expected one of {', '.join(allowed)}, found {found!r}")
