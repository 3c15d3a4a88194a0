"""`tidecache teacher extend`: give a cache what it lacks, and leave what it has.

The cache says how it was captured, so nothing of that is asked again: traits of the teacher, lengths, seed, law. What is
given only adds. Everything that can be refused without the teacher's weights is refused before they are loaded, and the
teacher, once loaded, must be the cache's by content.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shared.errors import TidecacheError
from stage1_teacher.options import (
    BackendOption,
    LimitOption,
    PartOption,
    SplitOption,
    StudentsOption,
    TemplateOption,
    TensorParallelOption,
    TextColumnOption,
)

if TYPE_CHECKING:
    from rich.console import Console

    from shared.cache.manifest import Manifest
    from shared.spec import CaptureSpec
    from shared.tokenization import TextTokenizer
    from stage1_teacher.capture import Extent
    from stage1_teacher.draft import Draft
    from stage1_teacher.planning import ShardPart


def extend(
    cache: Annotated[Path, typer.Argument(help="The cache's folder.", metavar="CACHE")],
    context: Annotated[str | None, typer.Option(help="A context more: compdemo, plain, or both.")] = None,
    lanes: Annotated[str | None, typer.Option(help="topk: the lane that a cache of gold alone lacks.")] = None,
    k: Annotated[int | None, typer.Option(min=1, help="More fillings per chunk than it has.")] = None,
    temperatures: Annotated[
        str | None, typer.Option(help="More temperatures with a stored log Z, comma-separated.")
    ] = None,
    tail_samples: Annotated[
        int | None, typer.Option(min=1, help="More tail samples per chunk of one token than it has.")
    ] = None,
    codec: Annotated[
        str | None, typer.Option(help="With --lanes topk: raw, or packed (smaller). Default: raw.")
    ] = None,
    draws: Annotated[int | None, typer.Option(min=1, help="More draws per document than it has.")] = None,
    corpus: Annotated[
        str | None, typer.Option(help="For more documents: the corpus that it came from, or one that begins with it.")
    ] = None,
    limit: LimitOption = None,
    text_column: TextColumnOption = None,
    split: SplitOption = "train",
    documents_per_shard: Annotated[
        int | None, typer.Option(min=1, help="Documents of one new shard. Default: as the cache has.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Where the cache's teacher is now. Default: the preset of its name.")
    ] = None,
    template: TemplateOption = None,
    students: StudentsOption = None,
    backend: BackendOption = "transformers",
    tensor_parallel: TensorParallelOption = 1,
    part: PartOption = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the summary as JSON to this file.")] = None,
) -> None:
    """Add draws, documents, a context, the topk lane, fillings or temperatures to a cache.

    Only what is missing is asked of the teacher; the result is the cache that one capture with all of it would have
    written. May be stopped at any time, and readers go on meanwhile: the same command finishes it. The corpus is needed
    for more documents alone.
    """
    from rich.console import Console

    from shared.cache.manifest import read_manifest
    from shared.cache.widening import Widening
    from stage1_teacher.capture import Capture
    from stage1_teacher.draft import contexts_of, numbers, words
    from stage1_teacher.extend import Additions, Extension, slices
    from stage1_teacher.planning import WHOLE, ShardPart, lacks_draws
    from stage1_teacher.progress import CaptureProgress, counted, show_report, stoppable, write_summary
    from stage1_teacher.shards import LocalEngine, ShardMaker
    from stage1_teacher.stored import StoredMaker

    console = Console()
    if corpus is None and limit is not None:
        raise TidecacheError(f"--limit {limit} is of the corpus' documents: give the --corpus that the cache came from")
    has = read_manifest(cache)
    spec = Additions(
        contexts=contexts_of(context) if context else (),
        lanes=words(lanes) if lanes else (),
        k=k,
        temperatures=numbers(temperatures) if temperatures else (),
        tail_samples=tail_samples,
        codec=codec,
    ).to(has.spec)
    folders = slices(cache)
    widens = [f for f in folders if Widening.begin(f, spec) is not None]
    lacking = draws is not None and any(lacks_draws(read_manifest(f).shards, draws) for f in folders)
    if not widens and not lacking and corpus is None:
        console.print(f"{cache} has all of this already: nothing to do", highlight=False)
        return
    own = ShardPart.parse(part) if part else WHOLE
    extent = _extent(has, cache, draws, corpus, text_column, split, limit, documents_per_shard, own)
    reads_students = corpus is not None or (lacking and spec.mask_law == "token")
    draft = _draft(spec, extent, teacher, template, students if reads_students else (), backend, tensor_parallel)
    _show_plan(console, cache, has.spec, draft, spec, widens=bool(widens), grows=lacking or corpus is not None)
    loaded, found = draft.load()
    _refuse_another_teacher(cache, spec, found)
    extension = Extension(cache, spec, own)
    stored = StoredMaker(spec, draft.tokenizer, draft.students)
    maker = stored if corpus is None else ShardMaker(spec, draft.tokenizer, draft.students)
    engine = LocalEngine(loaded, maker)
    with stoppable(console, cache):
        with CaptureProgress(console) as progress:
            progress.expect(extension.documents_to_widen())
            complete = extension.widen(loaded, stored, progress)
        if complete and (lacking or corpus is not None):
            with CaptureProgress(console) as progress, counted(progress, extent, spec):
                extension.grow(Capture(engine, draft.tokenizer, spec, extent, cache, progress))
    show_report(console, extension.report())
    if not complete:
        console.print("the cache stays as it was until the shards of the other parts are ready, too", highlight=False)
    write_summary(json_file, extension.report())


def _extent(
    has: Manifest,
    cache: Path,
    draws: int | None,
    corpus: str | None,
    text_column: str | None,
    split: str,
    limit: int | None,
    width: int | None,
    part: ShardPart,
) -> Extent:
    """What the cache shall cover: its own documents, or the corpus'."""
    from stage1_teacher.capture import Extent
    from stage1_teacher.extend import documents_per_shard, stored_draws
    from stage1_teacher.stored import StoredExtent

    draws, width = draws or stored_draws(has), width or documents_per_shard(has)
    if corpus is None:
        return StoredExtent(str(cache), draws, width, part=part)
    extent = Extent(corpus, draws, width, text_column, split, limit, part)
    extent.open()
    return extent


