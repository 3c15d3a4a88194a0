"""Caches that are sound to the bit and yet wrong: one thing is changed, and every digest is made anew to agree with it.

So only a check of what is said can find it, none of who said it. `WAYS` are all ways to read a cache.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shared import cli
from shared.cache import manifest as manifests
from shared.cache import open_cache, parquet
from shared.cache.inspect import inspect_cache
from shared.cache.manifest import FileRecord, seal
from shared.cache.stream import DocumentStream, DrawStream
from shared.cache.verify import verify
from shared.errors import TidecacheError

Change = Callable[[pa.Table], pa.Table]


def copy_of(folder: Path, root: Path) -> Path:
    shutil.copytree(folder, root)
    return root


def rows(folder: Path, root: Path, which: str, change: Change) -> Path:
    """A copy at `root` whose first shard has one table changed: `documents`, `likelihoods` or the `vocabulary`."""

    def encoded(data: bytes) -> bytes:
        table = pq.read_table(pa.BufferReader(data))
        return parquet.encode(change(table), parquet.footer_of(table.schema.metadata))

    return data_file(folder, root, which, encoded)


def data_file(folder: Path, root: Path, which: str, change: Callable[[bytes], bytes], rows: int | None = None) -> Path:
    """A copy at `root` with other bytes for one data file (of the first shard), in agreement with its record; `rows`: what
    the record says of them, by default what the footer does.
    """
    copy_of(folder, root)
    manifest = manifests.read_manifest(root)
    receipt, vocabulary = manifest.shards[0], manifest.vocabulary
    record = {"documents": receipt.documents, "likelihoods": receipt.likelihoods[0], "vocabulary": vocabulary}[which]
    data = change((root / record.path).read_bytes())
    (root / record.path).write_bytes(data)
    if rows is None:
        rows = pq.read_metadata(pa.BufferReader(data)).num_rows
    fresh = FileRecord.of(record.path, data, rows, record.columns)
    if which == "vocabulary":
        vocabulary = fresh
    else:
        receipt = dataclasses.replace(receipt, **{which: fresh if which == "documents" else (fresh,)})
    manifests.write_receipt(root, receipt)
    again = manifests.derive(manifest.spec, vocabulary, [receipt, *manifest.shards[1:]])
    (root / "manifest.json").write_bytes(seal(again.to_json()))
    return root


def manifest(folder: Path, root: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy at `root` of whose manifest `change` has edited the JSON."""
    copy_of(folder, root)
    data = json.loads((root / "manifest.json").read_text())
    change(data)
    (root / "manifest.json").write_bytes(seal(data))
    return root


def edit(column: str, function: Callable[[Any], Any], kind: pa.DataType | None = None) -> Change:
    """Change one column's values, row by row, and its type with `kind`."""

    def change(table: pa.Table) -> pa.Table:
        values = [function(v) for v in table[column].to_pylist()]
        field = table.schema.field(column) if kind is None else pa.field(column, kind)
        return table.set_column(table.schema.get_field_index(column), field, pa.array(values, field.type))

    return change


# --- ways to read a cache ----------------------------------------------------------------------------------------


def iterate(path: Path | str) -> None:
    for draw in open_cache(path).iter_draws():
        if "topk" in open_cache(path).spec.lanes:
            _ = draw.candidates


def filtered(path: Path | str) -> None:
    cache = open_cache(path)
    for low, high in ((0.0, 0.5), (0.5, 1.0)):
        _ = list(cache.iter_draws(low, high, names="*"))


def stream(path: Path | str) -> None:
    draws = DrawStream([open_cache(path)])
    _ = [draws[n] for n in range(draws.indexes[0].draws)]


def fresh(path: Path | str) -> None:
    documents = DocumentStream(DrawStream([open_cache(path)], topk=False))
    _ = [documents[n] for n in range(8)]


def verified(path: Path | str) -> None:
    problems = verify(path).problems
    if problems:
        raise TidecacheError(problems[0])


WAYS: dict[str, Callable[[Path], None]] = {
    "iter_draws": iterate,
    "iter_draws, filtered": filtered,
    "stream": stream,
    "documents": fresh,
    "verify": verified,
    "inspect": inspect_cache,  # type: ignore[dict-item]
}


def outcome(way: Callable[[Path], None], path: Path) -> str | None:
    """What a way of reading says against a cache, one line for a person; None if it takes it. Anything but
    `TidecacheError` comes out as it is.
    """
    try:
        way(path)
    except TidecacheError as error:
        return str(error)
    return None


def command(capsys: Any, *arguments: object) -> tuple[int, str, str]:
    """`tidecache …` in this process: (exit code, stdout, stderr)."""
    saved, sys.argv = sys.argv, ["tidecache", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as error:
        code = error.code
    finally:
        sys.argv = saved
    captured = capsys.readouterr()
    return int(code or 0), captured.out, captured.err
