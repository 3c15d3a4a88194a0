"""`tidecache teacher plan`: what a capture with these options will hold, take and unlock, before it is begun."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shared.errors import TidecacheError
from stage1_teacher.options import CaptureOptions, takes_capture_options

if TYPE_CHECKING:
    from rich.console import Console

    from stage1_teacher.capture import Extent
    from stage1_teacher.plan import Plan


@takes_capture_options
def plan(
    options: CaptureOptions,
    sample: Annotated[int, typer.Option(min=1, help="Documents that go through the teacher.")] = 64,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers as JSON to this file.")] = None,
) -> None:
    """Say what a capture with the same options will hold, take and unlock, from a small measured sample.

    Nothing is written but --json. The corpus is read twice, some shards' documents are tokenised, and --sample documents
    go through the teacher.
    """
    from rich.console import Console

    from stage1_teacher.draft import Draft
    from stage1_teacher.plan import make_plan

    draft = Draft.of(options)
    found = make_plan(draft, sample)
    _show(Console(), found, draft.extent, draft.preset.name, draft.folder(found.spec))
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(found.to_json(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise TidecacheError(f"--json {json_file}: cannot be written: {error.strerror}") from error


def _show(console: Console, found: Plan, extent: Extent, teacher: str, folder: Path) -> None:
    from rich.filesize import decimal
    from rich.table import Table

    from shared.cache.encoding import MAX_SHARD_BYTES
    from shared.cache.manifest import MANIFEST_FILE, read_manifest
    from stage1_teacher.progress import duration, show_rows

    spec, size, measured = found.spec, found.size_bytes, found.measured
    per_token = size / max(found.scored_tokens, 1)
    least, most = found.seconds
    share = "" if extent.part.count == 1 else f"; this is part {extent.part.number} of {extent.part.count}"
    rows = [
        (
            "documents",
            f"{found.documents:,}, of which {found.held_out:,} held out; {found.dropped:,} dropped{share}",
        ),
        (
            "draws",
            f"{found.draws:,} ({extent.draws} per document), with {found.masked_chunks:,} masked chunks of "
            f"{found.scored_tokens:,} teacher tokens, scored in {' and '.join(spec.contexts)}",
        ),
        ("shards", f"{found.shards:,} of at most {extent.documents_per_shard:,} documents"),
        ("size", f"{decimal(size)} ± {found.error:.1%}, {per_token:.1f} bytes per scored token"),
        ("time", f"{duration(least)} to {duration(most)} on one machine like this"),
        (
            "measured",
            f"{found.tokens_per_second:,.0f} tokens/s in the teacher, on {measured['documents_scored']:,} documents with "
            f"{measured['draws_scored']} draws; {measured['documents_prepared']:,} documents prepared",
        ),
    ]  # fmt: skip
    if not found.complete:
        rows.insert(0, ("corpus", "too long to read here: all of this is for its first documents; give --limit"))
    if measured["load_average"] > 1.0:
        rows.append(("load", f"this machine is busy ({measured['load_average']:.1f} processes per CPU)"))
    if found.largest_shard > 0.8 * MAX_SHARD_BYTES:
        fewer = max(1, extent.documents_per_shard * MAX_SHARD_BYTES // (2 * found.largest_shard))
        rows.append(("too large", f"shards of {decimal(found.largest_shard)}: take --documents-per-shard {fewer}"))
    free = shutil.disk_usage(next(p for p in (folder, *folder.absolute().parents) if p.exists())).free
    if size * (1 + found.error) > free:
        rows.append(("disk", f"{decimal(free)} free where {folder} would be: too little"))
    if (folder / MANIFEST_FILE).exists():
        shards = len(read_manifest(folder).shards)
        rows.append(
            (
                "there",
                f"{folder} has {shards:,} {'shard' if shards == 1 else 'shards'} already; this plan is as if it had none",
            )
        )
    show_rows(console, f"plan with {teacher}", rows)
    console.print()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading, side in (("lane", "left"), ("bytes", "right"), ("share", "right"), ("per token", "right")):
        table.add_column(heading, justify=side, no_wrap=True)  # type: ignore[arg-type]
    for lane, lane_size in found.lane_bytes.items():
        per = lane_size / max(found.scored_tokens, 1)
        table.add_row(lane, f"{lane_size:,}", f"{lane_size / size:.1%}", f"{per:.2f}")
    console.print(table, highlight=False)
    console.print()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("recipe", "reads", "with this cache"):
        table.add_column(heading)
    for u in found.unlocks:
        need = u.need
        reads = "no teacher"
        if need.context is not None:
            reads = f"{need.context} {need.lane}" + (f", T = {need.temperature:g}" if need.temperature else "")
        answer = "yes" + (f"; {u.advice}" if u.advice else "") if u.unlocked else f"no: lacks {', '.join(u.missing)}"
        table.add_row(u.recipe, reads, answer)
    console.print(table, highlight=False)
