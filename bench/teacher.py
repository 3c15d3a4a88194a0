"""How fast is the teacher? Scored tokens per second against the plain way of computing the same, in one run.

- *head*: masked positions only, in tiles, against a plain forward with full logits and `topk` (V = 49152, half masked);
- *packing*: 8 draws of one document in `bd3lm` (L = 256, hidden 512) sharing one x_0, against 8 rows [x_0, x_t];
- *teacher*, in both backends: tokens/s of the embedded teacher, or on a GPU of random weights in the shapes of LLaDA2.0-mini
  and WeDLM-8B in bfloat16, with the share of the matrix-product ceiling that is measured in the same run; and what a
  capture of real text (tokenising, fillings, encoding, writing, all beside the teacher) takes over the teacher alone.

    python bench/teacher.py [--only head,packing,teacher] [--backend both] [--shapes auto] [--threads 1] [--json FILE]

Ways that are compared take turns, so that what else the machine does hits both, and their results must agree. CPU seconds
(of all threads) decide the ratios of *head* and *packing* on a CPU: on a busy machine they are the steadier number. A
capture is compared by the clock on the wall, and needs two idle cores for that. The vllm backend runs in a process of its
own, of this Python or of `.venv-vllm`, and is stopped when the time is up. Once --minutes are over no row and no further
round is begun, so that all of it ends within 8 minutes on one H100: by design, for it has not been run on one.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from teacher_shapes import DEVICE, MASK_ID, REAL, SCALED, Shape, active_flops, random_teacher, random_vllm_teacher

from shared.cache.vocabulary import TeacherVocabulary
from shared.cache.writer import CacheWriter
from shared.spec import CaptureSpec, StudentTokenizerSpec, TeacherSpec
from shared.tokenization import TextTokenizer
from stage1_teacher.backends import ScoreRequest, load
from stage1_teacher.capture import Extent
from stage1_teacher.planning import segments
from stage1_teacher.shards import LocalEngine, ShardMaker

ROOT = Path(__file__).resolve().parent.parent
K = 16
BACKENDS = ("transformers", "vllm")
VLLM_LAYOUTS = ("full", "block-causal", "bd3lm")


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    name: str
    scored_per_s: float  # scored tokens/s
    tokens_per_s: float  # text tokens of all passes/s
    note: str


def left_out(name: str, why: str) -> Line:
    """A row without numbers."""
    return Line(name, float("nan"), float("nan"), f"left out: {why}")


@dataclass(frozen=True)
class Settings:
    """What is measured in this process. `shapes`: tiny, scaled or real; `until`: of the monotonic clock."""

    backend: str
    shapes: str
    shards: int
    until: float

    def late(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.until

    def chosen(self) -> Iterator[tuple[Shape, Callable[[str], Any]]]:
        """Each network, and what starts it in a layout."""
        if self.shapes == "tiny":
            from transformers import AutoConfig

            fields = AutoConfig.from_pretrained(ROOT / "stage1_teacher/tiny").to_dict()
            layouts = ("full", "bd3lm")
            start = partial(load, "tiny", self.backend)
            yield Shape("embedded teacher", fields.pop("model_type"), layouts, 192, fields), start
            return
        dtype, budget = ("bfloat16", 32768) if DEVICE.type == "cuda" else ("float32", 4096)
        for shape in REAL if self.shapes == "real" else SCALED:
            make = random_teacher if self.backend == "transformers" else random_vllm_teacher
            yield shape, partial(make, shape.config, dtype=dtype, batch_tokens=budget)


class Deaf:
    """A watcher that does nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def wall() -> float:
    """Seconds on the wall, once the device has finished."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def work() -> float:
    """CPU seconds of all threads; on a GPU wall seconds."""
    return wall() if DEVICE.type == "cuda" else time.process_time()


def in_turn(
    ways: list[Callable[[], Any]], repeats: int, clock: Callable[[], float] = work, until: float = float("inf")
) -> list[float]:
    """Median seconds of each way; after `until` (of the monotonic clock) one round is enough."""
    seconds: list[list[float]] = [[] for _ in ways]
    for repeat in range(repeats + 1):
        if repeat > 1 and time.monotonic() > until:
            break
        for number, way in enumerate(ways):
            begin = clock()
            way()
            if repeat:  # the first round warms up
                seconds[number].append(clock() - begin)
    return [statistics.median(s) for s in seconds]


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
def head(repeats: int, until: float) -> list[Line]:
    """The backend against a plain forward with full logits."""
    vocabulary, length, rows = 49152, 256, 8
    fields = {
        "vocab_size": vocabulary, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    teacher = random_teacher(Shape("head", "qwen3", (), length, fields).config, "full")
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
    slow, fast = in_turn([plain, lambda: teacher.score(requests, K)], repeats, until=until)
    count, tokens = scored(requests), rows * length
    return [
        Line("plain forward, full logits", count / slow, tokens / slow, "V = 49152, half of the positions masked"),
        Line(
            "scored positions in tiles",
            count / fast,
            tokens / fast,
            f"{slow / fast:.2f} x (target ≥ 1.5); differ by {difference:.0e} nats",
        ),
    ]


@torch.inference_mode()
def packing(repeats: int, until: float) -> list[Line]:
    """One x_0 for 8 draws against 8 rows [x_0, x_t] under a dense mask."""
    length, count, vocabulary = 256, 8, 512
    fields = {
        "vocab_size": vocabulary, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    teacher = random_teacher(Shape("packing", "qwen3", (), length, fields).config, "bd3lm", batch_tokens=8192)
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
    slow, fast = in_turn([separate, lambda: teacher.score(requests, K)], repeats, until=until)
    n, tokens = scored(requests), count * length
    return [
        Line("8 rows [x_0, x_t]", n / slow, tokens / slow, "bd3lm, L = 256, hidden 512"),
        Line(
            "8 draws share one x_0",
            n / fast,
            tokens / fast,
            f"{slow / fast:.2f} x (target ≥ 1.4); differ by {difference:.0e} nats",
        ),
    ]


def ceiling(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product in this type, on this device, now."""
    size = 8192 if DEVICE.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    (seconds,) = in_turn([lambda: a @ b], 5)
    return 2 * size**3 / seconds


