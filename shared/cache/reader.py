"""The reader: opens a cache by its manifest and reads shards whole, every byte checked before it is used.

A shard is at most some tens of MB, so its files are read in one go, their length and digest compared with the receipt,
and only then parsed; page checksums are verified as well. What comes out are NumPy slices of whole columns. Here is how
one shard, or all in their order, are read; `shared.cache.stream` gives draws in the order of a training run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from shared.cache import consistency, files, format
from shared.cache.manifest import HELD_OUT_FOLDER, MANIFEST_FILE, FileRecord, Manifest, Receipt, read_manifest
from shared.cache.parquet import REMEDY, footer_of, open_parquet, read_columns, read_narrow
from shared.cache.records import BoolArray, Draw, StoredDocument
from shared.cache.remote import Folder, folder_of
from shared.cache.selection import Selection
from shared.cache.vocabulary import TeacherVocabulary
from shared.errors import TidecacheError
from shared.spec import CaptureSpec


@dataclass(frozen=True)
class Shard:
    """One shard in memory: its documents and those of its draws that were asked for, both in document order."""

    documents: list[StoredDocument]
    draws: list[Draw]


@dataclass(frozen=True)
class Cache:
    """A cache open for reading; nothing but the manifest is in memory."""

    path: Folder
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Folder) -> Cache:
        """See `shared.cache.open_cache`."""
        return cls(folder_of(path), read_manifest(folder_of(path)))

    def held_out(self) -> Cache | None:
        """The cache of the held-out documents; None if there is none, or its capture was killed at its very begin.

        Raises:
            TidecacheError: it is there and cannot be read.
        """
        inner = self.path / HELD_OUT_FOLDER
        if isinstance(inner, Path) and not (inner / MANIFEST_FILE).exists():
            return None
        try:
            return Cache.open(inner)
        except TidecacheError as error:
            if isinstance(error.__cause__, files.MissingError):  # an address without a manifest
                return None
            raise

    @property
    def spec(self) -> CaptureSpec:
        """All that decided this cache's content."""
        return self.manifest.spec

    @property
    def shards(self) -> tuple[Receipt, ...]:
        """The complete shards, by first document, then first draw."""
        return self.manifest.shards

    @property
    def default_context(self) -> str:
        """`compdemo` where the cache holds it, `plain` otherwise."""
        return "compdemo" if "compdemo" in self.spec.contexts else self.spec.contexts[0]

    @cached_property
    def _vocabulary(self) -> TeacherVocabulary:
        record = self.manifest.vocabulary
        file = open_parquet(self.path, record)
        table = read_columns(self.path, file, record, list(format.VOCABULARY_SCHEMA.names))
        with self._fitting(record):
            consistency.check_columns(table, format.VOCABULARY_SCHEMA)
            consistency.check_vocabulary(table, self.spec)
        footer = footer_of(file.metadata.metadata)
        if footer.get("tokenizer") != self.spec.teacher.tokenizer or not isinstance(footer.get("name"), str):
            raise files.DamagedError(self.path / record.path, "of another tokenizer than the spec's", REMEDY)
        special_V = table["special"].to_numpy()
        return TeacherVocabulary(footer["name"], footer["tokenizer"], table["bytes"].to_pylist(), special_V)

    def vocabulary(self) -> TeacherVocabulary:
        """The teacher's vocabulary: the bytes of each id.

        Raises:
            TidecacheError: its file is damaged or missing.
        """
        return self._vocabulary

    def read_shard(
        self, index: int, min_timestep: float = 0.0, max_timestep: float = 1.0, context: str | None = None
    ) -> Shard:
        """Read shard `index` of `shards`; only draws with min_timestep ≤ t ≤ max_timestep.

        Raises:
            TidecacheError: a file is missing, truncated or damaged, or of another spec; an unknown context.
        """
        documents = self.read_documents(index)
        table = self._likelihoods(index, self.spec, (min_timestep, max_timestep))
        return Shard(documents, self._draws(index, table, self.spec, documents, self.known_context(context)))

    def read_rows(self, index: int, wanted_R: BoolArray, context: str | None = None, topk: bool = True) -> list[Draw]:
        """The draws of shard `index` whose row is wanted, in order, with the scores of one context; of the others
        nothing stays in memory. Without `topk` the topk lane is neither read nor there.

        Raises:
            TidecacheError: as `read_shard`.
        """
        context = self.known_context(context)
        spec = replace(self.spec, contexts=(context,))
        if not topk:
            spec = replace(spec, lanes=("gold",), tail_samples=0)
        table = self._likelihoods(index, spec)
        if not wanted_R.all():
            table = table.filter(pa.array(wanted_R))
        return self._draws(index, table, spec, self.read_documents(index), context)

    def _draws(
        self, index: int, table: pa.Table, spec: CaptureSpec, documents: list[StoredDocument], context: str
    ) -> list[Draw]:
        """The rows of a shard's likelihoods as draws of these documents; `spec` names the columns that there are."""
        with self._fitting(self.shards[index].likelihoods[0]):
            by_key = {d.key: d for d in documents}
            return format.draws_of(table, spec, by_key, context, self.vocabulary())

    def read_documents(self, index: int) -> list[StoredDocument]:
        """The documents of shard `index` alone, in order.

        Raises:
            TidecacheError: the file is missing, truncated or damaged, or of another spec.
        """
        receipt = self.shards[index]
        table = self._table(receipt.documents, list(format.DOCUMENTS_SCHEMA.names))
        with self._fitting(receipt.documents):
            consistency.check_columns(table, format.DOCUMENTS_SCHEMA)
            consistency.check_documents(table, self.spec, receipt.range)
            return format.documents_of(table)

    def read_narrow_rows(self, index: int, columns: list[str]) -> pa.Table:
        """Some of `position`, `draw`, `timestep` (these three at least) and `document` of all rows of shard `index`, without
        reading the rest of the file, so its digest is not checked; the pages' checksums and the shard's range are.

        Raises:
            TidecacheError: the file is missing, damaged where it was read, or its rows are not the shard's.
        """
        receipt = self.shards[index]
        table = read_narrow(self.path, receipt.likelihoods[0], columns)
        with self._fitting(receipt.likelihoods[0]):
            consistency.check_columns(table, format.likelihoods_schema(self.spec))
            consistency.check_extent(table, receipt.range)
        return table

    def read_document_names(self, index: int) -> list[tuple[str, str]]:
        """(key, name) of all documents of shard `index`, read and checked likewise."""
        record = self.shards[index].documents
        table = read_narrow(self.path, record, ["document", "name"])
        with self._fitting(record):
            consistency.check_columns(table, format.DOCUMENTS_SCHEMA)
        return list(zip(table["document"].to_pylist(), table["name"].to_pylist(), strict=True))

    @contextmanager
    def _fitting(self, record: FileRecord) -> Iterator[None]:
        """What the columns of a file do not agree in ends as damage of that file."""
        try:
            yield
        except (ValueError, KeyError, pa.ArrowException) as error:
            finding = f"its columns do not fit each other or the spec ({error})"
            raise files.DamagedError(self.path / record.path, finding, REMEDY) from error

    def iter_draws(
        self,
        min_timestep: float = 0.0,
        max_timestep: float = 1.0,
        context: str | None = None,
        documents: Collection[str] | None = None,
        names: str | None = None,
    ) -> Iterator[Draw]:
        """All draws with min_timestep ≤ t ≤ max_timestep, by document position, then draw, whatever the shards.

        `context` decides what `gold_logp` and `candidates` of a draw mean; by default `compdemo` where it is held.
        `documents` (keys) and `names` (a glob) leave out all other documents, and shards that hold none of these.

        Raises:
            TidecacheError: as `read_shard`.
        """
        context = self.known_context(context)
        keys = None if documents is None else frozenset(documents)
        selection = Selection(min_timestep, max_timestep, keys, names)
        for group in self._groups():
            draws = [d for index in group for d in self._selected(index, selection, context)]
            yield from sorted(draws, key=lambda d: (d.stored.position, d.draw))

    def _selected(self, index: int, selection: Selection, context: str) -> list[Draw]:
        """The draws of one shard that are wanted."""
        documents = [d for d in self.read_documents(index) if selection.takes(d.key, d.name)]
        if not documents:
            return []
        table = self._likelihoods(index, self.spec, selection.timesteps)
        if not selection.all_documents:
            table = table.filter(pc.is_in(table["document"], value_set=pa.array([d.key for d in documents])))
        return self._draws(index, table, self.spec, documents, context)

    def _groups(self) -> list[list[int]]:
        """Shard indices by connected document ranges: the draw ranges of the same documents come together."""
        groups: list[list[int]] = []
        stop = -1
        for index, receipt in enumerate(self.shards):
            if receipt.range.first_document >= stop:
                groups.append([])
            groups[-1].append(index)
            stop = max(stop, receipt.range.document_stop)
        return groups

    def known_context(self, context: str | None) -> str:
        """The context asked for, or the default one.

        Raises:
            TidecacheError: the cache does not hold it.
        """
        context = context or self.default_context
        if context not in self.spec.contexts:
            raise TidecacheError(
                f"{self.path}: holds the contexts {', '.join(self.spec.contexts)}, not {context!r}: take one of these"
            )
        return context

    def _likelihoods(self, index: int, spec: CaptureSpec, timesteps: tuple[float, float] = (0.0, 1.0)) -> pa.Table:
        """The columns of `spec` from all the shard's likelihoods files side by side, filtered by timestep."""
        receipt = self.shards[index]
        schema = format.likelihoods_schema(spec)
        wanted = set(schema.names)
        joined: pa.Table | None = None
        for record in receipt.likelihoods:
            own = [c for c in record.columns if c in wanted and (c not in format.DRAW_COLUMNS or joined is None)]
            if not own:
                continue
            names = list(dict.fromkeys(["document", "draw", "timestep", *own]))
            table = self._table(record, names, timesteps)
            with self._fitting(record):
                consistency.check_columns(table, schema)
            if joined is None:
                joined = table
                continue
            if not all(table[n].equals(joined[n]) for n in ("document", "draw")):
                finding = f"its rows are not those of {receipt.likelihoods[0].path}"
                raise files.DamagedError(self.path / record.path, finding, REMEDY)
            for name in own:
                joined = joined.append_column(name, table[name])
        if joined is None:
            raise files.DamagedError(self.path / receipt.path, "names no likelihoods file", REMEDY)
        if missing := [c for c in schema.names if c not in joined.column_names]:
            finding = f"none of its files has the column {missing[0]}, which the spec names"
            raise files.DamagedError(self.path / receipt.path, finding, REMEDY)
        with self._fitting(receipt.likelihoods[0]):
            consistency.check_extent(joined, receipt.range)
        return joined

    def _table(self, record: FileRecord, columns: list[str], timesteps: tuple[float, float] = (0.0, 1.0)) -> pa.Table:
        file = open_parquet(self.path, record)
        found = footer_of(file.metadata.metadata).get("fingerprint")
        if found not in (self.spec.fingerprint, *self.manifest.widened_from):
            finding = f"expected the spec {self.spec.fingerprint}, found {found}: it belongs to another cache"
            raise files.DamagedError(self.path / record.path, finding, REMEDY)
        return read_columns(self.path, file, record, columns, timesteps)
