"""Speed and memory of a student's step against the plain online way, side by side in one run.

    python bench/student.py [--threads 2] [--repeats 9] [--parts steps,head,draws] [--json FILE]
    python bench/student.py --quality          # held-out bits per byte with and without packed draws, some 15 minutes
    python bench/student.py --gpu              # Qwen3-0.6B's shape in bf16 on one GPU, with and without a teacher

- steps: a 15.7M student (4 layers × 256, V = 49152; 4 rows of 256 tokens, 64 of them prompt) against the released
  code's way (`student_steps`), whose teacher (8 × 512) runs in every step. The student's own step and the whole step
  stand apart: the rest is what the absent teacher saves.
- head: V = 151669, hidden 1024: the tiled head at the masked tokens against logits at all 2·L positions. What it adds
  to memory is the gradient of its weight, 592 MiB, and a few tiles, however many tokens are masked.
- draws: 12 layers × 512; M = 4 draws of one document a step against one draw of each of 4 documents.

Every way lives in a process of its own, so that its peak memory is its own, and the ways take turns step by step, so
that whatever else the machine does hits all of them; ratios are medians over the turns. CPU seconds of all threads,
which wait without spinning, stand beside wall seconds: on a busy machine they are the steadier number. Peak memory is
the process's, the interpreter with its libraries included, and beside it what the step adds. The target of 0.42 is for
the first, the whole process.

`kl` (TIDAL + CompDemo KL) is not the same mathematics on both sides: plain takes the dense KL over the whole
vocabulary, ours the events of a cache, 32 candidates and 32 samples. Its ratio says what a user gains, not a kernel.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HEAD_VOCABULARY, HEAD_HIDDEN, HEAD_LENGTH = 151669, 1024, 512
HEAD_COUNTS = (96, 192, 384)  # masked tokens; 192: half of a response that is 75 % of the row


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# Ways: each is built in its own process and gives a function from a step's number to ({clock: seconds}, loss, norm)


def _timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def steps_way(who: str, objective: str) -> Callable[[int], dict[str, float]]:
    """A step of the small student: `plain`, `ours`, or `ours, recomputing` (activation checkpointing)."""
    import student_steps as steps
    import torch

    sizes = steps.Sizes(documents=4, draws=1, length=256, prompt=64)
    student = steps.Shape(4, 256, 4, 4, 64, 768).model()
    teacher = steps.Shape(8, 512, 8, 8, 64, 1536).model() if who == "plain" else None
    if who == "ours, recomputing":
        student.train()
        student.gradient_checkpointing_enable()
    ours = steps.our_step(student, objective, sizes.block) if teacher is None else None

    def step(number: int) -> dict[str, float]:
        batch = steps.batch_of(sizes, 49152, number, objective)
        student.zero_grad(set_to_none=True)
        found = {"teacher_wall": 0.0, "teacher_cpu": 0.0}
        scores = torch.zeros(0)
        if teacher is not None:
            scores, found["teacher_wall"], found["teacher_cpu"] = _timed(
                lambda: steps.plain_teacher(teacher, batch, objective, sizes.block)
            )
        loss, found["own_wall"], found["own_cpu"] = _timed(
            lambda: ours(batch) if ours else steps.plain_student(student, batch, objective, sizes.block, scores)
        )
        norms = [p.grad.norm() for p in student.parameters() if p.grad is not None]
        return {**found, "loss": float(loss), "norm": float(torch.stack(norms).norm())}

    return step


def draws_way(documents: int, draws: int) -> Callable[[int], dict[str, float]]:
    """A step on `draws` of each of `documents`."""
    import student_steps as steps

    sizes = steps.Sizes(documents, draws, length=256, prompt=64)
    student = steps.Shape(12, 512, 8, 8, 64, 1536).model()
    ours = steps.our_step(student, "calm", sizes.block)

    def step(number: int) -> dict[str, float]:
        batch = steps.batch_of(sizes, 49152, number, "calm")
        student.zero_grad(set_to_none=True)
        _, wall, cpu = _timed(lambda: ours(batch))
        return {"own_wall": wall, "own_cpu": cpu}

    return step


def head_way(masked: int) -> Callable[[int], dict[str, float]]:
    """Cross-entropy and chunk likelihoods of `masked` tokens from hidden states; 0: logits at all 2·L positions."""
    import torch
    import torch.nn.functional as F

    from stage2_student.head import Head, gather_logits

    torch.manual_seed(0)
    weight_VD = torch.empty(HEAD_VOCABULARY, HEAD_HIDDEN).normal_(std=0.02).requires_grad_()

    def step(number: int) -> dict[str, float]:
        generator = torch.Generator().manual_seed(number)
        hidden_SD = torch.randn(2 * HEAD_LENGTH, HEAD_HIDDEN, generator=generator).requires_grad_()
        target_S = torch.randint(0, HEAD_VOCABULARY, (2 * HEAD_LENGTH,), generator=generator)
        weight_VD.grad = None

        def plain() -> None:
            logits_LV = F.linear(hidden_SD, weight_VD)[:HEAD_LENGTH]
            nll_L = F.cross_entropy(logits_LV, target_S[:HEAD_LENGTH], reduction="none")
            logp_L = F.log_softmax(logits_LV, dim=-1).gather(1, target_S[:HEAD_LENGTH, None])[:, 0]
            (nll_L[128:320].sum() - logp_L[128:320].exp().sum()).backward()

        def tiled() -> None:
            row_N = torch.arange(masked)
            logit_N, log_z_N1 = gather_logits(
                hidden_SD[128 : 128 + masked], Head(weight_VD), row_N, target_S[:masked], (1.0,)
            )
            logp_N = logit_N - log_z_N1[:, 0]
            (-logp_N.sum() - logp_N.exp().sum()).backward()

        _, wall, cpu = _timed(tiled if masked else plain)
        return {"own_wall": wall, "own_cpu": cpu}

    return step


WAYS: dict[str, tuple[Callable[..., Callable[[int], dict[str, float]]], tuple[Any, ...]]] = {
    f"{who}, {objective}": (steps_way, (who, objective))
    for objective in ("calm", "kl")
    for who in ("plain", "ours", "ours, recomputing")
}
WAYS |= {"1 draw": (draws_way, (4, 1)), "4 draws": (draws_way, (1, 4))}
WAYS |= {"head, all": (head_way, (0,))} | {f"head, {n}": (head_way, (n,)) for n in HEAD_COUNTS}


def serve(name: str, threads: int, pipe: Connection) -> None:
    """Serve steps by number until the number is negative; then report the peak of this process's memory."""
    import torch

    torch.set_num_threads(threads)
    make, arguments = WAYS[name]
    step = make(*arguments)
    pipe.send(peak_mib())
    while (number := pipe.recv()) >= 0:
        pipe.send(step(number))
    pipe.send(peak_mib())


