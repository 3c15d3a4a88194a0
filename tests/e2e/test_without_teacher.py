"""Stage 2 needs nothing of the teacher: its folder is deleted and its package cannot be imported, and training works."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TINY_STUDENT, TINY_TEACHER

BLOCKED = """
import sys
class NoTeacher:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "stage1_teacher":
            raise ImportError("stage 2 must not import the teacher's stage")
sys.meta_path.insert(0, NoTeacher())
sys.argv = ["tidecache", *sys.argv[1:]]
from shared.cli import main
main()
"""


@pytest.mark.slow
def test_a_student_trains_after_the_teacher_is_gone(tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(TINY_TEACHER, teacher)
    cache = tmp_path / "cache"
    command = str(Path(sys.executable).parent / "tidecache")
    arguments = [
        "teacher",
        "capture",
        "--limit",
        "12",
        "--draws",
        "2",
        "--context",
        "both",
        "--layout",
        "full",
        "--held-out",
        "0.3",
    ]
    subprocess.run(
        [command, *arguments, "--teacher", teacher, "--students", TINY_STUDENT, "--out", cache],
        check=True, capture_output=True,
    )  # fmt: skip
    shutil.rmtree(teacher)

    def student(*words: object) -> subprocess.CompletedProcess[str]:
        arguments = [sys.executable, "-c", BLOCKED, "student", *map(str, words)]
        return subprocess.run(arguments, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})

    out = tmp_path / "student"
    trained = student("train", "--cache", cache, "--recipe", "events", "--steps", 2, "--batch", 2, "--out", out)
    assert trained.returncode == 0, trained.stderr
    assert (out / "model.safetensors").is_file()
    lines = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "distill" in line] == [1, 2]
