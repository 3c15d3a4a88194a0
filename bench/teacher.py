"""How fast is the teacher? Scored tokens per second against the plain way of computing the same, in one run.

Four measurements; each pair takes turns, so that what else the machine does hits both:

- *head*: masked positions only, in tiles, against a plain forward with full logits and `topk` (V = 49152, half masked);
- *packing*: 8 draws of one document in `bd3lm` (L = 256, hidden 512) sharing one x_0, against 8 rows [x_0, x_t];
- *teacher*: tokens/s of the embedded teacher, or on a GPU of random weights in the shapes of LLaDA2.0-mini and WeDLM-8B
  in bfloat16, with the share of the matrix-product ceiling that is measured in the same run;
- *capture*: a real capture with the embedded teacher: the share of time that is not the teacher's.

    python bench/teacher.py [--only head,packing,teacher,capture] [--threads 1] [--repeats 5] [--json FILE]

CPU seconds (of all threads) decide the ratios on a CPU: on a busy machine they are the steadier number. On one H100 all of
it takes some minutes. The results of both ways must agree.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stage1_teacher.architectures.families import register
from stage1_teacher.backends import ScoreRequest, load
from stage1_teacher.backends.transformers import TransformersTeacher
from stage1_teacher.head import Head
from stage1_teacher.presets import Preset

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
K = 16
MASK_ID = 1


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    name: str
    scored_per_s: float  # scored tokens/s
    tokens_per_s: float  # text tokens of all passes/s
    note: str


def clock() -> float:
    """CPU seconds of all threads; on a GPU wall seconds, once it has finished."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def in_turn(ways: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Median seconds of each way."""
    seconds: list[list[float]] = [[] for _ in ways]
    for repeat in range(repeats + 1):
        for number, way in enumerate(ways):
            begin = clock()
            way()
            if repeat:  # the first round warms up
                seconds[number].append(clock() - begin)
    return [statistics.median(s) for s in seconds]


def random_teacher(
    kind: str, layout: str, dtype: str = "float32", batch_tokens: int = 4096, mask_id: int = MASK_ID, **shape: Any
) -> TransformersTeacher:
    """A teacher with random weights; no cost depends on them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    register()
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **shape)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    folder = Path(tempfile.mkdtemp())
    config.save_pretrained(folder)
    preset = Preset(name=kind, checkpoint=str(folder), layout=layout, block_size=32, mask_id=mask_id)
    head = Head.of(model, None, kind)
    return TransformersTeacher(preset, folder, model.eval(), head, mask_id, dtype, (1.0, 2.0), batch_tokens)


def draws(documents: int, per_document: int, length: int, vocabulary: int, share: float = 0.5) -> list[ScoreRequest]:
    """Random documents with random masks."""
    rng = np.random.default_rng(0)
    requests = []
    for _ in range(documents):
        clean_L = rng.integers(2, vocabulary, length)
        for _ in range(per_document):
            position_N = np.flatnonzero(rng.random(length) < share)
            noisy_L = clean_L.copy()
            noisy_L[position_N] = MASK_ID
            requests.append(ScoreRequest(noisy_L, position_N, clean_L[position_N], clean_L))
    return requests


def scored(requests: list[ScoreRequest]) -> int:
    return sum(len(r.positions) for r in requests)


@torch.inference_mode()
def head(repeats: int) -> list[Line]:
    """The backend against a plain forward with full logits."""
    vocabulary, length, rows = 49152, 256, 8
    teacher = random_teacher(
        "qwen3", "full", vocab_size=vocabulary, hidden_size=256, intermediate_size=768, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    requests = draws(rows, 1, length, vocabulary)
    input_BL = torch.from_numpy(np.stack([r.token_ids for r in requests])).to(DEVICE)
    gold = [torch.as_tensor(r.gold_ids, device=DEVICE) for r in requests]
    where = [torch.as_tensor(r.positions, device=DEVICE) for r in requests]
    everything = torch.zeros(rows, 1, length, length, device=DEVICE)

    def plain() -> torch.Tensor:
        logits_BLV = teacher._model(input_ids=input_BL, attention_mask=everything, use_cache=False).logits
        logp_BLV = logits_BLV.float().log_softmax(-1)
        logp_BLV.topk(K)
        (logp_BLV / 2.0).logsumexp(-1)
        return torch.cat([logp_BLV[b, where[b], gold[b]] for b in range(rows)])

    difference = float((plain().cpu() - teacher.score(requests, K).gold_logp_N).abs().max())
    slow, fast = in_turn([plain, lambda: teacher.score(requests, K)], repeats)
    count, tokens = scored(requests), rows * length
    return [
        Line("plain forward, full logits", count / slow, tokens / slow, "V = 49152, half of the positions masked"),
        Line(
            "scored positions in tiles",
            count / fast,
            tokens / fast,
            f"{slow / fast:.2f} x; differ by {difference:.0e} nats",
        ),
    ]


@torch.inference_mode()
def packing(repeats: int) -> list[Line]:
    """One x_0 for 8 draws against 8 rows [x_0, x_t] under a dense mask."""
    length, count, vocabulary = 256, 8, 512
    teacher = random_teacher(
        "qwen3", "bd3lm", batch_tokens=8192, vocab_size=vocabulary, hidden_size=512, intermediate_size=1536,
        num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    requests = draws(1, count, length, vocabulary)
    input_BS = torch.from_numpy(np.stack([np.concatenate([r.clean_ids, r.token_ids]) for r in requests])).to(DEVICE)
    position_BS = torch.arange(length, device=DEVICE).repeat(2)[None].expand(count, -1)
    block_S, clean_S = position_BS[0] // 32, torch.arange(2 * length, device=DEVICE) < length
    query, key = block_S[:, None], block_S[None]
    sees_SS = torch.where(
        clean_S[:, None], clean_S[None] & (query >= key), torch.where(clean_S[None], query > key, query == key)
    )
    bias = torch.zeros(count, 1, 2 * length, 2 * length, device=DEVICE).masked_fill_(~sees_SS, float("-inf"))
    rows_N = np.concatenate([b * 2 * length + length + np.asarray(r.positions) for b, r in enumerate(requests)])
    gold_N = torch.from_numpy(np.concatenate([r.gold_ids for r in requests])).to(DEVICE)

    def separate() -> torch.Tensor:
        hidden = teacher._decoder(
            input_ids=input_BS, attention_mask=bias, position_ids=position_BS, use_cache=False
        ).last_hidden_state.flatten(0, 1)
        return teacher._head.score(hidden[torch.from_numpy(rows_N).to(DEVICE)], gold_N, K, (1.0, 2.0)).gold_logp_N

    difference = float((separate() - teacher.score(requests, K).gold_logp_N).abs().max())
    slow, fast = in_turn([separate, lambda: teacher.score(requests, K)], repeats)
    n, tokens = scored(requests), count * length
    return [
        Line("8 rows [x_0, x_t]", n / slow, tokens / slow, "bd3lm, L = 256, hidden 512"),
        Line("8 draws share one x_0", n / fast, tokens / fast, f"{slow / fast:.2f} x; differ by {difference:.0e} nats"),
    ]


def ceiling(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product in this type, on this device, now."""
    size = 8192 if DEVICE.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    (seconds,) = in_turn([lambda: a @ b], 5)
    return 2 * size**3 / seconds


