"""Tables and text for terminals: numbers to the right, light rules, and nothing that a terminal would obey."""

from __future__ import annotations

from rich import box
from rich.table import Table


def printable(text: object) -> str:
    """One line of text that is safe on a terminal: whatever is not printable, ANSI escapes and line ends above all, is
    written as Python writes it, `\\x1b`. Names of documents and of caches come from strangers.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def plain_table(title: str, headings: list[str]) -> Table:
    """The first column to the left, all others to the right. Headings and title may hold anything."""
    table = Table(
        title=_literal(title) or None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        min_width=len(title),  # or it would be broken to the width of a narrow table
    )
    table.add_column(_literal(headings[0]), no_wrap=True)
    for heading in headings[1:]:
        table.add_column(_literal(heading), justify="right", no_wrap=True)
    return table


def _literal(text: str) -> str:
    """Printable, and no markup of rich's."""
    return printable(text).replace("[", "\\[")


def number(value: float | None, form: str) -> str:
    """The number; a dash where there is none."""
    return "–" if value is None else format(value, form)
