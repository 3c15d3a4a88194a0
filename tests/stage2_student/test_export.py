"""Exported folders: what transformers loads, what dLLM's classes load, the model card, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

from shared.errors import TidecacheError
from stage2_student import commands
from stage2_student.export import export
from stage2_student.inference import open_checkpoint
from stage2_student.sampler import SampleOptions
from tests.conftest import TINY_STUDENT


class A2DQwen3Config(Qwen3Config):
    """As dLLM defines it."""

    model_type = "a2d-qwen3"


class A2DQwen3LMHeadModel(Qwen3ForCausalLM):
    """As dLLM defines it, apart from its attention mask."""

    config_class = A2DQwen3Config


AutoConfig.register("a2d-qwen3", A2DQwen3Config)
AutoModel.register(A2DQwen3Config, A2DQwen3LMHeadModel)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """The embedded student with the metadata of a training run and another rotary base."""
    folder = tmp_path / "trained"
    shutil.copytree(TINY_STUDENT, folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 1_000_000.0
    (folder / "config.json").write_text(json.dumps(config))
    metadata = {
        "format": 1, "block_size": 32, "mask_token": "<|mask|>",
        "caches": [{"fingerprint": "0123456789abcdef", "content": "fedcba", "weight": 1.0}],
        "config": {"objective": "reverse-calm", "temperature": 2.0, "tidal": "none"},
    }  # fmt: skip
    (folder / "tidecache.json").write_text(json.dumps(metadata))
    return folder


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_plain_export_is_the_plain_architecture_and_samples_alike(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "plain"
    export(open_checkpoint(trained), out)
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "tidecache.json"} <= files(out)
    assert not [name for name in files(out) if name.endswith((".bin", ".pt", ".pkl", ".pth"))]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model) is Qwen3ForCausalLM
    before, after = open_checkpoint(trained), open_checkpoint(out)
    for name, weight in before.model.state_dict().items():
        assert torch.equal(weight, after.model.state_dict()[name]), name
    prompt = before.encode("import os\n\n\ndef read(path):\n")
    options = SampleOptions(40, 20)
    assert before.sampler().sample([prompt], options) == after.sampler().sample([prompt], options)
    assert AutoTokenizer.from_pretrained(out).mask_token == "<|mask|>"


def test_older_transformers_find_the_rotary_base_and_the_tokenizer_class(trained: Path, tmp_path: Path) -> None:
    for kind in ("hf", "dllm"):
        export(open_checkpoint(trained), tmp_path / kind, kind)
        config = json.loads((tmp_path / kind / "config.json").read_text())
        assert config["rope_theta"] == 1_000_000.0
        assert config["rope_scaling"] is None
        assert config["torch_dtype"] == "float32"
        tokenizer = json.loads((tmp_path / kind / "tokenizer_config.json").read_text())
        assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_dllm_loads_its_folder_as_its_own_class(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "dllm"
    export(open_checkpoint(trained), out, "dllm", "bfloat16")
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("a2d-qwen3", ["A2DQwen3LMHeadModel"])
    model = AutoModel.from_pretrained(out)
    assert type(model) is A2DQwen3LMHeadModel
    assert model.dtype == torch.bfloat16
    assert model.config.rope_parameters["rope_theta"] == 1_000_000.0
    plain = load_file(TINY_STUDENT / "model.safetensors")
    for name, weight in load_file(out / "model.safetensors").items():
        torch.testing.assert_close(weight.float(), plain[name].float(), rtol=1e-2, atol=1e-3)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.add_special_tokens({"mask_token": "<|mask|>"}) == 0  # what dLLM does: nothing is added


def test_the_card_tells_recipe_cache_and_metrics(trained: Path, tmp_path: Path) -> None:
    scores, results = tmp_path / "scores.json", tmp_path / "results.json"
    quality = {"low": 0.0, "high": 0.2, "bits_per_byte": 1.2345, "accuracy": 0.451}
    row: dict[str, Any] = {"name": "m", "bins": [quality]}
    scores.write_text(json.dumps({"rows": [row, {"name": "teacher", "bins": []}], "bits_per_byte_bound": {"m": 1.5}}))
    benchmark = {"benchmark": "HumanEval", "percent": 48.17, "error": 3.91, "questions": {"a": 1.0}}
    results.write_text(json.dumps({"results": [benchmark]}))
    out = tmp_path / "out"
    arguments = [
        "export",
        "--model",
        str(trained),
        "--out",
        str(out),
        "--metrics",
        str(scores),
        "--metrics",
        str(results),
    ]
    result = CliRunner().invoke(commands.app, arguments)
    assert result.exit_code == 0, result.output
    card = (out / "README.md").read_text()
    for words in ("reverse-calm", "0123456789abcdef", "blocks of 32", "1.234 bits per byte", "45.1%", "48.17 ± 3.91"):
        assert words in card
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert str(tmp_path) not in card


def test_what_cannot_be_exported_is_refused(trained: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(trained)
    with pytest.raises(TidecacheError, match="--format"):
        export(checkpoint, tmp_path / "x", "gguf")
    with pytest.raises(TidecacheError, match="--dtype"):
        export(checkpoint, tmp_path / "x", dtype="int8")
    with pytest.raises(TidecacheError, match="there is something already"):
        export(checkpoint, trained)
    odd = tmp_path / "odd.json"
    odd.write_text("{}")
    with pytest.raises(TidecacheError, match="expected JSON of `tidecache student score"):
        export(checkpoint, tmp_path / "x", metrics=[odd])
    checkpoint.model.config.model_type = "gemma"
    with pytest.raises(TidecacheError, match="this is gemma"):
        export(checkpoint, tmp_path / "x", "dllm")
    text = (trained / "tokenizer.json").read_text().replace("<|mask|>", "<|hole|>")
    (trained / "tokenizer.json").write_text(text)
    config = (trained / "tokenizer_config.json").read_text().replace("<|mask|>", "<|hole|>")
    (trained / "tokenizer_config.json").write_text(config)
    with pytest.raises(TidecacheError, match=r"mask token is <\|mask\|>, this checkpoint's is <\|hole\|>"):
        export(open_checkpoint(trained), tmp_path / "x", "dllm")
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "x.partial").exists()
