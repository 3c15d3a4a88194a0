"""The Hugging Face Hub as this project uses it: dataset repositories, through `huggingface_hub`, errors in one line."""

from __future__ import annotations

import contextlib
import errno
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from shared.cache.manifest import (
    HELD_OUT_FOLDER,
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    FileRecord,
    Manifest,
    read_manifest,
)
from shared.cache.remote import reason
from shared.errors import TidecacheError, printable
from shared.spec import differences

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Watch = Callable[[int], None]  # hears of so many more bytes being done


def ignore(_bytes: int) -> None:
    """A `Watch` that does not listen."""


@contextlib.contextmanager
def hub_errors(repo: str, revision: str | None = None) -> Iterator[None]:
    """What goes wrong with the Hub becomes a `TidecacheError`.

    `huggingface_hub` raises its own exceptions, those of its HTTP library, and bare ones; they have no base in common.
    """
    from huggingface_hub import errors

    login = "log in with `hf auth login`, or set HF_TOKEN"
    try:
        yield
    except TidecacheError:
        raise
    except errors.GatedRepoError as error:
        raise TidecacheError(f"{repo}: access must be asked for on its page, and {login}") from error
    except errors.RepositoryNotFoundError as error:
        raise TidecacheError(
            f"{repo}: no such dataset repository, or a private one that your token does not open: check the name; {login}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise TidecacheError(f"{repo}: no revision {revision!r}: check --revision") from error
    except errors.LocalTokenNotFoundError as error:
        raise TidecacheError(f"{repo}: writing needs a token: {login}") from error
    except errors.HFValidationError as error:
        raise TidecacheError(f"{repo!r}: expected a repository such as name/dataset ({_line(error)})") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise TidecacheError(f"{repo}: your token may not do that (HTTP {status}): {login}") from error
        raise TidecacheError(f"{repo}: the Hub answers with an error ({_line(error)}); run this again") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TidecacheError(f"{repo}: the disk is full: free some space and run this again") from error
        raise TidecacheError(_unreachable(repo, error)) from error
    except Exception as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        raise TidecacheError(_unreachable(repo, cause)) from error


def _unreachable(repo: str, error: BaseException) -> str:
    return f"{repo}: the Hub cannot be reached, or gave something else ({_line(error)}); run this again, it goes on from there"


def _line(error: BaseException) -> str:
    """One line, not too long."""
    text = printable(reason(error) if isinstance(error, Exception) else str(error))
    return text if len(text) <= 300 else text[:300] + "…"


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """A bar for each file says little about the whole."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


@dataclass(frozen=True)
class Snapshot:
    """One commit of a dataset repository: its files and their sizes in bytes."""

    repo: str
    commit: str
    sizes: dict[str, int]
    api: HfApi

    @classmethod
    def of(cls, api: HfApi, repo: str, revision: str | None) -> Snapshot:
        """Look at a revision.

        Raises:
            TidecacheError: no such repository or revision, or no access.
        """
        with hub_errors(repo, revision):
            info = api.dataset_info(repo, revision=revision, files_metadata=True)
            sizes = {file.rfilename: int(file.size or 0) for file in info.siblings or []}
            return cls(repo, str(info.sha), sizes, api)

    def fetch(self, name: str, folder: Path, size: int) -> Path:
        """Download a file into a folder, or go on with one that was begun; `size` is what it must have at most.

        Raises:
            TidecacheError: it is not there, longer, or the Hub fails.
        """
        if name not in self.sizes:
            raise TidecacheError(f"{self.repo}: {name} is missing there: push the cache again")
        if self.sizes[name] > size:
            raise TidecacheError(
                f"{self.repo}: {name}: expected at most {size} bytes, found {self.sizes[name]}: refused; push the cache again"
            )
        with hub_errors(self.repo, self.commit), without_progress_bars():
            return Path(
                self.api.hf_hub_download(
                    self.repo, name, repo_type="dataset", revision=self.commit, local_dir=str(folder)
                )
            )

    @cached_property
    def _manifests(self) -> tuple[dict[str, Manifest], dict[str, bytes]]:
        found, raw = {}, {}
        with tempfile.TemporaryDirectory(prefix="tidecache-") as folder:
            for prefix in ("", f"{HELD_OUT_FOLDER}/"):
                if prefix + MANIFEST_FILE in self.sizes:
                    path = self.fetch(prefix + MANIFEST_FILE, Path(folder), MAX_MANIFEST_BYTES)
                    found[prefix], raw[prefix] = read_manifest(path.parent), path.read_bytes()
        return found, raw

    @property
    def manifests(self) -> dict[str, Manifest]:
        """The manifests that are there, checked: of the cache (the prefix "") and its held-out part (`held-out/`).

        Raises:
            TidecacheError: a damaged one.
        """
        return self._manifests[0]

    @property
    def raw_manifests(self) -> dict[str, bytes]:
        """Their files."""
        return self._manifests[1]


def records_of(manifest: Manifest) -> list[FileRecord]:
    """The data files of a cache, each once."""
    records = [manifest.vocabulary, *(f for r in manifest.shards for f in (r.documents, *r.likelihoods))]
    return list({record.path: record for record in records}.values())


def refuse_other_cache(ours: Manifest, theirs: Manifest, where: str, there: str, advice: str) -> None:
    """A cache may only replace one of its spec that holds nothing more.

    Raises:
        TidecacheError: the spec differs, or `there` would lose shards.
    """
    if changed := differences(ours.spec, theirs.spec):
        fields = "; ".join(f"{name}: {a!r} and {b!r}" for name, a, b in changed)
        raise TidecacheError(f"{where} and {there} hold caches with different specs ({fields}): {advice}")
    held = {(r.range, r.content) for r in ours.shards}
    lost = [r for r in theirs.shards if (r.range, r.content) not in held]
    if lost:
        raise TidecacheError(
            f"{there} holds {len(lost)} shards that {where} does not have, or has otherwise ({lost[0].path} is one): "
            f"{advice}, and put the two together with `tidecache cache merge`"
        )
