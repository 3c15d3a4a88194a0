"""The options that describe a capture, defined once for every command that describes one (`capture`, `plan`, …).

`CaptureOptions` is a dataclass whose fields are the options: name, type, help and default. A command takes it as its
first parameter and is decorated with `takes_capture_options`, which shows its fields to typer as if they were the
command's own parameters. So two commands can't come to differ in what an option is called, means, or is by default.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer


def _take_spec(context: typer.Context, name: str | None) -> str | None:
    """Let a named spec replace the defaults of the options; eager, so that it comes before they are filled in."""
    if name is not None and not context.resilient_parsing:
        from stage1_teacher.specs import read_spec

        options = {p.name: p.default for p in context.command.params if p.name not in (None, "help", "spec")}
        context.default_map = {**(context.default_map or {}), **read_spec(name, options)}
    return name


SpecOption = Annotated[
    str | None,
    typer.Option(
        callback=_take_spec, is_eager=True, help="paper-cross, paper-shared, or a TOML file: defaults for the rest."
    ),
]
TeacherOption = Annotated[str, typer.Option(help="A preset, a TOML file, a model's folder, or a hub id.")]
CorpusOption = Annotated[
    str, typer.Option(help="Text, JSON Lines (.zst), JSON or Parquet; a folder; a dataset's name; or `stdlib`.")
]
OutOption = Annotated[
    Path | None, typer.Option(help="The cache's folder. Default: $TIDECACHE_HOME (./caches)/TEACHER-FINGERPRINT.")
]
DrawsOption = Annotated[int, typer.Option(min=1, help="Draws per document; more may be added later.")]
ContextOption = Annotated[str, typer.Option(help="compdemo, plain, or both.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="At most so many documents of the corpus.")]
StudentsOption = Annotated[
    list[str] | None, typer.Option(help="A student's tokenizer (folder or hub id); repeat for several.")
]
LengthOption = Annotated[int | None, typer.Option(min=1, help="Longest teacher sequence, in tokens.")]
StudentLengthOption = Annotated[
    int | None, typer.Option(min=1, help="Longest student sequence, in tokens. Default: --length.")
]
HeldOutOption = Annotated[
    str | None, typer.Option(help="A share such as 0.02, `corpus` (as it says itself), or `none`.")
]
MaskLawOption = Annotated[str, typer.Option(help="chunk, or token (TIDE's; needs exactly one student).")]
KOption = Annotated[int, typer.Option(min=1, help="Fillings stored per chunk.")]
TemperaturesOption = Annotated[str, typer.Option(help="Temperatures with a stored log Z, comma-separated.")]
LanesOption = Annotated[str, typer.Option(help="gold, or gold,topk.")]
TailSamplesOption = Annotated[
    int, typer.Option(min=0, help="Samples of the tail per chunk of one token: for KL with a shared tokenizer.")
]
CodecOption = Annotated[
    str, typer.Option(help="Of the topk lane: raw (plain columns), or packed (smaller; log-likelihoods to 0.1 nats).")
]
DemoRatioOption = Annotated[float, typer.Option(help="Share of masked chunks that CompDemo shows in pass 1.")]
SeedOption = Annotated[int, typer.Option(help="Seed of timesteps, masks and splits.")]
LayoutOption = Annotated[
    str | None, typer.Option(help="Attention: full, block-causal, bd3lm, reordered. Default: preset's.")
]
BlockSizeOption = Annotated[int | None, typer.Option(min=1, help="Block of the block layouts, in tokens.")]
MaskIdOption = Annotated[int | None, typer.Option(min=0, help="The mask token's id, if the tokenizer names none.")]
LogitShiftOption = Annotated[
    bool | None,
    typer.Option("--logit-shift/--no-logit-shift", help="Logits for a position come from the row before."),
]
TemplateOption = Annotated[
    Path | None, typer.Option(help="A Jinja file that replaces the chat template of the teacher's tokenizer.")
]
BackendOption = Annotated[
    str, typer.Option(help="transformers (anywhere), or vllm (fast; with CUDA the extra `vllm`).")
]
TensorParallelOption = Annotated[int, typer.Option(min=1, help="Devices that share one teacher (vllm).")]
DtypeOption = Annotated[
    str | None, typer.Option(help="The teacher's type: float32, bfloat16, float16. Default: preset's.")
]
BatchTokensOption = Annotated[
    int | None, typer.Option(min=1, help="Padded tokens of one teacher batch. Default: preset's.")
]
DocumentsPerShardOption = Annotated[int, typer.Option(min=1, help="Documents of one shard.")]
PartOption = Annotated[
    str | None, typer.Option(help="i/n: the i-th of n jobs that share this capture, into one folder or several.")
]
EngineOption = Annotated[
    str, typer.Option(help="local (this process), or ray: shards on actors, on one machine or many (extra `ray`).")
]
ActorsOption = Annotated[
    int | None, typer.Option(min=1, help="Ray actors, one teacher each. Default: as many as the cluster has room for.")
]
CpusPerActorOption = Annotated[float, typer.Option(min=0, help="CPUs that Ray reserves for an actor; its threads.")]
GpusPerActorOption = Annotated[
    float | None, typer.Option(min=0, help="GPUs of an actor. Default: --tensor-parallel if there are GPUs, else 0.")
]
TextColumnOption = Annotated[str | None, typer.Option(help="The corpus' column of plain text.")]
SplitOption = Annotated[str, typer.Option(help="The split of a dataset that has some.")]


@dataclass(frozen=True)
class CaptureOptions:
    """What a person says about a capture, as it was typed; `stage1_teacher.draft` makes a spec and an extent of it."""

    spec: SpecOption = None
    teacher: TeacherOption = "tiny"
    corpus: CorpusOption = "stdlib"
    out: OutOption = None
    draws: DrawsOption = 4
    context: ContextOption = "compdemo"
    limit: LimitOption = None
    students: StudentsOption = None
    length: LengthOption = None
    student_length: StudentLengthOption = None
    held_out: HeldOutOption = None
    mask_law: MaskLawOption = "chunk"
    k: KOption = 16
    temperatures: TemperaturesOption = "1,2"
    tail_samples: TailSamplesOption = 0
    lanes: LanesOption = "gold,topk"
    codec: CodecOption = "raw"
    demo_ratio: DemoRatioOption = 0.5
    seed: SeedOption = 0
    layout: LayoutOption = None
    block_size: BlockSizeOption = None
    mask_id: MaskIdOption = None
    logit_shift: LogitShiftOption = None
    template: TemplateOption = None
    backend: BackendOption = "transformers"
    tensor_parallel: TensorParallelOption = 1
    dtype: DtypeOption = None
    batch_tokens: BatchTokensOption = None
    documents_per_shard: DocumentsPerShardOption = 64
    part: PartOption = None
    engine: EngineOption = "local"
    actors: ActorsOption = None
    cpus_per_actor: CpusPerActorOption = 1.0
    gpus_per_actor: GpusPerActorOption = None
    text_column: TextColumnOption = None
    split: SplitOption = "train"


def takes_capture_options(command: Callable[..., None]) -> Callable[..., None]:
    """Show the fields of `CaptureOptions` as parameters in the place of the command's first one, `options`."""
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    hints = get_type_hints(CaptureOptions, include_extras=True)
    shared = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(CaptureOptions)
    ]
    parameters = [*shared, *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own)]

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        options = CaptureOptions(**{p.name: given.pop(p.name) for p in shared if p.name in given})
        command(options, **given)

    vars(with_options)["__signature__"] = inspect.Signature(parameters)
    with_options.__annotations__ = {p.name: p.annotation for p in parameters}
    return with_options
