"""`tidecache teacher`: run the teacher over a corpus and write the cache.

Everything heavy is imported inside the commands, so that `--help` answers at once. What can be checked without the
teacher (corpus, tokenizers, choices of the spec) is checked before its weights are loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shared.spec import CaptureSpec
from stage1_teacher.check_command import check
from stage1_teacher.extend_command import extend
from stage1_teacher.options import CaptureOptions, takes_capture_options
from stage1_teacher.plan_command import plan

if TYPE_CHECKING:
    from stage1_teacher.capture import Extent
    from stage1_teacher.presets import Preset

app = typer.Typer(no_args_is_help=True, help="Stage 1: run the teacher once and write its likelihoods to a cache.")


@app.callback()
def group() -> None:
    """Stage 1: run the teacher once and write its likelihoods to a cache."""


app.command()(plan)
app.command()(check)
app.command()(extend)


@app.command()
@takes_capture_options
def capture(
    options: CaptureOptions,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the summary as JSON to this file.")] = None,
) -> None:
    """Run the teacher over a corpus and write a cache.

    May be stopped at any time: the same command goes on from the last complete shard. With a larger corpus or limit, or
    more draws, it extends the cache that is there; `tidecache teacher extend` adds contexts, lanes and fillings, too.
    """
    from rich.console import Console

    from stage1_teacher.capture import Capture
    from stage1_teacher.draft import Draft
    from stage1_teacher.engines import open_engine
    from stage1_teacher.progress import CaptureProgress, counted, show_report, stoppable, write_summary

    console = Console()
    draft = Draft.of(options)
    with open_engine(draft) as (engine, spec):
        folder = draft.folder(spec)
        _show_plan(console, spec, draft.extent, folder, draft.preset)
        with stoppable(console, folder), CaptureProgress(console) as progress, counted(progress, draft.extent, spec):
            report = Capture(engine, draft.tokenizer, spec, draft.extent, folder, progress).run()
    show_report(console, report)
    write_summary(json_file, report)


def _show_plan(console: Any, spec: CaptureSpec, extent: Extent, folder: Path, preset: Preset) -> None:
    from stage1_teacher.progress import show_rows

    t = spec.teacher
    layout = t.layout if t.layout == "full" else f"{t.layout}, blocks of {t.block_size}"
    shift = ", logits shifted by one" if t.logit_shift else ""
    documents = f"at most {extent.limit:,} documents" if extent.limit else "all documents"
    if extent.part.count > 1:
        documents += f", of these the shards of part {extent.part.number} of {extent.part.count}"
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
            (
                "lanes",
                f"{', '.join(spec.lanes)}; k = {spec.k}, T = {', '.join(f'{x:g}' for x in spec.temperatures)}, codec {spec.codec}",
            ),
            ("spec", spec.fingerprint),
            ("out", str(folder)),
        ],
    )
