"""Corpora: where documents come from, streamed, deduplicated by content and split (DESIGN §4, issue "One pipeline").

`open_corpus` takes what people have: text files, JSON Lines (plain or zstd), JSON, Parquet, folders of these, a folder
written by `datasets`' `save_to_disk`, the name of a Hugging Face dataset, or a named corpus: `stdlib`, `paper-mixture`. Rows become
documents by their columns: `messages` is a chat; `prompt` with `response` is a chat of one turn; `text` is plain text.
Of a chat the assistant's messages are trainable; of plain text, all. Nothing is held in memory but one batch of rows.
Whatever is wrong with a row is raised with its file and line (or row number), for a wrong row means a wrong corpus.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared import mixture_corpus, stdlib_corpus
from shared.documents import Message, RawDocument
from shared.errors import TidecacheError
from shared.noise import stream_key

# Longer text files are split between paragraphs into documents of at most so many bytes; else a book would be one
# document, of which a length limit leaves the first page.
TEXT_BYTES = 2048
ROWS_AT_ONCE = 1024
# The columns that make a document, in this order of preference.
FORMS = (("messages",), ("prompt", "response"), ("text",))
DATASET_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # with the owner, so that a mistyped path asks no network
HELD_OUT_RULES = ("hash", "corpus", "none")

Row = tuple[str, Mapping[str, Any]]  # (where it stands, which names it; its columns)


def open_corpus(
    source: str, *, text_column: str | None = None, limit: int | None = None, split: str = "train"
) -> Iterator[RawDocument]:
    """Yield the documents of a corpus, in an order that is always the same.

    Args:
        source: a file, a folder, the name of a Hugging Face dataset, or `stdlib`.
        text_column: the column that holds plain text; without it the columns decide.
        limit: at most so many documents.
        split: of datasets that have splits.

    Raises:
        TidecacheError: there is no such source, at once; it is empty, a column isn't there, or a file is broken, while
            it is read.
    """
    if limit is not None and limit < 1:
        raise TidecacheError(f"the limit of documents must be at least 1, found {limit}")
    documents = _documents(source, Columns(text_column), split)
    return _not_empty(itertools.islice(documents, limit), source)


def deduplicated(documents: Iterable[RawDocument]) -> Iterator[RawDocument]:
    """The first of each group of documents with the same key (same content; names play no part)."""
    seen: set[bytes] = set()
    for document in documents:
        key = bytes.fromhex(document.key)
        if key not in seen:
            seen.add(key)
            yield document


def held_out_rule(text: str) -> tuple[str, float]:
    """Read the spec's `held_out`: `hash:SHARE`, `corpus` or `none` → (rule, share).

    Raises:
        TidecacheError: it is none of these.
    """
    rule, _, share = text.partition(":")
    try:
        value = float(share) if rule == "hash" else 0.0
    except ValueError:
        value = -1.0
    if rule not in HELD_OUT_RULES or not 0.0 <= value < 1.0 or (rule != "hash" and share):
        raise TidecacheError(
            f"held_out: expected `hash:SHARE` with a share from 0 to below 1, `corpus` or `none`, found {text!r}"
        )
    return rule, value


def in_held_out(raw: RawDocument, share: float, rule: str) -> bool:
    """Whether a document belongs to the held-out slice.

    `none`: never. Otherwise what the corpus itself says counts; where it says nothing, `hash` takes a share of the
    documents by their keys, so that a document keeps its side whatever else the corpus holds, and `corpus` takes none.
    """
    if rule == "none":
        return False
    if raw.held_out is not None:
        return raw.held_out
    return rule == "hash" and stream_key(0, raw.key, "held-out") < share * 2.0**64


@dataclass(frozen=True)
class Columns:
    """Which columns of a row make a document."""

    text_column: str | None

    def choose(self, names: Iterable[str], where: str) -> tuple[str, ...]:
        """The columns to read among those that are there.

        Raises:
            TidecacheError: none of the forms is there; the message names what is.
        """
        found = tuple(names)
        forms = FORMS if self.text_column is None else ((self.text_column,),)
        for form in forms:
            if set(form) <= set(found):
                return form
        expected = ", or ".join(" with ".join(f"`{column}`" for column in form) for form in forms)
        raise TidecacheError(
            f"{where}: expected the column {expected}, found {', '.join(f'`{n}`' for n in found) or 'no column'}: "
            f"name the column that holds the text"
        )

    def document(self, row: Row) -> RawDocument:
        """Make a row's document.

        Raises:
            TidecacheError: a column is missing or holds something else than text or messages.
        """
        where, values = row
        form = self.choose(values, where)
        if form == ("messages",) and self.text_column is None:
            return RawDocument(where, _chat(values["messages"], where), chat=True)
        texts = [_text(values[column], f"{where}, column `{column}`") for column in form]
        if len(form) == 2:
            prompt, response = texts
            messages = (Message("user", prompt, False), Message("assistant", response, True))
            return RawDocument(where, messages, chat=True)
        return RawDocument(where, (Message("text", texts[0], True),), chat=False)


def _chat(messages: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise TidecacheError(f"{where}, column `messages`: expected a list of objects with `role` and `content`")
    chat = []
    for number, message in enumerate(messages):
        place = f"{where}, message {number}"
        role = _text(message.get("role"), f"{place}, `role`")
        chat.append(Message(role, _text(message.get("content"), f"{place}, `content`"), role == "assistant"))
    return tuple(chat)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise TidecacheError(f"{where}: expected text, found {'nothing' if value is None else type(value).__name__}")
    return value


def _not_empty(documents: Iterator[RawDocument], source: str) -> Iterator[RawDocument]:
    found = False
    for document in documents:
        found = True
        yield document
    if not found:
        raise TidecacheError(f"the corpus {source} is empty: expected at least one document, found none")


def _documents(source: str, columns: Columns, split: str) -> Iterator[RawDocument]:
    path = Path(source).expanduser()
    if source == "stdlib" and not path.exists():
        return _stdlib()
    if source == mixture_corpus.NAME and not path.exists():
        return map(columns.document, mixture_corpus.rows(split))
    if path.is_dir():
        saved = any((path / name).exists() for name in ("state.json", "dataset_dict.json"))
        rows = _saved_rows(path, split) if saved else _folder_rows(path, columns)
    elif path.is_file():
        rows = _file_rows(path, path.name, columns)
    elif DATASET_NAME.fullmatch(source) and _reader(path) is None:
        rows = _dataset_rows(source, split)
    else:
        raise TidecacheError(
            f"there is no corpus {source}: expected a file, a folder, a dataset's owner/name or `stdlib`"
        )
    return map(columns.document, rows)


def _stdlib() -> Iterator[RawDocument]:
    """The standard library's documents, ordered by key: mixed well, so that the first N are a sample of all."""
    documents = [
        RawDocument(name, (Message("text", text, True),), chat=False, held_out=held_out)
        for held_out in (False, True)
        for name, text in stdlib_corpus.documents(held_out)
    ]
    yield from sorted(documents, key=lambda document: (document.key, document.name))


