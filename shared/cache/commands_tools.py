"""`tidecache cache …`: the commands that compare caches and make others of them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shared.embedded import EMBEDDED, embedded_or
from shared.errors import TidecacheError, printable

if TYPE_CHECKING:
    from shared.cache.manifest import Manifest

CachePath = Annotated[str, typer.Argument(help="The cache's folder, or an address.", metavar="CACHE")]
OutPath = Annotated[Path, typer.Option(help="Folder for the new cache.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]


def register(app: typer.Typer) -> None:
    """Add these commands to the group, in the order of the help."""
    app.command()(coverage)
    app.command()(diff)
    app.command()(merge)
    app.command("slice")(slice_)
    app.command()(push)
    app.command()(pull)


def describe(folder: Path, manifest: Manifest, held_out: Manifest | None) -> str:
    """What a new cache holds, in a line."""
    totals, size = manifest.totals, manifest.totals.size_bytes
    inner = ""
    if held_out is not None:
        size += held_out.totals.size_bytes
        inner = f", {held_out.totals.documents:,} documents held out"
    return f"{folder}: {totals.documents:,} documents, {totals.draws:,} draws{inner}, {size:,} bytes"


def coverage(
    cache: CachePath,
    student: Annotated[
        list[str] | None,
        typer.Option(help="A tokenizer: a folder, a Hugging Face id, or tiny. May be repeated.", show_default=EMBEDDED),
    ] = None,
    documents: Annotated[int, typer.Option(min=1, help="Documents of the sample.")] = 64,
    context: Annotated[
        str | None, typer.Option(help="Whose scores: compdemo or plain.", show_default="compdemo if held")
    ] = None,
    topk: Annotated[bool, typer.Option(help="Look at the candidates of the topk lane too.")] = True,
    as_json: AsJson = False,
) -> None:
    """Show how much of a cache a student can use.

    For any tokenizer: the share of masked chunks that it can use, the share lost and why, and the length of chunks.

    The counts are exact for a sample of documents, spread over the cache; training sees the same.
    """
    from shared.cache.coverage import measure, render
    from shared.tokenization import TextTokenizer

    students = [TextTokenizer.load(embedded_or(s), _name(s)) for s in student or [EMBEDDED]]
    report = measure(cache, students, documents, context, topk)
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=1))
        return
    from rich.console import Console

    render(report, Console(highlight=False, markup=False, emoji=False))


def _name(source: str) -> str:
    """A tokenizer's last part, as elsewhere."""
    return Path(source).name


def diff(
    first: Annotated[str, typer.Argument(help="The one cache.", metavar="FIRST")],
    second: Annotated[str, typer.Argument(help="The other.", metavar="SECOND")],
    as_json: AsJson = False,
) -> None:
    """Show whether two caches say the same, and what differs.

    Spec field by field, documents, draws, gold log-likelihoods by timestep, candidates.

    Exits with 0 if they are the same, 1 if they differ, 2 if that cannot be said.
    """
    from shared.cache.diffing import diff_caches, render

    try:
        found = diff_caches(first, second)
    except TidecacheError as error:
        typer.echo(f"error: {printable(str(error))}", err=True)
        raise typer.Exit(2) from error
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1))
    else:
        from rich.console import Console

        render(found, Console(highlight=False, markup=False, emoji=False))
    raise typer.Exit(0 if found.same else 1)


def slice_(
    cache: CachePath,
    out: OutPath,
    documents: Annotated[int | None, typer.Option(min=1, help="The first so many documents.")] = None,
    draws: Annotated[int | None, typer.Option(min=1, help="The first so many draws of each document.")] = None,
    context: Annotated[list[str] | None, typer.Option(help="Only this context. May be repeated.")] = None,
    k: Annotated[int | None, typer.Option(min=1, help="The so many best candidates of each chunk.")] = None,
    drop_lane: Annotated[str | None, typer.Option(metavar="topk", help="Without this lane.")] = None,
) -> None:
    """Make a smaller cache: fewer documents, draws, contexts, candidates or lanes.

    The result is the cache that a capture with the smaller settings would have written, and can be extended like one.

    If it is stopped, the same command goes on.
    """
    from shared.cache.slicing import Cut, slice_cache

    if drop_lane not in (None, "topk"):
        raise TidecacheError(f"--drop-lane: expected topk, found {drop_lane!r}: the gold lane is always there")
    cut = Cut(documents, draws, tuple(context) if context else None, k, drop_lane is not None)
    sliced = slice_cache(cache, out, cut)
    typer.echo(f"{describe(out, sliced.manifest, sliced.held_out)}, of {sliced.source_bytes:,} bytes")
    if sliced.lost_tail_samples:
        typer.echo("without tail samples: they lie beyond the k best candidates of the larger cache")


def merge(
    caches: Annotated[list[str], typer.Argument(help="Folders, or addresses.", metavar="CACHE…")],
    out: OutPath,
) -> None:
    """Make one cache of several that were captured in parts.

    They must have the same spec, and be parts of one corpus (as `teacher capture --part` makes them). Shards are copied
    as they are; whatever does not fit together is refused, and nothing is written then.

    If it is stopped, the same command goes on.
    """
    from shared.cache.merging import merge_caches

    merged = merge_caches(caches, out)
    repeated = f"; {merged.repeated} shards were there more than once" if merged.repeated else ""
    typer.echo(f"{describe(out, merged.manifest, merged.held_out)}{repeated}")


def push(
    cache: Annotated[Path, typer.Argument(help="The cache's folder.", metavar="CACHE")],
    repo: Annotated[str, typer.Argument(help="A dataset repository, such as name/dataset.", metavar="REPO")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository readable by anybody.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch.", show_default="main")] = None,
) -> None:
    """Push a cache to the Hugging Face Hub, with a dataset card.

    Its texts go with it: a new repository is private, unless you say otherwise. The manifest comes with the last commit.

    If it is stopped, the same command goes on.
    """
    from shared.cache.pushing import push_cache

    with _progress("pushed") as watch:
        pushed = push_cache(cache, repo, public, revision, watch)
    typer.echo(
        f"{pushed.url} at {pushed.commit[:12]}: {pushed.files:,} files sent; its card says what it holds: choose a licence"
    )


def pull(
    repo: Annotated[str, typer.Argument(help="A dataset repository, such as name/dataset.", metavar="REPO")],
    out: OutPath,
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit.", show_default="main")] = None,
) -> None:
    """Pull a cache from the Hugging Face Hub; every digest is checked before it counts.

    If it is stopped, the same command goes on. A cache that is there already is brought up to date.
    """
    from shared.cache.pulling import pull_cache

    with _progress("pulled") as watch:
        pulled = pull_cache(repo, out, revision, watch)
    typer.echo(
        f"{describe(out, pulled.manifest, pulled.held_out)}; {pulled.files:,} files loaded, commit {pulled.commit[:12]}"
    )


@contextlib.contextmanager
def _progress(verb: str) -> Iterator[Callable[[int], None]]:
    """A line of bytes done, on a terminal."""
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(verb, total=None)
        yield lambda size: progress.advance(task, size)
