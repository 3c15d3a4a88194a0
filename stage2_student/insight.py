"""What a training run says about itself between two log lines: sums that add up over micro-batches, steps and ranks.

A `Tally` is one vector of sums, on the device where the losses are, so that a micro-batch is recorded without waiting
for the GPU; `numbers` turns the summed vector into those of a log line. Parts of the loss are kept by
timestep too, in the bins of held-out evaluation, since that is where objectives and schedules differ.

Arithmetic is counted as model FLOPs are: what the mathematics needs and no recomputation, over the tokens of the pack
(`packing`: x_0 once per document, no padding), the pairs of tokens that attention lets see each other, and the head at
masked tokens alone. MFU is their rate over a peak, which is either given or measured here: a large matrix product in
the precision of the run.

Shape suffixes as in `batch`; F fields of the vector.
"""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from stage2_student.batch import Batch
from stage2_student.evaluation import EDGES, bin_names
from stage2_student.losses import BatchLosses, Counts
from stage2_student.model import Student, input_and_output
from stage2_student.packing import Layout

PER_STEP = ("ce", "distill", "chunks", "masked_tokens", "rows", "fresh_rows")
PER_CHUNK = ("tidal_weight", "student_logp", "teacher_logp")
OTHERS = ("nll", "tokens", "masked_chunks", "usable_chunks", "flops")
BINNED = ("tokens", "nll", "chunks", "distill", "student_logp", "teacher_logp")
PEAK_SIZE = {"cuda": 8192, "cpu": 1024}  # rows and columns of the measured product
PEAK_REPEATS = 5


@dataclass(frozen=True)
class Arithmetic:
    """What one token, one masked token and one pair of tokens cost, forward and backward, in floating-point operations."""

    per_token: float
    per_masked_token: float
    per_pair: float

    @classmethod
    def of(cls, student: Student) -> Arithmetic:
        """6 per trained weight and 4 per frozen one; embeddings are looked up, which costs nothing."""
        model = student.model
        embedding, head = input_and_output(model)
        ends = {id(embedding.weight), id(head.weight)}
        body = sum((6 if p.requires_grad else 4) * p.numel() for p in model.parameters() if id(p) not in ends)
        config = model.config.get_text_config()
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        head_cost = (6 if head.weight.requires_grad else 4) * head.weight.numel()
        pair = 12 * config.num_hidden_layers * config.num_attention_heads * width
        return cls(float(body), float(head_cost), float(pair))

    def of_batch(self, batch: Batch, block_size: int) -> float:
        """Model FLOPs of a training step on this batch, whose layout the forward pass has made and remembered."""
        layout = Layout.of(batch.groups, block_size, batch.length_B.device)
        pairs = sum(run.count * run.size**2 for run in layout.runs)
        pairs += sum((s.stop - s.start) * (s.last - s.first) for s in (*layout.to_clean, *layout.within_clean))
        return self.per_token * layout.tokens + self.per_masked_token * len(batch.target_N) + self.per_pair * pairs


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of some; what the hardware gives to plain code, below its data sheet."""
    size = PEAK_SIZE.get(device.type, PEAK_SIZE["cpu"])
    a_NN = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(PEAK_REPEATS):
        _synchronize(device)
        begin = time.perf_counter()
        a_NN @ a_NN
        _synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2.0 * size**3 / best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> float:
    """Bytes: the most that tensors took on a GPU, or this process in all on a CPU, since it began."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


