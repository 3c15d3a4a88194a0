"""`tidecache teacher plan` against the capture that follows: bytes, and hours.

    python bench/plan.py [--seeds 2] [--limit 200] [--only NAME]

The embedded teacher, on a corpus of two kinds with very different lengths (modules of the standard library, and lines of
them), with duplicates and documents that are too short to keep. Each configuration is planned from a few documents and
then captured; the table says how far off the bytes were, what error the plan itself stated, and whether the capture
took as long as it said. Time depends on what else the machine does: look at it on a quiet one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from shared import stdlib_corpus
from shared.noise import stream_key
from stage1_teacher.capture import Capture
from stage1_teacher.draft import Draft
from stage1_teacher.options import CaptureOptions
from stage1_teacher.plan import make_plan
from stage1_teacher.plan_sample import Unheard
from stage1_teacher.shards import LocalEngine, ShardMaker

CONFIGURATIONS = {
    "gold": {"lanes": "gold", "context": "plain", "draws": 4},
    "topk, both": {"context": "both", "draws": 2},
    "k = 4, 1 draw": {"k": 4, "draws": 1, "documents_per_shard": 16},
    "12 draws": {"k": 8, "draws": 12, "documents_per_shard": 32, "limit": 60},
    "packed": {"codec": "packed", "draws": 2},
    "tail samples": {"tail_samples": 4, "context": "plain", "draws": 1},
    "many documents": {"lanes": "gold", "context": "plain", "draws": 1, "limit": 1600},
}


def write_corpus(path: Path, seed: int, count: int) -> None:
    """JSON Lines: documents, single lines and repetitions, in an order of the seed's."""
    texts = [text for _, text in stdlib_corpus.documents(held_out=False)]
    texts = sorted(texts, key=lambda t: stream_key(seed, t, "order"))[:count]
    rows = []
    for number, text in enumerate(texts):
        rows.append(text if number % 3 else text.splitlines()[0])
        if number % 10 == 9:
            rows.append(rows[-5])
        if number % 25 == 24:
            rows.append("")
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in rows), encoding="utf-8")


def compare(options: CaptureOptions, sample: int) -> dict[str, object]:
    draft = Draft.of(options)
    plan = make_plan(draft, sample)
    begin = time.monotonic()
    teacher, spec = draft.load()
    engine = LocalEngine(teacher, ShardMaker(spec, draft.tokenizer, draft.students))
    report = Capture(engine, draft.tokenizer, spec, draft.extent, draft.folder(spec), Unheard()).run()
    seconds = time.monotonic() - begin
    parts = [p.manifest for p in (report.train, report.held_out) if p is not None]
    return {
        "plan": plan,
        "bytes": sum(m.totals.size_bytes for m in parts),
        "tokens": sum(m.totals.scored_tokens for m in parts),
        "shards": sum(len(m.shards) for m in parts),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--sample", type=int, default=64)
    parser.add_argument("--only", choices=CONFIGURATIONS)
    given = parser.parse_args()
    table = Table("configuration", "seed", "bytes", "planned", "off", "stated ±", "tokens off", "seconds", "planned s")
    for name, changes in CONFIGURATIONS.items():
        for seed in range(given.seeds) if given.only in (None, name) else ():
            with tempfile.TemporaryDirectory() as folder:
                corpus = Path(folder) / "corpus.jsonl"
                fields = {"limit": given.limit, "seed": seed, **changes}
                write_corpus(corpus, seed, fields["limit"])
                options = CaptureOptions(corpus=str(corpus), out=Path(folder) / "cache", **fields)
                found = compare(options, given.sample)
            plan, actual = found["plan"], found["bytes"]
            table.add_row(
                name,
                str(seed),
                f"{actual:,}",
                f"{plan.size_bytes:,}",
                f"{plan.size_bytes / actual - 1:+.1%}",
                f"{plan.error:.1%}",
                f"{plan.scored_tokens / found['tokens'] - 1:+.1%}",
                f"{found['seconds']:.0f}",
                f"{plan.seconds[0]:.0f}–{plan.seconds[1]:.0f}",
            )
            print(name, seed, f"{plan.size_bytes / actual - 1:+.2%}", plan.shards, found["shards"], flush=True)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
