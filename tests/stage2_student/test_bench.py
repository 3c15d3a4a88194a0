"""The benchmark of the student's step: both ways compute the same, and the GPU mode's code runs, at sizes for a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
CODE = """
import json, sys
import torch
import student_gpu, student_steps as steps
shape = steps.Shape(2, 64, 2, 1, 32, 96, 300)
losses = {}
sizes = steps.Sizes(documents=2, draws=2, length=64, prompt=16)
for objective in ("calm", "kl"):
    batch = steps.batch_of(sizes, 300, 0, objective)
    teacher = steps.plain_teacher(steps.Shape(2, 64, 2, 2, 32, 96, 300).model(), batch, objective, 32)
    student = shape.model()
    found = []
    ours = steps.our_step(student, objective, 32)
    for step in (lambda batch: steps.plain_student(student, batch, objective, 32, teacher), ours):
        loss = step(batch)
        norm = torch.stack([p.grad.norm() for p in student.parameters()]).norm()
        found.append([float(loss), float(norm)])
        student.zero_grad()
    losses[objective] = found
scale = student_gpu.Scale(shape, shape, sizes, steps.Sizes(1, 4, 64, 16), sizes, seconds=0.0, warm_up=1)
def measured(**limits):
    return {name: value for part in student_gpu.measure(scale, "cpu", **limits) for name, value in part.items()}
report = measured()
our_step = steps.our_step
def fits_two_rows(*a, **k):
    step = our_step(*a, **k)
    def within(batch):
        if k and len(batch) > 2:  # the steps that are timed
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(batch)
    return within
steps.our_step = fits_two_rows
halved = measured()
print(json.dumps([losses, report, halved, measured(limit=50.0)]))
"""


@pytest.mark.slow
def test_both_ways_agree_and_the_gpu_mode_runs() -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCH), str(BENCH.parent)])}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    losses, report, halved, late = json.loads(done.stdout.splitlines()[-1])
    plain, ours = losses["calm"]
    assert ours == pytest.approx(plain, rel=1e-5)
    plain, ours = losses["kl"]  # ours has a sample of the vocabulary
    assert all(value > 0 for value in (*plain, *ours))
    for name in ("1 draw", "4 draws of a document", "1 draw, online teacher"):
        assert report[f"gpu: {name}, tokens/s"] > 0
        assert 0 < report[f"gpu: {name}, student's MFU"] < 2
        assert report[f"gpu: {name}, peak GiB"] > 0
        assert (report[f"gpu: {name}, rows a step"], halved[f"gpu: {name}, rows a step"]) == (4, 2)
        assert f"gpu: {name}: out of memory with 4 rows a step; trying 2" in done.stdout
        assert f"gpu: {name}: not measured, since " in done.stdout
        assert f"gpu: {name}, tokens/s" not in late
    for key in ("loss", "gradient norm"):
        assert report[f"gpu: float32, split, {key}"] == pytest.approx(report[f"gpu: float32, dense, {key}"], rel=1e-4)
        assert report[f"gpu: float32, relative difference of {key}"] < 1e-4
