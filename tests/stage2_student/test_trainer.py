"""Whole training runs on a CPU with a random tiny student: what is learnt, logged, saved, resumed and refused."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from shared.cache import open_cache
from shared.cache.reader import Cache
from shared.errors import TidecacheError
from stage2_student import run
from stage2_student.batch import Collator
from stage2_student.config import TrainConfig, load_recipe, resolve
from stage2_student.data import FRESH_DRAWS_FROM
from stage2_student.evaluation import evaluate
from stage2_student.model import load_student
from stage2_student.trainer import StudentTrainer, loader_workers, training_arguments
from tests.conftest import TINY_TEACHER
from tests.stage2_student import synthetic


def quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


def short(recipe: str = "reverse-calm-tidal", **values: Any) -> TrainConfig:
    return load_recipe(recipe, {"batch": 2, "steps": 3, "save_steps": 0, "learning_rate": 1e-3, **values})


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]


class GradientKeeper(TrainerCallback):
    """Copies the gradient before the first optimiser step."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):  # type: ignore[no-untyped-def]
        if not self.gradients:
            self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("recipe", "values"),
    [
        ("reverse-calm-tidal", {"ce_normalisation": "sequence"}),
        ("events", {"fresh": 0.5}),
        ("cross-entropy", {"ce_normalisation": "batch"}),
    ],
)
def test_accumulation_gives_the_large_batchs_gradient(
    recipe: str, values: Mapping[str, Any], cache: Cache, student_folder: Path, tmp_path: Path
) -> None:
    found = []
    for batch, accumulation in ((8, 1), (2, 4)):
        config = short(recipe, batch=batch, accumulation=accumulation, steps=1, max_grad_norm=0.0, **values)
        prepared = run.prepare(config, cache.path, student_folder)
        keeper = GradientKeeper()
        trainer = StudentTrainer(
            prepared.student, prepared.rows, config, training_arguments(config, tmp_path / str(batch), 1), {}, [keeper]
        )
        loss = trainer.train().training_loss
        found.append((loss, keeper.gradients, trainer.state.log_history[0]))
        sizes = [sum(len(prepared.rows[n].token_first_Q) for n in range(s, s + batch)) for s in range(0, 8, batch)]
        assert len(set(sizes)) == accumulation, "micro-batches of unequal numbers of items"
    (loss_a, whole, log_a), (loss_b, parts, log_b) = found
    assert whole
    assert loss_a == pytest.approx(loss_b, rel=1e-6)
    largest = max(float(gradient.abs().max()) for gradient in whole.values())
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=1e-6 * max(1.0, largest))
    for name in (
        "loss",
        "ce",
        "distill",
        "chunks",
        "masked_tokens",
        "rows",
        "fresh_rows",
        "tidal_weight",
        "student_logp",
    ):
        assert log_a[name] == pytest.approx(log_b[name], rel=1e-6, abs=1e-7), name


@pytest.mark.parametrize("recipe", ["cross-entropy", "calm", "reverse-calm-tidal", "events"])
def test_the_objective_falls(recipe: str, cache: Cache, student_folder: Path, tmp_path: Path) -> None:
    # Reverse CALM's gradient vanishes with the student's probabilities: it begins where cross-entropy has worked.
    config = short(
        recipe, context="compdemo", batch=6, steps=20, learning_rate=5e-3, tidal="none", max_timestep=0.7, warmup=0.05
    )  # fmt: skip
    run.train(config, cache.path, student_folder, tmp_path / "out", console=quiet())
    lines = [line for line in log_of(tmp_path / "out") if "ce" in line]
    assert [line["step"] for line in lines] == list(range(1, 21))
    name = "nll" if recipe in ("cross-entropy", "reverse-calm-tidal", "calm") else "distill"
    first, last = (sum(line[name] for line in part) / len(part) for part in (lines[:4], lines[-4:]))
    assert last < 0.9 * first
    if recipe != "cross-entropy":
        before, after = (
            run.dry_run(config, run.prepare(config, cache.path, base), quiet())
            for base in (student_folder, tmp_path / "out")
        )
        assert after < before


