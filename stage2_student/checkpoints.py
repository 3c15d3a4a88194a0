"""The folder of a run: checkpoints that appear whole or not at all, and what a resumed run must have in common.

A checkpoint is written under `.unfinished`, made durable and given its name by one rename; so is the removal of an old
one begun. Whatever a kill or a full disk leaves, a folder called `checkpoint-N` is complete. The result of a run, which
lies in the run's folder itself, is written the same way and moved in file by file, `tidecache.json` last.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.filesize import decimal
from torch import nn

from shared.cache.files import fsync_folder
from shared.errors import TidecacheError
from stage2_student.callbacks import LOG_FILE
from stage2_student.config import METADATA_FILE, TrainConfig
from stage2_student.model import TrainedFrom, load_metadata

UNFINISHED = ".unfinished"
KEPT = 2  # checkpoints
EARLIER = {"reuse": "same", "gold_share": 0.0}  # what checkpoints did that do not say it
FREE = (
    "logging_steps",
    "save_steps",
    "eval_steps",
    "eval_documents",
    "workers",
    "peak_tflops",
    "activation_checkpointing",
)
_FULL = re.compile(r"PytorchStreamWriter|inline_container|os error (27|28|122)\b|No space left|File too large")
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Identity:
    """What decides every number of a run besides the base's weights; two that differ are two runs."""

    config: TrainConfig
    caches: tuple[TrainedFrom, ...]
    tokenizer: str  # digest of the student's
    processes: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, for `tidecache.json`."""
        return {
            "caches": [asdict(cache) for cache in self.caches],
            "tokenizer": self.tokenizer,
            "processes": self.processes,
            "config": self.config.to_json(),
        }

    def check(self, checkpoint: Path) -> None:
        """A resumed run must be the same run; only how it reports, saves and loads may change.

        Raises:
            TidecacheError: it is not; the message has each field with both values.
        """
        there, now = load_metadata(checkpoint), self.to_json()
        before = EARLIER | there.get("config", {})
        pairs = [(name, before.get(name), value) for name, value in now["config"].items()]
        pairs += [(name, there.get(name), now[name]) for name in ("caches", "tokenizer", "processes")]
        changed = [f"{name}: {a!r} there, {b!r} now" for name, a, b in pairs if a != b and name not in FREE]
        if changed:
            raise TidecacheError(
                f"{checkpoint} was trained with another configuration ({'; '.join(changed)}): resume with the same "
                "options, or choose another --out"
            )


def complete(out: Path) -> list[Path]:
    """The checkpoints of a run's folder, by step."""
    found = [(int(m[1]), path) for path in out.glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def last(out: Path) -> Path | None:
    """The newest checkpoint; None where there is none."""
    return next(reversed(complete(out)), None)


def check_out(out: Path, resume: bool) -> None:
    """A run may begin in a new or empty folder, and go on where there is a checkpoint.

    Raises:
        TidecacheError: it may not.
    """
    if out.exists() and not out.is_dir():
        raise TidecacheError(f"{out}: expected a folder for the checkpoint, found a file: choose another --out")
    found = any((out / name).exists() for name in (LOG_FILE, METADATA_FILE, "config.json"))
    if (found or last(out)) and not resume:
        if last(out) is None and not (out / METADATA_FILE).exists():
            advice = "it ended before its first checkpoint: remove the folder, or choose another --out"
        else:
            advice = "choose another --out, or pass --resume to go on with it"
        raise TidecacheError(f"{out} holds a run already: {advice}")
    if resume and last(out) is None:
        raise TidecacheError(
            f"{out}: nothing to resume, no checkpoint was found there: run without --resume; --save-steps sets how "
            "often checkpoints are written"
        )


def check_space(out: Path, model: nn.Module, config: TrainConfig, steps: int) -> None:
    """Refuse a run whose checkpoints surely do not fit on the disk: float32 weights, and twice the trained ones for Adam.

    Raises:
        TidecacheError: they do not.
    """
    weights = 4 * sum(p.numel() for p in model.parameters())
    states = 8 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    written = -(-steps // config.save_steps) if config.save_steps else 0
    missing = min(written, KEPT + 1) - len(complete(out))  # the oldest goes when the next is complete
    needed = weights + max(missing, 0) * (weights + states)
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise TidecacheError(
            f"{out}: the run's checkpoints need about {decimal(needed)}, its disk has {decimal(free)} free: free some "
            "space, choose another --out, or pass --save-steps 0 to write the result alone"
        )


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """An empty folder for what is being written, gone afterwards.

    Raises:
        TidecacheError: the disk is full or refuses.
    """
    folder = out / UNFINISHED
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder
    except Exception as error:  # torch's writer, safetensors and tokenizers have errors of their own for a full disk
        reason = _reason(error)
        if reason is None:
            raise
        raise TidecacheError(
            f"{out}: a checkpoint cannot be written ({reason}): free some space and go on from the last one with --resume; "
            "those written before are complete"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _reason(error: Exception) -> str | None:
    """Why a file could not be written; None if that is not what happened."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return "the disk is full or a limit on file sizes is reached" if _FULL.search(str(error)) else None


def publish(checkpoint: Path, out: Path) -> None:
    """Give a staged checkpoint its name, then remove those that are too old."""
    for path in checkpoint.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    fsync_folder(checkpoint)
    os.replace(checkpoint, out / checkpoint.name)
    fsync_folder(out)
    for old in complete(out)[:-KEPT]:
        os.replace(old, checkpoint.parent / old.name)  # from here on no one takes it for a checkpoint


def move_result(folder: Path, out: Path) -> None:
    """Move a staged result into the run's folder."""
    for path in sorted(folder.iterdir(), key=lambda path: (path.name == METADATA_FILE, path.name)):
        if path.is_dir():
            shutil.rmtree(out / path.name, ignore_errors=True)
        os.replace(path, out / path.name)
    fsync_folder(out)
