"""Every family of students trains as a plain dense computation says: one step, many steps, a checkpoint, and back.

The reference runs row by row without padding, with a mask written out from its definition, and takes full logits from the
model itself, so that embedding scales and soft-caps come from `transformers`.
"""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from shared.cache.reader import Cache
from shared.errors import TidecacheError
from shared.tokenization import TextTokenizer
from stage2_student import adapters, evaluation, objectives, run, tidal
from stage2_student.batch import Collator
from stage2_student.config import TrainConfig, load_recipe
from stage2_student.data import Row, RowMaker, view_document
from stage2_student.export import export
from stage2_student.inference import open_checkpoint
from stage2_student.losses import Counts, total
from stage2_student.model import Student, TrainableStudent, load_student, masked_hidden
from stage2_student.sampler import SampleOptions
from tests.conftest import TINY_STUDENT
from tests.stage2_student import synthetic

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen2": {"tie_word_embeddings": False},
    "llama": {"tie_word_embeddings": False, "rope_theta": 5000.0},
    "gemma": {"hidden_activation": "gelu_pytorch_tanh"},
    "gemma2": {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0, "sliding_window": 512},
    "gemma3_text": {"sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"]},
}


def save_family(folder: Path, kind: str, mask: bool = True, **changes: Any) -> Path:
    """A random tiny model of a family with the embedded student's tokenizer, without its mask token unless `mask`."""
    torch.manual_seed(0)
    rows = TextTokenizer.load(TINY_STUDENT).vocabulary
    shape = {
        "vocab_size": rows, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 1024,
        "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.1,
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **(shape | FAMILIES[kind] | changes))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    synthetic.copy_tokenizer(folder)
    if not mask:
        synthetic.without_mask_token(folder)
    return folder


def short(recipe: str = "reverse-calm-tidal", **values: Any) -> TrainConfig:
    return load_recipe(recipe, {"batch": 3, "steps": 8, "save_steps": 0, "learning_rate": 3e-3, "fresh": 0.0, **values})


