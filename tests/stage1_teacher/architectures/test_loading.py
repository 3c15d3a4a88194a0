"""Each known family, from its official form, equals the plain class; every wrong checkpoint has its own error."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shared.errors import TidecacheError
from stage1_teacher.architectures import hub, memory
from stage1_teacher.architectures.families import FAMILIES, register
from stage1_teacher.architectures.loading import load_model
from tests.stage1_teacher.architectures.checkpoints import (
    OFFICIAL_FIELDS,
    QWEN_FIELDS,
    change_tensors,
    plain_model,
    write_checkpoint,
)

CPU = torch.device("cpu")
IDS_BL = torch.tensor([[5, 17, 80, 2, 44, 9, 9, 61], [1, 2, 3, 4, 5, 6, 7, 8]])


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS_BL, attention_mask=torch.zeros(2, 1, 8, 8)).logits


@pytest.mark.parametrize("kind", sorted(OFFICIAL_FIELDS))
def test_official_form_equals_plain_class(kind: str, tmp_path: Path) -> None:
    loaded = load_model(write_checkpoint(tmp_path, kind), "float32", CPU)
    plain = plain_model(kind)
    assert type(loaded) is type(plain)
    assert torch.equal(logits(loaded), logits(plain))
    assert loaded.config.mask_token_id == OFFICIAL_FIELDS[kind]["mask_token_id"]
    assert loaded.config._attn_implementation == "sdpa"


def test_wedlm_without_norms_is_qwen2(tmp_path: Path) -> None:
    from transformers import Qwen2ForCausalLM

    plain = plain_model("Dream")
    folder = write_checkpoint(tmp_path, "wedlm", plain, qk_norm=False, attention_bias=True, head_dim=16)
    loaded = load_model(folder, "float32", CPU)
    assert type(loaded) is Qwen2ForCausalLM
    assert torch.equal(logits(loaded), logits(plain))


def test_register_can_be_called_again() -> None:
    from transformers import AutoConfig

    register()
    register()
    assert type(AutoConfig.for_model("llada2_moe")).__name__ == "LLaDA2MoeConfig"


@pytest.mark.parametrize("kind", sorted(OFFICIAL_FIELDS))
def test_missing_additional_and_misshapen_tensors_are_named_officially(kind: str, tmp_path: Path) -> None:
    name = "model.transformer.blocks.1.ff_out.weight" if kind == "llada" else "model.layers.1.mlp.down_proj.weight"
    folder = write_checkpoint(tmp_path / "missing", kind)
    change_tensors(folder, drop=name)
    with pytest.raises(TidecacheError, match=rf"lacks 1 tensor of {kind} \(first: {name}\).*random"):
        load_model(folder, "float32", CPU)
    folder = write_checkpoint(tmp_path / "extra", kind)
    change_tensors(folder, add={"model.extra.weight": torch.zeros(2)})
    with pytest.raises(TidecacheError, match=r"has besides 1 tensor .*model\.extra\.weight"):
        load_model(folder, "float32", CPU)
    folder = write_checkpoint(tmp_path / "shape", kind)
    change_tensors(folder, add={name: torch.zeros(64, 8)})
    with pytest.raises(TidecacheError, match=rf"another shape.*{name} \[64, 8\], expected \[64, 96\]"):
        load_model(folder, "float32", CPU)


def test_missing_tensors_of_a_plain_architecture_too(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "sdar", model_type="qwen3")
    change_tensors(folder, drop="model.norm.weight")
    with pytest.raises(TidecacheError, match=r"lacks 1 tensor of Qwen3ForCausalLM \(first: model\.norm\.weight\)"):
        load_model(folder, "float32", CPU)


def test_tied_head_may_be_absent(tmp_path: Path) -> None:
    plain = plain_model("sdar")
    plain.lm_head.weight = plain.model.embed_tokens.weight
    folder = write_checkpoint(tmp_path, "sdar", plain, tie_word_embeddings=True)
    change_tensors(folder, drop="lm_head.weight")
    assert torch.equal(logits(load_model(folder, "float32", CPU)), logits(plain))


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        ("llada", {"activation_type": "gelu"}, "activation_type = 'gelu'.*'silu' only"),
        ("llada", {"layer_norm_type": "default"}, "layer_norm_type"),
        ("llada", {"include_qkv_bias": True}, "include_qkv_bias"),
        ("llada", {"d_model": None}, "'d_model' .* is missing"),
        ("wedlm", {"qk_norm": None}, "'qk_norm' .* is missing"),
        ("Dream", {"use_sliding_window": True}, "use_sliding_window"),
        ("sdar", {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ("sdar", {"hidden_size": "wide"}, "not a valid configuration"),
    ],
    ids=str,
)
def test_variants_that_are_not_computed_are_refused(kind: str, fields: dict, named: str, tmp_path: Path) -> None:
    with pytest.raises(TidecacheError, match=named):
        load_model(write_checkpoint(tmp_path, kind, **fields), "float32", CPU)


def test_unknown_architecture_lists_the_known(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "sdar", model_type="brand_new")
    with pytest.raises(TidecacheError, match="'brand_new'") as caught:
        load_model(folder, "float32", CPU)
    assert all(name in str(caught.value) for name in (*FAMILIES, "LLaDA2.0-mini", "qwen3"))


def test_uniform_noise_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "diffusion_gemma"}))
    with pytest.raises(TidecacheError, match=r"DiffusionGemma .*uniform noise.*no mask token"):
        load_model(tmp_path, "float32", CPU)


def test_sliding_window_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "sdar", model_type="mistral", sliding_window=16, use_sliding_window=True)
    with pytest.raises(TidecacheError, match="slides over a window of 16 tokens"):
        load_model(folder, "float32", CPU)


def test_truncated_weights(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "sdar")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(
        TidecacheError, match=rf"model\.safetensors: cut short: {len(data) - 100} bytes, expected {len(data)}"
    ):
        load_model(folder, "float32", CPU)
    (folder / "model.safetensors").write_bytes(data[:20])
    with pytest.raises(TidecacheError, match="not a safetensors file"):
        load_model(folder, "float32", CPU)


def test_snapshot_without_weights_says_what_to_download(tmp_path: Path) -> None:
    folder = tmp_path / "models--inclusionAI--LLaDA2.0-mini" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(QWEN_FIELDS | {"model_type": "qwen3"}))
    with pytest.raises(TidecacheError, match=r"`hf download inclusionAI/LLaDA2\.0-mini`"):
        load_model(folder, "float32", CPU)


def test_memory_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path, "sdar")
    count = sum(tensor.numel() for tensor in plain_model("sdar").state_dict().values())
    shapes = memory.read_shapes([folder / "model.safetensors"])
    assert memory.Need(sum(torch.Size(s).numel() for s in shapes.values()), 0, "float32").parameters == count

    monkeypatch.setattr(memory, "WORKING_SET", 0)
    for free, advice in ((count * 3, "--dtype bfloat16 needs .* would fit"), (count, "split it over 3 such devices")):
        monkeypatch.setattr(memory, "available_bytes", lambda device, free=free: free)
        with pytest.raises(TidecacheError, match=f"not enough memory: .* billion parameters in float32 .*{advice}"):
            load_model(folder, "float32", CPU)
    monkeypatch.setattr(memory, "available_bytes", lambda device: count * 5)
    load_model(folder, "float32", CPU)


def test_memory_of_the_big_presets() -> None:
    """The estimate for LLaDA2.0-mini's published shapes: 16.3 billion parameters, 33 GB in bfloat16, 65 in float32."""
    from stage1_teacher.architectures.llada2_config import LLaDA2MoeConfig
    from stage1_teacher.architectures.loading import expected_shapes

    shapes, _ = expected_shapes(LLaDA2MoeConfig())
    assert "model.layers.19.mlp.experts.255.down_proj.weight" in shapes
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert 16.0e9 < parameters < 16.5e9
    head = 157184 * 2048
    assert 33e9 < memory.Need(parameters, head, "bfloat16").bytes < 35e9
    assert 64e9 < memory.Need(parameters, head, "float32").bytes < 66e9


