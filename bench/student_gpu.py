"""The same steps on one GPU: Qwen3-0.6B's shape in bf16, with and without a WeDLM-8B-shaped teacher in the loop.

Ours trains in bf16 autocast over float32 weights with fused AdamW, on rows of 1024 tokens, a quarter of them prompt: with
one draw of each of 8 documents, and with four draws of each of 2. The online way has the same student with ours' step, so
that what the teacher costs stands alone, and asks the teacher as the released code does (two passes over [x_t, x_0],
logits at all positions), in bf16. Each runs for a fixed number of seconds after warm-up. MFU is of the rate of a large bf16
matrix product on the same GPU. Before anything is timed, one step in float32 by the kernel that is chosen on the device
(FlexAttention) is compared with one by the dense kernel: loss and gradient norm.

All of it takes at most 8 minutes: a way that has too little time left is not begun. What does not fit into memory is
tried again with half the batch, until a single row does not fit; the rows of a step stand beside each way's figures.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import student_steps as steps
import torch

from shared.errors import TidecacheError
from stage2_student import insight, kernels

VOCABULARY = 151936
LIMIT = 450.0  # seconds in all; a last step and the start of the process come on top
SETTING_UP = 60.0  # seconds that a way may take before its warm-up is over: compilation, and the teacher's weights


@dataclass(frozen=True)
class Scale:
    """What is measured; `QWEN` on a GPU, something small in a test."""

    student: steps.Shape
    teacher: steps.Shape
    one: steps.Sizes
    packed: steps.Sizes
    compared: steps.Sizes  # short, since the dense kernel keeps its scores
    seconds: float  # of each measurement
    warm_up: int  # steps


QWEN = Scale(
    student=steps.Shape(28, 1024, 16, 8, 128, 3072, VOCABULARY),
    teacher=steps.Shape(36, 4096, 32, 8, 128, 12288, VOCABULARY, tied=False),
    one=steps.Sizes(documents=8, draws=1, length=1024, prompt=256),
    packed=steps.Sizes(documents=2, draws=4, length=1024, prompt=256),
    compared=steps.Sizes(documents=2, draws=2, length=256, prompt=64),
    seconds=60.0,
    warm_up=4,
)


def measure(
    scale: Scale = QWEN, device: str = "cuda", limit: float = LIMIT, setting_up: float = SETTING_UP
) -> Iterator[dict[str, float]]:
    """Figures as they are measured: tokens per second (of rows, as the trainer counts them), MFU, peak memory in GiB.

    Raises:
        TidecacheError: there is no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise TidecacheError("--gpu: no CUDA device was found: leave --gpu out to measure on this CPU")
    end = time.perf_counter() + limit
    at = torch.device(device)
    student = scale.student.model(device)
    yield _compared(student, scale, at)
    peak = insight.measured_peak(at, torch.bfloat16)
    yield {"gpu: TFLOP/s of a large bf16 product": peak / 1e12}
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
    teacher = None
    ways = [
        ("1 draw", scale.one, False),
        ("4 draws of a document", scale.packed, False),
        ("1 draw, online teacher", scale.one, True),
    ]
    for name, asked, online in ways:
        sizes: steps.Sizes | None = asked
        while sizes is not None:
            if (left := end - time.perf_counter()) < scale.seconds + setting_up:
                print(f"gpu: {name}: not measured, since {left:.0f} s are left of {limit:.0f}", flush=True)
                break
            try:
                if online and teacher is None:
                    teacher = scale.teacher.model(device, torch.bfloat16).eval()
                yield _way(name, student, teacher, optimizer, scale, sizes, at, end, peak)
                break
            except torch.OutOfMemoryError:
                pass  # mended outside, where the exception no longer holds the step's tensors
            optimizer.zero_grad()
            optimizer.state.clear()  # its first step may have got only some of its tensors
            if at.type == "cuda":
                torch.cuda.empty_cache()
            rows, sizes = sizes.documents * sizes.draws, _halved(sizes)
            then = "it does not fit" if sizes is None else f"trying {sizes.documents * sizes.draws}"
            print(f"gpu: {name}: out of memory with {rows} rows a step; {then}", flush=True)


def _halved(sizes: steps.Sizes) -> steps.Sizes | None:
    """Half the documents, or half the draws of a single one; None below one row."""
    if sizes.documents > 1:
        return replace(sizes, documents=sizes.documents // 2)
    return replace(sizes, draws=sizes.draws // 2) if sizes.draws > 1 else None


def _compared(student: Any, scale: Scale, at: torch.device) -> dict[str, float]:
    """Loss and gradient norm of one step in float32 by the kernel chosen on the device, and by the dense one."""
    sizes = scale.compared
    batch = steps.batch_of(sizes, scale.student.vocabulary, 0, "calm").to(at)
    step = steps.our_step(student, "calm", sizes.block)
    found = {}
    for kernel, attend in (("flex" if at.type == "cuda" else "split", kernels.attend), ("dense", kernels.dense)):
        with mock.patch.object(kernels, "attend", attend):
            loss = float(step(batch))
        norms = [p.grad.norm() for p in student.parameters() if p.grad is not None]
        found[kernel] = {"loss": loss, "gradient norm": float(torch.stack(norms).norm())}
        student.zero_grad(set_to_none=True)
    report = {f"gpu: float32, {kernel}, {key}": v for kernel, pair in found.items() for key, v in pair.items()}
    ours, dense = found.values()
    for key in dense:
        report[f"gpu: float32, relative difference of {key}"] = abs(ours[key] - dense[key]) / abs(dense[key])
    return report


def _way(
    name: str,
    student: Any,
    teacher: Any,
    optimizer: torch.optim.Optimizer,
    scale: Scale,
    sizes: steps.Sizes,
    at: torch.device,
    end: float,
    peak: float,
) -> dict[str, float]:
    """Steps after warm-up, for `scale.seconds` or until `end`."""
    step = steps.our_step(student, "calm", sizes.block, bf16=True)
    arithmetic = insight.Arithmetic.of(cast(Any, SimpleNamespace(model=student)))
    if at.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    tokens = flops = 0.0
    number, begin = -scale.warm_up, time.perf_counter()
    while number < 1 or (time.perf_counter() - begin < scale.seconds and time.perf_counter() < end):
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
    return {
        f"gpu: {name}, rows a step": float(sizes.documents * sizes.draws),
        f"gpu: {name}, tokens/s": tokens / seconds,
        f"gpu: {name}, student's MFU": flops / seconds / peak,
        f"gpu: {name}, peak GiB": insight.peak_memory(at) / 2**30,
    }
