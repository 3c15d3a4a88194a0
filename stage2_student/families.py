"""Which architectures can be students, and what of theirs needs care: dLLM's names, windows, soft-caps (DESIGN §8).

A student runs as the plain class of `transformers` under a mask of its own. dLLM and TIDE store the same tensors under
names of their own (`a2d-qwen3`, class `A2DQwen3LMHeadModel`), whose classes differ from the plain ones in the attention
mask alone: `plain_config` reads such a checkpoint as the plain architecture, without remote code. A layer with a sliding
window sees no further back than the window; in a row that is no longer than the window it equals full attention, so such
models (Gemma 2, Gemma 3) are students for rows up to that length and longer rows are refused. A soft-cap on attention
logits (Gemma 2) needs the eager implementation, since `sdpa` leaves it out. What else a layer may be (chunked, linear)
the mask cannot describe.
"""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from shared.errors import TidecacheError

DLLM_PREFIX = "a2d-"  # dLLM's model types: a2d-llama, a2d-qwen2, a2d-qwen3
# Layers of the form h + o_proj(attention(input_layernorm(h))), then h + mlp(…), each token for itself after attention.
CUTTABLE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
EQUAL_WITHIN_WINDOW = ("full_attention", "sliding_attention")


def plain_config(path_or_id: str) -> tuple[PreTrainedConfig, bool]:
    """(configuration, whether dLLM wrote it) of a checkpoint; dLLM's model types become the plain ones.

    Raises:
        TidecacheError: a type of dLLM's whose plain one is not known.
        OSError, ValueError: as `transformers` raises them where there is no configuration, or one of an unknown type.
    """
    values, _ = PreTrainedConfig.get_config_dict(path_or_id)
    kind = str(values.get("model_type", ""))
    if not kind.startswith(DLLM_PREFIX):
        return AutoConfig.from_pretrained(path_or_id, trust_remote_code=False), False
    plain = kind.removeprefix(DLLM_PREFIX)
    if plain not in CONFIG_MAPPING:
        raise TidecacheError(
            f"{path_or_id}: model_type {kind} would be plain {plain}, which this version of transformers does not know: "
            "take a checkpoint of a2d-llama, a2d-qwen2 or a2d-qwen3"
        )
    for name in ("model_type", "architectures", "auto_map"):
        values.pop(name, None)
    return CONFIG_MAPPING[plain].from_dict(values), True


def attention_implementation(config: PreTrainedConfig) -> str:
    """`eager` where attention logits are capped, else `sdpa`."""
    return "sdpa" if getattr(config.get_text_config(), "attn_logit_softcapping", None) is None else "eager"


def window(config: PreTrainedConfig) -> int | None:
    """Tokens that the narrowest layer sees; None where all layers see everything."""
    text: Any = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    size = getattr(text, "sliding_window", None)
    if size is None or (kinds and "sliding_attention" not in kinds):
        return None
    return int(size)


def check_length(config: PreTrainedConfig, length: int) -> None:
    """Refuse rows that a sliding window would cut.

    Raises:
        TidecacheError: `length` tokens are more than the window.
    """
    size = window(config)
    if size is not None and length > size:
        raise TidecacheError(
            f"a row has {length} tokens and this {config.model_type} has layers with a sliding window of {size}, which "
            "block diffusion does not describe beyond that length: capture with a shorter --student-length, or take a "
            "student whose layers are all full_attention"
        )


def check_layers(config: PreTrainedConfig, name: str) -> None:
    """Refuse layers that no mask over all keys describes.

    Raises:
        TidecacheError: layers that are neither full attention nor a sliding window.
    """
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or []) - set(EQUAL_WITHIN_WINDOW)
    if kinds:
        raise TidecacheError(
            f"{name} has layers of {', '.join(sorted(kinds))}, which the block-diffusion mask does not describe: "
            "take a student whose layers are full_attention, or sliding_attention with a window longer than its rows"
        )