def speed(
    teacher: Any, config: Any, name: str, repeats: int, documents: int, length: int, until: float = float("inf")
) -> Line:
    """Throughput of 4 draws per document, half of the positions masked."""
    requests = draws(documents, 4, length, teacher.vocabulary)
    (seconds,) = in_turn([lambda: teacher.score(requests, K)], repeats, until=until)
    tokens = len(requests) * length
    shared = documents * length if teacher.layout in ("bd3lm", "reordered") else 0
    head_flops = 2 * scored(requests) * config.vocab_size * config.hidden_size
    flops = active_flops(config) * (tokens + shared) + head_flops
    top = ceiling(getattr(torch, teacher.dtype))
    note = f"{flops / seconds / top:.0%} of {top / 1e12:.2f} TFLOP/s ({teacher.layout}, {teacher.dtype}, L = {length})"
    return Line(name, scored(requests) / seconds, tokens / seconds, note)


def teachers(repeats: int, settings: Settings) -> Iterator[Line]:
    """The embedded teacher, and real or scaled shapes, in one backend: tokens/s, then what a capture adds to that."""
    for shape, start in settings.chosen():
        for layout in shape.layouts:
            if settings.backend == "vllm" and layout not in VLLM_LAYOUTS:
                continue
            name = f"{settings.backend}: {shape.name}"
            if settings.late():
                yield left_out(name, f"the time is up ({layout})")
                continue
            teacher = start(layout)
            documents = 16 if DEVICE.type == "cuda" else 4  # enough for full batches
            yield speed(teacher, shape.config, name, repeats, documents, shape.length, settings.until)
            if layout == shape.layouts[0]:
                yield overlap(teacher, f"  capture with it ({layout})", repeats, shape.length, settings)
            if hasattr(teacher, "close"):
                teacher.close()
            del teacher
            gc.collect()
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()


