"""The same steps on one GPU: Qwen3-0.6B's shape in bf16, with and without a WeDLM-8B-shaped teacher in the loop.

Ours trains in bf16 autocast over float32 weights with fused AdamW, on rows of 1024 tokens, a quarter of them prompt: with
one draw of each of 8 documents, and with four draws of each of 2. The online way has the same student with ours' step, so
that what the teacher costs stands alone, and asks the teacher as the released code does (two passes over [x_t, x_0],
logits at all positions), in bf16. Each runs for a fixed number of seconds after warm-up: at most 8 minutes in all.
MFU is of the rate of a large bf16 matrix product on the same GPU.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import student_steps as steps
import torch

from shared.errors import TidecacheError
from stage2_student import insight

VOCABULARY = 151936


@dataclass(frozen=True)
class Scale:
    """What is measured; `QWEN` on a GPU, something small in a test."""

    student: steps.Shape
    teacher: steps.Shape
    one: steps.Sizes
    packed: steps.Sizes
    seconds: float  # of each measurement
    warm_up: int  # steps


QWEN = Scale(
    student=steps.Shape(28, 1024, 16, 8, 128, 3072, VOCABULARY),
    teacher=steps.Shape(36, 4096, 32, 8, 128, 12288, VOCABULARY, tied=False),
    one=steps.Sizes(documents=8, draws=1, length=1024, prompt=256),
    packed=steps.Sizes(documents=2, draws=4, length=1024, prompt=256),
    seconds=60.0,
    warm_up=4,
)


def measure(scale: Scale = QWEN, device: str = "cuda") -> dict[str, float]:
    """Tokens per second (of rows, as the trainer counts them), MFU, and peak memory in GiB.

    Raises:
        TidecacheError: there is no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise TidecacheError("--gpu: no CUDA device was found: leave --gpu out to measure on this CPU")
    at = torch.device(device)
    student = scale.student.model(device)
    step = steps.our_step(student, "calm", scale.one.block, bf16=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
    arithmetic = insight.Arithmetic.of(cast(Any, SimpleNamespace(model=student)))
    peak = insight.measured_peak(at, torch.bfloat16)
    report = {"gpu: TFLOP/s of a large bf16 product": peak / 1e12}
    teacher = None
    ways = [
        ("1 draw", scale.one, False),
        ("4 draws of a document", scale.packed, False),
        ("1 draw, online teacher", scale.one, True),
    ]
    for name, sizes, online in ways:
        if online:
            teacher = scale.teacher.model(device, torch.bfloat16).eval()
        if at.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        tokens = flops = 0.0
        number, begin = -scale.warm_up, time.perf_counter()
        while number < 1 or time.perf_counter() - begin < scale.seconds:
            batch = steps.batch_of(sizes, scale.student.vocabulary, number + scale.warm_up, "calm").to(at)
            if number == 0:
                insight._synchronize(at)
                begin = time.perf_counter()
            if teacher is not None:
                steps.plain_teacher(teacher, batch, "kl", sizes.block)
            step(batch)
            optimizer.step()
            optimizer.zero_grad()
            if number >= 0:
                tokens += sizes.documents * sizes.draws * sizes.length
                flops += arithmetic.of_batch(batch, sizes.block)
            number += 1
            insight._synchronize(at)
        seconds = time.perf_counter() - begin
        report |= {
            f"gpu: {name}, tokens/s": tokens / seconds,
            f"gpu: {name}, student's MFU": flops / seconds / peak,
            f"gpu: {name}, peak GiB": insight.peak_memory(at) / 2**30,
        }
    return report
