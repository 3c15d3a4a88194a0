"""The reader: opens a cache by its manifest and reads shards whole, every byte checked before it is used.

A shard is at most some tens of MB, so its files are read in one go, their length and digest compared with the receipt,
and only then parsed; page checksums are verified as well. What comes out are NumPy slices of whole columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa

from shared.cache import files, format
from shared.cache.manifest import FileRecord, Manifest, Receipt, read_manifest
from shared.cache.parquet import REMEDY, footer_of, open_parquet, read_columns
from shared.cache.records import Draw, StoredDocument
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

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> Cache:
        """See `shared.cache.open_cache`."""
        return cls(Path(path), read_manifest(Path(path)))

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
        footer = footer_of(file.metadata.metadata)
        if footer.get("tokenizer") != self.spec.teacher.tokenizer:
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
        context = self._known(context)
        receipt = self.shards[index]
        documents = self.read_documents(index)
        table = self._likelihoods(receipt, min_timestep, max_timestep)
        try:
            by_key = {d.key: d for d in documents}
            return Shard(documents, format.draws_of(table, self.spec, by_key, context, self.vocabulary()))
        except (KeyError, ValueError, pa.ArrowInvalid) as error:
            path = self.path / receipt.likelihoods[0].path
            raise files.DamagedError(path, f"its columns do not fit each other ({error})", REMEDY) from error

    def read_documents(self, index: int) -> list[StoredDocument]:
        """The documents of shard `index` alone, in order.

        Raises:
            TidecacheError: the file is missing, truncated or damaged, or of another spec.
        """
        record = self.shards[index].documents
        try:
            return format.documents_of(self._table(record, list(record.columns)))
        except (KeyError, ValueError, TypeError, pa.ArrowInvalid) as error:
            path = self.path / record.path
            raise files.DamagedError(path, f"its columns do not fit each other ({error})", REMEDY) from error

    def iter_draws(
        self, min_timestep: float = 0.0, max_timestep: float = 1.0, context: str | None = None
    ) -> Iterator[Draw]:
        """All draws with min_timestep ≤ t ≤ max_timestep, by document position, then draw, whatever the shards.

        `context` decides what `gold_logp` and `candidates` of a draw mean; by default `compdemo` where it is held.

        Raises:
            TidecacheError: as `read_shard`.
        """
        context = self._known(context)
        for group in self._groups():
            draws = [d for i in group for d in self.read_shard(i, min_timestep, max_timestep, context).draws]
            yield from sorted(draws, key=lambda d: (d.stored.position, d.draw))

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

    def _known(self, context: str | None) -> str:
        context = context or self.default_context
        if context not in self.spec.contexts:
            raise TidecacheError(
                f"{self.path}: holds the contexts {', '.join(self.spec.contexts)}, not {context!r}: take one of these"
            )
        return context

    def _likelihoods(self, receipt: Receipt, low: float, high: float) -> pa.Table:
        """The columns of all the shard's likelihoods files side by side, filtered by timestep."""
        joined: pa.Table | None = None
        for record in receipt.likelihoods:
            own = [c for c in record.columns if c not in format.DRAW_COLUMNS or joined is None]
            names = list(dict.fromkeys(["document", "draw", "timestep", *own]))
            table = self._table(record, names, (low, high))
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
        return joined

    def _table(self, record: FileRecord, columns: list[str], timesteps: tuple[float, float] = (0.0, 1.0)) -> pa.Table:
        file = open_parquet(self.path, record)
        found = footer_of(file.metadata.metadata).get("fingerprint")
        if found not in (self.spec.fingerprint, *self.manifest.widened_from):
            finding = f"expected the spec {self.spec.fingerprint}, found {found}: it belongs to another cache"
            raise files.DamagedError(self.path / record.path, finding, REMEDY)
        return read_columns(self.path, file, record, columns, timesteps)
