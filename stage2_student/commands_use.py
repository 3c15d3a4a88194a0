"""`tidecache student generate | chat | evaluate | export`: what one does with a trained student.

`commands` adds these to the group. Heavy imports happen inside the commands, so that `--help` stays fast.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from stage2_student.inference import Checkpoint
    from stage2_student.sampler import SampleOptions

app = typer.Typer()

Model = Annotated[str, typer.Option(help="Checkpoint: a folder, a Hugging Face id, or tiny.")]
BlockSize = Annotated[int | None, typer.Option(help="Tokens per block, where the checkpoint does not say.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, … Default: a GPU if there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
Steps = Annotated[int, typer.Option(help="Denoising steps for that many tokens; 0: one per token.")]
Temperature = Annotated[float, typer.Option(help="0: always the most likely token.")]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens that make up this share.")]
Remasking = Annotated[str, typer.Option(help="Which tokens a step commits: low-confidence or random.")]
Threshold = Annotated[float | None, typer.Option(help="Commit every token above this probability in a step.")]
Blocks = Annotated[str | None, typer.Option(help="Blocks count from: sequence or response. Default: as trained.")]
Seed = Annotated[int, typer.Option(help="Same seed, same answers.")]


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _as_trained(options: SampleOptions, blocks: str | None, checkpoint: Checkpoint) -> SampleOptions:
    """Start blocks where the checkpoint's started in training, unless the user says where."""
    return options if blocks else dataclasses.replace(options, blocks=checkpoint.block_start)


