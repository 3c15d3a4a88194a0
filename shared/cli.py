"""The command `tidecache`: one root that finds its groups through the entry-point group `tidecache.commands`.

So `shared` imports no stage. Only the group that is asked for is loaded; `--help` loads all three, and none of them
imports torch at that point. What a user can mend ends in one line on stderr and exit code 1; a traceback is a defect of
ours and stays visible.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer
from typer.core import TyperGroup

from shared import __version__
from shared.errors import TidecacheError, printable

GROUP = "tidecache.commands"
OUR_PACKAGES = ("shared", "stage1_teacher", "stage2_student")
ORDER = ("teacher", "cache", "student")  # as one uses them


class RootGroup(TyperGroup):
    """Turns what users can mend into one line."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except TidecacheError as error:
            typer.echo(f"error: {printable(str(error))}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from error


def load(point: EntryPoint) -> typer.Typer:
    """The commands of one group.

    Raises:
        TidecacheError: a package that it needs is not installed. What is wrong in our own code is raised as it is.
    """
    try:
        app = getattr(importlib.import_module(point.module), point.attr)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in OUR_PACKAGES:
            raise
        raise TidecacheError(
            f"`tidecache {point.name}` needs the package {error.name}, which is not installed: install tidecache again "
            f"with its dependencies (`make install` or `pip install tidecache`)"
        ) from error
    assert isinstance(app, typer.Typer)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tidecache {__version__}")
        raise typer.Exit


def root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """Distil diffusion language models offline: run the teacher once, train students from its cache."""


def build(arguments: Sequence[str]) -> typer.Typer:
    """The root app with the group that `arguments` begin with, or with all groups."""
    app = typer.Typer(
        cls=RootGroup, name="tidecache", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
    )
    app.callback()(root)
    points = {point.name: point for point in entry_points(group=GROUP)}
    names = [arguments[0]] if arguments and arguments[0] in points else sorted(points, key=_rank)
    for name in names:
        app.add_typer(load(points[name]), name=name)
    return app


def _rank(name: str) -> tuple[int, str]:
    return (ORDER.index(name) if name in ORDER else len(ORDER), name)


def main() -> None:
    """The console command."""
    # transformers warns about checkpoints in general terms; what matters in them is checked here and said in one line.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    arguments = sys.argv[1:]
    try:
        app = build(arguments)
    except TidecacheError as error:
        typer.echo(f"error: {printable(str(error))}", err=True)
        sys.exit(1)
    app(arguments, prog_name="tidecache")


if __name__ == "__main__":
    main()
