"""How the checkpoints of known diffusion language models are read (DESIGN §7): as which plain class, under which names.

Most of these models are an ordinary transformer under a name of their own, with remote code that today's transformers
cannot run. So each is read as the plain class that computes the same: its configuration is translated, and where its
tensors have other names, these are mapped. Whatever a translation could silently get wrong (an activation, a bias, a
norm of another kind) is refused by name. Anything else that the installed transformers can load as a causal language
model is read as it is; a model whose noise is not a mask token is refused, and the message says why.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import TidecacheError
from stage1_teacher.weights import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Fields = dict[str, Any]

# Fields that say who wrote a checkpoint, how its own code is found, or how it was run: no part of the network.
_WRITER_FIELDS = frozenset(
    (
        *("architectures", "auto_map", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path"),
        *("attn_implementation", "_attn_implementation", "use_cache"),
    )
)


@dataclass(frozen=True)
class Family:
    """One kind of checkpoint. `translate`: official fields to (transformers model type, its configuration fields)."""

    model_type: str
    known_as: str  # checkpoints, for messages
    translate: Callable[[Mapping[str, Any], str], tuple[str, Fields]]
    names: tuple[tuple[str, str], ...] = ()  # (official, in the plain class); {} stands for a layer's number

    def key_mapping(self) -> dict[str, str] | None:
        """The names as the regular expressions that transformers' `from_pretrained` takes."""
        pairs = {
            "^" + re.escape(official).replace(r"\{\}", r"(\d+)") + "$": ours.replace("{}", r"\1")
            for official, ours in self.names
        }
        return pairs or None

    def plain_name(self, official: str) -> str:
        """The plain class's name of an official tensor."""
        return _renamed(official, self.names)

    def official_name(self, plain: str) -> str:
        """The official name of a tensor of the plain class."""
        return _renamed(plain, [(ours, official) for official, ours in self.names])


def _renamed(name: str, pairs: list[tuple[str, str]] | tuple[tuple[str, str], ...]) -> str:
    number = re.search(r"\.(\d+)\.", name)
    layer = number.group(1) if number else ""
    for source, target in pairs:
        if source.replace("{}", layer) == name:
            return target.replace("{}", layer)
    return name


