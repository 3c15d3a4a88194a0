"""The entry point of vLLM's plug-in group `vllm.general_plugins`: makes tidecache's architectures known to vLLM.

vLLM calls it in every process it starts (front end, engine, workers), so it does nothing but register names: the modules
behind them, which need an accelerator, are imported by vLLM when it builds a model.
"""

from __future__ import annotations

# Model type of the plain class -> (its class for `full`, its class for layouts with blocks).
ARCHITECTURES = {
    "qwen3": ("Qwen3Full", "Qwen3Blocks"),
    "qwen2": ("Qwen2Full", "Qwen2Blocks"),
    "llama": ("LlamaFull", "LlamaBlocks"),
    "llada2_moe": ("LLaDA2Full", "LLaDA2Blocks"),
}
PREFIX = "Tidecache"  # of the names in vLLM's registry


def architecture(model_type: str, layout: str) -> str | None:
    """The name in vLLM's registry, or None where there is no such network."""
    names = ARCHITECTURES.get(model_type)
    return None if names is None else PREFIX + names[layout != "full"]


def register() -> None:
    """Register the configuration that transformers lacks, and all architectures. May be called again."""
    from vllm import ModelRegistry

    from stage1_teacher.architectures.families import register as register_configurations

    register_configurations()
    for names in ARCHITECTURES.values():
        for name in names:
            ModelRegistry.register_model(PREFIX + name, f"stage1_teacher.backends.vllm.models:{name}")
