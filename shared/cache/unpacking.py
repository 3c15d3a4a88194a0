"""What a Parquet file will take once it is unpacked, found by walking its footer and page headers before anything is.

A few bytes can stand for gigabytes: a page that says it holds two thousand million equal values, a dictionary of one long
text and a million references to it, a footer of a million empty row groups. The library that decodes Parquet believes
what it reads. So this module reads the same structures first (Thrift's compact protocol, of which only lengths and counts
matter here), in memory bounded by the file's own length, and refuses what no shard needs. Pages without a checksum are
refused too: damage in them would go unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MAX_VALUES = 1 << 28  # values in one column of one file; more is no shard but a decompression bomb
MAX_UNCOMPRESSED = 1 << 31  # bytes of all columns of one file, decoded
MAX_FOOTER_BYTES = 8 << 20
MAX_ELEMENTS = 1 << 21  # fields and list elements of one footer
MAX_COLUMN_CHUNKS = 1 << 16
MAX_SCHEMA = 1024
MAX_DEPTH = 16  # of structures in one another; Parquet's own have 8
MAX_PAGE_HEADER = 1 << 16
MAGIC = b"PAR1"

# Thrift's compact types
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 12
_INTEGERS = (4, 5, 6)

_BYTE_ARRAY = 6
_WIDTHS = {0: 1, 1: 4, 2: 8, 4: 4, 5: 8, _BYTE_ARRAY: 8}  # bytes of a decoded value by Parquet's physical type
_CODECS = (0, 6)  # none, zstd
_DICTIONARY_ENCODINGS = (2, 8)
_ENCODINGS = (0, 3, 5, 6, 9, *_DICTIONARY_ENCODINGS)  # not DELTA_BYTE_ARRAY (7), where a byte can stand for a long text
_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = 0, 2, 3
_LEVELS = 4  # bytes of a value's definition and repetition levels

Read = Callable[[int, int], bytes | memoryview]  # (offset, length) to bytes; fewer where the file ends


class BombError(ValueError):
    """A file that is refused unread; the text says why."""


@dataclass(frozen=True)
class Chunk:
    """One column's part of one row group: bytes [start, stop) of the file."""

    column: str
    kind: int
    start: int
    stop: int
    values: int


def check(read: Read, size: int, columns: list[str] | None = None) -> None:
    """Walk the footer, and the pages of these columns (None: of all).

    Raises:
        BombError: no Parquet file, too much of something, or pages without checksums.
    """
    unpacked, values_by_column = 0, dict[str, int]()
    for chunk in chunks_of(footer(read, size), size):
        if columns is not None and chunk.column.split(".")[0] not in columns:
            continue
        values_by_column[chunk.column] = values_by_column.get(chunk.column, 0) + chunk.values
        unpacked += _check_pages(read(chunk.start, chunk.stop - chunk.start), chunk)
        if values_by_column[chunk.column] > MAX_VALUES or unpacked > MAX_UNCOMPRESSED:
            raise BombError(
                f"column {chunk.column} claims {values_by_column[chunk.column]} values, {unpacked} bytes unpacked with those "
                f"before it, more than a shard can have: refused"
            )


def footer(read: Read, size: int) -> dict[int, Any]:
    """The parsed footer.

    Raises:
        BombError: there is none, or one with too much in it.
    """
    end = bytes(read(max(size - 8, 0), 8))
    length = int.from_bytes(end[:4], "little")
    if size < 12 or end[4:] != MAGIC or length > size - 12:
        raise BombError("no Parquet file: it does not end as one")
    if length > MAX_FOOTER_BYTES:
        raise BombError(f"a footer of {length} bytes, more than a shard can have: refused")
    return _parse(_Thrift(bytes(read(size - 8 - length, length)), MAX_ELEMENTS))


