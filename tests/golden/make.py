"""How the golden caches were made: `python -m tests.golden.make FOLDER`.

They are never made again. Whatever a later version writes, it must read these, and their content digests stay as pinned in
`tests/shared/cache/test_golden.py`: format v1 is read for ever.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.shared.cache import synthetic
from tests.shared.cache.widened import widen

BOTH = {"contexts": ("compdemo", "plain"), "temperatures": (1.0, 2.0, 0.5), "tail_samples": 2}


def main() -> None:
    root = Path(sys.argv[1])
    synthetic.build(root / "raw", documents=4, per_shard=2, draws=1, drop=(1,), **BOTH)
    synthetic.build(root / "packed", documents=2, per_shard=2, draws=2, drop=(), codec="packed", **BOTH)
    synthetic.build(root / "widened", documents=2, per_shard=2, draws=2, drop=(), lanes=("gold",))
    widen(root / "widened", synthetic.spec(k=2))
    widen(root / "widened", synthetic.spec(contexts=("compdemo", "plain")))


if __name__ == "__main__":
    main()
