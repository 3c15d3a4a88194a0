"""`tidecache cache push`: a cache becomes a dataset repository of the Hugging Face Hub, with a card.

Every file is compared with its digest before anything is sent. Data files and receipts go first, in commits of some
hundred files; manifests and card come with the last commit, so whoever pulls meanwhile gets the cache as it was before.
What is there already is not sent again, and a push that was stopped goes on with the same command.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shared.cache import hub
from shared.cache.card import CARD_FILE, updated_card
from shared.cache.manifest import HELD_OUT_FOLDER, MANIFEST_FILE, read_receipt, seal
from shared.cache.parquet import read_data
from shared.cache.reader import Cache
from shared.errors import TidecacheError

FILES_PER_COMMIT = 300
MAX_CARD_BYTES = 1 << 20


@dataclass(frozen=True)
class Pushed:
    """Where the cache is now; `files` were sent in this run."""

    url: str
    commit: str
    files: int


@dataclass(frozen=True)
class _File:
    """A file of the cache: its name in the repository, where it lies, and a digest (of a receipt: its shard's content)."""

    name: str
    path: Path
    size_bytes: int
    digest: str


def push_cache(
    folder: Path,
    repo: str,
    public: bool = False,
    revision: str | None = None,
    watch: hub.Watch = hub.ignore,
) -> Pushed:
    """Push a local cache. A repository that is not there is made, private unless `public`.

    Raises:
        TidecacheError: damage, a repository that holds another cache or more shards, no right to write, or a Hub that fails.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    cache = Cache.open(folder)
    caches = {"": cache}
    if (held_out := cache.held_out()) is not None:
        caches[f"{HELD_OUT_FOLDER}/"] = held_out
    files = [file for prefix, c in caches.items() for file in _files(prefix, c)]
    api = HfApi()
    with hub.hub_errors(repo, revision):
        repo = api.create_repo(repo, repo_type="dataset", private=not public, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo, repo_type="dataset", branch=revision, exist_ok=True)
    there = hub.Snapshot.of(api, repo, revision)
    for prefix, manifest in there.manifests.items():
        if prefix not in caches:
            raise TidecacheError(f"{repo} has held-out documents and {folder} none: push to another repository")
        ours = caches[prefix].manifest
        hub.refuse_other_cache(
            ours, manifest, str(folder), f"{repo}/{prefix}", "push to another repository, or pull it"
        )
    known = _known(there)
    new = [f for f in files if (f.name, f.size_bytes, f.digest) not in known]
    watch(sum(f.size_bytes for f in files) - sum(f.size_bytes for f in new))
    for first in range(0, len(new), FILES_PER_COMMIT):
        part = new[first : first + FILES_PER_COMMIT]
        operations = [CommitOperationAdd(f.name, str(f.path)) for f in part]
        with hub.hub_errors(repo, revision), hub.without_progress_bars():
            api.create_commit(repo, operations, commit_message="Add shards", repo_type="dataset", revision=revision)
        watch(sum(f.size_bytes for f in part))
    last = [
        CommitOperationAdd(prefix + MANIFEST_FILE, data)
        for prefix, c in caches.items()
        if (data := seal(c.manifest.to_json())) != there.raw_manifests.get(prefix)
    ]
    card = updated_card(_card_there(there), {prefix: c.manifest for prefix, c in caches.items()}, repo)
    if card is not None:
        last.append(CommitOperationAdd(CARD_FILE, card.encode()))
    commit = there.commit
    if last:
        with hub.hub_errors(repo, revision), hub.without_progress_bars():
            message = "Publish the cache"
            done = api.create_commit(repo, last, commit_message=message, repo_type="dataset", revision=revision)
            commit = str(done.oid)
    return Pushed(f"{api.endpoint}/datasets/{repo}", commit, len(new))


def _files(prefix: str, cache: Cache) -> Iterator[_File]:
    """All files of a cache but its manifest, each compared with its record; a shard's receipt after its data.

    Raises:
        TidecacheError: a file is missing or damaged, or a receipt is not what the manifest says.
    """
    assert isinstance(cache.path, Path)
    seen = set()
    for receipt in (None, *cache.shards):
        records = (cache.manifest.vocabulary,) if receipt is None else (receipt.documents, *receipt.likelihoods)
        for record in records:
            if record.path not in seen:
                seen.add(record.path)
                read_data(cache.path, record)
                yield _File(prefix + record.path, cache.path / record.path, record.size_bytes, record.digest)
        if receipt is not None:
            path = cache.path / receipt.path
            if read_receipt(cache.path, receipt.path) != receipt:
                raise TidecacheError(f"{path}: the manifest says otherwise: run `tidecache cache verify` first")
            yield _File(prefix + receipt.path, path, path.stat().st_size, receipt.content)


def _known(there: hub.Snapshot) -> set[tuple[str, int, str]]:
    """Name, size and digest of the files that the repository has, as its manifests give them."""
    found = set()
    for prefix, manifest in there.manifests.items():
        named = {record.path: record.digest for record in hub.records_of(manifest)}
        named |= {receipt.path: receipt.content for receipt in manifest.shards}
        found |= {(prefix + name, there.sizes.get(prefix + name, -1), digest) for name, digest in named.items()}
    return found


def _card_there(there: hub.Snapshot) -> str | None:
    """The card that the repository has."""
    if CARD_FILE not in there.sizes:
        return None
    with tempfile.TemporaryDirectory(prefix="tidecache-") as folder:
        return there.fetch(CARD_FILE, Path(folder), MAX_CARD_BYTES).read_text(encoding="utf-8", errors="replace")
