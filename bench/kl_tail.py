"""Which tail makes dense KL from a cache best: the events' *other*, or sampled tail entries with their weights?

    python bench/kl_tail.py            # about ten minutes on one core

Shared-tokenizer KL needs the teacher's whole distribution; a cache holds k entries per position. Two ways to treat what
lies outside are compared with the dense loss of TIDE (`objectives.tidal_kl_loss`), at equal bytes:

- *events*: k entries and one event *other* with the rest of the mass on each side (DESIGN §5). Its gradient takes the
  teacher's tail to have the student's shape.
- *sampled*: k − m entries and m more, drawn without bias from the rest of the teacher's distribution at T = 2 (systematic
  sampling), each with its log-likelihood, from which its weight at any T follows. Unbiased for λ = 1; for λ < 1 the
  interpolated target is normalised over entries and weighted samples.
- *truncated*: k entries renormalised over themselves on both sides, for comparison.

Teacher: the embedded one. Student: another network on the same tokens, two of the teacher's layers trained for some
steps by masked prediction alone, so that it knows unigrams and little more. Text: held-out library modules, chosen
before anything was measured. First table: the error of the gradient with respect to all of the student's parameters,
over one batch of documents, ‖g − g_dense‖ / ‖g_dense‖ and the cosine; second: the same per position, with respect to
its logits. `lift`: what is left of the dense KL at T (on other documents) after training by each loss from one start,
on the same rows in the same order, cross-entropy left out. One entry is 18 bits of id and 16 of log-likelihood.

Shape suffixes: B rows, L tokens, N masked positions, V vocabulary, K entries.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from shared.noise import stream_key, uniforms
from shared.spec import TAIL_TEMPERATURE
from shared.stdlib_corpus import documents
from stage1_teacher.head import systematic_samples
from stage2_student import objectives
from stage2_student.tidal import strength

TEACHER = Path(__file__).resolve().parent.parent / "stage1_teacher" / "tiny"
BYTES_PER_ENTRY = (18 + 16) / 8
TIMESTEPS = (0.1, 0.3, 0.5, 0.7, 0.9)
BY_K = (16, 64, 256, 1024)
STRENGTHS = (0.1, 0.5, 0.9, 1.0)
TEMPERATURES = (1.0, 2.0)

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, float, Tensor], Tensor]


@dataclass(frozen=True)
class Batch:
    """Masked rows of equal length, and the seed of their tail samples."""

    noisy_BL: Tensor
    clean_BL: Tensor
    masked_BL: Tensor


def batch_of(texts: list[list[int]], mask_id: int, timestep: float | None, seed: int) -> Batch:
    """Mask tokens independently with probability t; None: each row has its own t, uniform."""
    clean_BL = torch.tensor(texts)
    chance_BL = torch.from_numpy(uniforms(stream_key(seed, "kl-tail", "mask"), clean_BL.numel())).view(clean_BL.shape)
    t_B = torch.from_numpy(uniforms(stream_key(seed, "kl-tail", "t"), len(texts)))
    t_B = t_B * 0.95 + 0.03 if timestep is None else torch.full_like(t_B, timestep)
    masked_BL = chance_BL < t_B[:, None]
    return Batch(clean_BL.masked_fill(masked_BL, mask_id), clean_BL, masked_BL)


def logits_at_masked(model: Qwen3ForCausalLM, batch: Batch) -> Tensor:
    """logits_NV with full attention over the noisy rows."""
    length = batch.noisy_BL.shape[1]
    hidden_BLD = model.model(batch.noisy_BL, attention_mask=torch.zeros(1, 1, length, length)).last_hidden_state
    return model.lm_head(hidden_BLD[batch.masked_BL])


@torch.no_grad()
def given(teacher: Qwen3ForCausalLM, batch: Batch, seed: int, purpose: str) -> tuple[Tensor, Tensor, Tensor]:
    """(gold_N, chance_N1 of the tail samples, teacher_NV): what every loss is given beside the student's logits."""
    gold_N = batch.clean_BL[batch.masked_BL]
    chance_N1 = torch.from_numpy(uniforms(stream_key(seed, "kl-tail", purpose), len(gold_N)))[:, None]
    return gold_N, chance_N1, logits_at_masked(teacher, batch)


