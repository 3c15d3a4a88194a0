"""The models that ship beside this code, by name."""

from __future__ import annotations

from pathlib import Path

EMBEDDED = "tiny"  # the student that comes with the project: a base, a checkpoint and its tokenizer
_STUDENT = Path(__file__).resolve().parent.parent / "stage2_student" / EMBEDDED


def embedded_or(name: str) -> str:
    """`tiny` is the embedded student, unless there is a folder of that name; anything else stays as it is."""
    return str(_STUDENT) if name == EMBEDDED and not Path(name).is_dir() else name
