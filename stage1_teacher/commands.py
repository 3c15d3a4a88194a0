"""`tidecache teacher`: run the teacher over a corpus and write the cache.

Everything heavy is imported inside the commands, so that `--help` answers at once. What can be checked without the
teacher (corpus, tokenizers, choices of the spec) is checked before its weights are loaded.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shared.errors import TidecacheError
from shared.spec import CaptureSpec, StudentTokenizerSpec, TeacherSpec
from stage1_teacher.check_command import check

if TYPE_CHECKING:
    from shared.tokenization import TextTokenizer
    from stage1_teacher.backends import Teacher
    from stage1_teacher.capture import Extent, Report
    from stage1_teacher.presets import Preset

CONTEXTS = {"compdemo": ("compdemo",), "plain": ("plain",), "both": ("compdemo", "plain")}
EMBEDDED_STUDENT = "package:stage2_student/tiny"
LENGTH = 512  # tokens, where neither the preset nor a flag says
UNLOADED = TeacherSpec("", "", "", "", 0, "full", 1, 0, False)  # stands in the spec until the teacher is loaded

app = typer.Typer(no_args_is_help=True, help="Stage 1: run the teacher once and write its likelihoods to a cache.")


@app.callback()
def group() -> None:
    """Stage 1: run the teacher once and write its likelihoods to a cache."""


app.command()(check)


def _take_spec(context: typer.Context, name: str | None) -> str | None:
    """Let a named spec replace the defaults of the options; eager, so that it comes before they are filled in."""
    if name is not None and not context.resilient_parsing:
        from stage1_teacher.specs import read_spec

        options = {p.name: p.default for p in context.command.params if p.name not in (None, "help", "spec")}
        context.default_map = {**(context.default_map or {}), **read_spec(name, options)}
    return name


@app.command()
def capture(
    spec: Annotated[
        str | None,
        typer.Option(
            callback=_take_spec, is_eager=True, help="paper-cross, paper-shared, or a TOML file: defaults for the rest."
        ),
    ] = None,
    teacher: Annotated[str, typer.Option(help="A preset, a TOML file, a model's folder, or a hub id.")] = "tiny",
    corpus: Annotated[
        str, typer.Option(help="Text, JSON Lines (.zst), JSON or Parquet; a folder; a dataset's name; or `stdlib`.")
    ] = "stdlib",
    out: Annotated[
        Path | None, typer.Option(help="The cache's folder. Default: $TIDECACHE_HOME (./caches)/TEACHER-FINGERPRINT.")
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Draws per document; more may be added later.")] = 4,
    context: Annotated[str, typer.Option(help="compdemo, plain, or both.")] = "compdemo",
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many documents of the corpus.")] = None,
    students: Annotated[
        list[str] | None, typer.Option(help="A student's tokenizer (folder or hub id); repeat for several.")
    ] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Longest teacher sequence, in tokens.")] = None,
    student_length: Annotated[
        int | None, typer.Option(min=1, help="Longest student sequence, in tokens. Default: --length.")
    ] = None,
    held_out: Annotated[
        str | None, typer.Option(help="A share such as 0.02, `corpus` (as it says itself), or `none`.")
    ] = None,
    mask_law: Annotated[str, typer.Option(help="chunk, or token (TIDE's; needs exactly one student).")] = "chunk",
    k: Annotated[int, typer.Option(min=1, help="Fillings stored per chunk.")] = 16,
    temperatures: Annotated[str, typer.Option(help="Temperatures with a stored log Z, comma-separated.")] = "1,2",
    lanes: Annotated[str, typer.Option(help="gold, or gold,topk.")] = "gold,topk",
    demo_ratio: Annotated[float, typer.Option(help="Share of masked chunks that CompDemo shows in pass 1.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Seed of timesteps, masks and splits.")] = 0,
    layout: Annotated[
        str | None, typer.Option(help="Attention: full, block-causal, bd3lm, reordered. Default: preset's.")
    ] = None,
    block_size: Annotated[int | None, typer.Option(min=1, help="Block of the block layouts, in tokens.")] = None,
    mask_id: Annotated[
        int | None, typer.Option(min=0, help="The mask token's id, if the tokenizer names none.")
    ] = None,
    logit_shift: Annotated[
        bool | None,
        typer.Option("--logit-shift/--no-logit-shift", help="Logits for a position come from the row before."),
    ] = None,
    template: Annotated[
        Path | None, typer.Option(help="A Jinja file that replaces the chat template of the teacher's tokenizer.")
    ] = None,
    backend: Annotated[
        str, typer.Option(help="transformers (anywhere), or vllm (fast; with CUDA the extra `vllm`).")
    ] = "transformers",
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Devices that share one teacher (vllm).")] = 1,
    dtype: Annotated[
        str | None, typer.Option(help="The teacher's type: float32, bfloat16, float16. Default: preset's.")
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Padded tokens of one teacher batch. Default: preset's.")
    ] = None,
    documents_per_shard: Annotated[int, typer.Option(min=1, help="Documents of one shard.")] = 64,
    text_column: Annotated[str | None, typer.Option(help="The corpus' column of plain text.")] = None,
    split: Annotated[str, typer.Option(help="The split of a dataset that has some.")] = "train",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the summary as JSON to this file.")] = None,
) -> None:
    """Run the teacher over a corpus and write a cache.

    May be stopped at any time: the same command goes on from the last complete shard. With a larger corpus or limit, or
    more draws, it extends the cache that is there.
    """
    from rich.console import Console

    from stage1_teacher.architectures.tokenizers import teacher_tokenizer as load_tokenizer
    from stage1_teacher.backends import load
    from stage1_teacher.capture import Capture, Extent
    from stage1_teacher.presets import find_preset, local_folder
    from stage1_teacher.progress import CaptureProgress, show_report

    console = Console()
    preset = find_preset(teacher).with_flags(layout, block_size, mask_id, logit_shift, template)
    extent = Extent(corpus, draws, documents_per_shard, text_column, split, limit)
    extent.open()
    lengths = (length or preset.length or LENGTH, student_length or length or preset.length or LENGTH)
    teacher_tokenizer = load_tokenizer(local_folder(preset.checkpoint), preset.name, preset.template)
    student_tokenizers = [_student_tokenizer(s) for s in students or preset.students or [EMBEDDED_STUDENT]]
    draft = _draft(
        teacher_tokenizer, student_tokenizers, lengths,
        mask_law=mask_law, demo_ratio=demo_ratio, seed=seed, contexts=_context(context), lanes=_words(lanes), k=k,
        temperatures=_numbers(temperatures), batch_tokens=batch_tokens or preset.batch_tokens, held_out=_held_out(held_out, corpus),
    )  # fmt: skip
    loaded = load(
        teacher,
        backend,
        layout,
        block_size,
        mask_id,
        logit_shift,
        draft.temperatures,
        dtype or preset.dtype,
        draft.batch_tokens,
        tensor_parallel,
    )
    capture_spec = dataclasses.replace(draft, teacher=_teacher_spec(loaded, teacher_tokenizer, draft.length_limit))
    home = Path(os.environ.get("TIDECACHE_HOME") or "caches")
    folder = out or home / f"{preset.name}-{capture_spec.fingerprint[:12]}"
    _show_plan(console, capture_spec, extent, folder, preset)
    stop = threading.Event()
    with CaptureProgress(console) as progress, ThreadPoolExecutor(1, "count") as counting:
        counting.submit(_expect, progress, extent, capture_spec, stop)
        try:
            report = Capture(
                loaded, teacher_tokenizer, student_tokenizers, capture_spec, extent, folder, progress
            ).run()
        except KeyboardInterrupt:
            stop.set()
            console.print(
                f"stopped; every complete shard is kept in {folder}: the same command goes on from there",
                highlight=False,
            )
            raise typer.Exit(130) from None
        finally:
            stop.set()
    show_report(console, report)
    _write_summary(json_file, report)


def _expect(progress: Any, extent: Extent, spec: CaptureSpec, stop: threading.Event) -> None:
    from stage1_teacher.capture import count_documents

    counts = count_documents(extent, spec, stop)
    if counts is not None:
        progress.expect(sum(counts.values()))


def _draft(
    teacher: TextTokenizer, students: Sequence[TextTokenizer], lengths: tuple[int, int], **choices: Any
) -> CaptureSpec:
    """The spec but for its teacher: refuses what no capture can mean before any weights are loaded."""
    from shared.preparation import common_normal_form

    return CaptureSpec(
        teacher=UNLOADED,
        students=tuple(StudentTokenizerSpec(s.name, s.digest, lengths[1]) for s in students),
        length_limit=lengths[0],
        normal_form=common_normal_form([teacher, *students]),
        **choices,
    )


def _teacher_spec(loaded: Teacher, tokenizer: TextTokenizer, length: int) -> TeacherSpec:
    if loaded.mask_id is None:
        raise TidecacheError(
            f"the teacher {loaded.name} has no mask token: neither its tokenizer nor its config.json names one; give its id with "
            f"--mask-id (a teacher that was not trained with one, such as a uniform-noise model, cannot be used)"
        )
    if loaded.length_limit is not None and length > loaded.length_limit:
        raise TidecacheError(
            f"--length {length}: the teacher {loaded.name} has positions for {loaded.length_limit} tokens; give at most that"
        )
    return TeacherSpec(
        name=loaded.name,
        architecture=loaded.architecture,
        weights=loaded.weights,
        tokenizer=tokenizer.digest,
        vocabulary=loaded.vocabulary,
        layout=loaded.layout,
        block_size=loaded.block_size,
        mask_id=loaded.mask_id,
        logit_shift=loaded.logit_shift,
        dtype=loaded.dtype,
    )


def _student_tokenizer(source: str) -> TextTokenizer:
    from shared.tokenization import TextTokenizer
    from stage1_teacher.presets import PACKAGES

    if source.startswith("package:"):
        return TextTokenizer.load(PACKAGES / source.removeprefix("package:"))
    return TextTokenizer.load(source)


def _context(text: str) -> tuple[str, ...]:
    if text not in CONTEXTS:
        raise TidecacheError(f"--context: expected one of {', '.join(CONTEXTS)}, found {text!r}")
    return CONTEXTS[text]


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in _words(text))
    except ValueError:
        raise TidecacheError(
            f"--temperatures: expected numbers parted by commas, such as 1,2, found {text!r}"
        ) from None


def _held_out(text: str | None, corpus: str) -> str:
    """The spec's rule of the split."""
    if text is None:
        return "corpus" if corpus == "stdlib" else "hash:0.02"
    if text in ("corpus", "none"):
        return text
    from shared.corpus import held_out_rule

    rule = f"hash:{text.removeprefix('hash:')}"
    try:
        held_out_rule(rule)
    except TidecacheError:
        raise TidecacheError(
            f"--held-out: expected a share from 0 to below 1 such as 0.02, `corpus` or `none`, found {text!r}"
        ) from None
    return f"hash:{float(rule.removeprefix('hash:'))}"


