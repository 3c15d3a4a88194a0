"""Tables and text for terminals: numbers to the right, light rules, and nothing that a terminal would obey."""

from __future__ import annotations

from rich import box
from rich.table import Table

from shared.errors import printable

MOST_WIDENED = 60  # columns that a narrow table takes up so that its title stays on one line


def literal(text: object) -> str:
    """Text of unknown origin for a cell or a heading: printable, and no markup of rich's."""
    return printable(str(text)).replace("[", "\\[")


def plain_table(title: str, headings: list[str]) -> Table:
    """The first column to the left, all others to the right."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        min_width=min(len(title), MOST_WIDENED),
    )
    table.add_column(headings[0], no_wrap=True)
    for heading in headings[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def number(value: float | None, form: str) -> str:
    """The number; a dash where there is none."""
    return "–" if value is None else format(value, form)
