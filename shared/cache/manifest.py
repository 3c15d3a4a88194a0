"""The manifest and the receipts: what a cache says it holds.

Each complete shard has a receipt, a small JSON file that is written after its data files; the manifest is derived from
the vocabulary and all receipts and can be derived again at any time. Both are canonical JSON and carry a digest of
themselves, so that a damaged one is never believed (docs/cache-format.md).
"""

from __future__ import annotations

import bisect
import hashlib
import heapq
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.cache import files
from shared.cache.fields import HEX_32, HEX_64, LINE, WORD, Fields
from shared.cache.records import ShardRange
from shared.cache.remote import Folder
from shared.errors import TidecacheError, shown
from shared.spec import FORMAT_VERSION, CaptureSpec

MANIFEST_FILE = "manifest.json"
SHARDS_FOLDER = files.SHARDS_FOLDER
HELD_OUT_FOLDER = "held-out"
WIDENING_FOLDER = "widening"  # receipts that wait for others, see `shared.cache.widening`
MAX_MANIFEST_BYTES = 256 << 20
MAX_RECEIPT_BYTES = 1 << 20
MAX_FILE_BYTES = 1 << 30  # of a data file
MAX_ROWS = 1 << 28
MAX_DRAW = (1 << 31) - 1
MAX_COLUMNS, MAX_LANE_FILES, MAX_REASONS, MAX_WIDENED = 256, 64, 1000, 64
TIMESTEP_BINS = 10  # of [0, 1]
MIN_CONTAINERS, BYTES_PER_CONTAINER = 1000, 24  # a receipt has one list or object in 150 bytes
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

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "path": self.path,
            "size_bytes": self.size_bytes,
            "digest": self.digest,
            "rows": self.rows,
            "columns": list(self.columns),
        }

    @classmethod
    def from_json(cls, fields: Fields, where: str) -> FileRecord:
        """Read the JSON form; the name must stay inside the cache's folder."""
        return cls(
            files.check_name(fields.value("path"), where),
            fields.integer("size_bytes", most=MAX_FILE_BYTES),
            fields.text("digest", HEX_32),
            fields.integer("rows", most=MAX_ROWS),
            fields.texts("columns", WORD, MAX_COLUMNS),
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

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "dropped": dict(self.dropped), "timesteps": list(self.timesteps)}

    @classmethod
    def from_json(cls, fields: Fields) -> Counts:
        """Read `to_json`'s form."""
        return cls(
            documents=fields.integer("documents"),
            dropped=fields.counts("dropped", MAX_REASONS),
            cut=fields.integer("cut"),
            chunks=fields.integer("chunks"),
            draws=fields.integer("draws"),
            masked_chunks=fields.integer("masked_chunks"),
            scored_tokens=fields.integer("scored_tokens"),
            timesteps=fields.integers("timesteps", TIMESTEP_BINS),
        )


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
        shard = self.range
        return {
            "range": {
                "documents": [shard.first_document, shard.document_stop],
                "draws": [shard.first_draw, shard.draw_stop],
            },
            "fingerprint": self.fingerprint,
            "corpus": self.corpus,
            "batch_tokens": self.batch_tokens,
            "documents": self.documents.to_json(),
            "likelihoods": [f.to_json() for f in self.likelihoods],
            "counts": self.counts.to_json(),
            "content": self.content,
        }

    @classmethod
    def from_json(cls, data: object, where: str) -> Receipt:
        """Read `to_json`'s form, plain or as `Fields`.

        Raises:
            TidecacheError: something is missing, of another type, out of bounds, or leads out of the folder; `where` is
                named.
        """
        fields = data if isinstance(data, Fields) else Fields(data, where, _REMEDY)
        ranges = fields.inner("range")
        documents, draws = ranges.integers("documents", 2), ranges.integers("draws", 2, most=MAX_DRAW)
        if not (documents[0] < documents[1] and draws[0] < draws[1]):
            finding = f"range: expected a first number below the next, found documents {documents}, draws {draws}"
            raise files.DamagedError(where, finding, _REMEDY)
        return cls(
            range=ShardRange(*documents, *draws),
            fingerprint=fields.text("fingerprint", HEX_32),
            corpus=fields.text("corpus", LINE),
            batch_tokens=fields.integer("batch_tokens"),
            documents=FileRecord.from_json(fields.inner("documents"), where),
            likelihoods=tuple(FileRecord.from_json(f, where) for f in fields.inners("likelihoods", 1, MAX_LANE_FILES)),
            counts=Counts.from_json(fields.inner("counts")),
            content=fields.text("content", HEX_64),
        )

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
            "totals": self.totals.to_json(),
            "vocabulary": self.vocabulary.to_json(),
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
    content = sum(int(r.content, 16) for r in shards) % (1 << 256)
    return Manifest(spec, vocabulary, shards, _totals(vocabulary, shards), f"{content:064x}", widened_from)


