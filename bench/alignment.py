"""How fast is text brought from bytes to chunks, apart from tokenisation? (Target: 1 MB per second and core.)

    python bench/alignment.py [--megabytes 2] [--repeat 3]

Runs the embedded pair's tokenizers over the standard library, as short documents (some 900 bytes, what a capture sees)
and as long ones (whole modules), and prints CPU time per stage: tokenisation by the library, everything else that
preparation does (rendering, token bytes checked against the text, boundaries, chunks, keys), and the chunks alone.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAYON_NUM_THREADS", "1")

from rich.console import Console
from rich.table import Table

from shared.alignment import chunks_of
from shared.documents import Message, PreparedDocument, RawDocument
from shared.preparation import Limits, Preparer
from shared.stdlib_corpus import documents, library_folder, module_files
from shared.tokenization import TextTokenizer

ROOT = Path(__file__).resolve().parent.parent
TINY = [ROOT / "stage1_teacher" / "tiny", ROOT / "stage2_student" / "tiny"]

BATCH = 256  # documents per call, as the capture's shards have it


def seconds(work: Callable[[], object], repeat: int) -> float:
    """The least CPU time of all threads over some runs."""
    best = float("inf")
    for _ in range(repeat):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def take(texts: Iterator[str], size: int) -> list[RawDocument]:
    taken, total = [], 0
    for text in texts:
        if total >= size:
            break
        taken.append(RawDocument("", (Message("text", text, True),), chat=False))
        total += len(text.encode())
    return taken


def measure(
    tokenizers: list[TextTokenizer], preparer: Preparer, raws: list[RawDocument], repeat: int
) -> tuple[float, float, float]:
    """CPU seconds of tokenisation alone, of preparation (which tokenises too), and of the chunks alone."""
    batches = [raws[i : i + BATCH] for i in range(0, len(raws), BATCH)]
    texts = [[raw.messages[0].content for raw in batch] for batch in batches]
    prepared = [p for batch in batches for p in preparer.prepare_many(batch) if isinstance(p, PreparedDocument)]
    return (
        seconds(lambda: [t.encode_text_batch(batch) for t in tokenizers for batch in texts], repeat),
        seconds(lambda: [preparer.prepare_many(batch) for batch in batches], repeat),
        seconds(lambda: [chunks_of((p.teacher, *p.students), [0]) for p in prepared], repeat),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=2.0)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    size = int(options.megabytes * 1e6)
    tokenizers = [TextTokenizer.load(folder) for folder in TINY]
    preparer = Preparer(tokenizers[0], tokenizers[1:], Limits(10**9, (10**9,)), "none")  # nothing is cut
    modules = (path.read_text(encoding="utf-8", errors="ignore") for path in module_files(False, library_folder()))
    corpora = {
        "short documents": take((text for _, text in documents(held_out=False)), size),
        "whole modules": take(modules, size),
    }
    table = Table(title="CPU seconds per stage, two tokenizers, one core")
    for column in (
        "corpus",
        "documents",
        "MB",
        "tokenise",
        "prepare, rest",
        "chunks alone",
        "MB/s, rest",
        "MB/s, chunks",
    ):
        table.add_column(column, justify="left" if column == "corpus" else "right")
    for name, raws in corpora.items():
        megabytes = sum(len(raw.messages[0].content.encode()) for raw in raws) / 1e6
        tokenise, prepare, chunks = measure(tokenizers, preparer, raws, options.repeat)
        rest = prepare - tokenise
        numbers = (tokenise, rest, chunks, megabytes / rest, megabytes / chunks)
        table.add_row(name, str(len(raws)), f"{megabytes:.2f}", *(f"{number:.2f}" for number in numbers))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
