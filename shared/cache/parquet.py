"""Parquet files of a cache as such: how tables become bytes, and how bytes are checked before they become tables.

zstd, page checksums and a page index; the footer carries our entries as JSON under `tidecache.`. A file is read whole
(a shard has at most some tens of MB), and its length and digest are compared with its record before anything is parsed,
so that damage ends in a clear error and nothing damaged is ever used. What it would take unpacked is found before anything
is (`shared.cache.unpacking`). Page checksums are verified as well; other readers have only those.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shared.cache import files, unpacking
from shared.cache.manifest import FileRecord
from shared.cache.remote import Folder, RemotePath, reason
from shared.errors import printable, shown

ROW_GROUP_ROWS = 256
METADATA_PREFIX = "tidecache."
UNREADABLE = (pa.ArrowException, OSError, ValueError, KeyError, OverflowError)  # what decoding says of damage
REMEDY = "`tidecache cache verify` lists all that is damaged and says how to mend it"


def encode(table: pa.Table, metadata: Mapping[str, Any]) -> bytes:
    """The Parquet file: zstd, page checksums, `metadata` as JSON under `tidecache.` in the footer. Equal tables give
    equal bytes with the same pyarrow.
    """
    footer = {
        METADATA_PREFIX + key: json.dumps(value, sort_keys=True, ensure_ascii=True) for key, value in metadata.items()
    }
    sink = pa.BufferOutputStream()
    encodings = {
        f"{field.name}{'.list.element' if pa.types.is_list(field.type) else ''}": encoding
        for field in table.schema
        if (encoding := _encoding(field)) is not None
    }
    plain = table.replace_schema_metadata(None)
    with pq.ParquetWriter(
        sink,
        plain.schema,
        compression="zstd",
        compression_level=9,
        use_dictionary=["document", "messages.list.element.role"],
        column_encoding=encodings,
        write_page_checksum=True,
        write_page_index=True,
        store_schema=False,  # our types need no help, and it would hold them and the metadata a second time
    ) as writer:
        writer.write_table(plain, row_group_size=ROW_GROUP_ROWS)
        writer.add_key_value_metadata(footer)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def _encoding(field: pa.Field) -> str | None:
    """Floats and candidates' ids by byte planes (bits that are always 0 cost nothing then), other integers, which
    mostly grow along a row, as deltas, the rest plain.
    """
    value = field.type.value_type if pa.types.is_list(field.type) else field.type
    if pa.types.is_floating(value) or field.name.endswith("_topk_ids"):
        return "BYTE_STREAM_SPLIT"
    return "DELTA_BINARY_PACKED" if pa.types.is_integer(value) else None


def footer_of(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """The entries under `tidecache.`, decoded; those of others are left out."""
    prefix = METADATA_PREFIX.encode()
    return {k[len(prefix) :].decode(): json.loads(v) for k, v in (metadata or {}).items() if k.startswith(prefix)}


def read_data(root: Folder, record: FileRecord) -> bytes:
    """A data file, whole, its length and digest checked against its record.

    Raises:
        DamagedError: missing, truncated or changed.
    """
    path = root / record.path
    data = files.read(root, record.path, record.size_bytes + 1, REMEDY)
    if len(data) != record.size_bytes:
        finding = f"expected {record.size_bytes} bytes, found {len(data)}: cut off or replaced"
        raise files.DamagedError(path, finding, REMEDY)
    if files.digest(data) != record.digest:
        finding = f"expected the digest {record.digest}, found {files.digest(data)}: damaged"
        raise files.DamagedError(path, finding, REMEDY)
    return data


def open_parquet(root: Folder, record: FileRecord) -> pq.ParquetFile:
    """A data file, read whole and checked as by `read_data`, its footer parsed.

    Raises:
        DamagedError: missing, truncated, changed, or claiming more values than a shard can have.
    """
    return parse_parquet(read_data(root, record), root / record.path)


def parse_parquet(data: bytes, path: Folder) -> pq.ParquetFile:
    """The bytes of a data file, its footer parsed; `path` is for messages.

    Raises:
        DamagedError: no Parquet file, or it claims more values than a shard can have.
    """
    view = memoryview(data)
    _check(lambda offset, length: view[offset : offset + length], len(data), path)
    return _parse(pa.BufferReader(data), path)


def _check(read: unpacking.Read, size: int, path: Folder, columns: list[str] | None = None) -> None:
    try:
        unpacking.check(read, size, columns)
    except unpacking.BombError as error:
        raise files.DamagedError(path, str(error), REMEDY) from error


def _parse(source: Any, path: Folder) -> pq.ParquetFile:
    """The footer of a file that has been walked through."""
    try:
        file = pq.ParquetFile(source, page_checksum_verification=True)
        _ = file.schema_arrow.names
        footer_of(file.metadata.metadata)
    except (*UNREADABLE, RecursionError) as error:
        raise files.DamagedError(path, f"no Parquet file, or not one of ours ({_line(error)})", REMEDY) from error
    return file


def _line(error: Exception) -> str:
    """Another library's message, which may hold text from the file, as one short line."""
    return printable(" ".join(str(error).split()))[:200]


