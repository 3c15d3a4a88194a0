"""Several processes, micro-batches, recomputed layers and bf16 train what one process with the whole batch trains."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from shared.cache.reader import Cache
from shared.errors import TidecacheError
from stage2_student import run
from stage2_student.batch import Collator
from stage2_student.config import TrainConfig, load_recipe
from stage2_student.losses import Counts, total
from stage2_student.model import TrainableStudent
from stage2_student.trainer import StudentTrainer, training_arguments
from tests.stage2_student import synthetic

LAUNCH = ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")
DDP = ("--multi_gpu", "--num_processes", "2")
FSDP2 = (
    "--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "--num_processes", "2",
)  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {  # what one process does in a batch of 4
    "reverse-calm-tidal": {"fresh": 0.25},
    "events": {"fresh": 0.5, "ce_normalisation": "sequence", "eval_steps": 3, "eval_documents": 5},
    "tide-shared": {},
}
SPLIT = {"reverse-calm-tidal": (2, 1), "events": (1, 2), "tide-shared": (2, 1)}  # batch, accumulation of two processes


def config_of(recipe: str, batch: int, accumulation: int = 1, **more: Any) -> dict[str, Any]:
    shape = {"batch": batch, "accumulation": accumulation, "steps": 4, "save_steps": 0, "learning_rate": 1e-3}
    return {**shape, **RECIPES[recipe], **more}


def launch(arguments: tuple[str, ...], jobs: list[dict[str, Any]], folder: Path) -> None:
    """Run jobs in two processes as `docs/training-at-scale.md` has it, on CPUs over gloo."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    program = str(Path(__file__).with_name("ranks.py"))
    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments, *LAUNCH, program, str(file)]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def log_of(out: Path, having: str = "ce") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    return [line for line in lines if having in line]