class Tally:
    """Sums over the micro-batches of some optimiser steps; `vector_F` adds up over ranks, too."""

    names = (*PER_STEP, *PER_CHUNK, *OTHERS)

    def __init__(self) -> None:
        self.vector_F: Tensor | None = None
        self.steps = 0
        self._since = time.monotonic()

    def add(self, batch: Batch, losses: BatchLosses, counts: Counts, flops: float) -> None:
        """Record a micro-batch; nothing waits for the device."""
        timestep_C, timestep_N = batch.timestep_B[batch.sample_C], batch.timestep_B[batch.sample_N]
        values: dict[str, float | Tensor] = {
            "ce": losses.ce.over(counts.ce).detach(),
            "distill": losses.distill.over(counts.distill).detach(),
            "chunks": len(batch.sample_C),
            "masked_tokens": len(batch.target_N),
            "rows": len(batch),
            "fresh_rows": batch.fresh,
            "tidal_weight": losses.weight_C.sum(),
            "student_logp": losses.student_logp_C.sum(),
            "teacher_logp": batch.teacher_logp_C.sum(),
            "nll": losses.nll_N.sum(),
            "tokens": batch.length_B.sum(),
            "masked_chunks": batch.coverage.masked,
            "usable_chunks": batch.coverage.usable,
            "flops": flops,
        }
        device = losses.nll_N.device
        known = [values[name] for name in self.names]
        scalars_F = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in known])
        by_bin = [
            _binned(timestep_N, torch.ones_like(losses.nll_N)),
            _binned(timestep_N, losses.nll_N),
            *(
                _binned(timestep_C, value_C)
                for value_C in (
                    torch.ones_like(losses.distill_C), losses.distill_C, losses.student_logp_C, batch.teacher_logp_C,
                )
            ),
        ]  # fmt: skip
        added_F = torch.cat([scalars_F, *by_bin])
        self.vector_F = added_F if self.vector_F is None else self.vector_F + added_F

    def seconds(self) -> float:
        """Since the tally began."""
        return max(time.monotonic() - self._since, 1e-9)


def _binned(timestep_X: Tensor, value_X: Tensor) -> Tensor:
    """Sums of the values by bin, float64."""
    inner = torch.tensor(EDGES[1:-1], dtype=timestep_X.dtype, device=timestep_X.device)
    sums = torch.zeros(len(EDGES) - 1, dtype=torch.float64, device=timestep_X.device)
    return sums.index_add(0, torch.bucketize(timestep_X, inner, right=True), value_X.double())


def numbers(vector_F: Tensor, steps: int, seconds: float, peak_flops: float) -> dict[str, float]:
    """What a log line says of a summed vector.

    Per step: `ce`, `distill` (without distill_weight), `chunks`, `masked_tokens`, `rows`, `fresh_rows`. Per masked
    token, nats: `nll`. Per scored chunk: `tidal_weight`, `student_logp` and `teacher_logp` (log-likelihoods of the
    gold, nats). `coverage`: masked chunks that carry a score, over all. `mfu` of `peak_flops`, that of all ranks. For
    each bin of timesteps that had any: `nll/0–0.2` per masked token and `distill/…` (before any weight),
    `student_logp/…`, `teacher_logp/…` per chunk.
    """
    values = vector_F.tolist()
    sums = dict(zip(Tally.names, values, strict=False))
    chunks, tokens = max(sums["chunks"], 1.0), max(sums["masked_tokens"], 1.0)
    logs = {name: sums[name] / steps for name in PER_STEP}
    logs |= {name: sums[name] / chunks for name in PER_CHUNK}
    logs |= {
        "nll": sums["nll"] / tokens,
        "coverage": sums["usable_chunks"] / max(sums["masked_chunks"], 1.0),
        "tokens_per_second": sums["tokens"] / seconds,
        "seconds_per_step": seconds / steps,
        "mfu": sums["flops"] / seconds / peak_flops,
    }
    bins = len(EDGES) - 1
    binned = {
        name: values[len(Tally.names) + i * bins : len(Tally.names) + (i + 1) * bins] for i, name in enumerate(BINNED)
    }
    for name, count in (("nll", "tokens"), *((name, "chunks") for name in BINNED[3:])):
        for label, total, items in zip(bin_names(), binned[name], binned[count], strict=True):
            if items:
                logs[f"{name}/{label}"] = total / items
    return logs