def test_available_memory_is_positive() -> None:
    free = memory.available_bytes(CPU)
    assert free is None or free > 1 << 20


def raising(error: Exception) -> Any:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise error

    return snapshot_download


def test_errors_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    response: Any = SimpleNamespace(headers={}, request=None, status_code=401)
    for error, said in (
        (GatedRepoError("gated", response=response), "gated: accept its terms .*hf auth login.*hf download a/b"),
        (RepositoryNotFoundError("none", response=response), "no such repository, or it is private"),
        (LocalEntryNotFoundError("no"), "hub cannot be reached: run `hf download a/b`"),
        (OfflineModeIsEnabled("no"), "hub cannot be reached: run `hf download a/b`"),
        (HFValidationError("no"), "no valid repository name"),
        (OSError(28, "No space left on device"), "No space left on device.*hf download a/b"),
    ):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(error))
        with pytest.raises(TidecacheError, match=said) as caught:
            hub.checkpoint_folder("a/b")
        assert "\n" not in str(caught.value)


def test_offline_for_real() -> None:
    """The tests run with HF_HUB_OFFLINE=1, so that this is the library's own behaviour."""
    with pytest.raises(TidecacheError, match="hf download nobody/has-this"):
        hub.checkpoint_folder("nobody/has-this")
