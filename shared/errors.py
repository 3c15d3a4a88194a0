"""The one exception that users see.

Anything a user can cause (a wrong path, another spec, a full disk) is raised as `TidecacheError` with a message that
says what was wrong, where, what was expected and found, and what to do. The command line prints it as one line and
exits with 1; a traceback means a defect of ours.
"""

from __future__ import annotations


class TidecacheError(Exception):
    """A mistake that the user can mend; its text is one line and complete."""


def shown(value: object, most: int = 80) -> str:
    """A value that somebody else wrote, for a message: as Python writes it, shortened."""
    text = ascii(value[:most] if isinstance(value, str) else value)
    return text if len(text) <= most else f"{text[:most]}…"


def printable(text: str) -> str:
    """Text of unknown origin for a terminal: one line, and control characters (which could move the cursor, change colours
    or the window's title) as escapes.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