def overlap(teacher: Any, name: str, repeats: int, length: int, settings: Settings) -> Line:
    """A whole capture of real text against the teacher alone on the same requests: what tokenising and writing add.

    The vocabulary is padded to the teacher's: its ids need names in a cache, and no cost depends on these.
    """
    tokenizer, student = (TextTokenizer.load(ROOT / f) for f in ("stage1_teacher/tiny", "stage2_student/tiny"))
    fields = {n: getattr(teacher, n) for n in ("layout", "block_size", "mask_id", "logit_shift", "dtype", "vocabulary")}
    spec = CaptureSpec(
        teacher=TeacherSpec("random", "random", "0" * 32, tokenizer.digest, **fields),
        students=(StudentTokenizerSpec(student.name, student.digest, length),),
        length_limit=length,
        k=K,
        held_out="none",
        batch_tokens=teacher.batch_tokens,
    )
    padding = teacher.vocabulary - tokenizer.vocabulary
    special_V = np.concatenate([tokenizer.special, np.zeros(max(padding, 0), dtype=np.bool_)])
    vocabulary = TeacherVocabulary(
        tokenizer.name, tokenizer.digest, [*tokenizer.token_bytes, *[b"?"] * padding], special_V
    )
    documents = 8
    extent = Extent("stdlib", draws=4, documents_per_shard=documents, limit=settings.shards * documents)
    todo = list(segments(extent.stream(spec, held_out=False), (), extent.draws, documents, Path()))
    maker = ShardMaker(spec, tokenizer, [student])
    jobs = [job for segment in todo for job in maker.jobs(segment)]

    def alone() -> None:
        for job in jobs:
            teacher.score(job.requests, K)

    def capture() -> None:
        with tempfile.TemporaryDirectory() as folder:
            writer = CacheWriter.open(folder, spec, vocabulary)
            LocalEngine(teacher, maker).run(iter(todo), lambda shard: writer.commit(shard.encoded), Deaf())
            writer.finish()

    bare, whole = in_turn([alone, capture], repeats, wall, settings.until)
    tokens = sum(job.positions for job in jobs)
    text = sum(len(r.token_ids) for job in jobs for r in job.requests)
    note = (
        f"{whole / bare - 1:+.1%} over the teacher alone (target ≤ 5 %; {bare:.1f} s of wall time, {len(jobs)} shards)"
    )
    return Line(name, tokens / whole, text / whole, note)


def of_vllm(arguments: argparse.Namespace, until: float) -> Iterator[Line]:
    """The rows of the vllm backend, from a process in an environment that has it."""
    left = until - time.monotonic()
    if left <= 0:
        yield left_out("vllm", "the time is up")
        return
    python = arguments.vllm_python
    if python is None:
        here = importlib.util.find_spec("vllm") is not None
        found = Path(sys.executable) if here else ROOT / ".venv-vllm/bin/python"
        python = found if found.exists() else None
    if python is None:
        yield left_out("vllm", "not here, and no .venv-vllm (`make vllm-env`)")
        return
    with tempfile.TemporaryDirectory() as folder:
        summary = Path(folder) / "lines.json"
        options = {"only": "teacher", "backend": "vllm", "minutes": left / 60, "json": summary}
        options |= {name: getattr(arguments, name) for name in ("shapes", "threads", "repeats", "shards")}
        command = [python, __file__, *(f"--{name}={value}" for name, value in options.items())]
        late = False
        try:
            done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=left)
        except subprocess.TimeoutExpired:
            late = True
        else:
            if done.returncode:
                sys.exit(f"the vllm backend failed:\n{done.stderr[-2000:]}")
        for line in json.loads(summary.read_text()) if summary.exists() else ():  # each row is there once it is done
            yield Line(**line)
        if late:
            yield left_out("vllm", "the time was up before the rest was measured")


def measure(arguments: argparse.Namespace) -> Iterator[Line]:
    """All that was asked for."""
    until = time.monotonic() + 60 * arguments.minutes
    shapes = arguments.shapes
    if shapes == "auto":
        shapes = "real" if DEVICE.type == "cuda" else "tiny"
    parts = arguments.only.split(",")
    for part in (head, packing):
        if part.__name__ in parts:
            if time.monotonic() > until:
                yield left_out(part.__name__, "the time is up")
            else:
                yield from part(arguments.repeats, until)
    if "teacher" not in parts:
        return
    if arguments.backend != "vllm":
        yield from teachers(arguments.repeats, Settings("transformers", shapes, arguments.shards, until))
    if arguments.backend == "both":
        yield from of_vllm(arguments, until)
    elif arguments.backend == "vllm":
        yield from teachers(arguments.repeats, Settings("vllm", shapes, arguments.shards, until))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="head,packing,teacher")
    parser.add_argument("--backend", default="both", choices=(*BACKENDS, "both"))
    parser.add_argument("--shapes", default="auto", choices=("auto", "tiny", "scaled", "real"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shards", type=int, default=6, help="of a capture")
    parser.add_argument("--minutes", type=float, default=5, help="after which nothing more is begun")
    parser.add_argument("--vllm-python", type=Path, help="the Python that has vLLM")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lines = []
    print(f"{DEVICE.type}, {arguments.threads} threads\n{'':34} {'scored/s':>10} {'tokens/s':>10}")
    for line in measure(arguments):
        print(f"{line.name:34} {line.scored_per_s:10,.0f} {line.tokens_per_s:10,.0f}  {line.note}", flush=True)
        lines.append(vars(line))
        if arguments.json:  # whole after each row: who is stopped leaves what was measured
            unfinished = arguments.json.with_suffix(".part")
            unfinished.write_text(json.dumps(lines, indent=2) + "\n")
            unfinished.replace(arguments.json)


if __name__ == "__main__":
    main()
