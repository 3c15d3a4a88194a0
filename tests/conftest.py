"""Fixtures for all tests: the embedded tokenizers and models, and random tiny ones where training does not matter."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent
TINY_TEACHER = ROOT / "stage1_teacher" / "tiny"
TINY_STUDENT = ROOT / "stage2_student" / "tiny"
ORACLES = Path(__file__).resolve().parent / "oracles"

# Where a red run blocks others, the examples are the same every time; elsewhere new ones are tried.
settings.register_profile("ci", derandomize=True, print_blob=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