def _show_plan(console: Any, spec: CaptureSpec, extent: Extent, folder: Path, preset: Preset) -> None:
    from stage1_teacher.progress import show_rows

    t = spec.teacher
    layout = t.layout if t.layout == "full" else f"{t.layout}, blocks of {t.block_size}"
    shift = ", logits shifted by one" if t.logit_shift else ""
    documents = f"at most {extent.limit:,} documents" if extent.limit else "all documents"
    passes = {"compdemo": "compdemo (2 passes)", "plain": "plain (1 pass)"}
    show_rows(
        console,
        f"capture with {preset.name}",
        [
            ("teacher", f"{t.architecture.split(':')[0]} from {preset.checkpoint}, {t.vocabulary:,} tokens, {t.dtype}"),
            ("attention", f"{layout}{shift}; mask id {t.mask_id}"),
            ("students", ", ".join(f"{s.name} (≤ {s.length_limit} tokens)" for s in spec.students)),
            (
                "corpus",
                f"{extent.corpus}, {documents}; held out: {spec.held_out}; cut to {spec.length_limit} teacher tokens",
            ),
            (
                "draws",
                f"{extent.draws} per document in {', '.join(passes[c] for c in spec.contexts)}; masked by {spec.mask_law}",
            ),
            ("lanes", f"{', '.join(spec.lanes)}; k = {spec.k}, T = {', '.join(f'{x:g}' for x in spec.temperatures)}"),
            ("spec", spec.fingerprint),
            ("out", str(folder)),
        ],
    )


def _write_summary(path: Path | None, report: Report) -> None:
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise TidecacheError(
            f"--json {path}: the cache is complete, but the summary cannot be written: {error.strerror}"
        ) from error