def assert_same_run(found: Path, expected: Path) -> None:
    for a, b in zip(log_of(found), log_of(expected), strict=True):
        for name in ("loss", "ce", "distill", "nll", "student_logp", "tidal_weight"):
            assert a[name] == pytest.approx(b[name], rel=1e-6, abs=1e-7), (name, a["step"])
        for name in ("chunks", "masked_tokens", "rows", "fresh_rows"):
            assert a[name] == b[name]
        assert {n for n in a if "/" in n} == {n for n in b if "/" in n}
    for a, b in zip(log_of(found, "eval_accuracy"), log_of(expected, "eval_accuracy"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    a, b = (load_file(out / "model.safetensors") for out in (found, expected))
    assert set(a) == set(b)
    for name in a:  # measured: 5e-8, at weights of 0.02 after four steps of Adam at 1e-3
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def bases(student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base of each recipe's run: one has a head of its own, the others share it with the embedding."""
    untied = synthetic.save_student(tmp_path_factory.mktemp("untied") / "base", tie_word_embeddings=False)
    return {recipe: untied if recipe == "tide-shared" else student_folder for recipe in RECIPES}


@pytest.fixture(scope="module")
def one_process(cache: Cache, bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each recipe trained in one process with the whole batch."""
    found = {}
    for recipe in RECIPES:
        found[recipe] = tmp_path_factory.mktemp("one") / recipe
        config = load_recipe(recipe, config_of(recipe, 4))
        evaluated = cache.path if recipe == "events" else None
        quiet = Console(file=io.StringIO())
        run.train(config, cache.path, bases[recipe], found[recipe], eval_cache=evaluated, console=quiet)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [DDP, FSDP2], ids=["ddp", "fsdp2"])
def test_two_processes_train_what_one_does_with_the_doubled_batch(
    arguments: tuple[str, ...], one_process: dict[str, Path], cache: Cache, bases: dict[str, Path], tmp_path: Path
) -> None:
    def job(recipe: str, name: str, **more: Any) -> dict[str, Any]:
        batch, accumulation = SPLIT[recipe]
        return {
            "recipe": recipe, "overrides": config_of(recipe, batch, accumulation, **more), "cache": str(cache.path),
            "base": str(bases[recipe]), "out": str(tmp_path / name),
        }  # fmt: skip

    resumed = job("events", "resumed", save_steps=2) | {"resume": str(tmp_path / "whole" / "checkpoint-2")}
    jobs = [job(recipe, recipe) | ({"eval_cache": str(cache.path)} if recipe == "events" else {}) for recipe in RECIPES]
    jobs += [job("events", "whole", save_steps=2), resumed]
    launch(arguments, jobs, tmp_path)
    for recipe, expected in one_process.items():
        assert_same_run(tmp_path / recipe, expected)
        shown = {path.name for path in (tmp_path / recipe).iterdir()}
        assert shown == {path.name for path in expected.iterdir()}, "one plain checkpoint, however it was trained"
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "events")).__name__ == "Qwen3ForCausalLM"
    whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    sharded = (tmp_path / "whole" / "checkpoint-2" / "optimizer.bin").exists()  # what FSDP alone writes
    assert sharded == (arguments is FSDP2)


def batch_and_student(cache: Cache, base: Path, config: TrainConfig) -> tuple[Any, Any]:
    prepared = run.prepare(config, cache.path, base)
    student = prepared.student
    return Collator(student.mask_id, student.pad_id)([prepared.rows[n] for n in range(4)]), student


def test_recomputed_layers_give_the_same_gradient(
    cache: Cache, student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    original = Qwen3DecoderLayer.forward

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(self, *args, **options)

    monkeypatch.setattr(Qwen3DecoderLayer, "forward", counted)
    found = []
    for recompute in (False, True):
        config = load_recipe("events", config_of("events", 4, activation_checkpointing=recompute))
        batch, student = batch_and_student(cache, student_folder, config)
        model = TrainableStudent(student.model, config)
        if training_arguments(config, tmp_path, 1).gradient_checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        calls = 0
        total(model(batch, 0.5), Counts.of([batch], config), config).backward()
        found.append((calls, {name: p.grad for name, p in model.named_parameters()}))
    (plain, expected), (recomputed, gradients) = found
    assert (plain, recomputed) == (2, 4)  # two layers, run again in backward
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0)


def test_a_run_with_recomputed_layers_is_the_same_run(cache: Cache, student_folder: Path, tmp_path: Path) -> None:
    for recompute in (False, True):
        config = load_recipe(
            "reverse-calm-tidal", config_of("reverse-calm-tidal", 2, activation_checkpointing=recompute)
        )
        run.train(config, cache.path, student_folder, tmp_path / str(recompute), console=Console(file=io.StringIO()))
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("True", "False"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_bf16_keeps_float32_weights_and_loses_no_small_update(
    cache: Cache, student_folder: Path, tmp_path: Path
) -> None:
    rate = 1e-6  # against weights of 0.02, whose neighbours in bf16 are 6e-5 to 1e-4 away
    values = config_of("reverse-calm-tidal", 2, precision="bf16", learning_rate=rate, steps=1, warmup=0.0)
    config = load_recipe("reverse-calm-tidal", values)
    prepared = run.prepare(config, cache.path, student_folder)
    trainer = StudentTrainer(
        prepared.student, prepared.rows, config, training_arguments(config, tmp_path / "out", 1), {}, []
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    assert all(p.dtype == torch.float32 for p in prepared.student.model.parameters())
    state = next(iter(trainer.optimizer.state.values()))
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
    before, after = load_file(student_folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert after[name].dtype == torch.float32
    moved = (after[name] - before[name]).abs()
    assert float(moved.median()) == pytest.approx(rate, rel=0.05)  # Adam's first step is the rate everywhere
    assert float((after[name].bfloat16() == before[name].bfloat16()).float().mean()) > 0.9  # bf16 would not see it


def test_bf16_computes_in_bf16(cache: Cache, student_folder: Path, tmp_path: Path) -> None:
    seen = set()
    values = config_of("events", 2, precision="bf16", steps=1)
    config = load_recipe("events", values)
    prepared = run.prepare(config, cache.path, student_folder)
    arguments = training_arguments(config, tmp_path / "out", 1)
    trainer = StudentTrainer(prepared.student, prepared.rows, config, arguments, {}, [])
    layer: Any = prepared.student.model.base_model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
    loss = trainer.train().training_loss
    assert seen == {torch.bfloat16}
    in_float32 = load_recipe("events", {**values, "precision": "float32"})
    run.train(in_float32, cache.path, student_folder, tmp_path / "exact", console=Console(file=io.StringIO()))
    exact = log_of(tmp_path / "exact")[0]["loss"]
    assert loss == pytest.approx(exact, rel=0.02)
    assert loss != exact


@pytest.mark.parametrize(
    ("version", "values", "said"),
    [("2", {"lora_rank": 2}, "adapters are not trained under FSDP2"), ("1", {}, "pass --fsdp_version 2")],
)
def test_what_fsdp_cannot_do_is_said_first(
    version: str,
    values: dict[str, Any],
    said: str,
    cache: Cache,
    student_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", version)
    with pytest.raises(TidecacheError, match=said):
        run.train(load_recipe("tide-cross", values), cache.path, student_folder, tmp_path / "out")
