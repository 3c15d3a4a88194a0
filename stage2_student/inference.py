"""A student that can be asked: its checkpoint checked, its prompts rendered, its answers decoded (DESIGN §8).

Sampling, chat, benchmarks and export all start here. A checkpoint must say, or be told, what block size it was trained
with, and must have a mask token; a base that was never trained for diffusion has none and is refused. Chats are
rendered with the tokenizer's own template. Models that know the tokens `<think>` and `</think>` (Qwen3) get an empty
think block before their answer where the template does not put one, as in the paper's protocol, and think blocks are
cut out of answers.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from shared.documents import Message
from shared.embedded import embedded_or
from shared.errors import TidecacheError
from shared.tokenization import IrreproducibleText, TextTokenizer
from stage2_student.model import Student, load_student
from stage2_student.sampler import Sampler

EMPTY_THINK_BLOCK = "<think>\n\n</think>\n\n"
THINK_BLOCK = re.compile(r"<think>.*?</think>\s*", flags=re.DOTALL)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Checkpoint:
    """A block-diffusion checkpoint, ready to sample from."""

    path: str
    student: Student
    text: TextTokenizer
    block_size: int
    end_ids: tuple[int, ...]

    @property
    def model(self) -> PreTrainedModel:
        """The causal language model."""
        return self.student.model

    @property
    def block_start(self) -> str:
        """What its blocks count from, `sequence` or `response`: where sampling should start them too."""
        return self.student.block_start

    def sampler(self) -> Sampler:
        """A new sampler, with its own counts."""
        return Sampler(self.model, self.block_size, self.student.mask_id, self.end_ids, self.text.vocabulary)

    @cached_property
    def digest(self) -> str:
        """32 hexadecimal digits: BLAKE2b of the weights, the tokenizer and the block size."""
        digest = hashlib.blake2b(f"{self.text.digest} {self.block_size}".encode(), digest_size=16)
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().contiguous().cpu().numpy().data)
        return digest.hexdigest()

    @property
    def thinks(self) -> bool:
        """Whether the tokenizer knows think blocks."""
        known = self.student.tokenizer.get_vocab()
        return "<think>" in known and "</think>" in known

    def render_chat(self, messages: Sequence[Mapping[str, str]], prefix: str = "") -> str:
        """The text of a chat up to where the next answer starts, or goes on after `prefix`.

        Raises:
            TidecacheError: the tokenizer has no chat template, or the template refuses these messages.
        """
        tokenizer = self.student.tokenizer
        if not tokenizer.chat_template:
            raise TidecacheError(
                f"{self.path}: the tokenizer has no chat template: give a plain `prompt`, or add a chat_template to it"
            )
        try:
            text = tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )
        except Exception as error:  # templates raise what they like
            raise TidecacheError(f"{self.path}: the chat template refuses these messages: {error}") from error
        assert isinstance(text, str)
        if self.thinks and not text.endswith(EMPTY_THINK_BLOCK):
            text += EMPTY_THINK_BLOCK
        return text + prefix

    def encode(self, text: str) -> list[int]:
        """The ids of a rendered prompt, nothing added."""
        return self.text.encode_text(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer without special tokens and think blocks."""
        return THINK_BLOCK.sub("", str(self.student.tokenizer.decode(list(ids), skip_special_tokens=True)))


def open_checkpoint(
    path: str | Path, block_size: int | None = None, device: str | None = None, dtype: str | None = None
) -> Checkpoint:
    """Load a checkpoint for sampling; `tiny` is the embedded one.

    Args:
        path: a folder, a Hugging Face model id, or `tiny`.
        block_size: tokens per block; None: what the checkpoint says.
        device: where to run; None: a GPU if there is one.
        dtype: float32, bfloat16 or float16; None: bfloat16 on a GPU, float32 on a CPU.

    Raises:
        TidecacheError: nothing to load, no mask token, no block size or another one, no such device or dtype.
    """
    transformers_logging.disable_progress_bar()
    student = load_student(embedded_or(str(path)))
    if student.mask_added:
        raise TidecacheError(
            f"{path}: the tokenizer has no mask token, so this is no block-diffusion checkpoint: train one from it "
            "with `tidecache student train`, or name its mask_token in tokenizer_config.json"
        )
    size = student.check_blocks(str(path), block_size)
    if size is None:
        raise TidecacheError(
            f"{path}: the checkpoint does not say its block size: pass --block-size (the paper's is 32)"
        )
    torch.nn.Module.to(student.model, device=_device(device), dtype=_dtype(dtype, device))
    if size < 1:
        raise TidecacheError(f"--block-size: expected at least 1, found {size}")
    return Checkpoint(str(path), student, student.text, size, _end_ids(student))


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise TidecacheError(
            f"--device {name}: cannot be used here ({reason}): take cpu, or cuda with a GPU"
        ) from error
    return device


def _dtype(name: str | None, device: str | None) -> torch.dtype:
    if name is not None and name not in DTYPES:
        raise TidecacheError(f"--dtype: expected one of {', '.join(DTYPES)}, found {name!r}")
    return DTYPES[name or ("float32" if _device(device).type == "cpu" else "bfloat16")]


def _end_ids(student: Student) -> tuple[int, ...]:
    """What ends an answer: the end-of-text tokens, and the special token with which the template ends a turn."""
    found: set[int] = set()
    configured: Any = student.model.generation_config.eos_token_id if student.model.generation_config else None
    found.update(configured if isinstance(configured, list) else [] if configured is None else [int(configured)])
    if student.text.end_id is not None:
        found.add(student.text.end_id)
    if student.text.has_chat_template:
        chat = (Message("user", "x", trainable=False), Message("assistant", "x", trainable=True))
        with contextlib.suppress(IrreproducibleText):
            encoded = student.text.encode(chat, chat=True, cut=False)
            after = encoded.ids_L[encoded.edges[:-1] >= encoded.spans[1][1]].tolist()
            found.update(token for token in after[:1] if student.text.special[token])
    if not found:
        raise TidecacheError(
            f"{student.text.name}: neither tokenizer nor generation_config name an end token: set eos_token in "
            "tokenizer_config.json"
        )
    return tuple(sorted(found))
