"""Caches at an address that fsspec reads: `s3://…`, `http://…`, `hf://…`, `memory://…`.

`RemotePath` has as much of `pathlib.Path` as reading a cache needs, so that the reader knows one way to name and read a
file. The file system is looked up at each access: fsspec keeps one per process and thread, and those that hold
connections do not survive a fork. fsspec is imported only here, so a local cache never waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

SEPARATOR = "://"


@dataclass(frozen=True)
class RemotePath:
    """A file or folder by its address; what stands behind `::` is where fsspec finds the file system itself."""

    address: str

    def __truediv__(self, name: str) -> RemotePath:
        head, chain, rest = self.address.partition("::")
        head = head if head.endswith(SEPARATOR) else head.rstrip("/") + "/"
        return RemotePath(f"{head}{name}{chain}{rest}")

    def __str__(self) -> str:
        return self.address

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """The file, for reading parts of it.

        Raises:
            OSError: missing or unreadable.
            ImportError: the protocol needs a package that is not installed.
            Exception: whatever else the file system's library raises, which has no common base.
        """
        import fsspec

        system, path = fsspec.core.url_to_fs(self.address)
        with system.open(path, "rb", cache_type="none") as file:  # what is asked for, instead of blocks of 5 MB
            yield file

    def read_bytes(self, limit: int) -> bytes | None:
        """The whole file, or None if it is longer than `limit` bytes, of which no more are read.

        A length that a server announces is believed if it is above the limit, not if it is below. Raises as `open`.
        """
        parts: list[bytes] = []
        left = limit + 1
        with self.open() as file:
            if (getattr(file, "size", None) or 0) > limit:
                return None
            while left and (part := file.read(left)):  # a stream may give less than was asked for
                parts.append(part)
                left -= len(part)
        return b"".join(parts) if left else None


Folder = Path | RemotePath  # of a cache


def folder_of(path: str | Path | RemotePath) -> Folder:
    """An address becomes a `RemotePath`, anything else a local path."""
    if isinstance(path, str) and SEPARATOR in path:
        return RemotePath(path)
    return path if isinstance(path, RemotePath) else Path(path)


def reason(error: Exception) -> str:
    """One line for an exception of any file system's library, some of which have no text."""
    text: Any = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())