def sample_tail(logp_NV: Tensor, top_NK: Tensor, count: int, chance_N1: Tensor) -> tuple[Tensor, Tensor]:
    """(ids_NM, log weights of the tail per sample): from what `top_NK` leaves, as a capture samples it."""
    tail_NV = torch.exp(F.log_softmax(logp_NV / TAIL_TEMPERATURE, -1)).scatter(1, top_NK, 0.0)
    mass_N1 = tail_NV.double().sum(1, keepdim=True)
    ids_NM = systematic_samples(tail_NV, count, chance_N1[:, 0])
    # E[Σ_i w_i f(v_i)] = Σ_tail f(v) with w = mass / (m · p_T(v)).
    log_weight_NM = (mass_N1 / count / tail_NV.gather(1, ids_NM).clamp(min=1e-30)).log().float()
    return ids_NM, log_weight_NM


def dense(
    student_NV: Tensor, teacher_NV: Tensor, _: Tensor, __: Tensor, temperature: float, strength_N: Tensor
) -> Tensor:
    """What TIDE computes."""
    return objectives.tidal_kl_loss(student_NV, teacher_NV, strength_N, temperature)


def events(k: int) -> Loss:
    """k entries, gold and *other*: the loss of recipe `events` on single-token chunks."""

    def loss(
        student_NV: Tensor, teacher_NV: Tensor, gold_N: Tensor, _: Tensor, temperature: float, strength_N: Tensor
    ) -> Tensor:
        student_NE, teacher_NE = event_masses(student_NV, teacher_NV, gold_N, k, temperature)
        return objectives.tidal_event_kl_loss(student_NE, teacher_NE, strength_N, temperature)

    return loss


