"""Time and memory of one student step: the tiled head on masked positions against the plain implementation.

The plain step is written as the released code does it: logits at all 2·L positions, `F.cross_entropy` on the noisy
half, chunk log-likelihoods from a full log-softmax. Ours computes likelihoods of masked positions only, tile by tile.
Both run the same 15.7M-parameter Qwen3 student (4 layers × 256, V = 49152), the same batch (4 rows of 256 tokens,
prompt of 64), masks and teacher, forward and backward in float32. Each lives in a process of its own, so that its peak
memory is its own; the two take turns step by step, so that what else the machine does hits both. CPU seconds (of all
threads, which wait without spinning) are printed beside wall seconds: on a busy machine they are the steadier number.
Loss and gradient must agree.

    python bench/student.py [--threads 2] [--repeats 9] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

VOCABULARY, HIDDEN, LAYERS = 49152, 256, 4
ROWS, LENGTH, PROMPT, BLOCK, CHUNK = 4, 256, 64, 32, 2
TEMPERATURE = 2.0


def student_model() -> Any:
    """Random weights: neither step's cost depends on them."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=768,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config)


@dataclass(frozen=True)
class StepInput:
    """The same for both: ids, masks of whole chunks of two tokens, a teacher's chunk log-likelihoods."""

    clean_BL: Any
    noisy_BL: Any
    masked_BL: Any
    timestep_B: Any
    teacher_logp_C: Any
    sample_C: Any
    token_C: Any  # first token of each masked chunk

    @classmethod
    def number(cls, step: int) -> StepInput:
        import torch

        generator = torch.Generator().manual_seed(step)
        clean_BL = torch.randint(0, VOCABULARY - 1, (ROWS, LENGTH), generator=generator)
        # Timesteps as a cache has them: they cover (0, 1) evenly, whatever their offset.
        timestep_B = (torch.arange(ROWS) / ROWS + torch.rand(1, generator=generator)) % 1.0 * 0.999 + 1e-3
        chosen_BC = torch.rand(ROWS, (LENGTH - PROMPT) // CHUNK, generator=generator) < timestep_B[:, None]
        masked_BL = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
        masked_BL[:, PROMPT:] = chosen_BC.repeat_interleave(CHUNK, dim=1)
        sample_C, chunk_C = chosen_BC.nonzero(as_tuple=True)
        teacher_logp_C = -8.0 * torch.rand(len(sample_C), generator=generator)
        return cls(
            clean_BL,
            clean_BL.masked_fill(masked_BL, VOCABULARY - 1),
            masked_BL,
            timestep_B,
            teacher_logp_C,
            sample_C,
            PROMPT + CHUNK * chunk_C,
        )


def plain_loss(model: Any, data: StepInput) -> Any:
    """Reverse CALM and cross-entropy from logits at all positions."""
    import torch
    import torch.nn.functional as F

    from stage2_student.attention import block_diffusion_mask
    from stage2_student.objectives import reverse_calm_loss

    input_BS = torch.cat([data.noisy_BL, data.clean_BL], dim=1)
    position_BS = torch.arange(LENGTH).repeat(2)[None].expand(ROWS, -1)
    mask = torch.zeros(2 * LENGTH, 2 * LENGTH).masked_fill(~block_diffusion_mask(LENGTH, BLOCK), -1e30)[None, None]
    logits_BSV = model(input_ids=input_BS, position_ids=position_BS, attention_mask=mask, use_cache=False).logits
    logits_BLV = logits_BSV[:, :LENGTH]
    nll_BL = F.cross_entropy(logits_BLV.transpose(1, 2), data.clean_BL, reduction="none")
    weighed_BL = nll_BL * data.masked_BL / (data.timestep_B[:, None] + 1e-6)
    logp_BL = F.log_softmax(logits_BLV, dim=-1).gather(2, data.clean_BL[:, :, None])[:, :, 0]
    student_logp_C = sum(logp_BL[data.sample_C, data.token_C + i] for i in range(CHUNK))
    distillation = reverse_calm_loss(student_logp_C, data.teacher_logp_C, TEMPERATURE).mean()
    return weighed_BL.sum() / (ROWS * (LENGTH - PROMPT)) + distillation


def our_loss(model: Any, data: StepInput) -> Any:
    """The same from the tiled head, as the trainer computes it."""
    import torch

    from stage2_student import objectives
    from stage2_student.attention import masked_hidden
    from stage2_student.head import Head, gather_logits
    from stage2_student.packing import Group

    groups = [Group(0, masked_L[None].numpy()) for masked_L in data.masked_BL]
    hidden_ND = masked_hidden(model, data.noisy_BL, data.clean_BL, groups, BLOCK)
    sample_N, token_N = data.masked_BL.nonzero(as_tuple=True)
    row_N = torch.arange(len(sample_N))
    head = Head(model.lm_head.weight)
    logit_N, log_z_N1 = gather_logits(hidden_ND, head, row_N, data.clean_BL[sample_N, token_N], (1.0,))
    log_z_N = log_z_N1[:, 0]
    trainable_B = torch.full((ROWS,), LENGTH - PROMPT)
    cross_entropy = objectives.cross_entropy(log_z_N - logit_N, sample_N, data.timestep_B, trainable_B)
    chunk_N = torch.arange(len(data.sample_C)).repeat_interleave(CHUNK)  # masked tokens come chunk by chunk
    student_logp_C = objectives.chunk_logp(logit_N, log_z_N, row_N, chunk_N, len(data.sample_C))
    loss_C = objectives.reverse_calm_loss(student_logp_C, data.teacher_logp_C, TEMPERATURE)
    return cross_entropy.over() + objectives.weighted(loss_C).over()


def work(name: str, threads: int, pipe: Connection) -> None:
    """Serve steps by number until the number is negative; then report the peak of this process's memory."""
    import torch

    torch.set_num_threads(threads)
    model = student_model()
    loss_of = {"plain": plain_loss, "ours": our_loss}[name]
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    while (step := pipe.recv()) >= 0:
        data = StepInput.number(step)
        model.zero_grad(set_to_none=True)
        wall, cpu = time.perf_counter(), time.process_time()
        loss = loss_of(model, data)
        loss.backward()
        seconds = time.perf_counter() - wall, time.process_time() - cpu
        norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
        pipe.send((seconds, float(loss.detach()), float(norm)))
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    """Run both in turn and print seconds, MiB and their ratios."""
    arguments = argparse.ArgumentParser(description="One student step: tiled head against plain logits.")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--repeats", type=int, default=9)
    arguments.add_argument("--json", help="write the numbers to this file")
    options = arguments.parse_args()

    os.environ.update(OMP_NUM_THREADS=str(options.threads), OMP_WAIT_POLICY="PASSIVE")
    context = multiprocessing.get_context("spawn")
    pipes, workers = {}, []
    for name in ("plain", "ours"):
        pipes[name], end = context.Pipe()
        workers.append(context.Process(target=work, args=(name, options.threads, end)))
        workers[-1].start()
    idle = {name: pipe.recv() for name, pipe in pipes.items()}
    steps: dict[str, list[tuple[float, float]]] = {"plain": [], "ours": []}
    worst = 0.0
    for step in range(options.repeats + 1):  # the first step warms up
        results = {}
        for name in ("plain", "ours") if step % 2 else ("ours", "plain"):
            pipes[name].send(step)
            results[name] = pipes[name].recv()
            if step:
                steps[name].append(results[name][0])
        for plain, ours in zip(results["plain"][1:], results["ours"][1:], strict=True):
            worst = max(worst, abs(plain - ours) / abs(plain))
    peak = {}
    for name, pipe in pipes.items():
        pipe.send(-1)
        peak[name] = pipe.recv()
    for worker in workers:
        worker.join()

    report: dict[str, float] = {"threads": options.threads, "repeats": options.repeats}
    for i, clock in enumerate(("wall", "cpu")):
        plain_R, ours_R = ([step[i] for step in steps[name]] for name in ("plain", "ours"))
        ratios = sorted(plain / ours for plain, ours in zip(plain_R, ours_R, strict=True))
        report[f"{clock}_seconds_plain"] = statistics.median(plain_R)
        report[f"{clock}_seconds_ours"] = statistics.median(ours_R)
        report[f"{clock}_speedup_median"] = statistics.median(ratios)
        report[f"{clock}_speedup_least"], report[f"{clock}_speedup_most"] = ratios[0], ratios[-1]
    report["peak_mib_plain"], report["peak_mib_ours"] = peak["plain"], peak["ours"]
    report["peak_ratio"] = peak["ours"] / peak["plain"]
    report["peak_ratio_above_idle"] = (peak["ours"] - idle["ours"]) / (peak["plain"] - idle["plain"])
    report["worst_relative_difference"] = worst
    for name, value in report.items():
        print(f"{name:28} {value:.4g}")
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    if worst > 1e-4:
        raise SystemExit(f"the two steps disagree: relative difference {worst:.2e} of loss or gradient norm")


if __name__ == "__main__":
    main()