def train(config: TrainConfig, cache: Cache, base: Path, out: Path, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    run.train(config, cache.path, base, out, console=console, **options)
    return console.file.getvalue()  # type: ignore[attr-defined]


def rows_of(student: Student, cache: Cache, config: TrainConfig) -> list[Row]:
    maker = RowMaker(student.text, cache.spec, config.block_size, config.context, block_start=config.block_start)
    draws = [draw for draw in cache.iter_draws() if draw.draw == 0]
    return [maker.cached_row(draw) for draw in draws[:3]]


def reference_step(student: Student, rows: list[Row], config: TrainConfig, progress: float) -> Tensor:
    """The loss of a step, row by row and position by position (DESIGN §6, §8)."""
    nll, trainable, distilled, chunks = torch.zeros(()), 0, torch.zeros(()), 0
    for row in rows:
        length = len(row.ids_L)
        noisy = [student.mask_id if m else i for i, m in zip(row.ids_L.tolist(), row.masked_L, strict=True)]
        input_ids = torch.tensor([noisy + row.ids_L.tolist()])
        block = [(i + row.offset) // config.block_size for i in range(length)]
        seen = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
        for q in range(2 * length):
            for k in range(2 * length):
                query, key = block[q % length], block[k % length]
                if q < length:
                    seen[q, k] = query == key if k < length else key < query
                else:
                    seen[q, k] = k >= length and key <= query
        mask = torch.zeros(1, 1, *seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        position = torch.arange(length).repeat(2)[None]
        logits = student.model(input_ids=input_ids, attention_mask=mask, position_ids=position, use_cache=False).logits
        logp = torch.log_softmax(logits[0, :length], dim=-1)
        gold = logp.gather(1, torch.from_numpy(row.ids_L)[:, None])[:, 0]
        nll = nll - (gold * torch.from_numpy(row.masked_L)).sum() / (row.timestep + 1e-6)
        trainable += row.trainable
        own = [gold[a:b].sum() for a, b in zip(row.token_first_Q, row.token_stop_Q, strict=True)]
        if own:
            loss = objectives.reverse_calm_loss(torch.stack(own), torch.from_numpy(row.teacher_logp_Q), 1.0)
            t_1 = torch.tensor([row.timestep])
            weight = tidal.sample_weight(progress, t_1, "both", "uniform", 0.1, 0.9, "cosine")
            distilled, chunks = distilled + (loss * weight).sum(), chunks + len(own)
    return nll / trainable + distilled / max(chunks, 1)


def gradient(student: Student) -> Tensor:
    return torch.cat([p.grad.flatten() for p in student.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("block_start", ["sequence", "response"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_one_step_is_the_dense_references(kind: str, block_start: str, chats: Cache, tmp_path: Path) -> None:
    if block_start == "response" and kind not in ("qwen3", "gemma2"):
        pytest.skip("block starts do not depend on the family")
    student = load_student(save_family(tmp_path / "base", kind))
    config = short(block_size=16, block_start=block_start)
    rows = rows_of(student, chats, config)
    assert block_start == "sequence" or any(row.offset for row in rows)
    expected = reference_step(student, rows, config, 0.5)
    expected.backward()
    expected_gradient = gradient(student)
    student.model.zero_grad(set_to_none=True)
    batch = Collator(student.mask_id, student.pad_id)(rows)
    found = total(TrainableStudent(student.model, config)(batch, 0.5), Counts.of([batch], config), config)
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    error = (gradient(student) - expected_gradient).norm() / expected_gradient.norm()
    assert float(error) < 1e-4


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Four short chats with one draw each."""
    return synthetic.make_cache(
        tmp_path_factory.mktemp("chats") / "cache", [short_chat(i) for i in range(6)], draws=1, per_shard=6
    )


def short_chat(number: int) -> Any:
    [chat] = synthetic.chats(number + 1)[number:]
    question, answer = chat.messages
    words = " ".join(["please"] * (3 * number))
    return dataclasses.replace(
        chat,
        messages=(
            dataclasses.replace(question, content=f"{question.content} {words}"),
            dataclasses.replace(answer, content=answer.content[: 120 + 40 * number]),
        ),
    )


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_learns_saves_and_loads_again(kind: str, chats: Cache, tmp_path: Path) -> None:
    """The base has no mask token: one is added, and it starts as the mean of all embeddings."""
    base, out = save_family(tmp_path / "base", kind, mask=False), tmp_path / "out"
    fresh = load_student(base)
    assert fresh.mask_added
    before = evaluation.evaluate(fresh, chats, 16).overall.bits_per_byte
    embedding = fresh.model.get_input_embeddings()
    expected = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    torch.testing.assert_close(embedding.weight[fresh.mask_id], expected.mean(dim=0))
    assert "the base had no mask token; one was added" in train(short(block_size=16, steps=15), chats, base, out)
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert plain.config.model_type == kind
    again = load_student(out)
    assert not again.mask_added
    assert (again.mask_id, again.block_size, again.block_start) == (fresh.mask_id, 16, "sequence")
    tied = bool(again.model.config.tie_word_embeddings)
    head, embedding = again.model.get_output_embeddings(), again.model.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied
    assert torch.equal(plain.get_output_embeddings().weight, head.weight)
    after = evaluation.evaluate(again, chats, 16).overall.bits_per_byte
    assert before is not None
    assert after is not None
    assert after < 0.8 * before
    sampler = open_checkpoint(out, device="cpu").sampler()
    samples = sampler.sample([[5, 6, 7]], SampleOptions(max_new_tokens=8))
    assert len(samples) == 1


def test_sampling_applies_a_soft_cap_on_attention(tmp_path: Path) -> None:
    """With and without the cache of keys and values: the second runs the model's own attention."""
    base = save_family(tmp_path / "base", "gemma2", attn_logit_softcapping=0.5)
    sampler = open_checkpoint(base, block_size=8, device="cpu").sampler()
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [9, 8]]
    found, expected = (
        [s.ids for s in sampler.sample(prompts, SampleOptions(max_new_tokens=16, kv_cache=cached))]
        for cached in (True, False)
    )
    assert found == expected


# Windows


def test_rows_longer_than_a_window_are_refused(chats: Cache, tmp_path: Path) -> None:
    base = save_family(tmp_path / "base", "gemma3_text", sliding_window=32)
    with pytest.raises(TidecacheError, match=r"a row has \d+ tokens .* sliding window of 32.*--student-length"):
        train(short(), chats, base, tmp_path / "out")
    sampler = open_checkpoint(base, block_size=8, device="cpu").sampler()
    with pytest.raises(TidecacheError, match="more than the model's context of 32"):
        sampler.sample([[5] * 20], SampleOptions(max_new_tokens=16))


# Blocks


def test_blocks_from_the_response_start_with_it(chats: Cache) -> None:
    tokenizer = TextTokenizer.load(TINY_STUDENT)
    for stored in {draw.document: draw.stored for draw in chats.iter_draws()}.values():
        view = view_document(tokenizer, stored, 16, "response")
        first = int(np.argmax(view.trainable_L))
        assert 0 <= view.offset < 16
        assert (first + view.offset) % 16 == 0
        assert (len(view.ids_L) + view.offset) % 16 == 0  # EOS filling completes the last block
        plain = view_document(tokenizer, stored, 16)
        assert plain.offset == 0
        assert len(plain.ids_L) % 16 == 0
        assert view.ids_L[: len(view.encoded.ids_L)].tolist() == plain.ids_L[: len(plain.encoded.ids_L)].tolist()


def test_the_block_start_is_saved_and_honoured(chats: Cache, tmp_path: Path) -> None:
    base, out = save_family(tmp_path / "base", "qwen3"), tmp_path / "out"
    train(short(steps=1, block_size=16, block_start="response"), chats, base, out)
    student = load_student(out)
    assert (student.block_size, student.block_start) == (16, "response")
    assert open_checkpoint(out, device="cpu").block_start == "response"
    ours = evaluation.evaluate(student, chats, 16)
    theirs = evaluation.evaluate(dataclasses.replace(student, metadata={}), chats, 16)
    assert ours.overall.bits_per_byte != theirs.overall.bits_per_byte


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"block_size": 8},
            r"base: trained with block size 16, asked for 8: .*leave --block-size out",
        ),
        (
            {"block_size": 16, "block_start": "response"},
            r"base: trained with block start sequence, asked for response: ",
        ),
    ],
)
def test_other_blocks_than_the_bases_are_refused(
    changes: dict[str, Any], said: str, chats: Cache, tmp_path: Path
) -> None:
    base = save_family(tmp_path / "base", "qwen3")
    (base / "tidecache.json").write_text('{"block_size": 16, "block_start": "sequence"}')
    with pytest.raises(TidecacheError, match=said):
        train(short(**changes), chats, base, tmp_path / "out")
    with pytest.raises(TidecacheError, match="trained with block size 16, asked for 8"):
        load_student(base).check_blocks(str(base), 8)


# dLLM


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
def test_dllms_checkpoints_are_plain_ones_with_a_trained_mask_token(kind: str, chats: Cache, tmp_path: Path) -> None:
    """Saved as dLLM does: its own names, transformers 4's fields, a mask token that only the weights know."""
    vocabulary = TextTokenizer.load(TINY_STUDENT).vocabulary
    base = save_family(tmp_path / "base", kind, vocab_size=vocabulary + 40, rope_theta=77777.0)
    weights = load_file(base / "model.safetensors")
    mask_id = synthetic.without_mask_token(base)
    config = json.loads((base / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    name = {"qwen3": "Qwen3", "qwen2": "Qwen2", "llama": "Llama"}[kind]
    config |= {
        "model_type": f"a2d-{kind}",
        "architectures": [f"A2D{name}LMHeadModel"],
        "torch_dtype": "float32",
        "auto_map": {"AutoModel": "evil--code.Model"},
    }
    (base / "config.json").write_text(json.dumps(config))
    student = load_student(base)
    assert type(student.model).__name__ == f"{name}ForCausalLM"
    assert (student.mask_added, student.mask_id) == (False, mask_id)
    assert student.tokenizer.mask_token == "<|mask|>"
    assert student.model.config.rope_parameters["rope_theta"] == 77777.0
    for tensor, found in student.model.state_dict().items():
        if tensor in weights:
            assert torch.equal(found, weights[tensor]), tensor
    train(short(block_size=16, steps=2), chats, base, tmp_path / "out")
    # And back: dLLM's names again, the same tensors.
    export(open_checkpoint(tmp_path / "out", device="cpu"), tmp_path / "back", "dllm")
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (back["model_type"], back["architectures"]) == (f"a2d-{kind}", [f"A2D{name}LMHeadModel"])
    assert back["rope_theta"] == 77777.0
    again = load_student(tmp_path / "back")
    trained = load_student(tmp_path / "out").model.state_dict()
    assert all(torch.equal(found, trained[tensor]) for tensor, found in again.model.state_dict().items())
    assert again.mask_id == mask_id


def test_an_unknown_type_of_dllms_is_named(tmp_path: Path) -> None:
    base = save_family(tmp_path / "base", "qwen3")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "a2d-qwen9"}))
    with pytest.raises(TidecacheError, match="model_type a2d-qwen9 would be plain qwen9"):
        load_student(base)


# LoRA


@pytest.mark.parametrize(("kind", "mask"), [("qwen3", True), ("qwen3", False), ("gemma", False)])
def test_adapters_train_alone_and_are_saved_beside_merged_weights(
    kind: str, mask: bool, chats: Cache, tmp_path: Path
) -> None:
    base, out = save_family(tmp_path / "base", kind, mask=mask), tmp_path / "out"
    config = short(block_size=16, steps=6, lora_rank=4, lora_alpha=8, learning_rate=1e-2)
    frozen = {n: t.clone() for n, t in load_student(base).model.state_dict().items()}
    train(config, chats, base, out)
    merged = load_student(out)
    changed = {n for n, t in merged.model.state_dict().items() if not torch.equal(t, frozen[n])}
    projections = {n for n in frozen if n.endswith("proj.weight")}
    embeddings = {"model.embed_tokens.weight", "lm_head.weight"}  # of a new mask token, its row
    assert changed == (projections if mask else projections | embeddings)
    for name in projections:
        difference = merged.model.state_dict()[name] - frozen[name]
        assert int(torch.linalg.matrix_rank(difference, atol=1e-5)) <= 4
    if not mask:
        rows = (merged.model.state_dict()["model.embed_tokens.weight"] != frozen["model.embed_tokens.weight"]).any(1)
        assert torch.nonzero(rows).flatten().tolist() == [merged.mask_id]
    # The merged weights compute what the adapters do.
    prepared = run.prepare(config, chats.path, base)
    prepared.student.model.train(False)
    adapters.load_adapter(prepared.student.model, out)
    batch = Collator(merged.mask_id, merged.pad_id)([prepared.rows[0]])
    hidden = [masked_hidden(model, batch, 16) for model in (prepared.student.model, merged.model)]
    torch.testing.assert_close(hidden[0], hidden[1], rtol=1e-4, atol=1e-4)
    # The adapter alone, as peft loads it on the base.
    from peft import PeftModel

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if not mask:
        plain.resize_token_embeddings(len(frozen["model.embed_tokens.weight"]), mean_resizing=False)
    adapted = PeftModel.from_pretrained(plain, out / "adapter").merge_and_unload()
    for name in projections:
        torch.testing.assert_close(adapted.state_dict()[name], merged.model.state_dict()[name])


def test_a_run_with_adapters_resumes(chats: Cache, tmp_path: Path) -> None:
    base = save_family(tmp_path / "base", "qwen3", mask=False)
    config = short(block_size=16, steps=4, save_steps=2, lora_rank=4, scheduler="constant_with_warmup", warmup=0.0)
    train(config, chats, base, tmp_path / "whole")
    train(config, chats, base, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-4")
    train(config, chats, base, tmp_path / "cut", resume=True)
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_targets_that_fit_nothing_are_refused_with_those_that_do(chats: Cache, tmp_path: Path) -> None:
    base = save_family(tmp_path / "base", "qwen3")
    with pytest.raises(TidecacheError, match=r"lora_targets: query fits no module of Qwen3ForCausalLM.*q_proj"):
        train(short(lora_rank=2, lora_targets="query"), chats, base, tmp_path / "out")