def chunks_of(parsed: dict[int, Any], size: int) -> list[Chunk]:
    """The column chunks that a footer names.

    Raises:
        BombError: too many, outside of the file, encrypted, in other files, or of a schema that is too deep or wide.
    """
    schema, groups = _list(parsed, 2), _list(parsed, 4)
    leaves = _leaves(schema)
    if len(groups) * max(len(leaves), 1) > MAX_COLUMN_CHUNKS:
        raise BombError(f"{len(groups)} row groups of {len(leaves)} columns, more than a shard can have: refused")
    found = []
    for group in groups:
        columns = _list(group, 1)
        if len(columns) != len(leaves):
            raise BombError(f"a row group of {len(columns)} columns, where the schema has {len(leaves)}")
        for column, levels in zip(columns, leaves, strict=True):
            about = column.get(3)
            if not isinstance(about, dict) or {1, 8, 9} & set(column):
                raise BombError("a column that is encrypted, in another file, or not described")
            path = b".".join(p for p in _list(about, 3, bytes)).decode("ascii", "backslashreplace")[:200]
            # 0: no such page. Where a shard's documents were all dropped, a column has its dictionary alone, or nothing.
            starts = [at for at in (_whole(about, 9), _whole(about, 11) if 11 in about else 0) if at]
            start, length, values = min(starts, default=0), _whole(about, 7), _whole(about, 5)
            if not (starts or length or values):
                continue
            if not 4 <= start <= start + length <= size - 8:
                raise BombError(f"column {path}: its bytes are not within the file")
            if _whole(about, 4) not in _CODECS or _whole(about, 1) not in _WIDTHS:
                raise BombError(f"column {path}: expected zstd and plain types, found another codec or type")
            sizes = _inner(about, 16) if 16 in about else {}
            for number, most in zip((2, 3), levels, strict=True):
                if len(_list(sizes, number, int)) not in (0, most + 1):  # decoding would end the process
                    raise BombError(f"column {path}: a histogram of levels that it does not have")
            found.append(Chunk(path, _whole(about, 1), start, start + length, values))
    return found


def _leaves(schema: list[dict[int, Any]]) -> list[tuple[int, int]]:
    """(highest repetition level, highest definition level) of each column of a schema, a tree in depth-first order."""
    if not 0 < len(schema) <= MAX_SCHEMA:
        raise BombError(f"a schema of {len(schema)} elements")
    leaves = []
    open_ = [(1, 0, 0)]  # at each depth: children still to come, and the levels above them
    for element in schema:
        while open_ and not open_[-1][0]:
            open_.pop()
        if not open_ or len(open_) > MAX_DEPTH:
            raise BombError("a schema that is no tree, or too deep")
        left, repetition, definition = open_.pop()
        open_.append((left - 1, repetition, definition))
        kind = (
            _whole(element, 3) if 3 in element and len(open_) > 1 else 0
        )  # required, optional, repeated; the root is none
        levels = repetition + (kind == 2), definition + (kind > 0)
        children = _whole(element, 5) if 5 in element else 0
        if not children:
            leaves.append(levels)
        open_.append((children, *levels))
    if any(left for left, *_ in open_):
        raise BombError("a schema that is no tree")
    return leaves


def _check_pages(data: bytes | memoryview, chunk: Chunk) -> int:
    """Bytes that the pages of a column chunk take once decoded."""
    place, values, dictionary, decoded = 0, 0, 0, 0
    width = _WIDTHS[chunk.kind] + _LEVELS
    while values < chunk.values:
        thrift = _Thrift(bytes(data[place : place + MAX_PAGE_HEADER]), MAX_PAGE_HEADER)
        header = _parse(thrift)
        kind, unpacked, packed = (_whole(header, n) for n in (1, 2, 3))
        place += thrift.place + packed
        if place > len(data):
            raise BombError(f"column {chunk.column}: a page that is longer than its column")
        if 4 not in header:
            raise BombError(f"column {chunk.column}: a page without a checksum")
        if max(unpacked, packed) > MAX_UNCOMPRESSED // 2:
            raise BombError(f"column {chunk.column}: a page of {unpacked} bytes unpacked: refused")
        if kind == _DICTIONARY_PAGE:
            dictionary += unpacked
            decoded += unpacked + width * _whole(_inner(header, 7), 1)
            continue
        if kind not in (_DATA_PAGE, _DATA_PAGE_V2):
            raise BombError(f"column {chunk.column}: a page of an unknown kind")
        about = _inner(header, 5 if kind == _DATA_PAGE else 8)
        encoding = _whole(about, 2 if kind == _DATA_PAGE else 4)
        if encoding not in _ENCODINGS:
            raise BombError(f"column {chunk.column}: a page in the encoding {encoding}, which is not read")
        count = _whole(about, 1)
        values += count
        decoded += unpacked + width * count
        if encoding in _DICTIONARY_ENCODINGS and chunk.kind == _BYTE_ARRAY:
            decoded += dictionary * count  # all could be the longest
    if values != chunk.values:
        raise BombError(f"column {chunk.column}: its pages hold {values} values, its footer says {chunk.values}")
    return decoded