def _refuse_overlaps(shards: Sequence[Receipt]) -> None:
    """`shards` are sorted by first document. Those that reach over the same documents must differ in their draws, so they can
    be kept in the order of their draws, where an overlap is one with a neighbour.
    """
    active: list[tuple[int, int, Receipt]] = []  # (first draw, number, receipt)
    ends: list[tuple[int, int, int]] = []  # (document stop, first draw, number): a heap
    for number, receipt in enumerate(shards):
        while ends and ends[0][0] <= receipt.range.first_document:
            ended = heapq.heappop(ends)
            del active[bisect.bisect_left(active, ended[1:])]
        place = bisect.bisect_left(active, (receipt.range.first_draw, number))
        for _, _, other in active[max(place - 1, 0) : place + 1]:
            if other.range.overlaps(receipt.range):
                raise TidecacheError(
                    f"{receipt.path} and {other.path} hold the same draws: two captures with different "
                    f"--documents-per-shard worked in one folder; remove one of the two receipts and run the capture "
                    f"again"
                )
        active.insert(place, (receipt.range.first_draw, number, receipt))
        heapq.heappush(ends, (receipt.range.document_stop, receipt.range.first_draw, number))


def _totals(vocabulary: FileRecord, shards: Sequence[Receipt]) -> Totals:
    """The counts of all shards, those of documents once for each documents file."""
    once = {r.documents.path: r for r in reversed(shards)}.values()
    dropped: Counter[str] = Counter()
    for receipt in once:
        dropped.update(receipt.counts.dropped)
    return Totals(
        documents=sum(r.counts.documents for r in once),
        dropped=dict(sorted(dropped.items())),
        cut=sum(r.counts.cut for r in once),
        chunks=sum(r.counts.chunks for r in once),
        draws=sum(r.counts.draws for r in shards),
        masked_chunks=sum(r.counts.masked_chunks for r in shards),
        scored_tokens=sum(r.counts.scored_tokens for r in shards),
        timesteps=tuple(sum(bins) for bins in zip(*(r.counts.timesteps for r in shards), strict=True)),
        size_bytes=vocabulary.size_bytes
        + sum(r.documents.size_bytes for r in once)
        + sum(f.size_bytes for r in shards for f in r.likelihoods),
    )


# --- JSON files that carry their own digest ----------------------------------------------------------------------


def seal(data: Mapping[str, Any]) -> bytes:
    """The canonical text of an object with its `digest` added: BLAKE2b-16 of its compact, key-sorted, ASCII JSON."""
    body = {k: v for k, v in data.items() if k != "digest"}
    return (json.dumps({**body, "digest": _digest(body)}, indent=1, ensure_ascii=True) + "\n").encode()


