"""`tidecache cache …`: the commands that compare caches and make others of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from shared.embedded import EMBEDDED, embedded_or

CachePath = Annotated[str, typer.Argument(help="The cache's folder, or an address.", metavar="CACHE")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]


def register(app: typer.Typer) -> None:
    """Add these commands to the group, in the order of the help."""
    app.command()(coverage)


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

    render(report, Console(highlight=False))


def _name(source: str) -> str:
    """A tokenizer's last part, as elsewhere."""
    return Path(source).name
