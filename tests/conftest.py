"""Fixtures for all tests: the embedded tokenizers and models, and random tiny ones where training does not matter."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent
TINY_TEACHER = ROOT / "stage1_teacher" / "tiny"
TINY_STUDENT = ROOT / "stage2_student" / "tiny"
ORACLES = Path(__file__).resolve().parent / "oracles"
