"""What packed draws do to quality: students trained on one small real cache, then measured on held-out modules.

The embedded teacher captures part of the standard library with 4 draws per document; students start from the embedded
base with one seed. With M = 4 a batch of 8 rows holds 2 documents with 4 draws each, with M = 1 it holds 8 documents.
*Equal documents*: as many document visits as M = 1 has, each with four draws, so four times the rows (steps of 4 × the
rows); *equal rows*: the same number of steps and rows, so a quarter of the document visits.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DOCUMENTS, DRAWS, STEPS, BATCH, HELD_OUT, RATE = 120, 4, 60, 8, 40, "2e-4"
RUNS = {
    "M = 1": ["--batch", str(BATCH)],
    "M = 4, equal rows": ["--batch", str(BATCH), "--draws-together", str(DRAWS)],
    "M = 4, equal documents": ["--batch", str(BATCH * DRAWS), "--draws-together", str(DRAWS)],
}


def measure() -> dict[str, float]:
    """Held-out bits per byte and training seconds of each run."""
    report: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        _tidecache(
            "teacher", "capture", "--teacher", "tiny", "--corpus", "stdlib", "--context", "plain", "--draws", str(DRAWS),
            "--limit", str(DOCUMENTS), "--out", str(out / "cache"),
        )  # fmt: skip
        for number, (name, options) in enumerate(RUNS.items()):
            begin = time.monotonic()
            _tidecache(
                "student", "train", "--cache", str(out / "cache"), "--recipe", "tide-cross", "--base", "tiny", "--out",
                str(out / str(number)), "--steps", str(STEPS), "--seed", "0", "--fresh", "0", "--learning-rate", RATE, *options,
            )  # fmt: skip
            report[f"quality: {name}, s of training"] = time.monotonic() - begin
        models = [argument for number in range(len(RUNS)) for argument in ("--model", str(out / str(number)))]
        _tidecache(
            "student", "score", "--cache", str(out / "cache" / "held-out"), "--model", "tiny", *models,
            "--limit", str(HELD_OUT), "--json", str(out / "scores.json"),
        )  # fmt: skip
        rows = json.loads((out / "scores.json").read_text())["rows"]
        names = {"tiny": "base", **{str(out / str(number)): name for number, name in enumerate(RUNS)}}
        for row in rows:
            if row["name"] in names:
                report[f"quality: {names[row['name']]}, held-out bits per byte"] = row["all"]["bits_per_byte"]
    return report


def _tidecache(*arguments: str) -> None:
    subprocess.run([Path(sys.executable).parent / "tidecache", *arguments], check=True, stdout=subprocess.DEVNULL)
