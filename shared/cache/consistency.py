"""What the rows of a shard must be before anything uses them: one place for every reader and for `verify`.

A digest says that a file is the one that its record names, not that its author meant well. So the columns of each shard
that is read are compared with one another, with the spec and with the shard's range before they become documents and
draws: types, lengths of lists, ids within the vocabulary, bytes within the contents, likelihoods that are likelihoods.
All of it runs over whole columns. What costs a computation of its own (the draws that follow from the seed, spelled
chunks, digests of content) is left to `verify`.

Shape suffixes: R rows, D documents, C chunks (of all documents, or of all rows), M masked chunks, N teacher tokens of the
masked chunks, K fillings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shared.cache.columns import flat
from shared.cache.records import IntArray, ShardRange, StoredDocument
from shared.ragged import ranges
from shared.spec import CaptureSpec

MAX_LOGP = 1e-3  # nats; a little above 0, since float32 sums of probabilities are
MAX_TOKEN_BYTES = 1 << 12  # of one vocabulary entry: a few ids would spell gigabytes otherwise
_KEY = re.compile(r"[0-9a-f]{32}")


class InconsistentError(ValueError):
    """Columns that do not fit; the text says which and how."""


def check_columns(table: pa.Table, schema: pa.Schema) -> None:
    """Every column has the type that `schema` gives it, a value in every row, and text that is UTF-8.

    Raises:
        InconsistentError: one has not.
    """
    for name in table.column_names:
        column, expected = table[name], schema.field(name).type
        if _shape(column.type) != _shape(expected):
            raise InconsistentError(f"column {name}: expected {expected}, found {column.type}")
        if _nulls(column):
            raise InconsistentError(f"column {name}: expected a value everywhere, found nulls")
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            raise InconsistentError(f"column {name}: {error}") from error


def _shape(kind: pa.DataType) -> Any:
    """A type without what writers differ in: whether nulls are allowed, and what a list's element is called."""
    if pa.types.is_list(kind):
        return ("list", _shape(kind.value_type))
    if pa.types.is_struct(kind):
        return {kind.field(i).name: _shape(kind.field(i).type) for i in range(kind.num_fields)}
    return kind


def _nulls(column: pa.ChunkedArray) -> bool:
    """Whether there are nulls, at any depth."""
    parts = list(column.chunks)
    while parts:
        part = parts.pop()
        if part.null_count:
            return True
        if pa.types.is_list(part.type):
            parts.append(part.values)
        elif pa.types.is_struct(part.type):
            parts.extend(part.field(i) for i in range(part.type.num_fields))
    return False


def check_vocabulary(table: pa.Table, spec: CaptureSpec) -> None:
    """One row per id, in order, for all ids of the spec, none of them long.

    Raises:
        InconsistentError: it is not so.
    """
    if not np.array_equal(table["id"].to_numpy(), np.arange(len(table))) or len(table) < spec.teacher.vocabulary:
        raise InconsistentError(f"expected the ids 0 to {spec.teacher.vocabulary - 1} or more, each once, in order")
    longest = pc.max(pc.binary_length(table["bytes"])).as_py() or 0
    if longest > MAX_TOKEN_BYTES:
        raise InconsistentError(f"expected tokens of at most {MAX_TOKEN_BYTES} bytes, found one of {longest}")


# --- documents ---------------------------------------------------------------------------------------------------


