"""The Python standard library of the running interpreter as a corpus of short documents.

It is the one body of real text that is always there, so the demonstration, the tests and the embedded models use it.
A document is a run of whole top-level statements (a function, a class, a block of constants) of one module, closed
before it exceeds `DOCUMENT_BYTES`; a longer statement is cut between lines. `HELD_OUT` names the modules that no
embedded model has seen, the same for every Python version: quality is measured on them and nowhere else.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELD_OUT = frozenset(
    [
        "argparse",
        "bisect",
        "calendar",
        "configparser",
        "csv",
        "dataclasses",
        "difflib",
        "fileinput",
        "fractions",
        "graphlib",
        "heapq",
        "json",
        "mailbox",
        "pprint",
        "queue",
        "sched",
        "shelve",
        "shlex",
        "statistics",
        "string",
        "textwrap",
        "tomllib",
        "wave",
        "zipfile",
    ]
)
# Tables, generated data and tests: not what people write, and much of it.
SKIPPED = frozenset(
    ["site-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "turtledemo"]
)
DOCUMENT_BYTES = 900


def library_folder() -> Path:
    """Where the running interpreter keeps its standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def module_files(held_out: bool, folder: Path | None = None) -> list[Path]:
    """The library's source files, sorted by path: those of `HELD_OUT` modules, or all the others."""
    folder = folder or library_folder()
    files = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        if SKIPPED.intersection(parts) or parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        if (parts[0].removesuffix(".py") in HELD_OUT) == held_out:
            files.append(path)
    return files


def pieces(source: str, limit: int = DOCUMENT_BYTES) -> Iterator[str]:
    """Cut a module's source into documents of at most `limit` bytes of UTF-8, between top-level statements if possible.

    A line longer than `limit` bytes stands alone and whole.
    """
    block: list[str] = []
    size = 0
    paragraph: list[str] = []

    def flush() -> Iterator[str]:
        nonlocal block, size
        text = "".join(block).strip("\n")
        block, size = [], 0
        if text.strip():
            yield text + "\n"

    def close_paragraph() -> Iterator[str]:
        nonlocal block, size, paragraph
        length = sum(len(line.encode()) for line in paragraph)
        if size + length > limit:
            yield from flush()
        for line in paragraph:
            if size + len(line.encode()) > limit:
                yield from flush()
            block.append(line)
            size += len(line.encode())
        paragraph = []

    previous = ""
    for line in source.splitlines(keepends=True):
        starts_statement = line.startswith(("def ", "class ", "async def ", "@")) and not previous.startswith("@")
        if starts_statement and paragraph:
            yield from close_paragraph()
        paragraph.append(line)
        previous = line
    yield from close_paragraph()
    yield from flush()


def documents(held_out: bool, folder: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yield (name, text) for each document; the name is `module/path.py#number`, stable for one library version."""
    folder = folder or library_folder()
    for path in module_files(held_out, folder):
        try:
            source = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, text in enumerate(pieces(source)):
            yield f"{path.relative_to(folder).as_posix()}#{number}", text