def event_masses(
    student_NV: Tensor, teacher_NV: Tensor, gold_N: Tensor, k: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log masses of gold, k entries and *other*, the student's and the teacher's."""
    ids_NK = teacher_NV.topk(k, 1).indices
    ids_NE = torch.cat([gold_N[:, None], ids_NK], 1)
    valid_NE = torch.cat([torch.ones_like(gold_N[:, None], dtype=torch.bool), ids_NK != gold_N[:, None]], 1)
    masses = [
        objectives.event_log_mass(
            logits_NV.gather(1, ids_NE), torch.logsumexp(logits_NV / temperature, 1), valid_NE, temperature
        )
        for logits_NV in (student_NV, teacher_NV)
    ]
    return masses[0], masses[1]


def sampled(k: int, m: int) -> Loss:
    """k − m entries and m weighted samples of the tail (`chance_N1` shifts the systematic sample)."""

    def loss(
        student_NV: Tensor, teacher_NV: Tensor, _: Tensor, chance_N1: Tensor, temperature: float, strength_N: Tensor
    ) -> Tensor:
        log_s_NK, log_p_NK, log_weight_NK = entries(student_NV, teacher_NV, k, m, chance_N1, temperature)
        strength_N1 = strength_N[:, None]
        mixed_NK = ((1.0 - strength_N1) * log_s_NK + strength_N1 * log_p_NK + log_weight_NK).detach()
        target_NK = torch.where(strength_N1 == 1.0, mixed_NK.exp(), F.softmax(mixed_NK, 1))
        return -(temperature**2) * (target_NK * log_s_NK).sum(1)  # but for the target's entropy, which has no gradient

    return loss


def shared_out(k: int, m: int) -> Loss:
    """k − m entries and *other* as events; a share λ of what the target gives *other* goes to m weighted samples.

    `objectives.tail_kl_loss`, what a cache with tail samples trains with.
    """

    def loss(
        student_NV: Tensor, teacher_NV: Tensor, _: Tensor, chance_N1: Tensor, temperature: float, strength_N: Tensor
    ) -> Tensor:
        log_s_NK, log_p_NK, log_weight_NK = entries(student_NV, teacher_NV, k, m, chance_N1, temperature)
        top, tail = slice(0, k - m), slice(k - m, k)

        def with_other(log_mass_NK: Tensor) -> Tensor:
            other_N = torch.clamp(1.0 - log_mass_NK[:, top].exp().sum(1), min=objectives.OTHER_FLOOR)
            return torch.cat([log_mass_NK[:, top], other_N.log()[:, None]], 1)

        share_NM = F.log_softmax(log_p_NK[:, tail] + log_weight_NK[:, tail], 1)
        return objectives.tail_kl_loss(
            with_other(log_s_NK), with_other(log_p_NK), log_s_NK[:, tail], log_p_NK[:, tail], share_NM,
            strength_N, temperature,
        )  # fmt: skip

    return loss


def entries(
    student_NV: Tensor, teacher_NV: Tensor, k: int, m: int, chance_N1: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(student's and teacher's log-likelihood at T, log weight) of k − m entries and m samples."""
    top_NK = teacher_NV.topk(k - m, 1).indices
    tail_NM, log_weight_NM = sample_tail(F.log_softmax(teacher_NV, -1), top_NK, m, chance_N1)
    ids_NK = torch.cat([top_NK, tail_NM], 1)
    log_weight_NK = torch.cat([torch.zeros(top_NK.shape), log_weight_NM], 1)
    log_s_NK = student_NV.gather(1, ids_NK) / temperature - torch.logsumexp(student_NV / temperature, 1, keepdim=True)
    log_p_NK = teacher_NV.gather(1, ids_NK) / temperature - torch.logsumexp(teacher_NV / temperature, 1, keepdim=True)
    return log_s_NK, log_p_NK, log_weight_NK


def dense_reverse(
    student_NV: Tensor, teacher_NV: Tensor, _: Tensor, __: Tensor, temperature: float, ___: Tensor
) -> Tensor:
    """Reverse KL as TIDE computes it."""
    return objectives.reverse_kl_loss(student_NV, teacher_NV, temperature)


def reverse_events(k: int) -> Loss:
    """Reverse KL on k entries, gold and *other*."""

    def loss(
        student_NV: Tensor, teacher_NV: Tensor, gold_N: Tensor, _: Tensor, temperature: float, __: Tensor
    ) -> Tensor:
        student_NE, teacher_NE = event_masses(student_NV, teacher_NV, gold_N, k, temperature)
        return objectives.reverse_event_kl_loss(student_NE, teacher_NE, temperature)

    return loss


def truncated(k: int) -> Loss:
    """k entries, renormalised on both sides."""

    def loss(
        student_NV: Tensor, teacher_NV: Tensor, _: Tensor, __: Tensor, temperature: float, strength_N: Tensor
    ) -> Tensor:
        ids_NK = teacher_NV.topk(k, 1).indices
        return objectives.tidal_kl_loss(
            student_NV.gather(1, ids_NK), teacher_NV.gather(1, ids_NK), strength_N, temperature
        )

    return loss


def methods(sizes: tuple[int, ...]) -> dict[str, tuple[Loss, int]]:
    """Name → (loss, entries)."""
    found: dict[str, tuple[Loss, int]] = {}
    for k in sizes:
        found[f"events k={k}"] = (events(k), k)
        found[f"sampled {k // 2}+{k // 2}"] = (sampled(k, k // 2), k)
        found[f"shared out {k // 2}+{k // 2}"] = (shared_out(k, k // 2), k)
        found[f"truncated k={k}"] = (truncated(k), k)
    return found


def make_student(teacher: Qwen3ForCausalLM, rows: Iterator[Batch], steps: int) -> Qwen3ForCausalLM:
    """Two of the teacher's layers, trained by masked prediction."""
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers, config.layer_types = 2, config.layer_types[:2]
    torch.manual_seed(0)
    student = Qwen3ForCausalLM(config)
    student.model.embed_tokens.load_state_dict(teacher.model.embed_tokens.state_dict())
    optimiser = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0)
    for batch in itertools.islice(rows, steps):
        loss = F.cross_entropy(logits_at_masked(student, batch), batch.clean_BL[batch.masked_BL])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    print(f"student: 2 layers, {steps} steps of masked prediction; its last loss {loss.item():.2f} nats per token")
    return student


def flat_gradient(student: Qwen3ForCausalLM, logits_NV: Tensor, gradient_NV: Tensor) -> Tensor:
    """The gradient with respect to every parameter, as one vector, from that with respect to the logits."""
    found = torch.autograd.grad(logits_NV, list(student.parameters()), gradient_NV, retain_graph=True)
    return torch.cat([g.reshape(-1) for g in found])


def compare(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """(relative error, cosine), of vectors or averaged over rows."""
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-12)
    cosine = F.cosine_similarity(found, expected, dim=-1)
    return float(error.mean()), float(cosine.mean())


def gradient_errors(
    teacher: Qwen3ForCausalLM, student: Qwen3ForCausalLM, rows: list[list[int]], sizes: tuple[int, ...]
) -> list[dict[str, object]]:
    """Every method against the dense loss by timestep, temperature and strength."""
    mask_id = teacher.config.mask_token_id
    results: list[dict[str, object]] = []
    for timestep in TIMESTEPS:
        batch = batch_of(rows, mask_id, timestep, seed=1)
        gold_N, chance_N1, teacher_NV = given(teacher, batch, 0, "tail")
        student_NV = logits_at_masked(student, batch)
        logits_NV = student_NV.detach().requires_grad_()
        for temperature, value in itertools.product(TEMPERATURES, STRENGTHS):
            arguments = (teacher_NV, gold_N, chance_N1, temperature, torch.full((len(gold_N),), value))
            each_NV = torch.autograd.grad(dense(logits_NV, *arguments).mean(), logits_NV)[0]
            whole = flat_gradient(student, student_NV, each_NV)
            outside = {
                k: float(1.0 - F.softmax(teacher_NV / temperature, 1).topk(k, 1).values.sum(1).mean()) for k in sizes
            }
            for name, (loss, k) in methods(sizes).items():
                found_NV = torch.autograd.grad(loss(logits_NV, *arguments).mean(), logits_NV)[0]
                error, cosine = compare(flat_gradient(student, student_NV, found_NV), whole)
                error_each, cosine_each = compare(found_NV, each_NV)
                results.append(
                    {
                        "timestep": timestep, "temperature": temperature, "strength": value, "method": name, "k": k,
                        "outside": outside[k], "error": error, "cosine": cosine,
                        "error_each": error_each, "cosine_each": cosine_each,
                    }
                )  # fmt: skip
        print(f"  t = {timestep}: done", flush=True)
    return results


def errors_by_k(teacher: Qwen3ForCausalLM, student: Qwen3ForCausalLM, rows: list[list[int]]) -> None:
    """Print how the error of each kind of recipe falls with the number of entries, over all timesteps, λ = 1."""
    kinds: list[tuple[str, float, Loss, Callable[[int], Loss]]] = [
        ("forward KL, T = 2, shared out k/2 + k/2", 2.0, dense, lambda k: shared_out(k, k // 2)),
        ("forward KL, T = 2, events", 2.0, dense, events),
        ("forward KL, T = 1, shared out k/2 + k/2", 1.0, dense, lambda k: shared_out(k, k // 2)),
        ("forward KL, T = 1, events", 1.0, dense, events),
        ("reverse KL, T = 2, events", 2.0, dense_reverse, reverse_events),
        ("reverse KL, T = 1, events", 1.0, dense_reverse, reverse_events),
    ]
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for timestep in TIMESTEPS:
        batch = batch_of(rows, teacher.config.mask_token_id, timestep, seed=2)
        gold_N, chance_N1, teacher_NV = given(teacher, batch, 0, "by-k")
        student_NV = logits_at_masked(student, batch)
        logits_NV = student_NV.detach().requires_grad_()
        for name, temperature, exact, make in kinds:
            arguments = (teacher_NV, gold_N, chance_N1, temperature, torch.ones(len(gold_N)))
            expected_NV = torch.autograd.grad(exact(logits_NV, *arguments).mean(), logits_NV)[0]
            whole = flat_gradient(student, student_NV, expected_NV)
            for k in BY_K:
                part_NV = torch.autograd.grad(make(k)(logits_NV, *arguments).mean(), logits_NV)[0]
                error = compare(flat_gradient(student, student_NV, part_NV), whole)
                found.setdefault((name, k), []).append(error)
    print("\nGradient error (cosine), all parameters, by entries k; mean over t; λ = 1")
    print("| recipe | " + " | ".join(f"k={k}" for k in BY_K) + " |\n|---|" + "---|" * len(BY_K))
    for name, *_ in kinds:
        cells = [np.mean(found[name, k], axis=0) for k in BY_K]
        print(f"| {name} | " + " | ".join(f"{error:.2f} ({cosine:.2f})" for error, cosine in cells) + " |")


@torch.no_grad()
def dense_kl(teacher: Qwen3ForCausalLM, student: Qwen3ForCausalLM, batches: list[Batch], temperature: float) -> float:
    """Mean KL(teacher‖student) at T over masked positions, nats."""
    total, count = 0.0, 0
    for batch in batches:
        loss_N = objectives.kl_loss(logits_at_masked(student, batch), logits_at_masked(teacher, batch), temperature)
        total += float(loss_N.sum()) / temperature**2
        count += len(loss_N)
    return total / count


def lift(
    teacher: Qwen3ForCausalLM,
    start: Qwen3ForCausalLM,
    train: list[Batch],
    test: list[Batch],
    loss: Loss,
    temperature: float,
    tidal: bool,
) -> tuple[float, float]:
    """(dense KL at `temperature`, gold NLL) on `test` after one pass over `train` with `loss`.

    `tidal`: λ from 0.1 to 0.9 times (1 − t) as in the paper; else λ = 1.
    """
    student = copy.deepcopy(start)
    optimiser = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0)
    for step, batch in enumerate(train):
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 10) * (1.0 - step / len(train))
        gold_N, chance_N1, teacher_NV = given(teacher, batch, step, "lift")
        strength_N = torch.ones(len(gold_N))
        if tidal:
            t_N = batch.masked_BL.float().mean(1)[:, None].expand(batch.masked_BL.shape)[batch.masked_BL]
            strength_N = strength(step / len(train), t_N, "both", 0.1, 0.9, "cosine")
        value = loss(logits_at_masked(student, batch), teacher_NV, gold_N, chance_N1, temperature, strength_N).mean()
        value.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    with torch.no_grad():
        nll = [F.cross_entropy(logits_at_masked(student, b), b.clean_BL[b.masked_BL], reduction="sum") for b in test]
    return dense_kl(teacher, student, test, temperature), float(sum(nll)) / sum(int(b.masked_BL.sum()) for b in test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="16,64", help="entries per position")
    parser.add_argument("--student-steps", type=int, default=150)
    parser.add_argument("--lift-steps", type=int, default=150)
    parser.add_argument("--rows", type=int, default=16, help="rows of the gradient table")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    sizes = tuple(int(k) for k in options.sizes.split(","))
    teacher = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32, attn_implementation="sdpa").eval()
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    teacher.config.mask_token_id = tokenizer.mask_token_id
    length, rows_per_step = 128, 8

    def cut(held_out: bool) -> Iterator[list[int]]:
        for _, text in documents(held_out=held_out):
            ids = tokenizer(text).input_ids
            if len(ids) >= length:
                yield ids[:length]

    held_out = list(itertools.islice(cut(True), options.rows + 64))
    test_rows, gradient_rows = held_out[:64], held_out[64:]
    train_rows = cut(False)

    def steps(count: int, seed: int) -> Iterator[Batch]:
        for number in range(count):
            rows = list(itertools.islice(train_rows, rows_per_step))
            yield batch_of(rows, tokenizer.mask_token_id, None, seed + number)

    student = make_student(teacher, steps(options.student_steps, 1000), options.student_steps)
    results = gradient_errors(teacher, student, gradient_rows, sizes)
    for what, error, cosine in (
        ("batch, all parameters", "error", "cosine"),
        ("position", "error_each", "cosine_each"),
    ):
        print(f"\nGradient error (cosine) against the dense loss, per {what}; mean over t = {TIMESTEPS}")
        cells = list(itertools.product(TEMPERATURES, STRENGTHS))
        print("| method | bytes | " + " | ".join(f"T={t:g} λ={s:g}" for t, s in cells) + " |")
        print("|---|---|" + "---|" * len(cells))
        for name, (_, k) in methods(sizes).items():
            line = []
            for t, s in cells:
                part = [r for r in results if (r["method"], r["temperature"], r["strength"]) == (name, t, s)]
                line.append(f"{np.mean([r[error] for r in part]):.3f} ({np.mean([r[cosine] for r in part]):.3f})")
            print(f"| {name} | {k * BYTES_PER_ENTRY:.0f} | " + " | ".join(line) + " |")
    print("\nBy timestep, λ = 1, all parameters: error (teacher's mass outside the k)")
    print("| method | T | " + " | ".join(f"t={t:g}" for t in TIMESTEPS) + " |\n|---|---|" + "---|" * len(TIMESTEPS))
    for name, t in itertools.product(methods(sizes), TEMPERATURES):
        part = [r for r in results if (r["method"], r["temperature"], r["strength"]) == (name, t, 1.0)]
        print(f"| {name} | {t:g} | " + " | ".join(f"{r['error']:.3f} ({r['outside']:.2f})" for r in part) + " |")

    errors_by_k(teacher, student, gradient_rows)
    lifts = []
    if options.lift_steps:
        mask_id = tokenizer.mask_token_id
        test = [batch_of(test_rows[i : i + 8], mask_id, None, 5000 + i) for i in range(0, len(test_rows), 8)]
        train = list(steps(options.lift_steps, 9000))
        print(
            f"\nTraining by each loss, {len(train)} steps of {rows_per_step} rows: dense KL (gold NLL) on held-out rows"
        )
        compared = {n: m for n, (m, _) in methods(sizes).items() if n.startswith(("events", "shared out"))}
        for temperature, tidal in ((2.0, False), (2.0, True), (1.0, False)):
            before = dense_kl(teacher, student, test, temperature)
            print(f"T = {temperature:g}, {'λ of TIDAL' if tidal else 'λ = 1'}: before, dense KL {before:.3f}")
            for name, loss in {"dense": dense, **compared}.items():
                kl, nll = lift(teacher, student, train, test, loss, temperature, tidal)
                lifts.append({"temperature": temperature, "tidal": tidal, "method": name, "kl": kl, "nll": nll})
                print(f"  {name:20s} {kl:.4f} ({nll:.3f})", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"gradients": results, "lift": lifts}, indent=1))


if __name__ == "__main__":
    main()
