"""The dataset card of a pushed cache: what it is, what it holds, and how to load it.

The part between two marks follows from the manifests and is written anew with every push. All around it belongs to people:
it is written once, with a licence that somebody must choose.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from shared.cache.manifest import HELD_OUT_FOLDER, Manifest
from shared.errors import printable

CARD_FILE = "README.md"
BEGIN = "<!-- tidecache: from here to the end mark this text is made from the manifest -->"
END = "<!-- tidecache: end -->"
SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
)


def updated_card(existing: str | None, manifests: Mapping[str, Manifest], repo: str) -> str | None:
    """The card of a repository: a new one, or the one there with its middle part made anew; None: leave it as it is.

    `manifests`: of the cache (the prefix "") and of its held-out part (`held-out/`), if it has any.
    """
    middle = f"{BEGIN}\n{_middle(manifests, repo)}\n{END}"
    if existing is None:
        return f"{_head(manifests)}\n{middle}\n{_TAIL}"
    before, begin, rest = existing.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        return None  # a card that people wrote
    card = f"{before}{middle}{after}"
    return None if card == existing else card


def _head(manifests: Mapping[str, Manifest]) -> str:
    """The metadata and the title. JSON strings are YAML strings."""
    totals = manifests[""].totals
    size = next((name for limit, name in SIZES if totals.draws < limit), "n>10M")
    inner = manifests.get(f"{HELD_OUT_FOLDER}/")
    held_out = inner is not None and bool(inner.shards)  # a pattern that matches no file would be an error
    title = f"Likelihoods of {_plain(manifests[''].spec.teacher.name)}"

    def config(name: str, glob: str, default: bool = False) -> list[str]:
        lines = [f"- config_name: {name}", *(["  default: true"] if default else []), "  data_files:"]
        lines += ["  - split: train", f"    path: {glob}"]
        return lines + (["  - split: test", f"    path: {HELD_OUT_FOLDER}/{glob}"] if held_out else [])

    return "\n".join(
        [
            "---",
            "license: other",
            "license_name: not-chosen-yet",
            f"pretty_name: {json.dumps(title, ensure_ascii=True)}",
            "tags:",
            "- tidecache",
            "- knowledge-distillation",
            "- diffusion-language-models",
            "size_categories:",
            f"- {size}",
            "configs:",
            *config("likelihoods", "shards/*.likelihoods.parquet", default=True),
            *config("documents", "shards/*.documents.parquet"),
            "---",
            "",
            f"# {title}",
            "",
        ]
    )


_TAIL = """
## Licence

Not chosen yet. The texts keep the licence of the corpus that they come from; what a model said about them may be bound to the
licence of the model. Say here what holds, and in `license` at the top.
"""


def _middle(manifests: Mapping[str, Manifest], repo: str) -> str:
    """What follows from the manifests."""
    manifest = manifests[""]
    spec, totals, teacher = manifest.spec, manifest.totals, manifest.spec.teacher
    held_out = manifests.get(f"{HELD_OUT_FOLDER}/")
    students = ", ".join(f"{_plain(s.name)} (up to {s.length_limit} tokens)" for s in spec.students)
    lanes = "gold"
    if "topk" in spec.lanes:
        heats = ", ".join(f"{t:g}" for t in spec.temperatures)
        lanes += f", topk ({spec.k} candidates, log Z at temperatures {heats}, codec {spec.codec})"
    rows = {
        "teacher": f"{_plain(teacher.name)} ({_plain(teacher.architecture)}, {teacher.layout}, {_plain(teacher.dtype)})",
        "declared student tokenizers": students,
        "contexts": ", ".join(spec.contexts),
        "lanes": lanes,
        "masks": f"law {spec.mask_law}, seed {spec.seed}",
        "documents": f"{totals.documents:,}" + (f", and {held_out.totals.documents:,} held out" if held_out else ""),
        "draws": f"{totals.draws:,}" + (f", and {held_out.totals.draws:,} held out" if held_out else ""),
        "scored teacher tokens": f"{totals.scored_tokens:,} in each context",
        "bytes": f"{totals.size_bytes + (held_out.totals.size_bytes if held_out else 0):,}",
        "spec": f"`{spec.fingerprint}`",
        "content": f"`{manifest.content}`",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    extended = any(len(r.likelihoods) > 1 for m in manifests.values() for r in m.shards)
    also = "\nLanes that were added later lie in files of their own (`*.widened-*.parquet`), which only tidecache puts beside the first.\n"
    return f"""
What a diffusion language model said about masked text, for distilling it into students: a cache of
*tidecache*. For each document there are draws (a noise level and masked chunks); for each masked chunk the
teacher's log-likelihood of what is there{", and its most likely fillings" if "topk" in spec.lanes else ""}.

| | |
|---|---|
{table}

## Loading

```console
$ tidecache cache pull {repo} --out caches/pulled    # checks every byte
$ tidecache student train --cache caches/pulled
```

```python
from datasets import load_dataset

draws = load_dataset({json.dumps(repo)}, "likelihoods", split="train")
documents = load_dataset({json.dumps(repo)}, "documents", split="train")
```
{also if extended else ""}
One row of `likelihoods` is one draw, one row of `documents` one document; log-likelihoods are in nats. The format is
described in tidecache's `docs/cache-format.md`."""


def _plain(text: str) -> str:
    """Text that is neither Markdown nor HTML, on one line."""
    return "".join(f"&#{ord(c)};" if c in "<>|*_`[]&\\" else c for c in printable(text))
