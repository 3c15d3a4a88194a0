"""TIDAL's schedules, weights and errors; that the timestep axis does not change the overall scale."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import TidecacheError
from stage2_student import tidal

SCHEDULE = (0.1, 0.9, "cosine")
# Midpoints: the rule is exact enough that a wrong closed form shows, and never touches 0 or 1.
UNIFORM_B = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000


@pytest.mark.parametrize("decay", tidal.DECAYS)
def test_training_strength_runs_from_init_to_max(decay: str) -> None:
    steps = [tidal.training_strength(i / 50, 0.1, 0.9, decay) for i in range(51)]
    assert steps[0] == pytest.approx(0.1)
    assert steps[-1] == pytest.approx(0.9)
    assert steps == sorted(steps)
    assert steps[25] == pytest.approx(0.5)
    quarter = {"linear": 0.3, "cosine": 0.1 + 0.8 * 0.5 * (1 - math.sqrt(0.5))}[decay]
    assert tidal.training_strength(0.25, 0.1, 0.9, decay) == pytest.approx(quarter)


def test_progress_outside_its_range_is_cut() -> None:
    assert tidal.training_strength(1.2) == pytest.approx(0.9)
    assert tidal.training_strength(-0.2) == pytest.approx(0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strength_of_each_axis(dtype: torch.dtype) -> None:
    timestep_B = torch.tensor([0.2, 0.75], dtype=dtype)
    train = tidal.training_strength(0.3)
    for axis, expected in (
        ("both", [train * 0.8, train * 0.25]),
        ("training", [train, train]),
        ("timestep", [0.9 * 0.8, 0.9 * 0.25]),
    ):
        found = tidal.strength(0.3, timestep_B, axis, *SCHEDULE)
        assert found.dtype == dtype
        torch.testing.assert_close(found, torch.tensor(expected, dtype=dtype))


def test_midrange_bell() -> None:
    found = tidal.timestep_weight(torch.tensor([0.5, 0.5 + 0.15, 0.5 - 0.3], dtype=torch.float64), "midrange")
    torch.testing.assert_close(found, torch.tensor([1.0, math.exp(-0.5), math.exp(-2.0)], dtype=torch.float64))


@pytest.mark.parametrize("axis", tidal.AXES)
@pytest.mark.parametrize("kind", [*tidal.TIMESTEP_WEIGHTS, "1,0.8,0.25,0", "0,1"])
def test_mean_sample_weight_does_not_depend_on_the_axis(axis: str, kind: str) -> None:
    weight_B = tidal.sample_weight(0.4, UNIFORM_B, axis, kind, *SCHEDULE)
    expected = 0.9 if axis == "timestep" else tidal.training_strength(0.4)
    assert float(weight_B.mean()) == pytest.approx(expected, rel=1e-7)


@given(st.floats(0, 1), st.sampled_from(tidal.AXES), st.sampled_from([*tidal.TIMESTEP_WEIGHTS, "1,0.8,0.25,0"]))
def test_sample_weight_follows_its_factor(progress: float, axis: str, kind: str) -> None:
    """Between timesteps the weights stand in the ratio of (1 − t)·w(t), or of w(t) on the training axis."""
    timestep_B = torch.tensor([0.1, 0.45, 0.8], dtype=torch.float64)
    factor_B = tidal.timestep_weight(timestep_B, kind) * (1.0 if axis == "training" else 1.0 - timestep_B)
    weight_B = tidal.sample_weight(progress, timestep_B, axis, kind, *SCHEDULE)
    torch.testing.assert_close(weight_B / weight_B[0], factor_B / factor_B[0])


def test_weights_by_bin_are_joined_by_straight_lines() -> None:
    timestep_B = torch.tensor([0.0, 0.125, 0.25, 0.375, 0.5, 0.9, 1.0], dtype=torch.float64)
    found = tidal.timestep_weight(timestep_B, "1,0.5,0.2,0")
    torch.testing.assert_close(found, torch.tensor([1.0, 1.0, 0.75, 0.5, 0.35, 0.0, 0.0], dtype=torch.float64))


@given(st.lists(st.floats(0, 10), min_size=2, max_size=12).filter(any), st.sampled_from(tidal.AXES))
def test_mean_of_weights_by_bin_is_exact(weights: list[float], axis: str) -> None:
    """Against the midpoint rule, whose error for pieces of degree 2 is far below the tolerance."""
    kind = ",".join(map(repr, weights))
    factor_B = tidal.timestep_weight(UNIFORM_B, kind) * (1.0 if axis == "training" else 1.0 - UNIFORM_B)
    assert tidal.mean_factor(axis, kind) == pytest.approx(float(factor_B.mean()), rel=1e-5)


def test_unknown_names_are_refused() -> None:
    timestep_B = torch.tensor([0.5])
    for call in (
        lambda: tidal.strength(0.5, timestep_B, "sideways"),
        lambda: tidal.strength(0.5, timestep_B, "both", decay="square"),
        lambda: tidal.timestep_weight(timestep_B, "late"),
        lambda: tidal.mean_factor("sideways", "uniform"),
        lambda: tidal.mean_factor("both", "late"),
    ):
        with pytest.raises(TidecacheError, match=r"expected one of .*, found '(sideways|square|late)'"):
            call()


@pytest.mark.parametrize("kind", ["0.5", "0,0", "1,-1", "1,nan", "1,inf"])
def test_numbers_that_are_no_weights_are_refused(kind: str) -> None:
    with pytest.raises(TidecacheError, match="timestep_weight: expected at least two numbers from 0 on"):
        tidal.timestep_weight(torch.tensor([0.5]), kind)