def test_a_checkpoint_is_a_plain_folder(cache: Cache, student_folder: Path, tmp_path: Path) -> None:
    config, out = short(block_size=16), tmp_path / "out"
    summary = run.train(config, cache.path, student_folder, out, console=quiet())
    assert summary["steps"] == 3
    assert {p.suffix for p in out.iterdir()} == {".json", ".jsonl", ".safetensors", ".jinja"}
    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert AutoTokenizer.from_pretrained(out).mask_token == "<|mask|>"
    metadata = json.loads((out / "tidecache.json").read_text())
    assert metadata["block_size"] == 16
    assert resolve(metadata["config"], "saved") == dataclasses.replace(config, fresh=0.0, reuse="same")
    identity = {"fingerprint": cache.spec.fingerprint, "content": cache.manifest.content, "weight": 1.0}
    assert metadata["caches"] == [identity]
    before, after = load_file(student_folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert any(not torch.equal(before[n], after[n]) for n in before)
    loaded = load_student(out)
    assert loaded.block_size == 16
    assert not loaded.mask_added


def test_log_lines_say_what_was_done(cache: Cache, student_folder: Path, tmp_path: Path) -> None:
    config = short(fresh=0.5, batch=4, steps=4)
    run.train(config, cache.path, student_folder, tmp_path / "out", console=quiet())
    prepared = run.prepare(config, cache.path, student_folder)
    lines = [line for line in log_of(tmp_path / "out") if "ce" in line]
    for step, line in enumerate(lines):
        rows = [prepared.rows[n] for n in range(4 * step, 4 * step + 4)]
        assert line["rows"] == 4
        assert line["fresh_rows"] == 2
        assert line["masked_tokens"] == sum(int(r.masked_L.sum()) for r in rows)
        assert line["chunks"] == sum(len(r.token_first_Q) for r in rows)
        g = 0.5 * (1 - torch.cos(torch.tensor(torch.pi * step / 4)).item())
        lam = 0.1 + 0.8 * g
        assert line["tidal_lambda"] == pytest.approx(lam)
        weights = [2 * lam * (1 - r.timestep) for r in rows for _ in r.token_first_Q]
        assert line["tidal_weight"] == pytest.approx(sum(weights) / len(weights), rel=1e-5)
        golds = [float(x) for r in rows for x in r.teacher_logp_Q]
        assert line["teacher_logp"] == pytest.approx(sum(golds) / len(golds), rel=1e-4)
        assert line["loss"] == pytest.approx(line["ce"] + line["distill"], rel=1e-5)
        assert line["coverage"] == 1.0


def test_a_run_that_was_cut_off_goes_on_at_the_exact_row(
    cache: Cache, student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = short(fresh=0.25, steps=7, save_steps=3, accumulation=2)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run.train(config, cache.path, student_folder, whole, console=quiet())
    original = StudentTrainer.compute_loss

    def killed(self: StudentTrainer, *args: Any, **options: Any) -> Any:
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return original(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(StudentTrainer, "compute_loss", killed)
        with pytest.raises(KeyboardInterrupt):
            run.train(config, cache.path, student_folder, cut, console=quiet())
    with pytest.raises(TidecacheError, match="holds a run already: choose another --out, or pass --resume"):
        run.train(config, cache.path, student_folder, cut, console=quiet())
    run.train(config, cache.path, student_folder, cut, resume=True, console=quiet())
    a, b = load_file(whole / "model.safetensors"), load_file(cut / "model.safetensors")
    assert all(torch.equal(a[n], b[n]) for n in a)
    timed = ("tokens_per_second", "seconds_per_step", "mfu", "peak_memory_gib")
    lines = [
        [{k: v for k, v in line.items() if k not in timed} for line in log_of(out) if "ce" in line]
        for out in (whole, cut)
    ]
    assert lines[0] == lines[1]


def test_resuming_with_another_configuration_is_refused(cache: Cache, student_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run.train(short(steps=2, save_steps=1), cache.path, student_folder, out, console=quiet())
    with pytest.raises(TidecacheError, match="seed: 0 there, 1 now"):
        run.train(short(steps=3, save_steps=1, seed=1), cache.path, student_folder, out, resume=True, console=quiet())
    with pytest.raises(TidecacheError, match="nothing to resume"):
        run.train(short(), cache.path, student_folder, tmp_path / "new", resume=True, console=quiet())


def same(a: Any, b: Any) -> bool:
    """Whether two batches, or two parts of some, hold the same in every field."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return bool(a == b)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_batches_are_the_same_for_any_number_of_workers(cache: Cache, student_folder: Path, workers: int) -> None:
    prepared = run.prepare(short("events", steps=6, fresh=0.25), cache.path, student_folder)
    collator = Collator(prepared.student.mask_id, prepared.student.pad_id)
    here, there = (list(DataLoader(prepared.rows, 2, collate_fn=collator, num_workers=w)) for w in (0, workers))
    assert len(here) == len(there) == 6
    assert any(batch.events is not None for batch in here)
    assert all(same(a, b) for a, b in zip(here, there, strict=True))
    assert not same(here[0], here[1])


def test_a_gpu_does_not_wait_for_batches_unless_asked_to() -> None:
    assert loader_workers(short(), on_gpu=True) > 0 == loader_workers(short(), on_gpu=False)
    assert loader_workers(short(workers=0), on_gpu=True) == 0
    assert loader_workers(short(workers=3), on_gpu=False) == 3


def test_a_run_is_evaluated_on_held_out_draws_and_trains_as_without(
    cache: Cache, student_folder: Path, tmp_path: Path
) -> None:
    config, console = short(steps=3, eval_steps=2, eval_documents=4, block_start="response"), quiet()
    run.train(config, cache.path, student_folder, tmp_path / "with", eval_cache=cache.path, console=console)
    never = dataclasses.replace(config, eval_steps=0)
    run.train(never, cache.path, student_folder, tmp_path / "without", eval_cache=cache.path, console=quiet())
    run.train(
        config, cache.path, student_folder, tmp_path / "none", console=quiet()
    )  # no held-out part, none asked for
    lines = [line for line in log_of(tmp_path / "with") if "eval_accuracy" in line]
    assert [line["step"] for line in lines] == [2, 3]
    expected = evaluate(load_student(tmp_path / "with"), cache, 32, limit=4).metrics()
    assert expected["eval_documents"] == 4
    assert {name: lines[-1][name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert {"eval_bits_per_byte/0.4–0.6", "eval_calibration_error/0.4–0.6", "eval_accuracy"} <= set(expected)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"step 3  held out: {expected['eval_bits_per_byte']:.3f} bits per byte" in said
    a, *others = (load_file(tmp_path / name / "model.safetensors") for name in ("with", "without", "none"))
    assert all(torch.equal(a[name], b[name]) for b in others for name in a)
    assert not any("eval_accuracy" in line for line in log_of(tmp_path / "none"))


def test_fresh_rows_differ_by_epoch_and_carry_no_score(cache: Cache, student_folder: Path) -> None:
    rows = run.prepare(short(fresh=1.0, batch=12, steps=2), cache.path, student_folder).rows
    first, second = ([rows[n] for n in range(start, start + 12)] for start in (0, 12))
    assert {r.draw for r in first} == {FRESH_DRAWS_FROM}
    assert {r.draw for r in second} == {FRESH_DRAWS_FROM + 1}
    assert all(r.fresh and not len(r.teacher_logp_Q) for r in first + second)
    by_document = {r.document: r for r in second}
    assert all(r.timestep != by_document[r.document].timestep for r in first)


def test_a_dry_run_writes_nothing_and_says_what_would_happen(
    cache: Cache, student_folder: Path, tmp_path: Path
) -> None:
    console = quiet()
    config = short(batch=4, steps=0, epochs=6.0)
    found = run.train(config, cache.path, student_folder, tmp_path / "out", stop_before_training=True, console=console)
    assert found["loss"] > 0
    assert not (tmp_path / "out").exists()
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for said in (
        cache.spec.fingerprint,
        "declared: 100.0% of the masked chunks",
        "3 per document, each used 2 times on average",
        "all of its masked chunks, one half of them, the other",
        "0% of each batch, cross-entropy only (automatic",
        "72 in 18 steps (6 epochs)",
        "first batch: loss",
    ):
        assert said in text, text


def test_the_plan_says_what_kl_misses_without_tail_samples(cache: Cache, tmp_path: Path) -> None:
    base = synthetic.save_student(tmp_path / "base", vocabulary=8192)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY_TEACHER / name, base / name)
    console, config = Console(file=io.StringIO(), width=1000), short("kl", min_coverage=0.0)
    run.train(config, cache.path, base, tmp_path / "out", stop_before_training=True, console=console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"`tidecache teacher extend {cache.path} --tail-samples 32`" in said
    own, spec = cache.spec.teacher.tokenizer, cache.spec
    assert run.misses_tail(config, spec, own)
    assert not run.misses_tail(config, dataclasses.replace(spec, tail_samples=8), own)
    assert not run.misses_tail(config, spec, spec.students[0].tokenizer)
    assert not run.misses_tail(dataclasses.replace(config, temperature=1.0), spec, own)
    assert not run.misses_tail(short("reverse-kl"), spec, own)


def test_an_undeclared_student_tokenizer_trains_on_what_it_can_use(cache: Cache, tmp_path: Path) -> None:
    base = synthetic.save_student(tmp_path / "base", vocabulary=700)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (base / name).unlink()
    synthetic.undeclared_tokenizer(base)
    console, out = quiet(), tmp_path / "out"
    with pytest.raises(TidecacheError, match=r"min_coverage: with the student's tokenizer \d+\.\d% .* at least 95%"):
        run.train(short(min_coverage=0.95), cache.path, base, out, console=console)
    run.train(short(), cache.path, base, out, console=console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "undeclared:" in text
    assert "the base had no mask token; one was added" in text
    trained = load_student(out)
    assert not trained.mask_added
    assert trained.mask_id == 700
    lines = [line for line in log_of(out) if "ce" in line]
    assert all(0.1 < line["coverage"] < 1.0 for line in lines)


def test_a_new_mask_token_is_the_mean_of_all_embeddings(tmp_path: Path) -> None:
    base = synthetic.save_student(tmp_path / "base", vocabulary=700, tie_word_embeddings=False)
    synthetic.undeclared_tokenizer(base)
    weights = load_file(base / "model.safetensors")
    student = load_student(base)
    assert student.mask_added
    for found, name in (
        (student.model.get_input_embeddings(), "model.embed_tokens.weight"),
        (student.model.get_output_embeddings(), "lm_head.weight"),
    ):
        torch.testing.assert_close(found.weight[student.mask_id], weights[name][:700].mean(0))
        torch.testing.assert_close(found.weight[:700], weights[name][:700])


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_documents(cache: Cache, tmp_path: Path) -> None:
    base = synthetic.save_student(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    from safetensors.torch import save_file

    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TidecacheError, match=r"the loss of step 1 is nan.*\.py#\d+"):
        run.train(short(), cache.path, base, tmp_path / "out", console=quiet())


def test_a_tokenizer_larger_than_the_model_is_refused(cache: Cache, tmp_path: Path) -> None:
    base = synthetic.save_student(tmp_path / "base", vocabulary=1000)
    with pytest.raises(TidecacheError, match="ids up to 4095, the model embeddings for 1000"):
        run.prepare(short(), cache.path, base)


def test_training_needs_nothing_of_the_teacher(student_folder: Path, tmp_path: Path) -> None:
    """No module of stage 1 is loaded by stage 2."""
    import subprocess
    import sys

    code = "import sys, stage2_student.run, stage2_student.evaluation; print([m for m in sys.modules if 'stage1' in m])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_gold_lane_alone_is_enough_for_calm(student_folder: Path, tmp_path: Path) -> None:
    made = synthetic.make_cache(tmp_path / "gold", synthetic.texts(4), draws=1, lanes=("gold",), contexts=("compdemo",))
    run.train(short(), open_cache(made.path).path, student_folder, tmp_path / "out", console=quiet())
    with pytest.raises(TidecacheError, match="needs the topk lane"):
        run.train(short("events"), made.path, student_folder, tmp_path / "other", console=quiet())
