"""Folders for others: a plain Hugging Face checkpoint with a model card, or one that dLLM loads (`tidecache student export`).

`hf`: what `AutoModelForCausalLM` loads as the plain architecture, with our `tidecache.json` beside it. `dllm`: the same
weights under the names of dLLM's block-diffusion models (ZHZisZZ/dllm, pipeline `a2d`), whose classes subclass the plain
ones and differ in the attention mask alone: `model_type` and `architectures` change, nothing else. dLLM adds a mask token
`<|mask|>` by that name, so the checkpoint's must be called so.

Both are written for `transformers` 4 as well, which dLLM runs on: it reads the rotary base from `rope_theta`, which
version 5 keeps in `rope_parameters` (a missing one would silently become 10,000), and does not know version 5's name for
fast tokenizers. Weights are safetensors.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.errors import TidecacheError
from stage2_student.config import METADATA_FILE
from stage2_student.inference import DTYPES, Checkpoint
from stage2_student.model import MASK_TOKEN

KINDS = ("hf", "dllm")
# model_type of the plain architecture → dLLM's model_type and class
DLLM_CLASSES: Mapping[str, tuple[str, str]] = {
    "llama": ("a2d-llama", "A2DLlamaLMHeadModel"),
    "qwen2": ("a2d-qwen2", "A2DQwen2LMHeadModel"),
    "qwen3": ("a2d-qwen3", "A2DQwen3LMHeadModel"),
}


def export(
    checkpoint: Checkpoint, out: Path, kind: str = "hf", dtype: str = "float32", metrics: Sequence[Path] = ()
) -> None:
    """Write a checkpoint to a new folder.

    Args:
        checkpoint: as opened; its model is cast to `dtype`.
        out: folder that does not exist yet, or is empty.
        kind: `hf` or `dllm`.
        dtype: of the weights: float32, bfloat16 or float16.
        metrics: JSON files of `tidecache student score` and `evaluate` for the model card.

    Raises:
        TidecacheError: an unknown kind or dtype, an architecture or mask token that dLLM does not take, a folder that is
            in use, a metrics file of another kind, or a disk that refuses.
    """
    if kind not in KINDS:
        raise TidecacheError(f"--format: expected one of {', '.join(KINDS)}, found {kind!r}")
    if dtype not in DTYPES:
        raise TidecacheError(f"--dtype: expected one of {', '.join(DTYPES)}, found {dtype!r}")
    family = str(checkpoint.model.config.model_type)
    if kind == "dllm":
        _check_dllm(checkpoint, family)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TidecacheError(f"{out}: there is something already: choose another --out or remove it")
    card = model_card(checkpoint, kind, [_metrics(path) for path in metrics])
    partial = out.with_name(out.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        model = checkpoint.model
        model.to(DTYPES[dtype])  # type: ignore[arg-type]
        model.save_pretrained(partial)
        checkpoint.student.tokenizer.save_pretrained(partial)
        _edit(partial / "config.json", lambda config: _config(config, family, kind, dtype))
        _edit(
            partial / "tokenizer_config.json", lambda config: {**config, "tokenizer_class": "PreTrainedTokenizerFast"}
        )
        metadata = {**checkpoint.student.metadata, "format": 1, "block_size": checkpoint.block_size}
        (partial / METADATA_FILE).write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        (partial / "README.md").write_text(card, encoding="utf-8")
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise TidecacheError(
            f"{out}: cannot be written ({error.strerror or error}): free some space or choose another"
        ) from error


def _check_dllm(checkpoint: Checkpoint, family: str) -> None:
    if family not in DLLM_CLASSES:
        raise TidecacheError(
            f"{checkpoint.path}: dLLM's a2d pipeline has {', '.join(DLLM_CLASSES)}, this is {family}: export with --format hf"
        )
    mask = checkpoint.student.tokenizer.mask_token
    if mask != MASK_TOKEN:
        raise TidecacheError(
            f"{checkpoint.path}: dLLM's mask token is {MASK_TOKEN}, this checkpoint's is {mask}: dLLM would add another "
            "that was never trained; rename it in tokenizer.json and tokenizer_config.json first"
        )


def _edit(path: Path, change: Any) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(change(found), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(config: dict[str, Any], family: str, kind: str, dtype: str) -> dict[str, Any]:
    rope = dict(config.get("rope_parameters") or {})
    if rope:
        config["rope_theta"] = rope.pop("rope_theta", 10000.0)
        config["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    config["torch_dtype"] = dtype
    if kind == "dllm":
        config["model_type"], name = DLLM_CLASSES[family]
        config["architectures"] = [name]
    return config


def _metrics(path: Path) -> list[tuple[str, str]]:
    """(what, value) lines of a JSON file of `score` or `evaluate`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if "results" in found:
            return [
                (r["benchmark"], f"{r['percent']:.2f} ± {r['error']:.2f} ({len(r['questions'])} questions)")
                for r in found["results"]
            ]
        lines = []
        for row in found["rows"]:
            if row["name"] not in found["bits_per_byte_bound"]:
                continue  # the teacher's rows
            for cell in row["bins"]:
                if cell["bits_per_byte"] is not None:
                    value = f"{cell['bits_per_byte']:.3f} bits per byte, {cell['accuracy']:.1%} of the chunks right"
                    lines.append((f"{row['name']}, masked share {cell['low']:g} to {cell['high']:g}", value))
        return lines
    except OSError as error:
        raise TidecacheError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TidecacheError(
            f"{path}: expected JSON of `tidecache student score --json` or the results.json of `evaluate`, found: {error!r}"
        ) from error


def model_card(checkpoint: Checkpoint, kind: str, metrics: Sequence[Sequence[tuple[str, str]]]) -> str:
    """README.md of an exported folder: what it is, how it was trained, what was measured, how to run it."""
    metadata = checkpoint.student.metadata
    model = checkpoint.model
    parameters = sum(p.numel() for p in model.parameters())
    caches, recipe = metadata.get("caches") or [], metadata.get("config") or {}
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [diffusion language model, block diffusion, distillation, tidecache]",
        "---",
        "# Block-diffusion student",
        "",
        f"{type(model).__name__}, {parameters / 1e6:.1f}M parameters, trained with block diffusion in blocks of "
        f"{checkpoint.block_size} tokens; mask token `{checkpoint.student.tokenizer.mask_token}`. The weights are plain; "
        "generating text needs block-diffusion sampling, not `model.generate`.",
        "",
    ]
    if kind == "dllm":
        lines += [
            "The folder has the form of dLLM's `a2d` models: after `import dllm.pipelines.a2d`, `dllm.utils.get_model` loads",
            f"it and `BD3LMSampler` samples with `block_size={checkpoint.block_size}`.",
            "",
        ]
    else:
        lines += ["```console", "$ tidecache student chat --model THIS_FOLDER", "```", ""]
    for cache in caches:
        lines += ["## Cache", "", *(f"- {name.replace('_', ' ')}: `{value}`" for name, value in cache.items()), ""]
    if recipe:
        lines += ["## Recipe", "", "| field | value |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in recipe.items()]
        lines += [""]
    rows = [row for part in metrics for row in part]
    if rows:
        lines += [
            "## Measured",
            "",
            "| what | value |",
            "|---|---|",
            *(f"| {what} | {value} |" for what, value in rows),
            "",
        ]
    return "\n".join(lines)