def _folder_rows(folder: Path, columns: Columns) -> Iterator[Row]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and _reader(p) and not _hidden(p, folder)]
    if not files:
        raise TidecacheError(
            f"the folder {folder} holds no corpus: expected files ending in {_SUFFIXES}, or what `save_to_disk` writes"
        )
    return itertools.chain.from_iterable(_file_rows(p, p.relative_to(folder).as_posix(), columns) for p in files)


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _file_rows(path: Path, name: str, columns: Columns) -> Iterator[Row]:
    """`name` is the path that names the documents: relative to the corpus, so the same on every machine."""
    reader = _reader(path)
    if reader is None:
        raise TidecacheError(f"{path} is no corpus: expected a file ending in {_SUFFIXES}")
    return _readable(path, reader(path, name, columns))


def _readable(path: Path, rows: Iterator[Row]) -> Iterator[Row]:
    try:
        yield from rows
    except UnicodeDecodeError as error:
        raise TidecacheError(f"{path} is not UTF-8: {error.reason}") from error
    except OSError as error:
        raise TidecacheError(f"{path} cannot be read: {error.strerror or error}") from error


def _reader(path: Path) -> Reader | None:
    return next((reader for suffix, reader in _READERS.items() if path.name.endswith(suffix)), None)


def paragraphs(lines: Iterable[str], limit: int = TEXT_BYTES) -> Iterator[str]:
    """Group the lines of a text into documents of at most `limit` bytes of UTF-8, between blank lines where possible.

    A longer paragraph is split between lines; a longer line stands alone. Put together again the documents are the
    text, except for runs of blank lines that would stand alone.
    """
    document: list[str] = []
    size = 0
    paragraph_start = 0  # index into `document` where the last paragraph starts; 0: nothing before it
    for line in lines:
        length = len(line.encode())
        if document and size + length > limit:
            kept = document[paragraph_start:] if paragraph_start else []
            done = document[:paragraph_start] if paragraph_start else document
            if "".join(done).strip():
                yield "".join(done)
            document, paragraph_start = kept, 0
            size = sum(len(part.encode()) for part in document)
            if document and size + length > limit:
                yield "".join(document)
                document, size = [], 0
        if document and not document[-1].strip() and line.strip():
            paragraph_start = len(document)
        document.append(line)
        size += length
    if "".join(document).strip():
        yield "".join(document)


