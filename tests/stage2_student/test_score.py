"""Bits per byte of whole answers: the bound of block diffusion, and an autoregressive model's value by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from shared.cache.reader import Cache
from stage2_student import commands, score
from stage2_student.evaluation import EDGES, Evaluation, Quality
from stage2_student.model import load_student
from tests.stage2_student import synthetic


def evaluation_of(values: list[float | None]) -> Evaluation:
    bins = tuple(Quality(low, low + 0.2, 10, 30, v, 0.5, 0.1) for low, v in zip(EDGES, values, strict=False))
    return Evaluation(bins, Quality(0.0, 1.0, 50, 150, 2.0, 0.5, 0.1), 3, 9)


def test_the_bound_weighs_timesteps_by_their_width() -> None:
    found = score.bound(evaluation_of([1.0, 1.0, 2.0, 3.0, 5.0]))
    assert found is not None
    assert math.isclose(found, 2.4)
    assert score.bound(evaluation_of([1.0, None, 2.0, 3.0, 5.0])) is None


def test_autoregressive_bits_are_those_of_the_chain_rule(cache: Cache, student_folder: Path) -> None:
    student = load_student(student_folder)
    documents = list({draw.document: draw.stored for draw in cache.iter_draws()}.values())
    nats, size, tokens = 0.0, 0, 0
    for stored in documents[:3]:
        encoded = student.text.encode(stored.messages, stored.chat, stored.cut)
        ids = torch.tensor([[student.text.end_id, *encoded.ids_L.tolist()]])
        with torch.no_grad():
            logp = student.model(input_ids=ids).logits[0].double()[:, : student.text.vocabulary].log_softmax(-1)
        content = stored.messages[0].content.encode()
        inside = np.flatnonzero(encoded.edges[:-1] < len(content))
        nats -= float(logp[torch.arange(len(ids[0]) - 1), ids[0, 1:]][torch.from_numpy(inside)].sum())
        size += len(content)
        tokens += len(inside)
    found = score.autoregressive(student, cache, limit=3)
    assert math.isclose(found.bits_per_byte, nats / math.log(2) / size, rel_tol=1e-5)
    assert (found.bytes, found.tokens, found.documents, found.cut, found.unusable) == (size, tokens, 3, 0, 0)


def test_prompts_and_templates_do_not_count(student_folder: Path, tmp_path: Path) -> None:
    chats = synthetic.make_cache(tmp_path / "chats", synthetic.chats(4), draws=1)
    student = load_student(student_folder)
    found = score.autoregressive(student, chats)
    stored = list({draw.document: draw.stored for draw in chats.iter_draws()}.values())
    answers = [len(m.content.encode()) for document in stored for m in document.messages if m.trainable]
    assert found.bytes == sum(answers)
    assert found.documents == len(stored)


def test_long_documents_are_cut_and_counted(cache: Cache, tmp_path: Path) -> None:
    folder = synthetic.save_student(tmp_path / "short", max_position_embeddings=16)
    found = score.autoregressive(load_student(folder), cache, limit=4)
    assert found.cut > 0
    assert found.tokens <= 4 * 15


@pytest.mark.parametrize("beside", [True, False])
def test_score_shows_students_and_others_side_by_side(
    cache: Cache, student_folder: Path, tmp_path: Path, beside: bool
) -> None:
    saved = tmp_path / "scores.json"
    arguments = [
        "score",
        "--cache",
        str(cache.path),
        "--limit",
        "3",
        "--model",
        str(student_folder),
        "--json",
        str(saved),
    ]
    result = CliRunner().invoke(
        commands.app, [*arguments, *(["--autoregressive", str(student_folder)] if beside else [])]
    )
    assert result.exit_code == 0, result.output
    assert ("autoregressive" in result.output) == beside
    written = json.loads(saved.read_text())
    assert list(written["bits_per_byte_bound"]) == [str(student_folder)]
    assert set(written["autoregressive"]) == ({str(student_folder)} if beside else set())
    assert {"bits_per_byte", "accuracy", "calibration_error"} <= set(written["rows"][0]["bins"][0])
