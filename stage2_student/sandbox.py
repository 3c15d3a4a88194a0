"""Running generated code: each program in a process of its own, with limits on time, memory, files and network.

Benchmarks of code run what a model wrote. `sandbox_child` does so in a fresh interpreter and an empty folder, after
giving up what it does not need: processor time, memory, file sizes and open files are capped; where the kernel allows
(Linux: namespaces, Landlock) there is no network, nothing outside the folder can be written, and little can be read;
and an audit hook of the interpreter refuses sockets, processes and writing elsewhere on any system. A program passes if
it runs to its end, which the child reports with a token that the program is not told; `sys.exit(0)` does not count.

This guards against accidents of generated code, not against an adversary: run evaluations as a user with little to
lose.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

CHILD = Path(__file__).parent / "sandbox_child.py"
REPORT_BYTES = 4096


@dataclass(frozen=True)
class Limits:
    """Of one program: seconds (of processor and of wall time), bytes of memory, bytes of any file, open files."""

    seconds: float = 10.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 24
    open_files: int = 64


@dataclass(frozen=True)
class Outcome:
    """Whether a program ran to its end, and if not, why."""

    passed: bool
    reason: str


def run_program(code: str, limits: Limits | None = None) -> Outcome:
    """Run one Python program."""
    limits = limits or Limits()
    token = secrets.token_hex(16)
    read_end, write_end = os.pipe()
    with tempfile.TemporaryDirectory(prefix="tidecache-sandbox-", ignore_cleanup_errors=True) as folder:
        task = json.dumps({"code": code, "token": token, "report": write_end, **asdict(limits)})
        child = subprocess.Popen(
            [sys.executable, "-I", "-B", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": "", "HOME": folder, "TMPDIR": folder, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
            pass_fds=(write_end,),
            start_new_session=True,
        )
        os.close(write_end)
        try:
            child.communicate(task.encode(), timeout=limits.seconds + 1.0)
            timed_out = False
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            report = _read(read_end)
    if timed_out or child.returncode == -signal.SIGXCPU:
        return Outcome(False, f"took longer than {limits.seconds:g} s")
    if report == token:
        return Outcome(True, "passed")
    return Outcome(False, report or f"ended early (exit status {child.returncode})")


def _read(descriptor: int) -> str:
    """What the child reported; nothing if it holds the pipe open without writing."""
    os.set_blocking(descriptor, False)
    try:
        return os.read(descriptor, REPORT_BYTES).decode("utf-8", "replace")
    except BlockingIOError:
        return ""
    finally:
        os.close(descriptor)


def run_programs(codes: Sequence[str], limits: Limits | None = None, workers: int | None = None) -> list[Outcome]:
    """Run many programs, as many at a time as there are processors; outcomes in their order."""
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        return list(pool.map(lambda code: run_program(code, limits), codes))
