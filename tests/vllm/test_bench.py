"""The teacher's benchmark with the vllm backend: random weights that lie on no disk."""

from __future__ import annotations

from pathlib import Path

from tests.stage1_teacher.test_bench import bench, check


def test_scaled_shapes_in_vllm(tmp_path: Path) -> None:
    check(bench(tmp_path / "lines.json", backend="vllm"), "vllm", ["full", "bd3lm", "bd3lm"])