def check_documents(table: pa.Table, spec: CaptureSpec, shard: ShardRange) -> None:
    """Documents of the shard's range in order, each once; chunks that lie in their contents, one after the other; at
    least one token of the vocabulary for each chunk.

    Raises:
        InconsistentError: it is not so; the first document is named.
    """
    keys, position_D = table["document"].to_pylist(), table["position"].to_numpy()
    for key in keys:
        if not _KEY.fullmatch(key):
            raise InconsistentError(f"expected document ids of 32 hexadecimal digits, found {key[:40]!r}")
    if len(set(keys)) != len(keys):
        raise InconsistentError("the same document twice")
    inside_D = (position_D >= shard.first_document) & (position_D < shard.document_stop)
    _refuse(inside_D, keys, "its position is not in the shard's range")
    _refuse(np.diff(position_D, prepend=-1) > 0, keys, "its position is not after the one before")
    message_C, offset_D = flat(table, "chunk_message")
    count_D = np.diff(offset_D)
    for name in ("chunk_start", "chunk_stop", "token_count"):
        found_D = np.diff(flat(table, name)[1])
        _refuse(found_D == count_D, keys, f"expected one {name} per chunk")
    document_C = np.repeat(np.arange(len(keys)), count_D)
    start_C, stop_C = flat(table, "chunk_start")[0], flat(table, "chunk_stop")[0]
    contents = table["messages"].combine_chunks()
    contents = contents.chunk(0) if isinstance(contents, pa.ChunkedArray) else contents
    first_D = contents.offsets.to_numpy().astype(np.int64)
    known_C = (message_C >= 0) & (message_C < np.diff(first_D)[document_C])
    _refuse_chunks(known_C, document_C, keys, "a chunk of a message that is not there")
    size = pc.binary_length(contents.values.field("content")).to_numpy()
    size_C = size[first_D[:-1][document_C] + message_C]
    sound_C = (start_C >= 0) & (start_C < stop_C) & (stop_C <= size_C)
    _refuse_chunks(sound_C, document_C, keys, "a chunk without bytes or tokens, or not within its message")
    again_C = np.zeros(len(document_C), np.bool_)  # chunks that are not the first of their message
    again_C[1:] = (document_C[1:] == document_C[:-1]) & (message_C[1:] == message_C[:-1])
    ordered_C = np.ones(len(document_C), np.bool_)
    ordered_C[1:] = np.where(
        again_C[1:],
        start_C[1:] >= stop_C[:-1],
        (document_C[1:] != document_C[:-1]) | (message_C[1:] > message_C[:-1]),
    )
    _refuse_chunks(ordered_C, document_C, keys, "chunks that overlap or are not in order")
    tokens_C = flat(table, "token_count")[0].astype(np.int64)
    _refuse_chunks(tokens_C >= 1, document_C, keys, "a chunk without bytes or tokens")
    ids_N, id_offset_D = flat(table, "token_ids")
    _refuse(np.diff(id_offset_D) == _sums(tokens_C, offset_D), keys, "expected as many token ids as its chunks have")
    _check_ids("token_ids", ids_N, spec.teacher.vocabulary)


def _refuse(sound_D: npt.NDArray[np.bool_], keys: Sequence[str], finding: str) -> None:
    if not sound_D.all():
        raise InconsistentError(f"document {keys[int(np.argmin(sound_D))]}: {finding}")


def _refuse_chunks(sound_C: npt.NDArray[np.bool_], document_C: IntArray, keys: Sequence[str], finding: str) -> None:
    if not sound_C.all():
        raise InconsistentError(f"document {keys[int(document_C[np.argmin(sound_C)])]}: {finding}")


# --- draws -------------------------------------------------------------------------------------------------------


def check_extent(table: pa.Table, shard: ShardRange) -> None:
    """Rows by position, then draw, each once, all of the shard's range; timesteps in (0, 1].

    Raises:
        InconsistentError: it is not so.
    """
    position_R, draw_R = table["position"].to_numpy(), table["draw"].to_numpy()
    timestep_R = table["timestep"].to_numpy()
    inside_R = (position_R >= shard.first_document) & (position_R < shard.document_stop)
    inside_R &= (draw_R >= shard.first_draw) & (draw_R < shard.draw_stop)
    if not inside_R.all():
        row = int(np.argmin(inside_R))
        raise InconsistentError(f"draw {draw_R[row]} of position {position_R[row]} is not in the shard's range")
    step_R = np.diff(position_R)
    if not ((step_R > 0) | ((step_R == 0) & (np.diff(draw_R) > 0))).all():
        raise InconsistentError("its rows are not in order, or a draw is there twice")
    if len(timestep_R) and not 0.0 < timestep_R.min() <= timestep_R.max() <= 1.0:  # never true of NaN
        raise InconsistentError("expected timesteps above 0 and up to 1")


