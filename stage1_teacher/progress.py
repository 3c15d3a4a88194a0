"""What a person sees during a capture: what it will do, how far it is, and what became of it.

In a terminal the progress is one live line with a bar: documents, chunks per second, bytes written, remaining time.
Elsewhere (a log file, a batch system) it is a plain line every half minute. The remaining time counts only documents
whose draws were missing: those that were there already are passed in no time.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from shared.cache.manifest import HELD_OUT_FOLDER, Receipt
from shared.errors import TidecacheError
from shared.spec import CaptureSpec
from stage1_teacher.capture import Extent, Part, Report

LOG_EVERY = 30.0  # seconds between lines where there is no terminal


class CaptureProgress:
    """A `Watcher` with a display; use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[line]}"),
            console=console,
            transient=True,
            expand=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("capturing", total=None, line="")
        self._total: int | None = None
        self._skipped = self._done = 0
        self._open: tuple[int, int, int] = (0, 0, 0)  # documents, chunks, positions of the shard in work
        self._share = 0.0  # of it
        self._chunks = 0
        self._bytes = 0
        self._begin: float | None = None
        self._logged = time.monotonic()

    def __enter__(self) -> CaptureProgress:
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take it away."""
        self._bar.stop()

    def expect(self, documents: int) -> None:
        """So many documents there are in all."""
        with self._lock:
            self._total = documents
            self._show()

    def skipped(self, documents: int) -> None:
        """See `Watcher`."""
        with self._lock:
            self._skipped += documents
            self._show()

    def begun(self, documents: int, chunks: int, positions: int) -> None:
        """See `Watcher`."""
        with self._lock:
            self._begin = self._begin or time.monotonic()
            self._done += self._open[0]
            self._chunks += self._open[1]
            self._open, self._share = (documents, chunks, positions), 0.0
            self._show()

    def scored(self, positions: int) -> None:
        """See `Watcher`."""
        with self._lock:
            self._share += positions / max(self._open[2], 1)
            self._show()

    def narrowed(self, batch_tokens: int) -> None:
        """See `Watcher`."""
        self._console.print(
            f"out of memory: this shard again with batches of {batch_tokens:,} tokens (its footer says so)",
            highlight=False,
        )

    def written(self, receipt: Receipt) -> None:
        """See `Watcher`."""
        with self._lock:
            self._bytes += receipt.documents.size_bytes + sum(f.size_bytes for f in receipt.likelihoods)

    def _show(self) -> None:
        now = time.monotonic()
        done = self._done + self._share * self._open[0]
        chunks = self._chunks + self._share * self._open[1]
        seconds = now - (self._begin or now)
        position = int(self._skipped + done)
        parts = [f"{position:,}" + (f"/{self._total:,}" if self._total is not None else "") + " documents"]
        if seconds > 0.5:
            parts += [f"{chunks / seconds:,.0f} chunks/s", decimal(self._bytes)]
            if self._total is not None and done > 0:
                parts.append(f"{duration((self._total - self._skipped - done) * seconds / done)} left")
        line = " · ".join(parts)
        self._bar.update(self._task, completed=position, total=self._total, line=line)
        if not self._console.is_terminal and now - self._logged > LOG_EVERY:
            self._logged = now
            self._console.print(f"capturing: {line}", highlight=False)


@contextlib.contextmanager
def counted(progress: CaptureProgress, extent: Extent, spec: CaptureSpec) -> Iterator[None]:
    """Tell the progress how many documents there are in all as soon as they are counted, which a thread does."""
    stop = threading.Event()

    def count() -> None:
        counts = extent.count(spec, stop)
        if counts is not None:
            progress.expect(sum(counts.values()))

    with ThreadPoolExecutor(1, "count") as counting:
        counting.submit(count)
        try:
            yield
        finally:
            stop.set()


@contextlib.contextmanager
def stoppable(console: Console, folder: Path) -> Iterator[None]:
    """Ctrl-C says how to go on, and exits with 130."""
    try:
        yield
    except KeyboardInterrupt:
        console.print(
            f"stopped; every complete shard is kept in {folder}: the same command goes on from there", highlight=False
        )
        raise typer.Exit(130) from None


def write_summary(path: Path | None, report: Report) -> None:
    """The report as JSON, where --json says so.

    Raises:
        TidecacheError: it cannot be written.
    """
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise TidecacheError(
            f"--json {path}: the cache is complete, but the summary cannot be written: {error.strerror}"
        ) from error


def duration(seconds: float) -> str:
    """A length of time as people say it."""
    whole = max(round(seconds), 0)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"


def show_rows(console: Console, title: str, rows: Sequence[tuple[str, str]]) -> None:
    """A heading and a list of (name, value)."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    console.print(f"[bold]{title}[/bold]", highlight=False)
    console.print(table, highlight=False)


def show_report(console: Console, report: Report) -> None:
    """What the cache holds now, what this run added, what was left out, and how long it took."""
    parts = [(("train", report.train))] + ([(HELD_OUT_FOLDER, report.held_out)] if report.held_out else [])
    for name, part in parts:
        show_rows(console, f"{name}: {part.folder}", _part_rows(part))
    timing = report.timing
    tokens = sum(part.tokens_scored for _, part in parts)
    speed = f", {tokens / timing.teacher:,.0f} scored tokens/s in the teacher" if tokens and timing.teacher else ""
    console.print(
        f"{duration(report.seconds)}: {_percent(timing.teacher, report.seconds)} in the teacher, "
        f"{_percent(timing.preparing, report.seconds)} waiting for text, {_percent(timing.writing, report.seconds)} for the disk{speed}",
        highlight=False,
    )


def _part_rows(part: Part) -> list[tuple[str, str]]:
    totals = part.manifest.totals
    rows = [
        (
            "documents",
            f"{totals.documents:,}" + (f", of which {totals.cut:,} cut to the length limit" if totals.cut else ""),
        ),
        (
            "draws",
            f"{totals.draws:,}, with {totals.masked_chunks:,} masked chunks of {totals.scored_tokens:,} teacher tokens",
        ),
        ("size", f"{decimal(totals.size_bytes)} in {len(part.manifest.shards):,} shards"),
    ]
    for reason, count in totals.dropped.items():
        example = f" (for example {part.examples[reason]})" if reason in part.examples else ""
        rows.append(("dropped", f"{count:,}: {reason}{example}"))
    if not part.documents_seen:
        rows.append(("this run", "its part has none of the shards"))
    elif not part.shards_written:
        rows.append(("this run", "nothing was missing"))
    elif part.shards_written < len(part.manifest.shards):
        rows.append(("this run", f"{part.shards_written:,} shards, {part.chunks_scored:,} masked chunks"))
    return rows


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / max(whole, 1e-9):.0f} %"
