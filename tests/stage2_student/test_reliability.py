"""Weights by timestep from a cache's own figures: their formula, gaps, and a run that takes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from shared.cache.inspect import inspect_cache
from shared.cache.reader import Cache
from shared.cache.statistics import ContextStatistics
from shared.errors import TidecacheError
from stage2_student import commands
from stage2_student.reliability import measured_weights, reliability
from tests.stage2_student import synthetic


def statistics(nll_B: list[float | None], error_B: list[float] | None = None) -> ContextStatistics:
    """Ten bins of 100 tokens (None: no draws) with these nats per token and, if given, calibration errors."""
    found = ContextStatistics.zero(1)
    for b, nll in enumerate(nll_B):
        if nll is None:
            continue
        found.tokens_B[b] = found.chunks_B[b] = 100
        found.gold_logp_B[b] = -100 * nll
        if error_B is not None:
            found.confident_BE[b, 5] = 100
            found.confidence_BE[b, 5] = 55
            found.hits_BE[b, 5] = 55 - 100 * error_B[b]
    return found


def test_the_weight_falls_with_the_loss_and_with_the_error() -> None:
    nll_B: list[float | None] = [0.5, 1, 1, 2, 2, 2, 3, 3, 4, 4]
    plain_B = 1 - np.array([0.5, 1, 1, 2, 2, 2, 3, 3, 4, 4]) / 4
    np.testing.assert_allclose(reliability(statistics(nll_B)), plain_B / plain_B.max())
    error_B = [0.1, 0.0, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5]
    weight_B = plain_B * (1 - np.array(error_B))
    np.testing.assert_allclose(reliability(statistics(nll_B, error_B)), weight_B / weight_B.max())


def test_bins_without_draws_lie_between_their_neighbours() -> None:
    found_B = reliability(statistics([None, 1, None, 3, None, None, None, 5, None, None]))
    expected_B = np.array([0.8, 0.8, 0.6, 0.4, 0.3, 0.2, 0.1, 0, 0, 0]) / 0.8
    np.testing.assert_allclose(found_B, expected_B, atol=1e-12)


def test_a_teacher_that_never_knows_more_is_refused() -> None:
    for hopeless in (statistics([2.0] * 10), statistics([1.99] * 5 + [2.0] * 5), ContextStatistics.zero(1)):
        with pytest.raises(TidecacheError, match=r"no better at any timestep.*--timestep-weight uniform"):
            reliability(hopeless)


def test_a_run_takes_them_from_its_cache(cache: Cache, student_folder: Path, tmp_path: Path) -> None:
    """The numbers are those of the footers; they are shown, and kept with the checkpoint."""
    found_B = reliability(inspect_cache(cache.path, sample=0).statistics["plain"])
    expected = ",".join(f"{weight:.4g}" for weight in found_B)
    arguments = [
        "train", "--cache", str(cache.path), "--base", str(student_folder), "--out", str(tmp_path / "run"),
        "--context", "plain", "--steps", "1", "--batch", "2", "--save-steps", "0", "--timestep-weight", "measured",
    ]  # fmt: skip
    result = CliRunner().invoke(commands.app, arguments)
    assert result.exit_code == 0, result.output
    kept = json.loads((tmp_path / "run" / "tidecache.json").read_text())["config"]
    assert kept["timestep_weight"] == expected
    assert "timestep weight" in result.output
    assert expected.replace(",", ", ")[:20] in result.output


def test_several_caches_count_by_their_shares(cache: Cache, tmp_path: Path) -> None:
    """Also where they hold other temperatures."""
    other = synthetic.make_cache(tmp_path / "other", synthetic.texts(6, skip=20), draws=4, temperatures=(1.0, 3.0))
    mine, its = (reliability(inspect_cache(c.path, sample=0).statistics["compdemo"]) for c in (cache, other))
    assert not np.allclose(mine, its)
    found = [float(weight) for weight in measured_weights([cache, other], [0.75, 0.25], "compdemo").split(",")]
    expected = 0.75 * mine + 0.25 * its
    np.testing.assert_allclose(found, expected / expected.max(), atol=1e-3)
