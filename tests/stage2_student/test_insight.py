"""What a log line says, against the definitions written out."""

from __future__ import annotations

import math

import pytest
import torch

from shared.cache.reader import Cache
from shared.tokenization import TextTokenizer
from stage2_student.batch import Batch, Collator
from stage2_student.callbacks import held_out_line, long_line
from stage2_student.data import RowMaker
from stage2_student.evaluation import EDGES, bin_names
from stage2_student.insight import Arithmetic, Tally, measured_peak, numbers, peak_memory
from stage2_student.losses import BatchLosses, Counts
from stage2_student.objectives import Mean
from stage2_student.packing import Layout

BLOCK = 32


@pytest.fixture(scope="module")
def batches(cache: Cache, tokenizer: TextTokenizer) -> list[Batch]:
    """Two micro-batches of four rows, some of them draws of one document."""
    maker = RowMaker(tokenizer, cache.spec, BLOCK, "compdemo")
    draws = list(cache.iter_draws())[:8]
    return [Collator(1, 0)([maker.cached_row(draw) for draw in draws[first : first + 4]]) for first in (0, 4)]


def made_up(batch: Batch, seed: int) -> BatchLosses:
    torch.manual_seed(seed)
    n, c = len(batch.target_N), len(batch.sample_C)
    one = torch.tensor(1.0)
    return BatchLosses(
        Mean(torch.rand(()), one),
        Mean(torch.rand(()), one),
        torch.rand(n),
        -torch.rand(c),
        torch.rand(c),
        torch.rand(c),
    )


def test_sums_and_bins_by_hand(batches: list[Batch]) -> None:
    losses = [made_up(batch, seed) for seed, batch in enumerate(batches)]
    counts = Counts(torch.tensor(7.0), torch.tensor(3.0))
    tally = Tally()
    for batch, part in zip(batches, losses, strict=True):
        tally.add(batch, part, counts, flops=50.0)
    assert tally.vector_F is not None
    found = numbers(tally.vector_F, steps=2, seconds=4.0, peak_flops=10.0)

    assert found["ce"] == pytest.approx(sum(float(x.ce.total) for x in losses) / 7 / 2)
    assert found["distill"] == pytest.approx(sum(float(x.distill.total) for x in losses) / 3 / 2)
    assert found["mfu"] == pytest.approx(100.0 / 4.0 / 10.0)
    assert found["tokens_per_second"] == sum(int(b.length_B.sum()) for b in batches) / 4.0
    tokens = [
        (float(b.timestep_B[s]), float(v))
        for b, x in zip(batches, losses, strict=True)
        for s, v in zip(b.sample_N.tolist(), x.nll_N.tolist(), strict=True)
    ]
    chunks = [
        (float(b.timestep_B[s]), d, mine, theirs, weight)
        for b, x in zip(batches, losses, strict=True)
        for s, d, mine, theirs, weight in zip(
            b.sample_C.tolist(), x.distill_C.tolist(), x.student_logp_C.tolist(), b.teacher_logp_C.tolist(),
            x.weight_C.tolist(), strict=True,
        )
    ]  # fmt: skip
    assert found["nll"] == pytest.approx(sum(v for _, v in tokens) / len(tokens))
    assert found["tidal_weight"] == pytest.approx(sum(c[4] for c in chunks) / len(chunks))
    for label, low, high in zip(bin_names(), EDGES[:-1], EDGES[1:], strict=True):
        inside = [v for t, v in tokens if low <= t < high]
        assert (f"nll/{label}" in found) == bool(inside)
        if inside:
            assert found[f"nll/{label}"] == pytest.approx(sum(inside) / len(inside), rel=1e-5)
        for place, name in ((1, "distill"), (2, "student_logp"), (3, "teacher_logp")):
            values = [c[place] for c in chunks if low <= c[0] < high]
            if values:
                assert found[f"{name}/{label}"] == pytest.approx(sum(values) / len(values), rel=1e-5)
    assert len([name for name in found if name.startswith("nll/")]) >= 2


def test_arithmetic_counts_the_pairs_that_attention_lets_see_each_other(batches: list[Batch]) -> None:
    for batch in batches:
        layout = Layout.of(batch.groups, BLOCK, torch.device("cpu"))
        every = torch.arange(layout.tokens)
        pairs = int(layout.sees(every[:, None], every[None, :]).sum())
        assert Arithmetic(0.0, 0.0, 1.0).of_batch(batch, BLOCK) == pairs
        assert Arithmetic(1.0, 0.0, 0.0).of_batch(batch, BLOCK) == layout.tokens
        assert Arithmetic(0.0, 1.0, 0.0).of_batch(batch, BLOCK) == len(batch.target_N)


def test_the_peaks_are_measured() -> None:
    cpu = torch.device("cpu")
    assert 1e8 < measured_peak(cpu, torch.float32) < 1e15
    assert 1e7 < peak_memory(cpu) < 1e12


def test_lines_for_people() -> None:
    logs = {
        "loss": 1.5, "ce": 1.25, "distill": 0.25, "chunks": 3.0, "tidal_weight": 0.5, "student_logp": -3.0,
        "teacher_logp": -1.0, "learning_rate": 5e-5, "tokens_per_second": 12345.0, "mfu": 0.314, "peak_memory_gib": 2.0,
    }  # fmt: skip
    assert long_line(logs) == (
        "loss 1.5000  ce 1.2500  distill 0.2500 (weight 0.50)  gold log p -3.00 (teacher -1.00)  lr 5.0e-05  "
        "12,345 tokens/s  MFU 31.4%  2.00 GiB"
    )
    assert "distill" not in long_line({**logs, "chunks": 0.0})
    held_out = {
        "eval_bits_per_byte": math.pi,
        "eval_accuracy": 0.5,
        "eval_calibration_error": 0.01,
        "eval_documents": 8,
    }
    assert held_out_line(held_out) == (
        "held out: 3.142 bits per byte, top-1 50.0%, calibration error 0.010 (8 documents)"
    )
