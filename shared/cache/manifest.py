"""The manifest and the receipts: what a cache says it holds.

Each complete shard has a receipt, a small JSON file that is written after its data files; the manifest is derived from
the vocabulary and all receipts and can be derived again at any time. Both are canonical JSON and carry a digest of
themselves, so that a damaged one is never believed (docs/cache-format.md).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.cache import files
from shared.cache.records import ShardRange
from shared.cache.remote import Folder
from shared.errors import TidecacheError
from shared.spec import FORMAT_VERSION, CaptureSpec

MANIFEST_FILE = "manifest.json"
SHARDS_FOLDER = "shards"
HELD_OUT_FOLDER = "held-out"
WIDENING_FOLDER = "widening"  # receipts that wait for others, see `shared.cache.widening`
MAX_MANIFEST_BYTES = 256 << 20
MAX_RECEIPT_BYTES = 1 << 20
_REMEDY = "resume the capture with the command that began it, which derives the manifest again, or get the cache again"


@dataclass(frozen=True)
class FileRecord:
    """A file of the cache: its name, length in bytes, BLAKE2b-16 digest, rows, and the columns to be read from it."""

    path: str
    size_bytes: int
    digest: str
    rows: int
    columns: tuple[str, ...]

    @classmethod
    def of(cls, path: str, data: bytes, rows: int, columns: Iterable[str]) -> FileRecord:
        """The record of a file with these bytes."""
        return cls(path, len(data), files.digest(data), rows, tuple(columns))

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str) -> FileRecord:
        """Read the JSON form; the name must stay inside the cache's folder."""
        return cls(
            files.check_name(data["path"], where),
            data["size_bytes"],
            data["digest"],
            data["rows"],
            tuple(data["columns"]),
        )


@dataclass(frozen=True)
class Counts:
    """Of one shard: documents stored, dropped by reason, cut; their chunks; draws, masked chunks, scored teacher tokens
    (once, whatever the number of contexts), and draws by timestep bin.
    """

    documents: int
    dropped: Mapping[str, int]
    cut: int
    chunks: int
    draws: int
    masked_chunks: int
    scored_tokens: int
    timesteps: tuple[int, ...]


