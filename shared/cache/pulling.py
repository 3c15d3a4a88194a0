"""`tidecache cache pull`: a cache out of a dataset repository of the Hugging Face Hub, every byte checked.

One commit of the repository is taken as a whole. Files are downloaded into a folder of their own, compared with size and
digest of the manifest, and only then put in their places; receipts follow their shards, and the manifest comes last. So
a pull that is stopped leaves no cache that lies, and the same command goes on: with half-loaded files too. Names in a
manifest that lead out of the folder are refused (`shared.cache.files.check_name`), as are names that are no data file's.
"""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from shared.cache import files, hub
from shared.cache.manifest import (
    HELD_OUT_FOLDER,
    MANIFEST_FILE,
    SHARDS_FOLDER,
    FileRecord,
    Manifest,
    Receipt,
    read_manifest,
    read_receipt,
    write_receipt,
)
from shared.cache.parquet import read_data
from shared.cache.writer import refuse_foreign_folder
from shared.errors import TidecacheError

STAGING = ".pull.tmp"
DOWNLOADS = 4  # at once


@dataclass(frozen=True)
class Pulled:
    """What is there now; `files` were loaded in this run."""

    manifest: Manifest
    held_out: Manifest | None
    commit: str
    files: int


def pull_cache(repo: str, out: Path, revision: str | None = None, watch: hub.Watch = hub.ignore) -> Pulled:
    """Pull a cache into the folder `out`, or bring the one there up to date.

    Raises:
        TidecacheError: no such repository, revision or cache, no access, damage, `out` holds something else, or a full disk.
    """
    from huggingface_hub import HfApi

    there = hub.Snapshot.of(HfApi(), repo, revision)
    manifests = there.manifests
    if "" not in manifests:
        raise TidecacheError(f"{repo}: holds no cache: no {MANIFEST_FILE} at {there.commit[:12]}")
    if not (out / MANIFEST_FILE).exists():
        refuse_foreign_folder(out)
    for prefix, manifest in manifests.items():
        _refuse_stranger_names(repo, manifest)
        if (out / prefix / MANIFEST_FILE).exists():
            here = read_manifest(out / prefix)
            hub.refuse_other_cache(manifest, here, repo, str(out / prefix), "pull into another folder")
            _refuse_other_files(repo, manifest, out / prefix, here)
    if f"{HELD_OUT_FOLDER}/" not in manifests and (out / HELD_OUT_FOLDER).exists():
        raise TidecacheError(f"{out} has held-out documents and {repo} none: pull into another folder")
    loads = [_Load(there, out, prefix, manifest, watch) for prefix, manifest in manifests.items()]
    count = sum(load.run() for load in loads)
    for load in reversed(loads):  # the cache's own manifest last
        load.finish()
    shutil.rmtree(out / STAGING, ignore_errors=True)
    return Pulled(manifests[""], manifests.get(f"{HELD_OUT_FOLDER}/"), there.commit, count)


def _refuse_stranger_names(repo: str, manifest: Manifest) -> None:
    for record in hub.records_of(manifest):
        if not record.path.endswith(".parquet"):
            raise TidecacheError(f"{repo}: its manifest names {record.path!r} as a data file, which is none: refused")


def _refuse_other_files(repo: str, theirs: Manifest, root: Path, ours: Manifest) -> None:
    """Files are never replaced under a manifest that names them; those of one content may differ in bytes."""
    digests = {record.path: record.digest for record in hub.records_of(ours)}
    for record in hub.records_of(theirs):
        if digests.get(record.path, record.digest) != record.digest:
            raise TidecacheError(
                f"{root / record.path}: {repo} has this file with other bytes: pull into another folder, and put the two "
                f"together with `tidecache cache merge`"
            )


class _Load:
    """The files of one cache on their way to its folder."""

    def __init__(self, there: hub.Snapshot, out: Path, prefix: str, manifest: Manifest, watch: hub.Watch) -> None:
        self._there = there
        self._root = out / prefix
        self._staging = out / STAGING
        self._prefix = prefix
        self._manifest = manifest
        self._watch = watch

    def run(self) -> int:
        """Load all data files and write the receipts; how many files were loaded."""
        for name in ("", SHARDS_FOLDER):  # of pulls that were killed
            files.remove_leftovers(self._root / name)
        loaded = self._load([self._manifest.vocabulary])
        known: set[str] = set()
        shards: dict[str, list[Receipt]] = {}
        for receipt in self._manifest.shards:
            shards.setdefault(receipt.documents.path, []).append(receipt)
        for receipts in shards.values():
            records = {f.path: f for r in receipts for f in (r.documents, *r.likelihoods)}
            loaded += self._load([f for name, f in records.items() if name not in known])
            known |= records.keys()
            for receipt in receipts:
                if not self._has_receipt(receipt):
                    write_receipt(self._root, receipt)
        return loaded

    def finish(self) -> None:
        """Put the manifest in its place."""
        files.write(self._root, MANIFEST_FILE, self._there.raw_manifests[self._prefix])

    def _has_receipt(self, receipt: Receipt) -> bool:
        if not (self._root / receipt.path).exists():
            return False
        try:
            return read_receipt(self._root, receipt.path) == receipt
        except files.DamagedError:
            return False

    def _load(self, records: list[FileRecord]) -> int:
        with ThreadPoolExecutor(DOWNLOADS) as pool:
            return sum(pool.map(self._load_one, records))

    def _load_one(self, record: FileRecord) -> bool:
        """Load one file unless it is there; whether it was loaded."""
        loaded = not self._is_there(record)
        if loaded:
            name = self._prefix + record.path
            path = self._there.fetch(name, self._staging, record.size_bytes)
            try:
                data = read_data(self._staging / self._prefix, record)
            except files.DamagedError as error:
                path.unlink(missing_ok=True)
                raise TidecacheError(
                    f"{self._there.repo}: {name} is not what its manifest says ({error.finding}): run this again, or push the "
                    f"cache again"
                ) from error
            files.write(self._root, record.path, data)
            path.unlink()
        self._watch(record.size_bytes)
        return loaded

    def _is_there(self, record: FileRecord) -> bool:
        if not (self._root / record.path).exists():
            return False
        try:
            read_data(self._root, record)
        except files.DamagedError:
            return False
        return True