def check_draws(
    spec: CaptureSpec, documents: Mapping[str, StoredDocument], table: pa.Table, keys: Sequence[str]
) -> None:
    """Rows fit their documents, and their scores the spec, as far as these stand in plain columns; what is packed is checked
    where it is unpacked. `keys`: the rows' documents.

    Raises:
        InconsistentError: a row does not; it is named, and so is the column.
    """
    number = {key: n for n, key in enumerate(documents)}
    strange = next((key for key in keys if key not in number), None)
    if strange is not None:
        raise InconsistentError(f"the documents file has no document {strange[:40]!r}")
    document_R = np.array([number[key] for key in keys], np.int64)
    position_D = np.array([d.position for d in documents.values()], np.int64)

    def refuse(sound_R: npt.NDArray[np.bool_], finding: str) -> None:
        if not sound_R.all():
            raise InconsistentError(f"{at(int(np.argmin(sound_R)))}: {finding}")

    def at(row: int) -> str:
        return f"draw {table['draw'][row]} of document {keys[row]}"

    refuse(table["position"].to_numpy() == position_D[document_R], "its position is not the document's")
    count_D = np.array([len(d.chunks) for d in documents.values()], np.int64)
    masked_C, offset_R = flat(table, "masked")
    refuse(np.diff(offset_R) == count_D[document_R], "expected one `masked` per chunk of the document")
    tokens = np.concatenate([np.zeros(0, np.int64), *(d.token_count_C for d in documents.values())])
    tokens_C = tokens[ranges((np.cumsum(count_D) - count_D)[document_R], count_D[document_R])]
    chunks_R = _sums(masked_C, offset_R)
    tokens_R = _sums(np.where(masked_C, tokens_C, 0), offset_R)
    single_R = _sums(masked_C & (tokens_C == 1), offset_R)
    hot = sum(t != 1.0 for t in spec.temperatures)
    expected_R = {
        "gold_logp": (tokens_R, "one per token"),
        "topk_ids": (spec.k * tokens_R, "k per token"),
        "topk_logp": (spec.k * chunks_R, "k per masked chunk"),
        "log_z": (hot * chunks_R, "one per masked chunk and temperature other than 1"),
        "tail_ids": (spec.tail_samples * single_R, "one per sample and masked chunk of one token"),
        "tail_logp": (spec.tail_samples * single_R, "one per sample and masked chunk of one token"),
    }
    refuse(np.diff(flat(table, "split")[1]) == chunks_R, "expected one `split` per masked chunk")
    for context in spec.contexts:
        for name, (wanted_R, rule) in expected_R.items():
            column = f"{context}_{name}"
            if column not in table.column_names:
                continue
            values, offsets = flat(table, column)
            found_R = np.diff(offsets)
            wrong = np.flatnonzero(found_R != wanted_R)
            if len(wrong):
                row = int(wrong[0])
                raise InconsistentError(
                    f"{at(row)}: {column}: expected {wanted_R[row]} values, {rule}, found {found_R[row]}"
                )
            _check_values(column, name, values, spec)


def _check_values(column: str, name: str, values: npt.NDArray[Any], spec: CaptureSpec) -> None:
    """The values of one column of all rows; comparisons with NaN are never true."""
    if not len(values):
        return
    if name.endswith("_ids"):
        _check_ids(column, values, spec.teacher.vocabulary)
    elif name == "log_z":
        if not -np.inf < values.min() <= values.max() < np.inf:
            raise InconsistentError(f"column {column}: expected finite numbers")
    elif not -np.inf < values.min() <= values.max() <= MAX_LOGP:
        raise InconsistentError(f"column {column}: log-likelihoods are not finite numbers up to 0")
    if name == "topk_logp":
        logp_MK = values.reshape(-1, spec.k)
        if (logp_MK[:, 1:] > logp_MK[:, :-1]).any():
            raise InconsistentError(f"column {column}: the candidates are not in descending order")


def _check_ids(column: str, ids_N: npt.NDArray[np.integer[Any]], vocabulary: int) -> None:
    if len(ids_N) and not 0 <= ids_N.min() <= ids_N.max() < vocabulary:
        raise InconsistentError(f"column {column}: expected ids of the vocabulary, 0 to {vocabulary - 1}")


def _sums(values_C: npt.NDArray[Any], offset_R: IntArray) -> IntArray:
    """The sum of each row's values."""
    total = np.concatenate([np.zeros(1, np.int64), np.cumsum(values_C, dtype=np.int64)])
    return np.asarray(total[offset_R[1:]] - total[offset_R[:-1]])
