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

AXES = ("both", "training", "timestep")
DECAYS = ("cosine", "linear")
TIMESTEP_WEIGHTS = ("uniform", "midrange")
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
    """Return w(t): `uniform` = 1, `midrange` = exp(−(t − ½)² / (2·0.15²)) (DESIGN §6).

    Raises:
        TidecacheError: an unknown kind.
    """
    if kind == "uniform":
        return torch.ones_like(timestep_B)
    if kind == "midrange":
        return torch.exp(-((timestep_B - 0.5) ** 2) / (2.0 * MIDRANGE_WIDTH**2))
    raise _unknown("timestep weight", kind, TIMESTEP_WEIGHTS)


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

    w is symmetric about ½ for every kind, so E[(1 − t)·w(t)] = ½·E[w(t)]; E[w] of the bell is a Gaussian integral.

    Raises:
        TidecacheError: an unknown axis or kind.
    """
    if kind == "uniform":
        mean = 1.0
    elif kind == "midrange":
        mean = MIDRANGE_WIDTH * math.sqrt(2.0 * math.pi) * math.erf(0.5 / (MIDRANGE_WIDTH * math.sqrt(2.0)))
    else:
        raise _unknown("timestep weight", kind, TIMESTEP_WEIGHTS)
    if axis not in AXES:
        raise _unknown("axis", axis, AXES)
    return mean if axis == "training" else 0.5 * mean


def _axis_factor(timestep_B: Tensor, axis: str) -> Tensor:
    if axis not in AXES:
        raise _unknown("axis", axis, AXES)
    return torch.ones_like(timestep_B) if axis == "training" else 1.0 - timestep_B


def _scale(progress: float, axis: str, lambda_init: float, lambda_max: float, decay: str) -> float:
    """The part of the strength that all samples share; the axis `timestep` knows no training progress."""
    return lambda_max if axis == "timestep" else training_strength(progress, lambda_init, lambda_max, decay)


def _unknown(what: str, found: str, allowed: tuple[str, ...]) -> TidecacheError:
    return TidecacheError(f"TIDAL's {what}: expected one of {', '.join(allowed)}, found {found!r}")