@dataclass(frozen=True)
class Receipt:
    """One complete shard. `content`: the sum of its draws' digests; `corpus`: the capture's digest of the corpus at
    these positions; `batch_tokens`: the budget that scored it, smaller than the spec's after an out-of-memory error.

    `likelihoods` lists files with the same rows in the same order; each gives the columns named in its record. The
    capture writes one; a lane or context that is added later comes as another.
    """

    range: ShardRange
    fingerprint: str
    corpus: str
    batch_tokens: int
    documents: FileRecord
    likelihoods: tuple[FileRecord, ...]
    counts: Counts
    content: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        plain = dataclasses.asdict(self)
        shard = plain.pop("range")
        return json.loads(  # type: ignore[no-any-return]
            json.dumps(
                {
                    "range": {
                        "documents": [shard["first_document"], shard["document_stop"]],
                        "draws": [shard["first_draw"], shard["draw_stop"]],
                    },
                    **plain,
                }
            )
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str) -> Receipt:
        """Read `to_json`'s form.

        Raises:
            TidecacheError: something is missing, of another type, or leads out of the folder; `where` is named.
        """
        try:
            counts = dict(data["counts"])
            counts["timesteps"] = tuple(counts["timesteps"])
            return cls(
                range=ShardRange(*data["range"]["documents"], *data["range"]["draws"]),
                fingerprint=data["fingerprint"],
                corpus=data["corpus"],
                batch_tokens=data["batch_tokens"],
                documents=FileRecord.from_json(data["documents"], where),
                likelihoods=tuple(FileRecord.from_json(f, where) for f in data["likelihoods"]),
                counts=Counts(**counts),
                content=data["content"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise files.DamagedError(where, f"not a receipt of format {FORMAT_VERSION} ({error!r})", _REMEDY) from error

    @property
    def path(self) -> str:
        """The receipt's own file."""
        return f"{SHARDS_FOLDER}/{self.range.name}.json"


@dataclass(frozen=True)
class Totals(Counts):
    """Of the whole cache; documents counted once, however many draw ranges they have."""

    size_bytes: int  # of all data files, manifest and receipts apart


@dataclass(frozen=True)
class Manifest:
    """All that a reader needs to find and check the shards. `content`: the digest of all rows, whatever their partition
    into shards. `widened_from`: fingerprints that older shards of this cache may carry, from before a lane or a
    context was added.
    """

    spec: CaptureSpec
    vocabulary: FileRecord
    shards: tuple[Receipt, ...]
    totals: Totals
    content: str
    widened_from: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "format": FORMAT_VERSION,
            "fingerprint": self.spec.fingerprint,
            "widened_from": list(self.widened_from),
            "spec": self.spec.to_json(),
            "content": self.content,
            "totals": json.loads(json.dumps(dataclasses.asdict(self.totals))),
            "vocabulary": json.loads(json.dumps(dataclasses.asdict(self.vocabulary))),
            "shards": [r.to_json() for r in self.shards],
        }


def derive(
    spec: CaptureSpec, vocabulary: FileRecord, receipts: Sequence[Receipt], widened_from: tuple[str, ...] = ()
) -> Manifest:
    """The manifest of these receipts, which must not overlap and must be of this spec.

    Raises:
        TidecacheError: two shards hold the same draws, or one is of another spec.
    """
    shards = tuple(sorted(receipts, key=lambda r: r.range))
    for receipt in shards:
        if receipt.fingerprint != spec.fingerprint:
            raise TidecacheError(
                f"{receipt.path}: expected the spec {spec.fingerprint}, found {receipt.fingerprint}: "
                f"the shard belongs to another cache; remove this receipt"
            )
    _refuse_overlaps(shards)
    totals, seen = _zero_totals(vocabulary), set()
    for receipt in shards:
        totals = _add(totals, receipt, new_documents=receipt.documents.path not in seen)
        seen.add(receipt.documents.path)
    content = sum(int(r.content, 16) for r in shards) % (1 << 256)
    return Manifest(spec, vocabulary, shards, totals, f"{content:064x}", widened_from)


def _refuse_overlaps(shards: Sequence[Receipt]) -> None:
    """`shards` are sorted, so only a few before each can reach into it."""
    active: list[Receipt] = []
    for receipt in shards:
        active = [a for a in active if a.range.document_stop > receipt.range.first_document]
        for other in active:
            if other.range.overlaps(receipt.range):
                raise TidecacheError(
                    f"{receipt.path} and {other.path} hold the same draws: two captures with different "
                    f"--documents-per-shard worked in one folder; remove one of the two receipts and run the capture "
                    f"again"
                )
        active.append(receipt)


def _zero_totals(vocabulary: FileRecord) -> Totals:
    return Totals(0, {}, 0, 0, 0, 0, 0, (), vocabulary.size_bytes)


def _add(totals: Totals, receipt: Receipt, new_documents: bool) -> Totals:
    counts = receipt.counts
    bins = totals.timesteps or (0,) * len(counts.timesteps)
    dropped = dict(totals.dropped)
    for reason, count in counts.dropped.items() if new_documents else ():
        dropped[reason] = dropped.get(reason, 0) + count
    once = int(new_documents)
    return Totals(
        documents=totals.documents + once * counts.documents,
        dropped=dict(sorted(dropped.items())),
        cut=totals.cut + once * counts.cut,
        chunks=totals.chunks + once * counts.chunks,
        draws=totals.draws + counts.draws,
        masked_chunks=totals.masked_chunks + counts.masked_chunks,
        scored_tokens=totals.scored_tokens + counts.scored_tokens,
        timesteps=tuple(a + b for a, b in zip(bins, counts.timesteps, strict=True)),
        size_bytes=totals.size_bytes
        + once * receipt.documents.size_bytes
        + sum(f.size_bytes for f in receipt.likelihoods),
    )


# --- JSON files that carry their own digest ----------------------------------------------------------------------


def seal(data: Mapping[str, Any]) -> bytes:
    """The canonical text of an object with its `digest` added: BLAKE2b-16 of its compact, key-sorted, ASCII JSON."""
    body = {k: v for k, v in data.items() if k != "digest"}
    compact = json.dumps(body, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    digest = hashlib.blake2b(compact.encode(), digest_size=16).hexdigest()
    return (json.dumps({**body, "digest": digest}, indent=1, ensure_ascii=True) + "\n").encode()


def unseal(data: bytes, where: str, remedy: str) -> dict[str, Any]:
    """The object, its format and its digest checked.

    Raises:
        TidecacheError: from a newer format, not JSON, or not what was written.
    """
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise files.DamagedError(where, f"expected JSON, found something else ({error})", remedy) from error
    if not isinstance(parsed, dict):
        raise files.DamagedError(where, f"expected a JSON object, found {type(parsed).__name__}", remedy)
    version = parsed.get("format")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise TidecacheError(
            f"{where}: written in cache format {version}, and this version of tidecache reads formats up to "
            f"{FORMAT_VERSION}: install a newer tidecache"
        )
    if version != FORMAT_VERSION or data != seal(parsed):
        raise files.DamagedError(where, "its contents do not agree with their own digest: damaged", remedy)
    return parsed


def read_manifest(root: Folder) -> Manifest:
    """The manifest of a cache's folder, checked.

    Raises:
        TidecacheError: no cache there, a newer format, damaged, too large, or naming files outside the folder.
    """
    where = str(root / MANIFEST_FILE)
    if isinstance(root, Path) and not (root / MANIFEST_FILE).exists():
        raise TidecacheError(f"{root}: expected the folder of a cache, found {_instead(root)}")
    try:
        text = files.read(root, MANIFEST_FILE, MAX_MANIFEST_BYTES, _REMEDY)
    except files.MissingError as error:
        raise TidecacheError(
            f"{root}: expected the address of a cache's folder, found no {MANIFEST_FILE} there: check the address"
        ) from error
    data = unseal(text, where, _REMEDY)
    try:
        spec = CaptureSpec.from_json(data["spec"])
        vocabulary = FileRecord.from_json(data["vocabulary"], where)
        receipts = [Receipt.from_json(r, where) for r in data["shards"]]
        manifest = derive(spec, vocabulary, receipts, tuple(data["widened_from"]))
    except (KeyError, TypeError, ValueError) as error:
        raise files.DamagedError(where, f"not a manifest of format {FORMAT_VERSION} ({error!r})", _REMEDY) from error
    if seal(manifest.to_json()) != seal(data):
        raise files.DamagedError(where, "its totals do not follow from its shards: damaged", _REMEDY)
    return manifest


def _instead(root: Path) -> str:
    """What is there instead of a cache, and what to do about it."""
    inside = sorted(p.parent.name for p in root.glob(f"*/{MANIFEST_FILE}"))
    if inside:
        return f"one that holds caches: name one of them ({', '.join(inside)})"
    found = f"a folder without {MANIFEST_FILE}" if root.is_dir() else "a file" if root.exists() else "nothing"
    return f"{found}: check the path, or capture a cache with `make cache`"


def read_receipt(root: Folder, name: str) -> Receipt:
    """One receipt of a cache's folder, checked.

    Raises:
        TidecacheError: damaged, from a newer format, or not the receipt of the shard that its name says.
    """
    where = str(root / name)
    remedy = "remove this receipt and run the capture again: only its shard is done anew"
    data = unseal(files.read(root, name, MAX_RECEIPT_BYTES, remedy), where, remedy)
    receipt = Receipt.from_json(data, where)
    if receipt.path != name:
        raise files.DamagedError(where, f"expected the receipt of this shard, found that of {receipt.path}", remedy)
    return receipt


def write_receipt(root: Path, receipt: Receipt) -> None:
    """Make a shard complete: its data files must be there already."""
    files.write(root, receipt.path, seal({"format": FORMAT_VERSION, **receipt.to_json()}))
