"""The teachers' networks inside vLLM: its own implementations, with a diffusion layout's attention and our pooler.

Nothing is forked. While such a network is built, the name `Attention` in its module stands for the class that the layout
needs: vLLM's encoder-only attention for `full`, ours for layouts with blocks.

vLLM decides by class whether a model has a key/value cache, hence two classes for each network.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, ClassVar

import torch
from vllm.model_executor.layers.attention.encoder_only_attention import EncoderOnlyAttention
from vllm.model_executor.models import bailing_moe, llama, qwen2, qwen3
from vllm.model_executor.models.interfaces_base import attn_type
from vllm.v1.attention.backend import AttentionType

from stage1_teacher.architectures.families import FAMILIES
from stage1_teacher.backends.vllm.attention import BlockAttention, text_positions
from stage1_teacher.backends.vllm.pooler import ScoringPooler
from stage1_teacher.backends.vllm.traits import ScorerTraits


class WholeAttention(EncoderOnlyAttention):
    """Encoder-only attention that takes no offence at a caller who asks for a decoder's."""

    def __init__(self, *args: Any, attn_type: str = AttentionType.ENCODER_ONLY, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


@contextmanager
def attention_class(module: ModuleType, replacement: type) -> Iterator[None]:
    """Let the name `Attention` in a model's module mean another class."""
    original = module.Attention
    module.Attention = replacement  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.Attention = original  # type: ignore[attr-defined]


class Scorer:
    """What tidecache adds to a network; comes before vLLM's class."""

    is_pooling_model = True
    source: ClassVar[ModuleType]  # the module in which vLLM's class builds its attention
    attention: ClassVar[type]

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        traits = ScorerTraits.of(config)
        rope = getattr(config, "rope_parameters", None) or {}
        if "partial_rotary_factor" in rope:
            # vLLM's Bailing reads it from the configuration itself, and silently rotates whole heads where it is absent.
            config.partial_rotary_factor = rope["partial_rotary_factor"]
        with attention_class(self.source, self.attention):
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.family = FAMILIES.get(traits.family)
        self.pooler = ScoringPooler(self.lm_head, traits)  # type: ignore[attr-defined]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load tensors under their official names."""
        family = self.family
        named = ((name if family is None else family.plain_name(name), tensor) for name, tensor in weights)
        loaded: set[str] = super().load_weights(named)  # type: ignore[misc]
        return loaded


class BlockScorer(Scorer):
    """For layouts with blocks: positions are those inside the text."""

    attention = BlockAttention

    def forward(self, input_ids: Any, positions: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """vLLM's forward."""
        return super().forward(input_ids, text_positions(positions), *args, **kwargs)  # type: ignore[misc]


@attn_type("encoder_only")
class Qwen3Full(Scorer, qwen3.Qwen3ForCausalLM):
    """Qwen3 (WeDLM-8B, SDAR, the embedded teacher), `full`."""

    source, attention = qwen3, WholeAttention


class Qwen3Blocks(BlockScorer, qwen3.Qwen3ForCausalLM):
    """Qwen3, `block-causal` and `bd3lm`."""

    source = qwen3


@attn_type("encoder_only")
class Qwen2Full(Scorer, qwen2.Qwen2ForCausalLM):
    """Qwen2 (Dream), `full`."""

    source, attention = qwen2, WholeAttention


class Qwen2Blocks(BlockScorer, qwen2.Qwen2ForCausalLM):
    """Qwen2, `block-causal` and `bd3lm`."""

    source = qwen2


@attn_type("encoder_only")
class LlamaFull(Scorer, llama.LlamaForCausalLM):
    """Llama (LLaDA-8B), `full`."""

    source, attention = llama, WholeAttention


class LlamaBlocks(BlockScorer, llama.LlamaForCausalLM):
    """Llama, `block-causal` and `bd3lm`."""

    source = llama


@attn_type("encoder_only")
class LLaDA2Full(Scorer, bailing_moe.BailingMoeV2ForCausalLM):
    """LLaDA2-MoE, `full`."""

    source, attention = bailing_moe, WholeAttention


class LLaDA2Blocks(BlockScorer, bailing_moe.BailingMoeV2ForCausalLM):
    """LLaDA2-MoE, `block-causal` and `bd3lm`."""

    source = bailing_moe
