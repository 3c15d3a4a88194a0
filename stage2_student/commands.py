"""`tidecache student train` and `tidecache student score`; the commands of `commands_use` join the group.

Heavy imports happen inside the commands, so that `--help` stays fast.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from shared.embedded import EMBEDDED, embedded_or
from shared.errors import TidecacheError
from stage2_student import commands_use

app = typer.Typer(no_args_is_help=True, help="Stage 2: train students from a cache, and measure them.")

DEFAULT_RECIPE = "reverse-calm-tidal"


@app.callback()
def student() -> None:
    """Stage 2: train students from a cache, and measure them."""


def newest_cache(home: Path | None = None) -> Path:
    """The cache under TIDECACHE_HOME (default ./caches) whose manifest changed last.

    Raises:
        TidecacheError: there is none.
    """
    home = home or Path(os.environ.get("TIDECACHE_HOME") or "caches")
    manifests = sorted(home.glob("*/manifest.json"), key=lambda path: path.stat().st_mtime)
    if not manifests:
        raise TidecacheError(
            f"{home}: no cache found there: capture one with `make cache`, or say where one is with --cache or "
            "TIDECACHE_HOME"
        )
    return manifests[-1].parent


@app.command()
def train(
    cache: Annotated[
        list[str] | None,
        typer.Option(
            help="Cache folder or address, and its share of the rows: CACHE or CACHE=WEIGHT; repeatable. Default: the "
            "newest under TIDECACHE_HOME."
        ),
    ] = None,
    base: Annotated[str, typer.Option(help="Base model: a folder, a Hugging Face id, or tiny.")] = EMBEDDED,
    recipe: Annotated[str, typer.Option(help="A named recipe, or a TOML file.")] = DEFAULT_RECIPE,
    out: Annotated[Path | None, typer.Option(help="Checkpoint folder. Default: runs/RECIPE.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in OUT.")] = False,
    eval_cache: Annotated[
        str | None,
        typer.Option(help="Cache to evaluate on. Default: the first cache's held-out part, where it has one."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop before step 1, after one batch's loss.")] = False,
    report_to: Annotated[list[str] | None, typer.Option(help="wandb, tensorboard, trackio, …; repeatable.")] = None,
    objective: Annotated[str | None, typer.Option(help="none, calm, reverse-calm, kl or reverse-kl.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Distillation temperature.")] = None,
    distill_weight: Annotated[float | None, typer.Option(help="Weight of distillation beside cross-entropy.")] = None,
    gold_share: Annotated[float | None, typer.Option(help="Share of the gold in the target of KL.")] = None,
    context: Annotated[str | None, typer.Option(help="compdemo or plain.")] = None,
    tidal: Annotated[str | None, typer.Option(help="none, interpolate or weight.")] = None,
    tidal_axis: Annotated[str | None, typer.Option(help="both, training or timestep.")] = None,
    tidal_decay: Annotated[str | None, typer.Option(help="cosine or linear.")] = None,
    lambda_init: Annotated[float | None, typer.Option(help="TIDAL's λ at the start.")] = None,
    lambda_max: Annotated[float | None, typer.Option(help="TIDAL's λ at the end.")] = None,
    timestep_weight: Annotated[str | None, typer.Option(help="uniform, midrange, measured, or numbers by bin.")] = None,
    ce_normalisation: Annotated[str | None, typer.Option(help="token, sequence or batch.")] = None,
    fresh: Annotated[str | None, typer.Option(help="Share of rows with fresh masks, or auto.")] = None,
    reuse: Annotated[str | None, typer.Option(help="A draw used again masks: same, halves in turn, or auto.")] = None,
    min_coverage: Annotated[float | None, typer.Option(help="Least share of chunks with a teacher's score.")] = None,
    draws_together: Annotated[int | None, typer.Option(help="Draws of one document, one after the other.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens per attention block.")] = None,
    block_start: Annotated[str | None, typer.Option(help="Blocks count from: sequence or response.")] = None,
    min_timestep: Annotated[float | None, typer.Option(help="Leave out draws below.")] = None,
    max_timestep: Annotated[float | None, typer.Option(help="Leave out draws above.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of the steps with a rising rate.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="cosine, linear or constant_with_warmup.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's weight decay.")] = None,
    max_grad_norm: Annotated[float | None, typer.Option(help="Clip gradients to this norm; 0: never.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows per process and micro-batch.")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Micro-batches per optimiser step.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the documents, where steps is 0.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps; 0: from epochs.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32 or bf16.")] = None,
    activation_checkpointing: Annotated[
        bool | None, typer.Option(help="Compute layers again in backward instead of keeping their activations.")
    ] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Rank of LoRA adapters; 0: train all weights.")] = None,
    lora_alpha: Annotated[int | None, typer.Option(help="LoRA's α; adapters are scaled by α / rank.")] = None,
    lora_targets: Annotated[str | None, typer.Option(help="all-linear, or module names with commas.")] = None,
    seed: Annotated[int | None, typer.Option(help="Order of rows, and fresh masks.")] = None,
    logging_steps: Annotated[int | None, typer.Option(help="Steps between log lines.")] = None,
    save_steps: Annotated[int | None, typer.Option(help="Steps between checkpoints; 0: only the result.")] = None,
    eval_steps: Annotated[int | None, typer.Option(help="Steps between held-out evaluations; 0: none.")] = None,
    eval_documents: Annotated[int | None, typer.Option(help="Held-out documents of an evaluation.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that prepare batches; -1: 2 beside a GPU, 0 on a CPU.")
    ] = None,
    peak_tflops: Annotated[
        float | None, typer.Option(help="TFLOP/s of one device, which MFU is a share of; 0: measured.")
    ] = None,
) -> None:
    """Train a student from a cache.

    Without options: the embedded base on the newest cache, Reverse CALM with TIDAL weighting.
    """
    given: dict[str, Any] = dict(locals())
    from shared.cache.mixing import WeightedCache
    from stage2_student.config import TrainConfig, base_defaults, load_recipe

    overrides = {name: given[name] for name in TrainConfig.__dataclass_fields__ if given[name] is not None}
    model = embedded_or(base)
    config = load_recipe(recipe, overrides, base_defaults(model))
    source = [WeightedCache.parse(text) for text in cache] if cache else [WeightedCache(str(newest_cache()))]
    from stage2_student import run

    target = out or Path("runs") / Path(recipe).name.removesuffix(".toml")
    summary = run.train(
        config,
        source,
        model,
        target,
        report_to=report_to or (),
        resume=resume,
        stop_before_training=dry_run,
        eval_cache=eval_cache,
    )
    if not dry_run and int(os.environ.get("RANK", "0")) == 0:
        typer.echo(f"trained {summary['steps']} steps in {summary['seconds']:.0f} s; checkpoint: {target}")


@app.command()
def score(
    model: Annotated[list[str] | None, typer.Option(help="Student: a folder or a Hugging Face id; repeatable.")] = None,
    autoregressive: Annotated[list[str] | None, typer.Option(help="Autoregressive model beside; repeatable.")] = None,
    cache: Annotated[
        str | None, typer.Option(help="Cache folder or address. Default: the newest cache's held-out part.")
    ] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens per block. Default: the model's own, or 32.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first documents.", min=1)] = None,
    batch: Annotated[int, typer.Option(help="Rows per batch.", min=1)] = 16,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers there as JSON.")] = None,
) -> None:
    """Held-out quality: bits per byte, top-1 accuracy and calibration of masked chunks by timestep, beside the teacher's."""
    import torch
    from rich.console import Console
    from transformers.utils import logging as transformers_logging

    from shared.cache import open_cache
    from shared.cache.manifest import HELD_OUT_FOLDER
    from stage2_student import evaluation
    from stage2_student import score as scoring
    from stage2_student.model import load_student

    transformers_logging.disable_progress_bar()
    source = cache or newest_cache() / HELD_OUT_FOLDER
    opened = open_cache(source)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {}
    for name in model or [EMBEDDED]:
        student = load_student(embedded_or(name))
        size = student.check_blocks(name, block_size) or 32
        found[name] = evaluation.evaluate(student, opened, size, limit, batch, device)
    bounds = {name: scoring.bound(e) for name, e in found.items()}
    others = {
        name: scoring.autoregressive(load_student(embedded_or(name)), opened, limit, device)
        for name in autoregressive or []
    }
    console = Console()
    console.print(scoring.table(found, others))
    # The teacher saw another context than the students, so its rows stand last and apart.
    found |= {f"teacher, {context}": e for context, e in evaluation.evaluate_teacher(opened, limit).items()}
    console.print(evaluation.table(found))
    if json_file is not None:
        described = {
            "cache": str(source),
            "fingerprint": opened.spec.fingerprint,
            "bins": evaluation.bin_names(),
            "rows": [{"name": name, **e.to_json()} for name, e in found.items()],
            "bits_per_byte_bound": bounds,
            "autoregressive": {name: measured.to_json() for name, measured in others.items()},
        }
        try:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise TidecacheError(f"{json_file}: cannot be written ({error.strerror}): choose another --json") from error


app.registered_commands += commands_use.app.registered_commands
