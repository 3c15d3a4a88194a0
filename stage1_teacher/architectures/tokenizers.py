"""A teacher's tokenizer, from its official files and without its code.

Most repositories have a tokenizer.json, and that is the tokenizer. Dream's has only vocab.json and merges.txt for a
class of its own, which is Qwen2's tokenizer with other special tokens, so it is read as that. A preset may name another
chat template, for a checkpoint that has none or that was trained with another one.
"""

from __future__ import annotations

from pathlib import Path

from shared.errors import TidecacheError
from shared.tokenization import TextTokenizer
from stage1_teacher.weights import read_json

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def has_tokenizer(folder: Path) -> bool:
    """Whether there is any tokenizer beside the weights."""
    return any((folder / name).is_file() for name in FILES)


def teacher_tokenizer(folder: Path, name: str, template: Path | None = None) -> TextTokenizer:
    """The tokenizer beside a checkpoint's weights; `template` is a Jinja file that replaces its chat template.

    Raises:
        TidecacheError: there is none, it is no fast one, or the template cannot be read.
    """
    source = _template(template)
    merges = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if config.get("model_type") == "Dream" and merges and not (folder / "tokenizer.json").is_file():
        from transformers import Qwen2Tokenizer

        return TextTokenizer.of(Qwen2Tokenizer.from_pretrained(folder), str(folder), name, source)
    return TextTokenizer.load(folder, name, source)


def _template(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TidecacheError(f"template {path}: expected a Jinja chat template; it cannot be read ({error})") from error
