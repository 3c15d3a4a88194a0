"""The cache: format v1, its writer and reader, and the tools that look into it (see docs/cache-format.md)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shared.cache.reader import Cache


def open_cache(path: str | Path) -> Cache:
    """Open a cache for reading: its manifest is read and checked, shards are read when they are asked for.

    `path`: a folder, or an address that fsspec reads, as `s3://bucket/cache` or `https://host/cache`.

    Raises:
        TidecacheError: no cache there, a newer format, or a damaged manifest.
    """
    from shared.cache.reader import Cache  # pyarrow stays out of `tidecache --help`

    return Cache.open(path)
