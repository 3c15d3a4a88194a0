"""All access to a cache's files: atomic writes, leftovers of killed processes, and reads that check what they find.

A file appears under its name complete or not at all: it is written under a temporary name, fsynced, renamed, and its
folder fsynced. Temporary names say which process on which machine they belong to, so that a later process can tell the
leftovers of a dead one from the work of one that is alive in the same folder.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import re
import secrets
import socket
import stat
import time
from pathlib import Path
from typing import IO

from shared.cache.remote import Folder, RemotePath, reason
from shared.errors import TidecacheError, shown

FOREIGN_LEFTOVER_SECONDS = 86400.0  # a temporary file lives for seconds; another machine's may be judged by age only
SHARDS_FOLDER = "shards"
MAX_NAME = 200  # characters of a file's name with its folders; ours have some 60
_TOKEN = secrets.token_hex(4)
_COUNTER = itertools.count()
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
_TEMPORARY = re.compile(r"\..+\.(?P<machine>[0-9a-f]{8})-(?P<pid>[0-9]+)-(?P<token>[0-9a-f]{8})-[0-9]+\.tmp")


class DamagedError(TidecacheError):
    """A file is not what the cache says it is. `finding` says what was found, the whole message also what to do."""

    def __init__(self, path: str | Folder, finding: str, remedy: str) -> None:
        super().__init__(f"{path}: {finding}; {remedy}")
        self.finding = f"{path}: {finding}"
        self._parts = (path, finding, remedy)

    def __reduce__(self) -> tuple[type[DamagedError], tuple[str | Folder, str, str]]:
        """So that it can leave a loader process."""
        return type(self), self._parts


class MissingError(DamagedError):
    """A file is not there."""


def digest(data: bytes | memoryview) -> str:
    """32 hexadecimal digits: BLAKE2b of the bytes, 16 bytes long."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def check_name(name: object, where: str) -> str:
    """The name of a file inside a cache's folder, as manifests give it. Links are judged by `open_inside`.

    Raises:
        TidecacheError: it is no name or leads out of the folder.
    """
    if not isinstance(name, str) or len(name) > MAX_NAME or not _NAME.fullmatch(name):
        raise TidecacheError(
            f"{where}: expected the name of a file inside the cache's folder, found {shown(name)}, "
            f"which may lead out of it: refused; get the cache again from where it came from"
        )
    return name


def read(root: Folder, name: str, limit: int, remedy: str) -> bytes:
    """The whole file.

    Raises:
        MissingError: it is not there; the message ends with `remedy`.
        DamagedError: unreadable, or longer than `limit` bytes.
    """
    path = root / name
    try:
        return _read_remote(path, limit, remedy) if isinstance(path, RemotePath) else _read_local(path, limit, remedy)
    except FileNotFoundError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):  # so fsspec tells of dead servers
            raise DamagedError(path, f"cannot be read ({reason(cause)})", remedy) from error
        raise MissingError(path, "the file is missing", remedy) from error
    except OSError as error:
        raise DamagedError(path, f"cannot be read ({reason(error)})", remedy) from error


def _read_local(path: Path, limit: int, remedy: str) -> bytes:
    with open_inside(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise DamagedError(path, f"expected at most {limit} bytes, found {size}: refused", remedy)
        return file.read(limit + 1)


def open_inside(path: Path) -> IO[bytes]:
    """A file of a cache, open for reading. Devices and pipes, which may never end, are refused, and a link that leads out of
    the cache's folder, except for those of the Hugging Face Hub's local copies (`snapshots/…` to `blobs`).

    Raises:
        OSError: missing, or refused; the text says why.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    file = os.fdopen(descriptor, "rb")
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a plain file: refused")
        link = path.is_symlink() or path.parent.is_symlink()
        if link and not _leads_inside(path):
            raise OSError(errno.EPERM, f"a link that leads out of the cache's folder, to {path.resolve()}: refused")
    except BaseException:
        file.close()
        raise
    return file


def _leads_inside(path: Path) -> bool:
    """Whether a link stays within its cache's folder: the file's own, or the one above it where shards are kept."""
    root = path.parent.parent if path.parent.name == SHARDS_FOLDER else path.parent
    inside = [root.resolve()]
    inside += [p.parent / "blobs" for p in inside[0].parents if p.name == "snapshots"]
    return any(path.resolve().is_relative_to(folder) for folder in inside)


def _read_remote(path: RemotePath, limit: int, remedy: str) -> bytes:
    try:
        data = path.read_bytes(limit)
    except OSError:
        raise
    except ImportError as error:
        raise TidecacheError(f"{path}: this kind of address needs another package: {reason(error)}") from error
    except Exception as error:  # each protocol's library has exceptions of its own
        raise DamagedError(path, f"cannot be read ({reason(error)})", remedy) from error
    if data is None:
        raise DamagedError(path, f"expected at most {limit} bytes, found more: refused", remedy)
    return data


def write(root: Path, name: str, data: bytes, exclusive: bool = False) -> bool:
    """Write `data` so that the file is there complete or not at all, also after a power failure.

    With `exclusive` an existing file stays as it is. Returns whether the data is now what the name stands for.

    Raises:
        TidecacheError: the disk is full or refuses; the temporary file is removed and what was there before stays.
    """
    final = root / name
    temporary = final.with_name(f".{final.name}.{_machine()}-{os.getpid()}-{_TOKEN}-{next(_COUNTER)}.tmp")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        written = True
        if exclusive:
            written = _link(temporary, final)
        else:
            os.replace(temporary, final)
        fsync_folder(final.parent)
    except OSError as error:
        raise TidecacheError(_cannot_write(final, len(data), error)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return written


def _link(temporary: Path, final: Path) -> bool:
    """Give the file its name unless the name is taken."""
    try:
        os.link(temporary, final)
    except FileExistsError:
        return False
    except OSError:  # file systems without links: the moment between look and rename is all that is lost
        if final.exists():
            return False
        os.replace(temporary, final)
    return True


def _cannot_write(path: Path, size: int, error: OSError) -> str:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    reason = "the disk is full or a limit on file sizes is reached" if full else error.strerror or str(error)
    advice = "free some space" if full else "make the folder writable"
    return (
        f"{path}: cannot write {size} bytes: {reason}; what was complete before stays so: {advice} and run the same "
        f"command again, it goes on from there"
    )


def fsync_folder(folder: Path) -> None:
    """Make a rename durable; systems that cannot open folders order renames by themselves."""
    with contextlib.suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _machine() -> str:
    """8 digits for this boot of this machine and this process namespace: in these a process id names one process."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.blake2b("\x00".join(parts).encode(), digest_size=4).hexdigest()


def remove_leftovers(folder: Path) -> list[str]:
    """Remove the temporary files of processes that are surely gone; those of any other process stay.

    Returns the names removed.
    """
    removed = []
    for path in sorted(folder.glob(".*.tmp")):
        match = _TEMPORARY.fullmatch(path.name)
        if match and _is_dead(match["machine"], int(match["pid"]), match["token"], path):
            with contextlib.suppress(OSError):
                path.unlink()
                removed.append(path.name)
    return removed


def _is_dead(machine: str, pid: int, token: str, path: Path) -> bool:
    if machine != _machine():
        with contextlib.suppress(OSError):
            return time.time() - path.stat().st_mtime > FOREIGN_LEFTOVER_SECONDS
        return False
    if pid == os.getpid():
        return token != _TOKEN  # a process of the past that had our number
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