def read_metadata(root: Folder, record: FileRecord) -> pq.FileMetaData:
    """The footer alone, without the file's digest: for statistics over many files.

    Raises:
        DamagedError: missing, unreadable, or with more in it than a shard can have.
    """
    path = root / record.path
    if isinstance(path, RemotePath):
        return open_parquet(root, record).metadata
    with _opened(path) as file:
        _check(file.part, file.size, path, [])
        return _parse(file, path).metadata


def _opened(path: Path) -> _Parts:
    try:
        return _Parts(files.open_inside(path))
    except FileNotFoundError as error:
        raise files.MissingError(path, "the file is missing", REMEDY) from error
    except OSError as error:
        raise files.DamagedError(path, f"cannot be read ({reason(error)})", REMEDY) from error


class _Parts(io.RawIOBase):
    """An open file that remembers the parts that were read, so that what was checked is what is decoded."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._place, self._parts = file, 0, dict[int, bytes]()
        self.size = file.seek(0, io.SEEK_END)

    def part(self, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length), fewer where the file ends."""
        for start, data in self._parts.items():
            if start <= offset and offset + length <= start + len(data):
                return data[offset - start : offset - start + length]
        self._file.seek(offset)
        self._parts[offset] = self._file.read(min(length, max(self.size - offset, 0)))
        return self._parts[offset]

    def read(self, size: int = -1) -> bytes:
        data = self.part(self._place, self.size - self._place if size < 0 else size)
        self._place += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


def column_bytes(metadata: pq.FileMetaData) -> dict[str, int]:
    """Compressed bytes of each top-level column over all row groups, in the file's order; what else a file holds is its
    footer and page index.
    """
    found: dict[str, int] = {}
    for group in (metadata.row_group(i) for i in range(metadata.num_row_groups)):
        for column in (group.column(i) for i in range(group.num_columns)):
            name = column.path_in_schema.split(".")[0]
            found[name] = found.get(name, 0) + column.total_compressed_size
    return found


def read_narrow(root: Folder, record: FileRecord, columns: list[str]) -> pa.Table:
    """A few narrow columns of a data file, without reading the rest of it, so its digest is not checked; the pages'
    checksums are. For an index: what goes into a batch comes from `open_parquet`.

    Raises:
        DamagedError: missing, damaged where it was read, or claiming more values than a shard can have.
    """
    path = root / record.path
    if isinstance(path, RemotePath):
        try:
            with path.open() as file:
                return _read_narrow(root, _Parts(file), record, columns)
        except Exception:  # a server that gives no parts of files, or a file with damage: the whole file will tell
            return read_columns(root, open_parquet(root, record), record, columns)
    with _opened(path) as parts:
        return _read_narrow(root, parts, record, columns)


def _read_narrow(root: Folder, parts: _Parts, record: FileRecord, columns: list[str]) -> pa.Table:
    path = root / record.path
    _check(parts.part, parts.size, path, columns)
    return read_columns(root, _parse(parts, path), record, columns)


def read_columns(
    root: Folder,
    file: pq.ParquetFile,
    record: FileRecord,
    columns: list[str],
    timesteps: tuple[float, float] = (0.0, 1.0),
) -> pa.Table:
    """The columns; with a narrower timestep range only rows in it, and row groups without any are not decoded.

    Raises:
        DamagedError: a column or rows are missing, or a page does not decode.
    """
    path = root / record.path
    missing = [c for c in columns if c not in file.schema_arrow.names]
    if missing:
        finding = f"expected the column {missing[0]}, found {shown(', '.join(file.schema_arrow.names), 200)}"
        raise files.DamagedError(path, finding, REMEDY)
    if file.metadata.num_rows != record.rows:
        raise files.DamagedError(path, f"expected {record.rows} rows, found {file.metadata.num_rows}", REMEDY)
    try:  # in this thread: a process that ends while a thread of Arrow's pool is still busy is aborted
        if timesteps == (0.0, 1.0):
            return file.read(columns, use_threads=False)
        groups = [i for i in range(file.num_row_groups) if _may_hold(file.metadata.row_group(i), timesteps)]
        table = file.read_row_groups(groups, columns, use_threads=False)
        low, high = (pa.scalar(t, pa.float64()) for t in timesteps)
        t = table["timestep"].cast(pa.float64())
        return table.filter(pc.and_(pc.greater_equal(t, low), pc.less_equal(t, high)))
    except UNREADABLE as error:
        raise files.DamagedError(path, f"cannot be decoded ({_line(error)})", REMEDY) from error


def _may_hold(group: pq.RowGroupMetaData, timesteps: tuple[float, float]) -> bool:
    """Whether the row group's statistics leave room for a timestep in the range."""
    columns = [group.column(i) for i in range(group.num_columns)]
    statistics = next(c.statistics for c in columns if c.path_in_schema == "timestep")
    if statistics is None or not statistics.has_min_max:
        return True
    return bool(statistics.min <= timesteps[1] and statistics.max >= timesteps[0])
