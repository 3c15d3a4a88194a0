"""Format v1 for ever: caches made once (`tests/golden/make.py`) are read, verified and gone on with by every later version."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shared.cache import open_cache
from shared.cache.verify import verify
from shared.cache.writer import CacheWriter
from tests.conftest import ROOT
from tests.shared.cache import synthetic
from tests.shared.cache.test_documented_format import draws_of

GOLDEN = ROOT / "tests" / "golden"

# fingerprint, content digest, draws, scored tokens, sum of the gold lane in nats, the first candidate
PINNED = {
    "raw": (
        "3841ea29bffb33dd22403d17bb99fba5",
        "792f69a416340f524ded7a1e497ad3399fc9bc62bc66a39ca0b4e5c7dd9549df",
        3, 28, -82.614624, (b'rct', -1.098633),
    ),
    "packed": (
        "eebee4ff9b07d7f81395561ec49ee0ea",
        "c114fd9f70ccd6132bd5627ae8e4b4bb3c8bda9ef6b199803025e7deae440cc3",
        4, 52, -158.915222, (b'rct', -1.101562),
    ),
    "widened": (
        "1fe518ace163c4e65c5630c36efa57a2",
        "e4d30ad93d86f0850e4f9464628f1214e94c63c7216a6360b5efda17bacba847",
        4, 52, -158.915222, (b'rct', -1.098633),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PINNED)
def test_a_golden_cache_reads_as_ever(name: str) -> None:
    fingerprint, content, count, tokens, gold, first = PINNED[name]
    assert verify(GOLDEN / name).problems == ()
    cache = open_cache(GOLDEN / name)
    assert (cache.spec.fingerprint, cache.manifest.content) == (fingerprint, content)
    assert (cache.manifest.totals.draws, cache.manifest.totals.scored_tokens) == (count, tokens)
    draws = list(cache.iter_draws())
    total = sum(float(d.gold_logp_of(x).astype(np.float64).sum()) for d in draws for x in cache.spec.contexts)
    assert total == pytest.approx(gold, rel=1e-6)
    filling, logp = next(fillings[0] for d in draws for fillings in d.candidates)
    assert (filling, logp) == (first[0], pytest.approx(first[1], rel=1e-5))


@pytest.mark.parametrize("name", PINNED)
def test_a_stranger_reads_it_by_the_page(name: str) -> None:
    """Which computes the content digest with hashlib alone."""
    assert len(list(draws_of(GOLDEN / name))) == PINNED[name][2]


@pytest.mark.parametrize("seed", ["1", "2"])
def test_digests_do_not_depend_on_the_process(seed: str) -> None:
    """Another hash seed, locale and time zone; every digest is made anew by `verify`."""
    code = f"from shared.cache.verify import verify; print(verify({str(GOLDEN / 'widened')!r}).problems)"
    environment = {**os.environ, "PYTHONHASHSEED": seed, "LC_ALL": "C", "TZ": "Asia/Kathmandu", "PYTHONUTF8": "0"}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=environment
    )
    assert out.stdout.strip() == "()"


@pytest.mark.parametrize("name", PINNED)
def test_a_capture_goes_on_with_it(name: str, tmp_path: Path) -> None:
    """The spec's JSON and the receipts are those that this version writes, too: nothing changes."""
    shutil.copytree(GOLDEN / name, tmp_path / "cache")
    before = {p: p.read_bytes() for p in (tmp_path / "cache").rglob("*") if p.is_file()}
    spec = open_cache(GOLDEN / name).spec
    assert CacheWriter.open(tmp_path / "cache", spec, synthetic.vocabulary()).finish().content == PINNED[name][1]
    assert {p: p.read_bytes() for p in (tmp_path / "cache").rglob("*") if p.is_file()} == before
