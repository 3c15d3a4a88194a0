"""Parquet files that are small and would be huge, made by hand: Thrift structures are read, changed and written again.

As a program: `python -m tests.shared.cache.bombs MEGABYTES FOLDER…` reads each cache in every way with no more address
space than so many megabytes above what the process has once it is loaded, and prints one line for each.
"""

from __future__ import annotations

import json
import resource
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from tests.shared.cache.resealed import WAYS, outcome

Struct = list[list[Any]]  # [field id, kind, value]; values of lists: (kind, elements)
I32, I64, BINARY, LIST, STRUCT = 5, 6, 8, 9, 12


def number(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def zigzag(value: int) -> bytes:
    return number(value << 1 if value >= 0 else (-value << 1) - 1)


def read_number(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[place] & 127) << shift
        place, shift = place + 1, shift + 7
        if data[place - 1] < 128:
            return value, place


def read(data: bytes, kind: int, place: int) -> tuple[Any, int]:
    if kind in (1, 2):
        return None, place
    if kind in (4, I32, I64):
        raw, place = read_number(data, place)
        return (raw >> 1) ^ -(raw & 1), place
    if kind == BINARY:
        length, place = read_number(data, place)
        return data[place : place + length], place + length
    if kind == LIST:
        count, inner = data[place] >> 4, data[place] & 15
        place += 1
        if count == 15:
            count, place = read_number(data, place)
        elements = []
        for _ in range(count):
            element, place = (data[place], place + 1) if inner in (1, 2) else read(data, inner, place)
            elements.append(element)
        return (inner, elements), place
    fields: Struct = []
    last = 0
    while data[place]:
        delta, inner = data[place] >> 4, data[place] & 15
        last, place = last + delta, place + 1
        value, place = read(data, inner, place)
        fields.append([last, inner, value])
    return fields, place + 1


def write(kind: int, value: Any) -> bytes:
    if kind in (1, 2):
        return b""
    if kind in (4, I32, I64):
        return zigzag(value)
    if kind == BINARY:
        return number(len(value)) + value
    if kind == LIST:
        inner, elements = value
        head = (
            bytes([len(elements) << 4 | inner])
            if len(elements) < 15
            else bytes([15 << 4 | inner]) + number(len(elements))
        )
        return head + b"".join(bytes([e]) if inner in (1, 2) else write(inner, e) for e in elements)
    out, last = bytearray(), 0
    for field, inner, inside in value:
        out += bytes([(field - last) << 4 | inner]) + write(inner, inside)
        last = field
    return bytes(out) + b"\x00"


def get(fields: Struct, name: int) -> Any:
    return next(v for n, _, v in fields if n == name)


def put(fields: Struct, name: int, value: Any) -> None:
    next(f for f in fields if f[0] == name)[2] = value


def refooted(data: bytes, change: Callable[[Struct], object], more: bytes = b"") -> bytes:
    """The file with another footer, and more bytes before it."""
    length = int.from_bytes(data[-8:-4], "little")
    footer, _ = read(data[-8 - length : -8], STRUCT, 0)
    change(footer)
    return with_footer(data[: -8 - length] + more, write(STRUCT, footer))


def with_footer(body: bytes, footer: bytes) -> bytes:
    return body + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def column(footer: Struct, name: bytes) -> Struct:
    """The metadata of a column in the first row group."""
    group = get(footer, 4)[1][0]
    return next(get(c, 3) for c in get(group, 1)[1] if get(get(c, 3), 3)[1][0] == name)


def page(values: int, unpacked: int, body: bytes, encoding: int = 8) -> bytes:
    """A data page, with a checksum that is right."""
    checksum = zlib.crc32(body)
    checksum -= (checksum >> 31) << 32
    about = [[1, I32, values], [2, I32, encoding], [3, I32, 3], [4, I32, 3]]
    header = [[1, I32, 0], [2, I32, unpacked], [3, I32, len(body)], [4, I32, checksum], [5, STRUCT, about]]
    return write(STRUCT, header) + body


def with_pages(data: bytes, name: bytes, pages: bytes, values: int | None = None) -> bytes:
    """The file with other pages for one column; `values`: how many the footer then claims."""

    def change(footer: Struct) -> None:
        about = column(footer, name)
        put(about, 9, len(data) - 8 - int.from_bytes(data[-8:-4], "little"))
        put(about, 7, len(pages))
        about[:] = [f for f in about if f[0] != 11]
        if values is not None:
            put(about, 5, values)

    return refooted(data, change, pages)


def equal_values(count: int) -> tuple[int, bytes]:
    """(unpacked size, zstd body) of a page with one row of so many values, all the dictionary's first: a few bytes."""

    def runs(*parts: tuple[int, int]) -> bytes:
        return b"".join(number(n << 1) + bytes([value]) for n, value in parts)

    repetition, definition = runs((1, 0), (count - 1, 1)), runs((count, 3))
    plain = b"".join(len(x).to_bytes(4, "little") + x for x in (repetition, definition)) + b"\x01" + runs((count, 0))
    return len(plain), pa.compress(plain, codec="zstd", asbytes=True)


def main() -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (int(sys.argv[1]) << 20),) * 2)
    for folder in map(Path, sys.argv[2:]):
        said = {}
        for name, way in WAYS.items():
            try:
                said[name] = outcome(way, folder)
            except BaseException as error:
                said[name] = f"CRASH {error!r}"
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
