"""`tidecache teacher capture --backend vllm`: the same cache as with the transformers backend, likelihoods within 2e-5 nats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from shared.cache import open_cache
from stage1_teacher.commands import app
from tests.stage1_teacher.models import save_model


def test_both_backends_write_the_same_cache(tmp_path: Path) -> None:
    teacher = save_model(tmp_path / "teacher", vocabulary=8192, tokenizer=True)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("def area(radius):\n    return 3.14159 * radius ** 2\n\n\nprint(area(2.0))\n", encoding="utf-8")
    for backend in ("transformers", "vllm"):
        arguments = [
            "capture", "--teacher", str(teacher), "--corpus", str(corpus), "--out", str(tmp_path / backend), "--backend", backend,
            "--length", "96", "--draws", "3", "--layout", "bd3lm", "--block-size", "16", "--held-out", "none", "--context", "both",
        ]  # fmt: skip
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, (result.output, result.exception)
    ours, theirs = open_cache(tmp_path / "vllm"), open_cache(tmp_path / "transformers")
    assert ours.spec.fingerprint == theirs.spec.fingerprint
    scored = 0
    for a, b in zip(ours.iter_draws(), theirs.iter_draws(), strict=True):
        assert (a.document, a.draw, a.timestep) == (b.document, b.draw, b.timestep)
        assert np.array_equal(a.chunks, b.chunks)
        # Stored with 11 significant bits: rounding may turn a difference of 2e-5 into one unit of the last place.
        np.testing.assert_allclose(a.gold_logp, b.gold_logp, rtol=2e-3, atol=1e-4)
        scored += len(a.chunks)
    assert scored > 20
