"""Held-out quality: against the definitions written out, for the student and for the teacher."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.cache.reader import Cache
from shared.errors import TidecacheError
from stage2_student.batch import Collator
from stage2_student.data import RowMaker
from stage2_student.evaluation import EDGES, bin_names, calibration_error, evaluate, evaluate_teacher, table
from stage2_student.head import Head
from stage2_student.model import load_student, masked_hidden
from tests.stage2_student import synthetic

BLOCK = 32


@given(st.lists(st.tuples(st.floats(0.0, 1.0), st.booleans()), min_size=1, max_size=60))
def test_calibration_error_by_hand(answers: list[tuple[float, bool]]) -> None:
    expected = 0.0
    for k in range(10):
        inside = [(c, r) for c, r in answers if min(int(c * 10), 9) == k]
        if inside:
            confidence, accuracy = (sum(x) / len(inside) for x in zip(*inside, strict=True))
            expected += len(inside) / len(answers) * abs(confidence - accuracy)
    confidence_Q, right_Q = np.array([c for c, _ in answers]), np.array([float(r) for _, r in answers])
    assert calibration_error(confidence_Q, right_Q) == pytest.approx(expected, abs=1e-9)


def test_a_students_numbers_by_hand(cache: Cache, student_folder: Path) -> None:
    student = load_student(student_folder)
    with torch.no_grad():
        student.model.get_input_embeddings().weight.mul_(25.0)  # type: ignore[operator]  # so that confidences differ
    found = evaluate(student, cache, BLOCK, limit=4, batch_rows=3)
    maker, collator = RowMaker(student.text, cache.spec, BLOCK, None), Collator(student.mask_id, student.pad_id)
    head, chunks, keys = Head.of(student.model), [], []
    for draw in cache.iter_draws():
        keys += [draw.document] if draw.document not in keys else []
        if len(keys) > 4:
            break
        row = maker.cached_row(draw)
        with torch.no_grad():
            logp = torch.log_softmax(head.logits(masked_hidden(student.model, collator([row]), BLOCK)).double(), -1)
        at = np.cumsum(row.masked_L) - 1
        for c, first, stop in zip(draw.chunks, row.token_first_Q, row.token_stop_Q, strict=True):
            part, gold = logp[at[first] : at[first] + stop - first], torch.from_numpy(row.ids_L[first:stop])
            best = part.max(-1)
            chunks.append((
                draw.timestep, len(draw.stored.chunk_bytes(c)), float(part[torch.arange(len(gold)), gold].sum()),
                float(best.values.sum().exp()), bool((best.indices == gold).all()),
            ))  # fmt: skip
    assert found.documents == 4
    assert found.draws == 12
    for quality, low, high in zip((*found.bins, found.overall), (*EDGES[:-1], 0.0), (*EDGES[1:], 1.0), strict=True):
        inside = [c for c in chunks if low <= c[0] < high]
        assert quality.chunks == len(inside)
        assert quality.bytes == sum(c[1] for c in inside)
        if inside:
            bits = -sum(c[2] for c in inside) / np.log(2) / sum(c[1] for c in inside)
            assert quality.bits_per_byte == pytest.approx(bits, rel=1e-4)
            assert quality.accuracy == pytest.approx(sum(c[4] for c in inside) / len(inside))
            error = calibration_error(np.array([c[3] for c in inside]), np.array([float(c[4]) for c in inside]))
            assert quality.calibration_error == pytest.approx(error, abs=1e-4)


def test_the_teachers_numbers_by_hand(cache: Cache) -> None:
    found = evaluate_teacher(cache)
    assert set(found) == {"compdemo", "plain"}
    for context, evaluation in found.items():
        logp = size = right = count = 0.0
        for draw in cache.iter_draws(context=context):
            for m, c in enumerate(draw.chunks.tolist()):
                logp += float(draw.gold_logp[m])
                size += len(draw.stored.chunk_bytes(c))
                right += draw.candidates[m][0][0] == draw.stored.chunk_bytes(c)
                count += 1
        assert evaluation.overall.chunks == count
        assert evaluation.overall.bits_per_byte == pytest.approx(-logp / np.log(2) / size, rel=1e-5)
        assert evaluation.overall.accuracy == pytest.approx(right / count, abs=0.01)  # other ids may spell the gold too
        assert 0.0 < evaluation.overall.accuracy < 1.0
    assert found["compdemo"].overall.bits_per_byte != found["plain"].overall.bits_per_byte


def test_a_cache_without_topk_has_no_teachers_row(tmp_path: Path) -> None:
    made = synthetic.make_cache(tmp_path / "gold", synthetic.texts(2), draws=1, lanes=("gold",), contexts=("compdemo",))
    assert evaluate_teacher(made) == {}


def test_an_empty_cache_is_refused(tmp_path: Path, student_folder: Path) -> None:
    made = synthetic.make_cache(tmp_path / "none", synthetic.texts(1), draws=0)
    with pytest.raises(TidecacheError, match="holds no draws to evaluate on"):
        evaluate(load_student(student_folder), made, BLOCK)


def test_a_table_and_json_hold_every_model(cache: Cache) -> None:
    found = evaluate_teacher(cache, limit=2)
    assert len(bin_names()) == len(found["plain"].bins) == len(EDGES) - 1
    assert table(found).row_count == 3 * len(found)
    saved = found["plain"].to_json()
    assert saved["all"]["bits_per_byte"] == found["plain"].overall.bits_per_byte
    assert [b["low"] for b in saved["bins"]] == list(EDGES[:-1])
