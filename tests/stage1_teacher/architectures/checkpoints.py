"""Tiny random checkpoints in the official form of each known family: fields of config.json and names of tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

VOCABULARY = 96

QWEN_FIELDS: dict[str, Any] = {
    "attention_dropout": 0.0,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "max_window_layers": 2,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.52.4",
    "use_cache": False,
    "use_sliding_window": False,
    "vocab_size": VOCABULARY,
}

OFFICIAL_FIELDS: dict[str, dict[str, Any]] = {
    "wedlm": QWEN_FIELDS
    | {
        "model_type": "wedlm",
        "architectures": ["WeDLMForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_wedlm.WeDLMForCausalLM"},
        "attention_bias": False,
        "layer_types": ["full_attention", "full_attention"],
        "mask_token_id": None,
        "qk_norm": True,
    },
    "sdar": QWEN_FIELDS
    | {
        "model_type": "sdar",
        "architectures": ["SDARForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"},
        "attention_bias": False,
        "attn_implementation": "flex_attention",
        "block_size": 4,
        "fuse_cross_entropy": True,
        "mask_token_id": 95,
        "use_deepep": False,
    },
    "Dream": {name: value for name, value in QWEN_FIELDS.items() if name != "head_dim"}
    | {
        "model_type": "Dream",
        "architectures": ["DreamModel"],
        "auto_map": {"AutoModel": "modeling_dream.DreamModel"},
        "mask_token_id": 95,
        "use_mrope": False,
    },
    "llada": {
        "model_type": "llada",
        "architectures": ["LLaDAModelLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_llada.LLaDAModelLM"},
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": 64,
        "embedding_dropout": 0.0,
        "embedding_size": VOCABULARY,
        "eos_token_id": 81,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": 94,
        "max_sequence_length": 128,
        "mlp_hidden_size": 96,
        "mlp_ratio": 4,
        "multi_query_attention": None,
        "n_heads": 2,
        "n_kv_heads": 2,
        "n_layers": 2,
        "pad_token_id": 81,
        "rms_norm_eps": 1e-5,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 500000.0,
        "scale_logits": False,
        "transformers_version": "4.46.3",
        "use_cache": False,
        "vocab_size": VOCABULARY,
        "weight_tying": False,
    },
}

LLADA_PARTS = {
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
}


def plain_model(kind: str) -> Any:
    """A random model of the plain class that the family's network is, configured by hand."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(3)
    common = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    common |= {"max_position_embeddings": 128, "tie_word_embeddings": False}
    model: Any
    if kind == "llada":
        config = LlamaConfig(
            **common, num_attention_heads=2, num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=500000.0
        )
        model = LlamaForCausalLM(config)
    elif kind == "Dream":
        model = Qwen2ForCausalLM(Qwen2Config(**common, num_attention_heads=4, num_key_value_heads=2, rope_theta=1e6))
    else:
        config = Qwen3Config(**common, num_attention_heads=4, num_key_value_heads=2, head_dim=32, rope_theta=1e6)
        model = Qwen3ForCausalLM(config)
    for parameter in model.parameters():  # norms and biases away from their neutral start, or a mix-up would not show
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def official_name(kind: str, name: str) -> str:
    if kind != "llada":
        return name
    fixed = {"model.embed_tokens": "wte", "model.norm": "ln_f", "lm_head": "ff_out"}
    stem = name.removesuffix(".weight")
    if stem in fixed:
        return f"model.transformer.{fixed[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"model.transformer.blocks.{layer}.{LLADA_PARTS[part]}.weight"


def write_checkpoint(folder: Path, kind: str, model: Any | None = None, **fields: Any) -> Path:
    """Write config.json and model.safetensors as the family's authors do; `fields` replace those of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(OFFICIAL_FIELDS[kind] | fields), encoding="utf-8")
    tensors = {
        official_name(kind, name): tensor.clone() for name, tensor in (model or plain_model(kind)).state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def change_tensors(folder: Path, drop: str | None = None, add: dict[str, torch.Tensor] | None = None) -> None:
    """Take a tensor out of a checkpoint, or put some into it."""
    tensors = load_file(folder / "model.safetensors")
    if drop is not None:
        del tensors[drop]
    save_file(tensors | (add or {}), folder / "model.safetensors", {"format": "pt"})
