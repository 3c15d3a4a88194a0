"""Parquet columns from arrays and back: one list of numbers, or one string of bytes, per row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shared.cache.unpacking import MAX_VALUES
from shared.errors import TidecacheError


def lists(arrays: Sequence[npt.NDArray[Any]], kind: pa.DataType) -> pa.Array:
    """A list column with one row per array.

    Raises:
        TidecacheError: more values than one file may have.
    """
    lengths = np.array([len(a) for a in arrays], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    if offsets[-1] > MAX_VALUES:
        raise TidecacheError(
            f"a shard has {offsets[-1]} values in one column, at most {MAX_VALUES} fit: capture with a smaller "
            f"--documents-per-shard"
        )
    values = np.concatenate(arrays) if arrays else np.zeros(0)
    return pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), pa.array(values.astype(kind.value_type.to_pandas_dtype()))
    )


def flat(table: pa.Table, name: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """(values of all rows, row offsets) of a list column; no copy per row.

    Raises:
        ValueError: nulls.
    """
    column = _whole(table, name)
    offsets = column.offsets.to_numpy().astype(np.int64)
    values = column.values.slice(offsets[0], offsets[-1] - offsets[0])
    if values.null_count:
        raise ValueError(f"column {name}: expected numbers, found nulls")
    return values.to_numpy(zero_copy_only=False), offsets - offsets[0]


def binaries(table: pa.Table, name: str) -> list[bytes]:
    """A column of bytes, row by row.

    Raises:
        ValueError: nulls, or another type.
    """
    column = _whole(table, name)
    if not pa.types.is_binary(column.type):
        raise ValueError(f"column {name}: expected bytes, found {column.type}")
    return column.to_pylist()  # type: ignore[no-any-return]


def _whole(table: pa.Table, name: str) -> pa.Array:
    """A column without nulls as one array."""
    column = table[name].combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # pyarrow keeps the type for columns without chunks
        column = column.chunk(0) if column.num_chunks else pa.array([], column.type)
    if column.null_count:
        raise ValueError(f"column {name}: expected a value in every row, found nulls")
    return column