# --- Thrift's compact protocol -----------------------------------------------------------------------------------


class _Thrift:
    """A place in bytes, and how many more fields and elements may come."""

    def __init__(self, data: bytes, elements: int) -> None:
        self.data, self.place, self.left = data, 0, elements

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.data[self.place]
            self.place += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise BombError("a number without an end")

    def integer(self) -> int:
        raw = self.varint()
        return (raw >> 1) ^ -(raw & 1)

    def skip(self, count: int) -> bytes:
        start, self.place = self.place, self.place + count
        if self.place > len(self.data):
            raise BombError("a structure that is cut off")
        return self.data[start : self.place]

    def value(self, kind: int, depth: int) -> Any:
        if kind in _INTEGERS:
            return self.integer()
        if kind == _BINARY:
            return self.skip(self.varint())
        if kind == _STRUCT:
            return self.struct(depth + 1)
        if kind in (_LIST, _SET):
            return self.list(depth + 1)
        if kind in (_TRUE, _FALSE):
            return kind == _TRUE
        if kind == _BYTE:
            return self.skip(1)
        if kind == _DOUBLE:
            return self.skip(8)
        raise BombError("a structure of an unknown kind")  # maps: Parquet has none

    def struct(self, depth: int) -> dict[int, Any]:
        if depth > MAX_DEPTH:
            raise BombError("structures too deep in one another")
        fields: dict[int, Any] = {}
        number = 0
        while True:
            head = self.data[self.place]
            self.place += 1
            if not head:
                return fields
            self.left -= 1
            if self.left < 0:
                raise BombError("more fields than a shard's file can have: refused")
            number = number + (head >> 4) if head >> 4 else self.integer()
            if number in fields:
                raise BombError("a field that is there twice")
            fields[number] = self.value(head & 15, depth)

    def list(self, depth: int) -> list[Any]:
        if depth > MAX_DEPTH:
            raise BombError("structures too deep in one another")
        head = self.data[self.place]
        self.place += 1
        count, kind = head >> 4, head & 15
        if count == 15:
            count = self.varint()
        self.left -= count
        if self.left < 0 or count > len(self.data) - self.place:  # each element has a byte at least
            raise BombError("a list of more elements than a shard's file can have: refused")
        if kind in (_TRUE, _FALSE):
            return [byte == _TRUE for byte in self.skip(count)]
        return [self.value(kind, depth) for _ in range(count)]


def _parse(thrift: _Thrift) -> dict[int, Any]:
    try:
        return thrift.struct(0)
    except IndexError as error:
        raise BombError("a structure that is cut off") from error


def _whole(fields: dict[int, Any], number: int) -> int:
    value = fields.get(number)
    if type(value) is not int or value < 0:
        raise BombError("a count or an offset is missing or negative")
    return value


def _inner(fields: dict[int, Any], number: int) -> dict[int, Any]:
    value = fields.get(number)
    if not isinstance(value, dict):
        raise BombError("a page without a description")
    return value


def _list(fields: dict[int, Any], number: int, kind: type = dict) -> list[Any]:
    value = fields.get(number, [])
    if not isinstance(value, list) or not all(isinstance(v, kind) for v in value):
        raise BombError("a list of something else")
    return value
