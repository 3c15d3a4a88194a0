"""`tidecache cache …`: look into a cache and check it."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from shared.cache import commands_tools
from shared.errors import TidecacheError, printable

app = typer.Typer(
    help="Look into a cache, check it, and make others of it.", no_args_is_help=True, rich_markup_mode="rich"
)

CachePath = typer.Argument(help="The cache's folder.", metavar="CACHE")


@app.callback()
def group() -> None:
    """Look into a cache, check it, and make others of it."""


@app.command()
def inspect(
    cache: Path = CachePath,
    as_json: bool = typer.Option(False, "--json", help="Print the figures as JSON."),
    sample: int = typer.Option(
        16, min=0, help="Read the rows of so many document ranges, evenly spaced (0: footers alone)."
    ),
    html: Path | None = typer.Option(None, help="Write one self-contained page to this file: plots, and a reader."),
    documents: int = typer.Option(12, min=0, help="Documents in the page's reader."),
) -> None:
    """Show what a cache holds.

    Documents, draws, bytes by lane; by timestep the teacher's likelihoods, entropy, tail mass and calibration; compdemo
    against plain.

    The footers of all files are read, and the rows of a sample. --html also shows documents with their masked chunks
    coloured by the teacher's confidence, and the candidates of each.
    """
    from shared.cache.inspect import inspect_cache
    from shared.cache.inspect_text import render

    inspection = inspect_cache(cache, sample)
    if html is not None:
        from shared.cache.page import write_page

        size = write_page(html, inspection, documents)
        typer.echo(f"{html}: {size:,} bytes; open it in a browser", err=as_json)
    if as_json:
        typer.echo(json.dumps(inspection.to_json(), indent=1))
    if as_json or html is not None:
        return
    from rich.console import Console

    render(inspection, Console(highlight=False, markup=False, emoji=False))


@app.command()
def verify(cache: Path = CachePath) -> None:
    """Check every file, row and digest of a cache.

    Reads all of it; each problem found is one line that says what to do.
    """
    from shared.cache.verify import verify as verify_cache

    report = verify_cache(cache)
    for problem in report.problems:
        typer.echo(f"problem: {printable(problem)}", err=True)
    if report.problems:
        raise TidecacheError(f"{cache}: {len(report.problems)} problems found, see above")
    typer.echo(f"{cache}: {report.files} files, {report.size_bytes:,} bytes, {report.draws:,} draws: all in order")


commands_tools.register(app)
