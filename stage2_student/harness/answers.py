"""Answers kept on disk while a benchmark runs, so that an interrupted evaluation goes on where it stopped.

One JSON-lines file per checkpoint. The first line says which checkpoint; every other holds an answer under a key of its
prompt, its stop strings and the sampling options. Answers at temperature 0 are a function of these, so they hold for any
later run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from shared.errors import TidecacheError
from stage2_student.generate import read_lines
from stage2_student.sampler import SampleOptions


class AnswerFile:
    """Answers of one checkpoint, read once and appended to."""

    def __init__(self, path: Path, model: str) -> None:
        """Open or begin the file of the checkpoint with digest `model`.

        Raises:
            TidecacheError: the file is another checkpoint's, no such file, or cannot be written.
        """
        self.path = path
        self._answers: dict[str, str] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                data = path.read_bytes()
                path.write_bytes(data[: data.rfind(b"\n") + 1])  # a torn last line
            rows = [row for _, row in read_lines(path)] if path.exists() else []
            if rows and rows[0].get("model") != model:
                raise TidecacheError(f"{path}: holds another checkpoint's answers: choose another --out or remove it")
            self._answers = {str(row["key"]): str(row["text"]) for row in rows[1:] if "key" in row and "text" in row}
            if not rows:
                path.write_text(json.dumps({"model": model}) + "\n", encoding="utf-8")
        except OSError as error:
            raise TidecacheError(f"{path}: cannot be written ({error.strerror}): choose another --out") from error

    def __len__(self) -> int:
        return len(self._answers)

    @staticmethod
    def key(prompt: str, until: Sequence[str], options: SampleOptions) -> str:
        """32 hexadecimal digits of what decides an answer."""
        text = json.dumps([prompt, list(until), asdict(options)], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def get(self, key: str) -> str | None:
        """An answer that is there already."""
        return self._answers.get(key)

    def add(self, answers: Sequence[tuple[str, str]]) -> None:
        """Append (key, text) pairs as whole lines.

        Raises:
            TidecacheError: the disk refuses.
        """
        self._answers.update(answers)
        lines = "".join(json.dumps({"key": key, "text": text}, ensure_ascii=False) + "\n" for key, text in answers)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            raise TidecacheError(
                f"{self.path}: cannot be written ({error.strerror}); earlier answers are kept"
            ) from error
