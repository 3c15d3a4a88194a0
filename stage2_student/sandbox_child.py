"""The process in which `sandbox` runs one program: it gives up its rights, runs the program, reports how it ended.

It is started by path in a fresh interpreter, so it imports the standard library only, and reads its task as JSON from
standard input. See `sandbox` for what is limited and why.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import struct
import sys
import sysconfig
from typing import Any

CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWIPC = 0x10000000, 0x40000000, 0x08000000
PR_SET_NO_NEW_PRIVS = 38
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # the same numbers on x86-64 and ARM
ACCESS_ALL = (1 << 13) - 1  # of Landlock's first version: execute, write, read, list, remove, make
ACCESS_READ = 1 | 1 << 2 | 1 << 3
REFUSED = (
    "socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "os.putenv",
    "os.chroot", "ctypes.", "pty.", "ftplib.", "smtplib.", "urllib.Request", "winreg.", "sys.addaudithook",
)  # fmt: skip
CHANGES = (
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
    "os.utime", "os.chflags", "os.setxattr", "os.removexattr", "shutil.",
)  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def cap(task: dict[str, Any]) -> None:
    """Limits that every system has."""
    for kind, value in (
        (resource.RLIMIT_CPU, int(task["seconds"]) + 1),
        (resource.RLIMIT_AS, task["memory_bytes"]),
        (resource.RLIMIT_FSIZE, task["file_bytes"]),
        (resource.RLIMIT_NOFILE, task["open_files"]),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (value, value))


def isolate(folder: str) -> None:
    """What Linux offers to any user, each part where the kernel has it: no network, no files but `folder`."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC) != 0:
        libc.unshare(CLONE_NEWNET | CLONE_NEWIPC)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    attributes = struct.pack("Q", ACCESS_ALL)
    ruleset = libc.syscall(LANDLOCK_CREATE, attributes, len(attributes), 0)
    if ruleset < 0:
        return
    readable = {
        sys.prefix,
        sys.base_prefix,
        *sysconfig.get_paths().values(),
        *sys.path,
        "/usr",
        "/lib",
        "/lib64",
        "/dev",
    }
    for path, access in [*((path, ACCESS_READ) for path in sorted(readable)), (folder, ACCESS_ALL)]:
        with contextlib.suppress(OSError):
            parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
            libc.syscall(LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", access, parent), 0)
            os.close(parent)
    libc.syscall(LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


def watch(folder: str) -> None:
    """Refuse what generated code has no business with, on any system. The hook cannot be taken off."""

    def inside(path: object) -> bool:
        if isinstance(path, int):
            return True  # a descriptor that is open already
        text = os.fsdecode(path) if isinstance(path, (str, bytes)) else str(path)
        return text == os.devnull or os.path.realpath(text).startswith(folder + os.sep)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & WRITES and not inside(path):
                raise PermissionError(f"writing {path!r} is not allowed here")
        elif event.startswith(REFUSED):
            raise PermissionError(f"{event} is not allowed here")
        elif event.startswith(CHANGES) and not all(
            inside(path) for path in arguments if isinstance(path, (str, bytes)) and os.sep in os.fsdecode(path)
        ):
            raise PermissionError(f"{event} is not allowed outside the program's folder")

    sys.addaudithook(hook)


def main() -> None:
    """Run the task of standard input."""
    task = json.load(sys.stdin)
    sys.stdin = open(os.devnull)  # noqa: SIM115 - open as long as the program runs
    folder = os.path.realpath(os.getcwd())
    sys.setrecursionlimit(10_000)
    cap(task)
    isolate(folder)
    token, report = task.pop("token"), task.pop("report")
    watch(folder)
    try:
        exec(compile(task["code"], "<program>", "exec"), {"__name__": "__main__"})
        text = token
    except BaseException as error:  # SystemExit too: the program did not run to its end
        text = f"{type(error).__name__}: {error}"[:500]
    os.write(report, text.encode("utf-8", "replace"))
    os._exit(0)  # threads and exit handlers of the program do not count


if __name__ == "__main__":
    main()