@app.command()
def generate(
    prompts: Annotated[Path, typer.Argument(help="JSON lines with `prompt` or `messages`, and maybe `id`.")],
    out: Annotated[Path, typer.Option(help="JSON lines with id, text, tokens, finish; continued if it exists.")],
    model: Model = "tiny",
    chat: Annotated[bool, typer.Option("--chat", help="A `prompt` is a user's message.")] = False,
    batch: Annotated[int, typer.Option(help="Prompts at once.", min=1)] = 8,
    max_new_tokens: MaxNewTokens = 256,
    steps: Steps = 0,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    remasking: Remasking = "low-confidence",
    threshold: Threshold = None,
    blocks: Blocks = None,
    seed: Seed = 0,
    kv_cache: Annotated[bool, typer.Option(help="Keep finished blocks' keys and values.")] = True,
    block_size: BlockSize = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Answer a file of prompts. Interrupted, it goes on where it stopped when called again."""
    from stage2_student import generate as generating
    from stage2_student.inference import open_checkpoint
    from stage2_student.sampler import SampleOptions

    options = SampleOptions(
        max_new_tokens, steps, temperature, top_p, remasking, threshold, blocks or "sequence", seed, kv_cache
    )  # fmt: skip
    checkpoint = open_checkpoint(model, block_size, device, dtype)
    options = _as_trained(options, blocks, checkpoint)
    requests = generating.read_requests(prompts, checkpoint, chat)
    try:
        count, usage = generating.generate(checkpoint, requests, out, options, batch)
    except KeyboardInterrupt:
        typer.echo(f"interrupted: the answers so far are in {out}; the same command goes on from there", err=True)
        raise typer.Exit(130) from None
    typer.echo(
        f"{count} answers in {out} ({len(requests) - count} were there): {usage.tokens} tokens, {usage.forwards} forwards, "
        f"{usage.positions} token positions, {usage.tokens_per_forward:.2f} tokens per forward and row"
    )


@app.command()
def chat(
    model: Model = "tiny",
    max_new_tokens: MaxNewTokens = 256,
    steps: Steps = 0,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    remasking: Remasking = "low-confidence",
    threshold: Threshold = 0.9,
    blocks: Blocks = None,
    seed: Seed = 0,
    block_size: BlockSize = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Talk to a checkpoint. /new forgets the conversation, /quit leaves."""
    from stage2_student import chat as chatting
    from stage2_student.inference import open_checkpoint
    from stage2_student.sampler import SampleOptions

    parallel = None if remasking == "random" else threshold
    options = SampleOptions(max_new_tokens, steps, temperature, top_p, remasking, parallel, blocks or "sequence", seed)
    checkpoint = open_checkpoint(model, block_size, device, dtype)
    options = _as_trained(options, blocks, checkpoint)

    def lines() -> Iterator[str]:
        while True:
            try:
                yield input("> " if sys.stdin.isatty() else "")
            except EOFError:
                return

    chatting.chat(checkpoint, lines(), _say, options)


@app.command()
def evaluate(
    model: Model = "tiny",
    tasks: Annotated[str, typer.Option(help="`paper` (all eight), or names separated by commas.")] = "paper",
    against: Annotated[str | None, typer.Option(help="Another checkpoint, compared on the same questions.")] = None,
    questions: Annotated[list[str] | None, typer.Option(help="TASK=FILE: local questions; repeatable.")] = None,
    run_code: Annotated[bool, typer.Option("--run-code", help="Allow running generated code (sandboxed).")] = False,
    limit: Annotated[int | None, typer.Option(help="Only the first questions of each task.", min=1)] = None,
    out: Annotated[Path, typer.Option(help="Folder for answers and scores, one part per checkpoint.")] = Path(
        "runs/eval"
    ),
    batch: Annotated[int, typer.Option(help="Prompts at once.", min=1)] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer of tasks outside the suite.", min=1)] = 256,
    threshold: Threshold = None,
    blocks: Blocks = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut the beginning of too long prompts.")] = False,
    block_size: BlockSize = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Benchmarks with the paper's protocol, beside its published numbers. Interrupted, it goes on when called again."""
    from stage2_student.harness import run

    run.require_lm_eval()
    from rich.console import Console

    from shared.errors import TidecacheError
    from stage2_student.harness import compare, suite
    from stage2_student.inference import open_checkpoint
    from stage2_student.sampler import SampleOptions

    manager = run.task_manager()
    wanted = run.benchmarks([name.strip() for name in tasks.split(",")], manager, max_new_tokens)
    run.refuse_code(wanted, run_code)
    files = {}
    for item in questions or []:
        name, separator, file = item.partition("=")
        if not separator:
            raise TidecacheError(f"--questions: expected TASK=FILE, found {item!r}")
        files[name] = file
    options = SampleOptions(max_new_tokens, threshold=threshold, blocks=blocks or "sequence")
    scores = {}
    for name in [model, *([against] if against else [])]:
        checkpoint = open_checkpoint(name, block_size, device, dtype)
        folder = out / checkpoint.digest[:12]
        try:
            trained = _as_trained(options, blocks, checkpoint)
            results = run.evaluate(checkpoint, wanted, manager, folder, trained, batch, limit, files, truncate)
        except KeyboardInterrupt:
            typer.echo(
                f"interrupted: the answers so far are in {folder}; the same command goes on from there", err=True
            )
            raise typer.Exit(130) from None
        scores[name] = {result.benchmark: result.score for result in results}
        for result in results:
            usage, cut = result.usage, f", {result.truncated} prompts cut" if result.truncated else ""
            typer.echo(
                f"{name}, {result.benchmark}: {len(result.score.questions)} questions{cut}; sampled now: {usage.forwards} "
                f"forwards, {usage.positions} token positions, {usage.tokens_per_forward:.2f} tokens per forward"
            )
    console = Console()
    console.print(suite.table(scores, wanted))
    if against:
        ours, theirs = scores[model], scores[against]
        compared = {name: compare.paired_bootstrap(ours[name], theirs[name]) for name in ours}
        if len(wanted) > 1:
            compared["average"] = compare.paired_bootstrap_of_average(ours, theirs)
        console.print(suite.comparison_table(compared, model, against))


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="New folder.")],
    model: Model = "tiny",
    kind: Annotated[str, typer.Option("--format", help="hf, or dllm for dLLM's a2d models.")] = "hf",
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, bfloat16 or float16.")] = "float32",
    metrics: Annotated[list[Path] | None, typer.Option(help="JSON of score or evaluate for the card.")] = None,
    block_size: BlockSize = None,
) -> None:
    """Write a checkpoint for others, with a model card."""
    from stage2_student import export as exporting
    from stage2_student.inference import open_checkpoint

    checkpoint = open_checkpoint(model, block_size, device="cpu", dtype="float32")
    exporting.export(checkpoint, out, kind, dtype, metrics or ())
    typer.echo(f"exported to {out}")