def _refuse_unless(fields: Mapping[str, Any], where: str, expected: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse a configuration with a field that is neither absent nor one of the values that are computed."""
    for field, values in expected.items():
        if field in fields and fields[field] not in values:
            raise TidecacheError(
                f"{where}/config.json: {field} = {fields[field]!r}, but tidecache reads {fields['model_type']} with "
                f"{field} = {values[0]!r} only: this variant of the architecture is not supported"
            )


def _required(fields: Mapping[str, Any], where: str, *names: str) -> list[Any]:
    missing = [name for name in names if fields.get(name) is None]
    if missing:
        raise TidecacheError(
            f"{where}/config.json: the field {missing[0]!r} of a {fields['model_type']} checkpoint is missing"
        )
    return [fields[name] for name in names]


def _as_it_is(model_type: str) -> Callable[[Mapping[str, Any], str], tuple[str, Fields]]:
    """The official fields are those of the plain class."""

    def translate(fields: Mapping[str, Any], where: str) -> tuple[str, Fields]:
        _refuse_unless(fields, where, {"use_sliding_window": (False, None), "quantization_config": (None,)})
        return model_type, {name: value for name, value in fields.items() if name not in _WRITER_FIELDS}

    return translate


def _wedlm(fields: Mapping[str, Any], where: str) -> tuple[str, Fields]:
    """WeDLM-8B is Qwen3 (norms on queries and keys), WeDLM-7B is Qwen2 (biases instead)."""
    (qk_norm,) = _required(fields, where, "qk_norm")
    if not qk_norm:
        _refuse_unless(fields, where, {"attention_bias": (True,)})
    return _as_it_is("qwen3" if qk_norm else "qwen2")(fields, where)


def _llada(fields: Mapping[str, Any], where: str) -> tuple[str, Fields]:
    """LLaDA-8B is Llama with the configuration and tensor names of OLMo."""
    _refuse_unless(
        fields,
        where,
        {
            "block_type": ("llama",),
            "activation_type": ("silu",),
            "layer_norm_type": ("rms",),
            "layer_norm_with_affine": (True,),
            "rope": (True,),
            "block_group_size": (1,),
            "alibi": (False,),
            "attention_layer_norm": (False,),
            "bias_for_layer_norm": (False, None),
            "include_bias": (False,),
            "include_qkv_bias": (False, None),
            "scale_logits": (False,),
            "input_emb_norm": (False,),
            "clip_qkv": (None,),
            "quantization_config": (None,),
        },
    )
    hidden, layers, heads, vocabulary, length = _required(
        fields, where, "d_model", "n_layers", "n_heads", "vocab_size", "max_sequence_length"
    )
    kv_heads = fields.get("n_kv_heads") or (1 if fields.get("multi_query_attention") else heads)
    return "llama", {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": fields.get("mlp_hidden_size") or fields.get("mlp_ratio", 4) * hidden,
        # Its embedding may have more rows than its tokenizer has tokens.
        "vocab_size": max(vocabulary, fields.get("embedding_size") or 0),
        "max_position_embeddings": length,
        "rms_norm_eps": fields.get("rms_norm_eps", 1e-5),
        "rope_theta": fields.get("rope_theta", 10000.0),
        "tie_word_embeddings": bool(fields.get("weight_tying", True)),
        "mask_token_id": fields.get("mask_token_id"),
        "pad_token_id": fields.get("pad_token_id"),
        "eos_token_id": fields.get("eos_token_id"),
    }


_LLADA_NAMES = (
    ("model.transformer.wte.weight", "model.embed_tokens.weight"),
    ("model.transformer.ln_f.weight", "model.norm.weight"),
    ("model.transformer.ff_out.weight", "lm_head.weight"),
    *(
        (f"model.transformer.blocks.{{}}.{official}.weight", f"model.layers.{{}}.{ours}.weight")
        for official, ours in (
            ("attn_norm", "input_layernorm"),
            ("q_proj", "self_attn.q_proj"),
            ("k_proj", "self_attn.k_proj"),
            ("v_proj", "self_attn.v_proj"),
            ("attn_out", "self_attn.o_proj"),
            ("ff_norm", "post_attention_layernorm"),
            ("ff_proj", "mlp.gate_proj"),
            ("up_proj", "mlp.up_proj"),
            ("ff_out", "mlp.down_proj"),
        )
    ),
)

FAMILIES = {
    family.model_type: family
    for family in (
        Family("llada2_moe", "LLaDA2.0-mini, LLaDA2.1-mini", _as_it_is("llada2_moe")),
        Family("wedlm", "WeDLM-8B-Instruct", _wedlm),
        Family("llada", "LLaDA-8B-Instruct", _llada, _LLADA_NAMES),
        Family("Dream", "Dream-v0-Instruct-7B", _as_it_is("qwen2")),
        Family("sdar", "SDAR-1.7B-Chat", _as_it_is("qwen3")),
    )
}

# Models whose noise replaces tokens by random tokens: nothing in their input says which tokens are to be predicted.
UNIFORM_NOISE = {
    "diffusion_gemma": "DiffusionGemma",
    "diffusion_gemma_text": "DiffusionGemma",
}


def register() -> None:
    """Make `AutoConfig` and `AutoModelForCausalLM` know the network that the library lacks. May be called again."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from stage1_teacher.architectures.llada2 import LLaDA2MoeModelLM
    from stage1_teacher.architectures.llada2_config import MODEL_TYPE, LLaDA2MoeConfig

    AutoConfig.register(MODEL_TYPE, LLaDA2MoeConfig, exist_ok=True)
    AutoModelForCausalLM.register(LLaDA2MoeConfig, LLaDA2MoeModelLM, exist_ok=True)


def read_family(folder: Path) -> tuple[Family | None, PreTrainedConfig]:
    """The family of a checkpoint (None: read as it is) and its configuration for the plain class.

    Raises:
        TidecacheError: no or a malformed config.json; an architecture that is not known (the message lists those that
            are), a variant that is not computed, or a model without a mask token.
    """
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    register()
    fields = read_json(folder / "config.json")
    kind = fields.get("model_type")
    if kind in UNIFORM_NOISE:
        raise TidecacheError(
            f"teacher {folder}: {UNIFORM_NOISE[kind]} ({kind}) is trained with uniform noise: it replaces tokens by "
            f"random ones and has no mask token, so it cannot be asked for the likelihood of masked chunks; only "
            f"models with a mask token are supported (noise kernel `mask`)"
        )
    try:
        if kind in FAMILIES:
            family = FAMILIES[kind]
            plain, translated = family.translate(fields, str(folder))
            config = CONFIG_MAPPING[plain](**translated)
            config.name_or_path = str(folder)
            return family, config
        if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            return None, AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except TidecacheError:
        raise
    except Exception as error:  # the library checks types and values of fields with errors of its own
        raise TidecacheError(
            f"{folder}/config.json: not a valid configuration: {' '.join(str(error).split())[:300]}"
        ) from error
    known = ", ".join(f"{family.model_type} ({family.known_as})" for family in FAMILIES.values())
    raise TidecacheError(
        f"teacher {folder}: architecture {kind!r} (model_type in config.json) is not known; known are {known}, and the "
        f"causal language models of the installed transformers, such as llama, qwen2 or qwen3; code that comes with a "
        f"checkpoint is never run"
    )
