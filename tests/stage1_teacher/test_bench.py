"""The teacher's benchmark on a CPU: the way that a GPU goes, with shapes that are scaled down."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.stage1_teacher.test_commands import ENVIRONMENT


def bench(summary: Path, *options: str, backend: str = "transformers") -> list[dict[str, Any]]:
    """The rows of `bench/teacher.py`; the smallest run that measures everything."""
    command = [sys.executable, str(ROOT / "bench/teacher.py"), "--only", "teacher", "--backend", backend]
    small = ["--shapes", "scaled", "--repeats", "1", "--shards", "2", "--json", str(summary)]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *small, *options], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    rows = json.loads(summary.read_text())
    assert all(row["name"] in done.stdout for row in rows)
    return rows


def check(rows: list[dict[str, Any]], backend: str, layouts: list[str]) -> None:
    """Each layout has its throughput and share of the ceiling, each network what a capture adds."""
    speeds = [row for row in rows if row["name"].startswith(f"{backend}: ")]
    captures = [row for row in rows if "capture with it" in row["name"]]
    assert [row["note"].split("(")[1].split(",")[0] for row in speeds] == layouts
    assert len(captures) == 2
    assert all(math.isfinite(row["scored_per_s"]) and row["scored_per_s"] > 0 for row in rows)
    assert all("TFLOP/s" in row["note"] for row in speeds)
    assert all("over the teacher alone" in row["note"] for row in captures)


@pytest.mark.slow
def test_scaled_shapes_go_the_way_of_the_real_ones(tmp_path: Path) -> None:
    rows = bench(tmp_path / "lines.json")
    check(rows, "transformers", ["full", "bd3lm", "bd3lm", "reordered"])


@pytest.mark.slow
def test_nothing_is_begun_when_the_time_is_up(tmp_path: Path) -> None:
    rows = bench(tmp_path / "lines.json", "--minutes", "0", "--only", "head,packing,teacher", backend="both")
    assert len(rows) == 7  # two parts, four layouts, vllm
    assert all(math.isnan(row["scored_per_s"]) and "the time is up" in row["note"] for row in rows)


def test_the_real_shapes_are_the_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a weight in memory: the parameters that a token meets, by the model cards."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import teacher_shapes

    mixture, dense = (teacher_shapes.active_flops(shape.config) / 2 for shape in teacher_shapes.REAL)
    assert mixture == pytest.approx(1.44e9 - 2 * 157184 * 2048, rel=0.1)  # LLaDA2.0-mini: 1.4 billion active
    assert dense == pytest.approx(6.95e9, rel=0.01)  # Qwen3-8B: 6.95 billion without embeddings


def test_the_codec_keeps_to_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Per scored teacher token, on the embedded teacher's own scores."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import codec as bench

    sample = bench.embedded(4)
    for k, most in ((16, 44), (64, 160)):
        cut = sample.of(k, "packed")
        data = cut.encode()
        assert (
            bench.column_bytes(data, ("topk_packed", "gold_logp")) <= most * cut.tokens
        )  # log Z is in the packed column
        assert bench.column_bytes(data, bench.GOLD) <= 3 * cut.tokens