def _draft(
    spec: CaptureSpec,
    extent: Extent,
    teacher: str | None,
    template: Path | None,
    students: Sequence[str] | None,
    backend: str,
    tensor_parallel: int,
) -> Draft:
    """A draft of a capture of the cache's spec; no student where `students` is empty, the default ones where it is None.

    Raises:
        TidecacheError: the teacher is not said, or a tokenizer is not the cache's.
    """
    from stage1_teacher.architectures.tokenizers import teacher_tokenizer
    from stage1_teacher.draft import EMBEDDED_STUDENT, UNLOADED, Draft, refuse_tail, student_tokenizer
    from stage1_teacher.options import CaptureOptions
    from stage1_teacher.presets import find_preset, local_folder, preset_names

    t = spec.teacher
    refuse_tail(spec.tail_samples, backend)
    if teacher is None and t.name not in preset_names():
        raise TidecacheError(
            f"--teacher: the cache was captured with {t.name}, which is no preset: say where that teacher is now (a TOML "
            f"file, a model's folder, or a hub id)"
        )
    options = CaptureOptions(
        teacher=teacher or t.name, layout=t.layout, block_size=t.block_size, mask_id=t.mask_id, logit_shift=t.logit_shift,
        template=template, backend=backend, tensor_parallel=tensor_parallel, dtype=t.dtype,
    )  # fmt: skip
    preset = find_preset(options.teacher).with_flags(t.layout, t.block_size, t.mask_id, t.logit_shift, template)
    tokenizer = teacher_tokenizer(local_folder(preset.checkpoint), preset.name, preset.template)
    if tokenizer.digest != t.tokenizer:
        raise TidecacheError(
            f"the tokenizer of {options.teacher} is not that of the cache's teacher (teacher.tokenizer: the cache has "
            f"{t.tokenizer!r}, found {tokenizer.digest!r}): give the cache's own with --teacher, and its --template if it had one"
        )
    names = (preset.students or (EMBEDDED_STUDENT,)) if students is None else students
    loaded = tuple(student_tokenizer(name) for name in names)
    if loaded:
        _refuse_other_students(spec, loaded)
    return Draft(options, preset, extent, tokenizer, loaded, dataclasses.replace(spec, teacher=UNLOADED))


def _refuse_other_students(spec: CaptureSpec, found: Sequence[TextTokenizer]) -> None:
    """The declared students' tokenizers shape the chunks, so they must be the cache's, in its order."""
    from shared.spec import StudentTokenizerSpec, differences

    limits = [s.length_limit for s in spec.students] + [0] * len(found)
    students = tuple(StudentTokenizerSpec(s.name, s.digest, limit) for s, limit in zip(found, limits, strict=False))
    if changed := differences(dataclasses.replace(spec, students=students, mask_law="chunk"), spec):
        fields = _fields([c for c in changed if c[0] != "mask_law"])
        if fields:
            raise TidecacheError(
                f"the student tokenizers are not those that the cache declares ({fields}): give these, in their order, with "
                f"--students"
            )


def _refuse_another_teacher(cache: Path, spec: CaptureSpec, found: CaptureSpec) -> None:
    from shared.spec import differences

    if changed := differences(found, spec):
        raise TidecacheError(
            f"{cache} was captured with another teacher ({_fields(changed)}): give that one with --teacher"
        )


def _fields(changed: Sequence[tuple[str, object, object]]) -> str:
    return "; ".join(f"{name}: the cache has {theirs!r}, found {ours!r}" for name, ours, theirs in changed)


def _show_plan(
    console: Console, cache: Path, has: CaptureSpec, draft: Draft, spec: CaptureSpec, widens: bool, grows: bool
) -> None:
    from shared.spec import differences
    from stage1_teacher.progress import show_rows

    rows = [("teacher", f"{draft.preset.name} from {draft.preset.checkpoint}, {spec.teacher.dtype}")]
    rows += [(name, f"{_words(old)} becomes {_words(new)}") for name, new, old in differences(spec, has)]
    if widens and has == spec:
        rows.append(("goes on", "with what an earlier run has begun"))
    if grows:
        source = "the documents that it has" if Path(draft.extent.corpus) == cache else draft.extent.corpus
        limit = f", at most {draft.extent.limit:,} documents" if draft.extent.limit else ""
        rows.append(("extent", f"{draft.extent.draws} draws per document of {source}{limit}"))
    rows.append(("spec", spec.fingerprint))
    show_rows(console, f"extend {cache}", rows)


def _words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
