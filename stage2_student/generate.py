"""Answers to a file of prompts: JSON lines in, JSON lines out, resumable (`tidecache student generate`).

A request is an object with `prompt` (a text to go on with) or `messages` (a chat, rendered with the tokenizer's
template), and maybe an `id`; without one it is called by its line number. Each answer is written and flushed as soon as
its batch is done, so what an interruption leaves is complete lines. A run with the same output file skips the ids that
are in it; other options or another checkpoint need another file, which the first line's `settings` tell apart.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from shared.errors import TidecacheError
from stage2_student.inference import Checkpoint
from stage2_student.sampler import SampleOptions, Usage


@dataclass(frozen=True)
class Request:
    """One prompt, encoded. `where`: file and line, for errors."""

    id: str
    ids: tuple[int, ...]
    where: str


def read_requests(path: Path, checkpoint: Checkpoint, as_chat: bool = False) -> list[Request]:
    """Read and encode a file of requests; `as_chat`: a `prompt` is a user's message.

    Raises:
        TidecacheError: no file, a bad line (named), or an id that occurs twice.
    """
    requests: dict[str, Request] = {}
    for number, row in read_lines(path):
        where = f"{path}:{number}"
        name = str(row.get("id", number))
        if name in requests:
            raise TidecacheError(f"{where}: id {name!r} occurs before at {requests[name].where}: ids must differ")
        requests[name] = Request(name, tuple(checkpoint.encode(_text(row, checkpoint, as_chat, where))), where)
    if not requests:
        raise TidecacheError(f"{path}: no requests: expected one JSON object with prompt or messages per line")
    return list(requests.values())


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line of a JSON-lines file that is not blank.

    Raises:
        TidecacheError: no such file, or a line that is no JSON object.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise TidecacheError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
                yield number, row
    except OSError as error:
        raise TidecacheError(f"{path}: cannot be read ({error.strerror}): expected a file of JSON lines") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TidecacheError(f"{path}: not JSON lines in UTF-8: {error}") from error


def _text(row: dict[str, Any], checkpoint: Checkpoint, as_chat: bool, where: str) -> str:
    prompt, messages = row.get("prompt"), row.get("messages")
    if (prompt is None) == (messages is None):
        raise TidecacheError(f"{where}: expected either prompt or messages, found {', '.join(row) or 'nothing'}")
    if prompt is not None:
        if not isinstance(prompt, str) or not prompt:
            raise TidecacheError(f"{where}: prompt: expected a text that is not empty, found {prompt!r}")
        return checkpoint.render_chat([{"role": "user", "content": prompt}]) if as_chat else prompt
    valid = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not valid or not messages:
        raise TidecacheError(f"{where}: messages: expected a list of objects with role and content")
    return checkpoint.render_chat(messages)


def answered(path: Path, settings: dict[str, Any]) -> set[str]:
    """The ids that an output file of the same settings has already; a torn last line is cut off.

    Raises:
        TidecacheError: the file holds answers of other settings, or something else.
    """
    if not path.exists() or path.stat().st_size == 0:
        return set()
    data = path.read_bytes()
    complete = data[: data.rfind(b"\n") + 1]
    if complete != data:
        path.write_bytes(complete)
    rows = [row for _, row in read_lines(path)]
    if not rows:
        return set()
    found = rows[0].get("settings")
    if found != settings:
        differing = "other contents"
        if isinstance(found, dict):
            names = sorted(n for n in {*found, *settings} if found.get(n) != settings.get(n))
            differing = ", ".join(f"{n} {found.get(n)!r} instead of {settings.get(n)!r}" for n in names)
        raise TidecacheError(f"{path}: made with other settings ({differing}): choose another --out or remove it")
    return {str(row["id"]) for row in rows[1:] if "id" in row}


def generate(
    checkpoint: Checkpoint,
    requests: Sequence[Request],
    out: Path,
    options: SampleOptions,
    batch: int,
    quiet: bool = False,
) -> tuple[int, Usage]:
    """Answer the requests that `out` has no answer for yet; returns how many, and what it took.

    Raises:
        TidecacheError: a prompt that cannot be used (named), another run's file, or a file that cannot be written.
    """
    settings = {"model": checkpoint.digest, "block_size": checkpoint.block_size, **asdict(options)}
    try:
        done = answered(out, settings)
        out.parent.mkdir(parents=True, exist_ok=True)
        waiting = [request for request in requests if request.id not in done]
        sampler = checkpoint.sampler()
        for request in waiting:
            sampler.check(request.where, request.ids, options)
        waiting.sort(key=lambda request: len(request.ids))  # rows of like lengths waste no padding
        with out.open("a", encoding="utf-8") as file, _bar(len(requests), quiet) as (progress, task):
            if not done and out.stat().st_size == 0:
                file.write(json.dumps({"settings": settings}) + "\n")
            progress.update(task, completed=len(requests) - len(waiting))
            for start in range(0, len(waiting), batch):
                group = waiting[start : start + batch]
                for request, sample in zip(group, sampler.sample([r.ids for r in group], options), strict=True):
                    answer = {
                        "id": request.id,
                        "text": checkpoint.decode(sample.ids),
                        "tokens": len(sample.ids),
                        "finish": sample.finish,
                    }
                    file.write(json.dumps(answer, ensure_ascii=False) + "\n")
                file.flush()
                progress.update(task, advance=len(group), rate=f"{sampler.usage.tokens_per_forward:.2f}")
    except OSError as error:
        raise TidecacheError(f"{out}: cannot be written ({error.strerror}): answers before this are kept") from error
    return len(waiting), sampler.usage


@contextmanager
def _bar(total: int, quiet: bool) -> Iterator[tuple[Progress, TaskID]]:
    """A progress bar with tokens per forward, or a silent one."""
    columns = (TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[rate]} tokens per forward"), disable=quiet) as progress:
        yield progress, progress.add_task("answers", total=total, rate="–")
