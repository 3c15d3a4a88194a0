"""SIGKILL at any instant: what was complete stays complete, and the final cache is that of an uninterrupted run."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.cache.manifest import read_manifest, read_receipt
from shared.cache.parquet import open_parquet
from shared.cache.verify import verify
from tests.conftest import ROOT
from tests.shared.cache import killed_capture
from tests.shared.cache.test_writer import snapshot

MODULE = "tests.shared.cache.killed_capture"


def assert_complete_or_absent(folder: Path) -> None:
    """Each receipt's files are there to the last bit."""
    for path in (folder / "shards").glob("*.json"):
        receipt = read_receipt(folder, f"shards/{path.name}")
        for record in (receipt.documents, *receipt.likelihoods):
            assert open_parquet(folder, record).metadata.num_rows == record.rows


def test_kill_at_every_step_on_the_disk(tmp_path):
    """Every fsync, rename and link in turn is the last thing that a capture does not do."""
    out = subprocess.run(
        [sys.executable, "-m", MODULE, "steps", str(tmp_path)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    steps = int(out.stdout)
    assert steps > 30
    whole = snapshot(tmp_path / "whole")
    assert not [name for name in whole if name.endswith(".tmp")]
    for step in range(1, steps + 1):
        assert snapshot(tmp_path / str(step)) == whole, f"killed at step {step}"


def start(folder: Path, part: int, parts: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", MODULE, "run", str(folder), str(part), str(parts)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> float:
    process.stdin.write("go\n")
    process.stdin.flush()
    return time.monotonic()


def kill_at_random_points(folder: Path, kills: int, seconds: float, randomness: random.Random) -> None:
    """Start captures and kill them; of five, two have a second one on the same shards, one a second one on the other half."""
    for attempt in range(kills):
        parts = 1 + attempt % 2
        first = start(folder, 0, parts)
        second = start(folder, attempt % 4 // 3, parts) if attempt % 2 or attempt % 4 == 2 else None
        for process in (first, second):
            if process:
                go(process)
        time.sleep(randomness.uniform(0.0, seconds))
        for process in (first, second):
            if process:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                time.sleep(randomness.uniform(0.0, 0.05))
        if folder.exists():
            assert_complete_or_absent(folder)


def run_to_the_end(folder: Path) -> float:
    process = start(folder, 0, 1)
    begin = go(process)
    process.communicate(timeout=60)
    assert process.returncode == 0
    return time.monotonic() - begin


def check_kills(tmp_path: Path, kills: int) -> None:
    randomness = random.Random(0)
    seconds = run_to_the_end(tmp_path / "whole")
    whole = snapshot(tmp_path / "whole")
    for folder in (tmp_path / f"killed {i}" for i in range(kills // 5)):
        kill_at_random_points(folder, 5, 0.4 * seconds, randomness)
        run_to_the_end(folder)
        assert read_manifest(folder).content == read_manifest(tmp_path / "whole").content
        assert {r.range for r in read_manifest(folder).shards} == set(killed_capture.SHARDS)
        assert verify(folder).problems == ()
        assert snapshot(folder) == whole


def test_random_kills(tmp_path):
    check_kills(tmp_path, 5)


@pytest.mark.slow
def test_fifty_random_kills(tmp_path):
    check_kills(tmp_path, 50)


def test_two_captures_of_the_same_shards_by_mistake(tmp_path):
    """Both run to the end; neither waits for the other, and nothing is there twice."""
    both = [start(tmp_path / "both", 0, 1) for _ in range(2)]
    for process in both:
        go(process)
    for process in both:
        process.communicate(timeout=60)
        assert process.returncode == 0
    run_to_the_end(tmp_path / "one")
    assert snapshot(tmp_path / "both") == snapshot(tmp_path / "one")