def race(names: list[str], threads: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Steps of these ways in turn; by way: lists of numbers by name, and peak memory in MiB."""
    context = multiprocessing.get_context("spawn")
    pipes, workers = {}, []
    for name in names:
        pipes[name], end = context.Pipe()
        workers.append(context.Process(target=serve, args=(name, threads, end)))
        workers[-1].start()
    found: dict[str, dict[str, Any]] = {name: {"idle": pipe.recv()} for name, pipe in pipes.items()}
    for step in range(repeats + 1):  # the first warms up
        for name in names if step % 2 else reversed(names):
            pipes[name].send(step)
            for key, value in pipes[name].recv().items():
                found[name].setdefault(key, [])
                if step:
                    found[name][key].append(value)
    for name, pipe in pipes.items():
        pipe.send(-1)
        found[name]["peak"] = pipe.recv()
    for worker in workers:
        worker.join()
    return found


def ratio(of: list[float], to: list[float]) -> float:
    """Median over the turns of one over the other."""
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


def steps_part(threads: int, repeats: int, report: dict[str, float]) -> None:
    """Own step, whole step, memory."""
    for objective, least in (("calm", 3.4), ("kl", 6.0)):
        found = race([name for name in WAYS if name.endswith(f", {objective}")], threads, repeats)
        plain = found[f"plain, {objective}"]
        if objective == "kl":
            print("kl, TIDAL + CompDemo: plain is dense KL over the vocabulary, ours KL over events with samples")
        for who in ("ours", "ours, recomputing"):
            ours = found[f"{who}, {objective}"]
            title = f"{objective}: {who}"
            for clock in ("wall", "cpu"):
                own_R, our_R = plain[f"own_{clock}"], ours[f"own_{clock}"]
                whole_R = [a + b for a, b in zip(own_R, plain[f"teacher_{clock}"], strict=True)]
                report[f"{title}: plain own step, {clock} s"] = statistics.median(own_R)
                report[f"{title}: plain teacher, {clock} s"] = statistics.median(plain[f"teacher_{clock}"])
                report[f"{title}: own step, {clock} s"] = statistics.median(our_R)
                report[f"{title}: own step, {clock}, × (target 2.2)"] = ratio(own_R, our_R)
                report[f"{title}: whole step, {clock}, × (target {least:g})"] = ratio(whole_R, our_R)
            report[f"{title}: plain peak, MiB"] = plain["peak"]
            report[f"{title}: peak, MiB"] = ours["peak"]
            report[f"{title}: peak, whole process, share of plain (target 0.42)"] = ours["peak"] / plain["peak"]
            added = (ours["peak"] - ours["idle"]) / (plain["peak"] - plain["idle"])
            report[f"{title}: beside it, what the step adds, share of plain"] = added
            if objective == "calm":  # the same mathematics; `kl` differs by what a cache keeps of the vocabulary
                for key in ("loss", "norm"):
                    pairs = zip(plain[key], ours[key], strict=True)
                    report[f"{title}: largest relative difference of {key}"] = max(
                        abs(a - b) / abs(a) for a, b in pairs
                    )


def head_part(threads: int, repeats: int, report: dict[str, float]) -> None:
    """The head alone: time at half of a response, memory by the number of masked tokens."""
    found = race(["head, all", "head, 192"], threads, repeats)
    for clock in ("wall", "cpu"):
        speed = ratio(found["head, all"][f"own_{clock}"], found["head, 192"][f"own_{clock}"])
        report[f"head: 192 of 1024 positions, {clock}, × (target 2)"] = speed
    report["head: all positions, MiB added"] = found["head, all"]["peak"] - found["head, all"]["idle"]
    for count in HEAD_COUNTS:
        alone = race([f"head, {count}"], threads, 1)[f"head, {count}"]
        report[f"head: {count} masked tokens, MiB added"] = alone["peak"] - alone["idle"]


def draws_part(threads: int, repeats: int, report: dict[str, float]) -> None:
    """Draws per second with one clean half for four draws."""
    found = race(["1 draw", "4 draws"], threads, repeats)
    for clock in ("wall", "cpu"):
        speed = ratio(found["1 draw"][f"own_{clock}"], found["4 draws"][f"own_{clock}"])
        report[f"draws: 4 of one document, {clock}, × draws/s of 1 (target 1.3)"] = speed
    for name in ("1 draw", "4 draws"):
        report[f"draws: {name}, draws/s"] = 4 / statistics.median(found[name]["own_wall"])
        report[f"draws: {name}, MiB added"] = found[name]["peak"] - found[name]["idle"]


PARTS = {"steps": steps_part, "head": head_part, "draws": draws_part}


def show(report: dict[str, float]) -> None:
    """Some rows of the table, at once."""
    for name, value in report.items():
        print(f"{name:72} {value:.4g}", flush=True)


def main() -> None:
    """Run what is asked for and print one table."""
    arguments = argparse.ArgumentParser(
        description="Speed and memory of a student's step against the plain online way."
    )
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--repeats", type=int, default=9)
    arguments.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}; with commas between")
    arguments.add_argument("--quality", action="store_true", help="train on a small real cache with M = 1 and M = 4")
    arguments.add_argument("--gpu", action="store_true", help="Qwen3-0.6B's shape in bf16 on a GPU")
    arguments.add_argument("--json", help="write the numbers to this file")
    options = arguments.parse_args()
    os.environ.update(OMP_NUM_THREADS=str(options.threads), OMP_WAIT_POLICY="PASSIVE")

    report: dict[str, float] = {}
    if options.gpu:
        import student_gpu

        for found in student_gpu.measure():
            show(found)
            report |= found
    elif options.quality:
        import student_quality

        report = student_quality.measure()
        show(report)
    else:
        for part in options.parts.split(","):
            found = {}
            PARTS[part](options.threads, options.repeats, found)
            show(found)
            report |= found
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    if (worst := max((v for n, v in report.items() if "relative difference" in n), default=0.0)) > 1e-4:
        raise SystemExit(f"the two steps disagree: relative difference {worst:.2e} of loss or gradient norm")


if __name__ == "__main__":
    main()
