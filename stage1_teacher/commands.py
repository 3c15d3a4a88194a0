"""`tidecache teacher`: run the teacher over a corpus and write the cache.

Everything heavy is imported inside the commands, so that `--help` answers at once. What can be checked without the
teacher (corpus, tokenizers, choices of the spec) is checked before its weights are loaded.
"""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shared.errors import TidecacheError
from shared.spec import CaptureSpec
from stage1_teacher.check_command import check
from stage1_teacher.options import CaptureOptions, takes_capture_options
from stage1_teacher.plan_command import plan

if TYPE_CHECKING:
    from stage1_teacher.capture import Extent, Report
    from stage1_teacher.presets import Preset

app = typer.Typer(no_args_is_help=True, help="Stage 1: run the teacher once and write its likelihoods to a cache.")


@app.callback()
def group() -> None:
    """Stage 1: run the teacher once and write its likelihoods to a cache."""


app.command()(plan)
app.command()(check)


@app.command()
@takes_capture_options
def capture(
    options: CaptureOptions,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the summary as JSON to this file.")] = None,
) -> None:
    """Run the teacher over a corpus and write a cache.

    May be stopped at any time: the same command goes on from the last complete shard. With a larger corpus or limit, or
    more draws, it extends the cache that is there.
    """
    from rich.console import Console

    from stage1_teacher.capture import Capture
    from stage1_teacher.draft import Draft
    from stage1_teacher.engines import open_engine
    from stage1_teacher.progress import CaptureProgress, show_report

    console = Console()
    draft = Draft.of(options)
    with open_engine(draft) as (engine, spec):
        folder = draft.folder(spec)
        _show_plan(console, spec, draft.extent, folder, draft.preset)
        stop = threading.Event()
        with CaptureProgress(console) as progress, ThreadPoolExecutor(1, "count") as counting:
            counting.submit(_expect, progress, draft.extent, spec, stop)
            try:
                report = Capture(engine, draft.tokenizer, spec, draft.extent, folder, progress).run()
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