def _digest(body: Mapping[str, Any]) -> str:
    compact = json.dumps(body, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(compact.encode(), digest_size=16).hexdigest()


def unseal(data: bytes, where: str, remedy: str) -> dict[str, Any]:
    """The object without its digest, its format and its digest checked.

    Raises:
        TidecacheError: from a newer format, not JSON, not what was written, or made to fill the memory.
    """
    containers = data.count(b"[") + data.count(b"{")
    if containers > MIN_CONTAINERS + len(data) // BYTES_PER_CONTAINER:  # each takes some 60 bytes of memory
        raise files.DamagedError(where, f"holds {containers} lists and objects in {len(data)} bytes: refused", remedy)
    try:
        parsed = json.loads(data, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise files.DamagedError(where, f"expected JSON, found something else ({error})", remedy) from error
    if not isinstance(parsed, dict):
        raise files.DamagedError(where, f"expected a JSON object, found {type(parsed).__name__}", remedy)
    version = parsed.get("format")
    if type(version) is int and version > FORMAT_VERSION:
        raise TidecacheError(
            f"{where}: written in cache format {shown(version)}, and this version of tidecache reads formats up to "
            f"{FORMAT_VERSION}: install a newer tidecache"
        )
    body = {k: v for k, v in parsed.items() if k != "digest"}
    # Line by line, so that a key that stands there twice, of which a parser sees one, is found too.
    written = json.dumps({**body, "digest": _digest(body)}, ensure_ascii=True, separators=(",", ": ")).encode()
    if type(version) is not int or version != FORMAT_VERSION or re.sub(rb"\n *", b"", data) != written:
        raise files.DamagedError(where, "its contents do not agree with their own digest: damaged", remedy)
    return body


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


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
    fields = Fields(data, where, _REMEDY)
    try:
        spec = CaptureSpec.from_json(fields.value("spec"))
    except TidecacheError as error:
        raise TidecacheError(f"{where}: {error}") from error
    vocabulary = FileRecord.from_json(fields.inner("vocabulary"), where)
    receipts = [Receipt.from_json(r, where) for r in fields.inners("shards")]
    manifest = derive(spec, vocabulary, receipts, fields.texts("widened_from", HEX_32, MAX_WIDENED))
    if _digest(manifest.to_json()) != _digest(data):
        raise files.DamagedError(where, "its totals do not follow from its shards: damaged", _REMEDY)
    return manifest


def _instead(root: Path) -> str:
    """What is there instead of a cache, and what to do about it."""
    inside = sorted(p.parent.name for p in root.glob(f"*/{MANIFEST_FILE}"))
    if inside:
        return f"one that holds caches: name one of them ({', '.join(inside)})"
    found = f"a folder without {MANIFEST_FILE}" if root.is_dir() else "a file" if root.exists() else "nothing"
    return f"{found}: check the path, or capture a cache with `make cache`"


def fingerprint_of(path: Path) -> str | None:
    """What a manifest's file says of its spec, unchecked; None where it is none or cannot be read."""
    try:
        found = json.loads(path.read_bytes()).get("fingerprint")
    except (ValueError, OSError, AttributeError):
        return None
    return found if isinstance(found, str) else None


def read_receipt(root: Folder, name: str) -> Receipt:
    """One receipt of a cache's folder, checked.

    Raises:
        TidecacheError: damaged, from a newer format, or not the receipt of the shard that its name says.
    """
    where = str(root / name)
    remedy = "remove this receipt and run the capture again: only its shard is done anew"
    data = unseal(files.read(root, name, MAX_RECEIPT_BYTES, remedy), where, remedy)
    receipt = Receipt.from_json(Fields(data, where, remedy), where)
    if _digest({"format": FORMAT_VERSION, **receipt.to_json()}) != _digest(data):
        raise files.DamagedError(where, f"not a receipt of format {FORMAT_VERSION}: it has fields of its own", remedy)
    if receipt.path != name:
        raise files.DamagedError(where, f"expected the receipt of this shard, found that of {receipt.path}", remedy)
    return receipt


def write_receipt(root: Path, receipt: Receipt) -> None:
    """Make a shard complete: its data files must be there already."""
    files.write(root, receipt.path, seal({"format": FORMAT_VERSION, **receipt.to_json()}))