def active_flops(teacher: TransformersTeacher) -> float:
    """FLOP of matrix products per token outside attention and head: twice the weights that a token meets."""
    config = teacher._model.config
    used = 0.0
    for name, parameter in teacher._decoder.named_parameters():
        if "embed" in name:
            continue
        routed = ".experts." in name and "shared" not in name
        used += parameter.numel() * (config.num_experts_per_tok / config.num_experts if routed else 1.0)
    return 2 * used


def speed(teacher: TransformersTeacher, name: str, repeats: int, documents: int, length: int) -> Line:
    """Throughput of 4 draws per document, half of the positions masked."""
    requests = draws(documents, 4, length, teacher.vocabulary)
    (seconds,) = in_turn([lambda: teacher.score(requests, K)], repeats)
    tokens = len(requests) * length
    shared = documents * length if teacher._layout.reads_clean else 0
    head_flops = 2 * scored(requests) * teacher._head.weight_VD.numel()
    flops = active_flops(teacher) * (tokens + shared) + head_flops
    top = ceiling(getattr(torch, teacher.dtype))
    note = f"{flops / seconds / top:.0%} of {top / 1e12:.2f} TFLOP/s ({teacher.layout}, {teacher.dtype}, L = {length})"
    return Line(name, scored(requests) / seconds, tokens / seconds, note)


def teachers(repeats: int) -> list[Line]:
    """The embedded teacher, and on a GPU the real shapes."""
    lines = []
    if DEVICE.type == "cpu":
        tiny: Any = load("tiny")
        for layout in ("full", "bd3lm"):
            lines.append(speed(tiny.varied(layout, 0, MASK_ID), "embedded teacher", repeats, 4, 192))
        return lines
    mixture = random_teacher("llada2_moe", "bd3lm", "bfloat16", 32768)
    for layout in ("full", "bd3lm"):
        lines.append(speed(mixture.varied(layout, 0, MASK_ID), "LLaDA2.0-mini, random", 2, 16, 1024))
    del mixture
    torch.cuda.empty_cache()
    dense = random_teacher(
        "qwen3", "reordered", "bfloat16", 32768, vocab_size=151936, hidden_size=4096, intermediate_size=12288,
        num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    for layout in ("bd3lm", "reordered"):
        lines.append(speed(dense.varied(layout, 0, MASK_ID), "WeDLM-8B, random", 2, 16, 768))
    return lines


def capture(_: int) -> list[Line]:
    """A real capture: what preparing, writing and everything else add to the teacher's own time."""
    with tempfile.TemporaryDirectory() as folder:
        summary = Path(folder) / "summary.json"
        command = [sys.executable, "-m", "shared.cli", "teacher", "capture", "--limit", "200", "--held-out", "none"]
        subprocess.run([*command, "--out", f"{folder}/cache", "--json", str(summary)], check=True, capture_output=True)
        data = json.loads(summary.read_text())
    seconds, inside = data["seconds"], data["teacher_seconds"]
    tokens = data["train"]["run"]["tokens_scored"]
    note = (
        f"waiting for text {data['preparing_seconds'] / seconds:.1%}, for the disk {data['writing_seconds'] / seconds:.1%}, "
        f"all but the teacher {1 - inside / seconds:.1%} of {seconds:.0f} s"
    )
    return [Line("capture, embedded teacher", tokens / seconds, float("nan"), note)]


PARTS = {"head": head, "packing": packing, "teacher": teachers, "capture": capture}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lines = []
    print(f"{DEVICE.type}, {arguments.threads} threads\n{'':30} {'scored/s':>10} {'tokens/s':>10}")
    for name in arguments.only.split(","):
        for line in PARTS[name](arguments.repeats):
            print(f"{line.name:30} {line.scored_per_s:10,.0f} {line.tokens_per_s:10,.0f}  {line.note}", flush=True)
            lines.append(vars(line))
    if arguments.json:
        arguments.json.write_text(json.dumps(lines, indent=2) + "\n")


if __name__ == "__main__":
    main()
