"""The command line: quick help, one line for what users can mend, a traceback for what they cannot."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from shared import __version__, cli
from shared.errors import TidecacheError
from tests.conftest import ROOT
from tests.shared.cache import synthetic

HEAVY = ("torch", "transformers", "pyarrow", "datasets", "pandas")


def tidecache(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """The command in a process of its own; `code` runs first."""
    program = f"import sys; sys.argv = ['tidecache', *{list(arguments)!r}]\n{code}\nfrom shared.cli import main; main()"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("caches") / "small"
    synthetic.build(path, documents=4)
    return path


@pytest.mark.parametrize(
    "arguments", [["--help"], ["cache", "--help"], ["teacher", "--help"], ["student", "--help"], ["--version"]]
)
def test_help_imports_nothing_heavy(arguments):
    report = "import atexit; atexit.register(lambda: print(sorted(sys.modules), file=sys.stderr))"
    done = tidecache(*arguments, code=report)
    assert done.returncode == 0
    modules = done.stderr.strip().splitlines()[-1]
    assert "'typer'" in modules
    assert [name for name in HEAVY if f"'{name}'" in modules] == []


def test_help_shows_the_groups_in_order():
    text = tidecache("--help").stdout.split("Commands")[1]
    assert text.index(" teacher ") < text.index(" cache ") < text.index(" student ")


def test_help_of_the_cache_group():
    text = tidecache("cache", "--help").stdout
    assert "inspect" in text
    assert "verify" in text


def test_version():
    assert tidecache("--version").stdout.strip() == f"tidecache {__version__}"


def test_the_console_script_is_installed():
    done = subprocess.run(
        [str(Path(sys.executable).with_name("tidecache")), "--version"], capture_output=True, text=True
    )
    assert done.stdout.strip() == f"tidecache {__version__}"


def test_inspect(folder):
    done = tidecache("cache", "inspect", str(folder))
    assert done.returncode == 0, done.stderr
    assert "context compdemo" in done.stdout
    figures = json.loads(tidecache("cache", "inspect", "--json", str(folder)).stdout)
    assert figures["totals"]["draws"] == 12
    assert figures["fingerprint"] == synthetic.spec().fingerprint


def test_verify(folder):
    done = tidecache("cache", "verify", str(folder))
    assert done.returncode == 0
    assert done.stdout.count("\n") == 1
    assert "all in order" in done.stdout


def test_verify_of_a_damaged_cache(folder, tmp_path):
    synthetic.build(tmp_path, documents=4, per_shard=2)
    for path in (tmp_path / "shards").glob("*.likelihoods.parquet"):
        path.write_bytes(path.read_bytes()[:-1])
    done = tidecache("cache", "verify", str(tmp_path))
    assert done.returncode == 1
    *problems, last = done.stderr.splitlines()
    assert len(problems) == 2
    assert all(p.startswith("problem: ") and "remove " in p and "cut off" in p for p in problems)
    assert last.startswith("error: ")
    assert "2 problems" in last


def test_what_users_can_mend_is_one_line(tmp_path):
    done = tidecache("cache", "inspect", str(tmp_path / "nowhere"))
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "nowhere" in line


def test_usage_errors_say_what_is_there():
    done = tidecache("cache", "inspect", "--colour")
    assert done.returncode == 2
    assert "--colour" in done.stderr
    assert "Traceback" not in done.stderr


def test_defects_keep_their_traceback(folder):
    code = "import shared.cache.verify as v\ndef broken(path): raise RuntimeError('our defect')\nv.verify = broken"
    done = tidecache("cache", "verify", str(folder), code=code)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "our defect" in done.stderr


def test_an_interrupt_is_one_line(folder):
    code = "import shared.cache.verify as v\ndef slow(path): raise KeyboardInterrupt\nv.verify = slow"
    done = tidecache("cache", "verify", str(folder), code=code)
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr.splitlines() == ["interrupted"]


class Point:
    """An entry point that leads nowhere."""

    name = "teacher"
    attr = "app"

    def __init__(self, module: str) -> None:
        self.module = module


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "needs_much.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TidecacheError, match="a_package_that_nobody_has"):
        cli.load(Point("needs_much"))


def test_our_own_missing_modules_stay_defects():
    with pytest.raises(ModuleNotFoundError):
        cli.load(Point("shared.no_such_module"))


def test_only_the_group_that_is_asked_for_is_loaded(monkeypatch):
    loaded = []
    monkeypatch.setattr(cli, "load", lambda point: loaded.append(point.name) or typer.Typer())
    cli.build(["cache", "inspect"])
    assert loaded == ["cache"]
    cli.build(["--help"])
    assert loaded[1:] == ["teacher", "cache", "student"]