def _text_rows(path: Path, name: str, columns: Columns) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, text in enumerate(paragraphs(file)):
            yield f"{name}#{number}", {columns.text_column or "text": text}


def _json_lines(lines: Iterable[str], path: Path, name: str) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise TidecacheError(f"{path}:{number} is not valid JSON: {error.msg} at column {error.colno}") from error
        yield f"{name}:{number}", _object(row, f"{path}:{number}")


def _object(row: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise TidecacheError(f"{where}: expected a JSON object with columns, found {type(row).__name__}")
    return row


def _jsonl_rows(path: Path, name: str, columns: Columns) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        yield from _json_lines(file, path, name)


def _zstd_rows(path: Path, name: str, columns: Columns) -> Iterator[Row]:
    return _json_lines(_zstd_lines(path), path, name)


def _zstd_lines(path: Path) -> Iterator[str]:
    """Decompress frame by frame: the library's stream reader takes a truncated file for a complete one."""
    import zstandard

    rest = b""
    decompressor = zstandard.ZstdDecompressor().decompressobj()
    fresh = True  # between two frames, where the file may end
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 16):
                while block:
                    if decompressor.eof:
                        decompressor = zstandard.ZstdDecompressor().decompressobj()
                    *lines, rest = (rest + decompressor.decompress(block)).split(b"\n")
                    block = decompressor.unused_data
                    fresh = decompressor.eof
                    yield from (line.decode() for line in lines)
    except zstandard.ZstdError as error:
        raise TidecacheError(f"{path} is not a valid zstd file: {error}") from error
    if not fresh:
        raise TidecacheError(f"{path} is truncated: its last zstd frame is not complete; fetch or write it again")
    if rest:
        yield rest.decode()


def _json_rows(path: Path, name: str, columns: Columns) -> Iterator[Row]:
    """A JSON array of objects; a `.json` file may also hold JSON Lines, as many datasets have it."""
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        yield from _json_lines(text.split("\n"), path, name)
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise TidecacheError(f"{path}:{error.lineno} is not valid JSON: {error.msg} at column {error.colno}") from error
    for number, row in enumerate(rows):
        yield f"{name}#{number}", _object(row, f"{path}, row {number}")


def _parquet_rows(path: Path, name: str, columns: Columns) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            wanted = columns.choose(file.schema_arrow.names, str(path))
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=list(wanted)):
                for row in batch.to_pylist():
                    yield f"{name}#{number}", row
                    number += 1
    except pa.ArrowException as error:
        raise TidecacheError(f"{path} is not a readable Parquet file: {_first_line(error)}") from error


def _saved_rows(folder: Path, split: str) -> Iterator[Row]:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(folder))
        if isinstance(dataset, datasets.DatasetDict):
            if split not in dataset:
                raise TidecacheError(f"{folder} has no split {split}: expected one of {', '.join(dataset)}")
            dataset = dataset[split]
        for number, row in enumerate(dataset):
            yield f"{split}#{number}", row
    except TidecacheError:
        raise
    except Exception as error:  # whatever a broken folder makes the library raise
        raise TidecacheError(f"{folder} is not a folder that `save_to_disk` wrote: {_first_line(error)}") from error


def _dataset_rows(source: str, split: str) -> Iterator[Row]:
    import datasets

    read = 0
    try:
        for row in datasets.load_dataset(source, split=split, streaming=True):
            yield f"{split}#{read}", row
            read += 1
    except Exception as error:  # hub, network and data errors of many kinds
        reason = _first_line(error)
        if read:
            raise TidecacheError(f"the dataset {source} broke off after {read} rows: {reason}") from error
        raise TidecacheError(
            f"there is no corpus {source}: no such file or folder, and no Hugging Face dataset of this name with the "
            f"split {split} could be loaded: {reason}"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


Reader = Callable[[Path, str, Columns], Iterator[Row]]
_READERS: dict[str, Reader] = {
    ".txt": _text_rows,
    ".md": _text_rows,
    ".py": _text_rows,
    ".jsonl": _jsonl_rows,
    ".jsonl.zst": _zstd_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
}
_SUFFIXES = ", ".join(_READERS)
