"""Replay: with the teacher in the loop on the very draws of a cache, a step's loss and gradient are the cache's own.

The online side asks the teacher again, for the same documents, masks and splits, and keeps its float32 scores unrounded;
the offline side reads what the cache stores. Everything else is the same code. They may differ by the codec's error
alone: log-likelihoods keep 11 significant bits (2^-11 of their value at most), log Z 16.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.cache import open_cache
from shared.cache.reader import Cache
from shared.cache.records import Draw
from shared.documents import RawDocument
from shared.preparation import Limits, Preparer
from shared.tokenization import TextTokenizer
from stage1_teacher import backends
from stage1_teacher.compdemo import Subject, plan_draw, records_of, requests_of
from stage2_student.batch import Batch, Collator
from stage2_student.config import TrainConfig, load_recipe, recipe_names
from stage2_student.data import RowMaker
from stage2_student.losses import Counts, total
from stage2_student.model import Student, TrainableStudent, load_student
from tests.conftest import TINY_STUDENT, TINY_TEACHER

LENGTH = 512
LOGP_ERROR = 2.0**-11
RECIPES = [name for name in recipe_names() if name != "cross-entropy"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Four documents with two draws each in both contexts, captured by the command with the embedded teacher."""
    out = tmp_path_factory.mktemp("replay") / "cache"
    command = Path(sys.executable).parent / "tidecache"
    arguments = f"teacher capture --limit 4 --draws 2 --context both --held-out none --length {LENGTH}".split()
    subprocess.run([command, *arguments, "--out", out], check=True, capture_output=True, env=os.environ)
    return open_cache(out)


@pytest.fixture(scope="module")
def stored(cache: Cache) -> list[Draw]:
    return list(cache.iter_draws())


@pytest.fixture(scope="module")
def online(cache: Cache, stored: list[Draw]) -> list[Draw]:
    """The same draws with the scores of a teacher asked anew."""
    teacher = backends.load(TINY_TEACHER, layout="full", temperatures=cache.spec.temperatures)
    preparer = Preparer(
        TextTokenizer.load(TINY_TEACHER), [TextTokenizer.load(TINY_STUDENT)], Limits(LENGTH, (LENGTH,)), "none"
    )
    planned = []
    for draw in stored:
        assert not draw.stored.cut
        document = preparer.prepare(RawDocument(draw.stored.name, draw.stored.messages, draw.stored.chat))
        assert document.key == draw.document
        planned.append(plan_draw(cache.spec, Subject(draw.stored.position, document), draw.draw))
        assert np.array_equal(np.flatnonzero(planned[-1].masked_C), draw.chunks)
    scores = teacher.score(requests_of(cache.spec, planned), cache.spec.k)
    records = records_of(cache.spec, planned, scores)
    return [dataclasses.replace(d, scores=r.contexts) for d, r in zip(stored, records, strict=True)]


@pytest.fixture(scope="module")
def student() -> Student:
    return load_student(TINY_STUDENT)


def batch_of(cache: Cache, student: Student, config: TrainConfig, draws: list[Draw]) -> Batch:
    temperature = config.temperature if config.uses_events else None
    maker = RowMaker(student.text, cache.spec, config.block_size, config.context, temperature=temperature)
    return Collator(student.mask_id, student.pad_id)([maker.cached_row(draw) for draw in draws])


def step(student: Student, config: TrainConfig, batch: Batch) -> tuple[float, float, torch.Tensor]:
    """(distillation, whole loss, flat gradient) in the middle of training."""
    student.model.zero_grad(set_to_none=True)
    losses = TrainableStudent(student.model, config)(batch, 0.5)
    loss = total(losses, Counts.of([batch], config), config)
    loss.backward()
    gradients = [p.grad.flatten() for p in student.model.parameters() if p.grad is not None]
    return losses.distill.over().item(), loss.item(), torch.cat(gradients)


def test_stored_likelihoods_keep_the_stated_error(stored: list[Draw], online: list[Draw]) -> None:
    for kept, exact in zip(stored, online, strict=True):
        for context, scores in exact.scores.items():
            found = kept.scores[context]
            np.testing.assert_allclose(found.gold_logp_N, scores.gold_logp_N, rtol=LOGP_ERROR, atol=2e-5)
            np.testing.assert_allclose(found.topk_logp_MK, scores.topk_logp_MK, rtol=LOGP_ERROR, atol=2e-5)
            np.testing.assert_allclose(found.log_z_MT, scores.log_z_MT, rtol=2.0**-16, atol=1e-4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_loss_and_gradient_of_a_step_are_the_teachers(
    cache: Cache, stored: list[Draw], online: list[Draw], student: Student, recipe: str
) -> None:
    config = load_recipe(recipe, {"fresh": 0.0, "distill_weight": 10.0})
    distill, loss, gradient = step(student, config, batch_of(cache, student, config, stored))
    exact_distill, exact_loss, exact_gradient = step(student, config, batch_of(cache, student, config, online))
    # A log-likelihood L enters the losses through exp(L / T) and, in the reverse ones, as L / T itself.
    error = LOGP_ERROR * max(1.0, abs(exact_distill))
    assert distill == pytest.approx(exact_distill, abs=error)
    assert loss == pytest.approx(exact_loss, abs=10 * error)
    assert float((gradient - exact_gradient).norm() / exact_gradient.norm()) < 4 * LOGP_ERROR
    assert float(torch.nn.functional.cosine_similarity(gradient, exact_gradient, dim=0)) > 1 - LOGP_ERROR


def test_another_context_is_seen_to_differ(
    cache: Cache, stored: list[Draw], online: list[Draw], student: Student
) -> None:
    """The bounds above are tight enough to tell one context's likelihoods from the other's."""
    config = load_recipe("tide-cross", {"fresh": 0.0, "distill_weight": 10.0})
    swapped = [dataclasses.replace(d, scores={"plain": d.scores["compdemo"]}) for d in online]
    _, _, gradient = step(student, config, batch_of(cache, student, config, stored))
    _, _, other = step(student, config, batch_of(cache, student, config, swapped))
    assert float((gradient - other).norm() / other.norm()) > 40 * LOGP_ERROR
