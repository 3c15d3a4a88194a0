"""Evidence at a size that needs a GPU: SmolLM2-135M as a block-diffusion teacher on code; at most 25 minutes on one.

    python bench/evidence_gpu.py                                      # SmolLM2-135M from the hub
    python bench/evidence_gpu.py --model stage2_student/tiny --scale smoke     # 3 steps, on a CPU

The model is continued on code until it denoises (the teacher), and so are its first layers (the student's base). Then as
in `bench/evidence.py`, with three seeds: cross-entropy, event KL from 1, 2 and 4 stored draws with and without fresh
rows, from as many draws as epochs (the teacher in the loop), and from the n-gram control; quality and infilling on
modules that were in no training text. Stages and cells that are done are not done again.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from evidence_cells import CROSS_ENTROPY, CacheChoice, Cell, Scale, events
from evidence_found import Found, bits, infilled, markdown
from evidence_results import Results, spread
from evidence_work import Pair, Workshop, capture
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from stage1_teacher.draft import Draft
from stage1_teacher.options import CaptureOptions
from stage2_student.config import load_recipe
from stage2_student.run import train


@dataclass(frozen=True)
class GpuScale:
    """`teacher_steps`, `base_steps`: of continued training on code; `layers`: the base's, the model's first ones."""

    cells: Scale
    corpus: int
    teacher_steps: int
    base_steps: int
    layers: int
    batch: int


SCALES = {
    "gpu": GpuScale(
        Scale("gpu", documents=1024, test_documents=320, epochs=4, batch=32, seeds=3,
            learning_rate=3e-4, contexts="compdemo"),
        corpus=8000, teacher_steps=1500, base_steps=600, layers=8, batch=32,
    ),
    "smoke": GpuScale(
        Scale("smoke", documents=6, test_documents=24, epochs=2, batch=4, seeds=1,
            contexts="compdemo"),
        corpus=40, teacher_steps=3, base_steps=3, layers=1, batch=2,
    ),
}  # fmt: skip


def grid(scale: Scale) -> list[Cell]:
    """What is compared, for seed 0; draws of 0: as many as epochs."""
    found = [CROSS_ENTROPY]
    for draws in (1, 2, 0):
        for fresh in (0.0, 0.5) if draws else (0.0,):
            found.append(events(CacheChoice(draws=draws), fresh=fresh))
    halves = [events(CacheChoice(draws=draws), reuse="halves") for draws in (1, 2)]
    return [*found, *halves, events(CacheChoice(teacher="ngram"))]


def continued(model: str, out: Path, steps: int, layers: int | None, scale: GpuScale) -> Path:
    """The model, or its first layers, trained as a block-diffusion model on code with cross-entropy and fresh masks."""
    if (out / "tidecache.json").exists():
        return out
    start = out.with_name(f"{out.name}-start")
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if layers is not None:
        loaded.model.layers = loaded.model.layers[:layers]
        loaded.config.num_hidden_layers = layers
        if getattr(loaded.config, "layer_types", None):
            loaded.config.layer_types = loaded.config.layer_types[:layers]
    loaded.save_pretrained(start)
    AutoTokenizer.from_pretrained(model).save_pretrained(start)
    cache = code_cache(model, out.with_name("code"), scale.corpus)
    shutil.rmtree(out, ignore_errors=True)
    overrides = {
        "steps": steps, "batch": scale.batch, "learning_rate": 3e-4, "fresh": 1.0, "save_steps": 0, "block_size": 32,
        "precision": "bf16" if torch.cuda.is_available() else "float32",
    }  # fmt: skip
    train(load_recipe("cross-entropy", overrides), str(cache), start, out, console=Console(quiet=True))
    return out


def code_cache(tokenizer: str, folder: Path, documents: int) -> Path:
    """Code as a cache, since stage 2 reads nothing else: the gold lane alone, of one draw that is never used."""
    options = CaptureOptions(
        corpus="stdlib", limit=documents, draws=1, lanes="gold", students=[tokenizer], out=folder, held_out="corpus"
    )
    draft = Draft.of(options)
    teacher, spec = draft.load()
    capture(draft, teacher, spec, folder)
    return folder


def main() -> None:
    """Make the pair, train what has no result yet, print the table."""
    parser = argparse.ArgumentParser(description="Evidence with SmolLM2-135M on a GPU.")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="a folder or a hub id")
    parser.add_argument("--scale", choices=list(SCALES), default="gpu")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence-gpu"))
    parser.add_argument("--results", type=Path, help="JSON lines; default: OUT/results.jsonl")
    options = parser.parse_args()
    scale, console = SCALES[options.scale], Console()
    results = Results(options.results or options.out / "results.jsonl")
    begin = time.monotonic()
    teacher = continued(options.model, options.out / "teacher", scale.teacher_steps, None, scale)
    base = continued(options.model, options.out / "base", scale.base_steps, scale.layers, scale)
    console.print(f"teacher and base: {time.monotonic() - begin:.0f} s", highlight=False)
    pair = Pair(str(teacher), str(base), str(base), "bd3lm", 32, "cuda" if torch.cuda.is_available() else "cpu")
    work = Workshop(options.out / "cells", scale.cells, console, pair)
    if "base" not in results.cells:
        results.add("base", {"device": device_name(), **work.measure(base)})
    todo = [dataclasses.replace(first, seed=seed) for seed in range(scale.cells.seeds) for first in grid(scale.cells)]
    for number, one in enumerate(todo, 1):
        if one.digest(scale.cells) in results.cells:
            continue
        started = time.monotonic()
        found = work.result(one)
        results.add(one.digest(scale.cells), {"cell": one.to_json(), **found})
        console.print(
            f"{number}/{len(todo)} {one.label}, seed {one.seed}: {found['bits_per_byte']:.4f} bits per byte, "
            f"{time.monotonic() - started:.0f} s",
            highlight=False,
        )
    took = work.captured(CacheChoice())
    print(f"capture of {scale.cells.draws} draws: {took.seconds:.0f} s, {took.bytes:,} bytes")
    print(table(Found(scale.cells, results), grid(scale.cells)))


def table(found: Found, firsts: list[Cell]) -> str:
    """One row per cell, with the paired difference to cross-entropy."""
    rows = []
    for first in firsts:
        records = found.records(first)
        difference = found.paired(first, CROSS_ENTROPY, bits)
        columns = [[metric(r) for r in records] for metric in (bits, infilled(2), infilled(0))]
        rows.append(
            [first.label, spread(columns[0]), spread(difference, signed=True), *[spread(c, 1) for c in columns[1:]]]
        )
    head = ["student", "bits per byte", "− cross-entropy's", "spans % at 1 token per forward", "at 4"]
    return f"{device_name()}\n\n" + markdown(head, rows)


def device_name() -> str:
    """What it ran on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


if __name__ == "__main__":
    main()
