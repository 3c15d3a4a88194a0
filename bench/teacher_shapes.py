"""Teachers for `bench/teacher.py`: the real shapes with random weights, and the same narrow enough for a CPU.

No weights are on disk: transformers fills a model on the device, and vLLM loads in its `dummy` format. No cost depends on
what the numbers are, but for a router: with random weights every expert is chosen about as often.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stage1_teacher.architectures.families import register
from stage1_teacher.backends.transformers import TransformersTeacher
from stage1_teacher.head import Head
from stage1_teacher.presets import Preset

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MASK_ID = 1
TEMPERATURES = (1.0, 2.0)


@dataclass(frozen=True)
class Shape:
    """A network, the layouts to read it in, and the length of its texts in tokens."""

    name: str
    kind: str  # model type
    layouts: tuple[str, ...]
    length: int
    fields: dict[str, Any] = field(default_factory=dict)  # of its configuration, where not the default

    @property
    def config(self) -> Any:
        """Its configuration."""
        from transformers import AutoConfig

        register()
        return AutoConfig.for_model(self.kind, **self.fields)


WEDLM = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
}  # fmt: skip
REAL = (
    Shape("LLaDA2.0-mini, random", "llada2_moe", ("full", "bd3lm"), 1024),
    Shape("WeDLM-8B, random", "qwen3", ("bd3lm", "reordered"), 768, WEDLM),
)
NARROW = {"vocab_size": 8192, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
EXPERTS = {
    "num_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "moe_intermediate_size": 64,
    "intermediate_size": 256, "num_hidden_layers": 3, "pad_token_id": 0,
}  # fmt: skip
SCALED = (
    Shape("LLaDA2, scaled down", "llada2_moe", ("full", "bd3lm"), 96, NARROW | EXPERTS),
    Shape(
        "WeDLM, scaled down", "qwen3", ("bd3lm", "reordered"), 96, NARROW | {"intermediate_size": 384, "num_hidden_layers": 2}
    ),
)  # fmt: skip


def random_teacher(
    config: Any, layout: str, dtype: str = "float32", batch_tokens: int = 4096, mask_id: int = MASK_ID
) -> TransformersTeacher:
    """In the transformers backend."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    folder, preset = _saved(config, layout)
    head = Head.of(model, None, config.model_type)
    return TransformersTeacher(preset, folder, model.eval(), head, mask_id, dtype, TEMPERATURES, batch_tokens)


def random_vllm_teacher(config: Any, layout: str, dtype: str, batch_tokens: int) -> Any:
    """In the vllm backend; its `close` frees the device."""
    from stage1_teacher.backends.vllm.client import VllmTeacher
    from stage1_teacher.backends.vllm.engine import PAGE, require_vllm, start_engine
    from stage1_teacher.backends.vllm.plugin import architecture
    from stage1_teacher.backends.vllm.traits import ScorerTraits

    platform = require_vllm(1)
    folder, preset = _saved(config, layout)
    name = architecture(config.model_type, layout)
    assert name is not None
    traits = ScorerTraits(config.model_type, layout, 32, PAGE[platform], config.vocab_size, TEMPERATURES)
    start = partial(start_engine, folder, config, traits, name, dtype, 1, load_format="dummy")
    return VllmTeacher(preset, folder, config, start, traits, MASK_ID, dtype, batch_tokens)


def _saved(config: Any, layout: str) -> tuple[Path, Preset]:
    folder = Path(tempfile.mkdtemp())
    config.save_pretrained(folder)
    return folder, Preset("random", str(folder), layout, 32, MASK_ID)


def active_flops(config: Any) -> float:
    """FLOP of matrix products per token outside attention and head: twice the weights that a token meets."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    used = 0.0
    for name, parameter in getattr(model, model.base_model_prefix).named_parameters():
        if "embed" in name:
            continue
        routed = ".experts." in name and "shared" not in name
        used += parameter.numel() * (config.num_experts_per_tok / config.num_experts if routed else 1.0)
    return 2 * used
