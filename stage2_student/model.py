"""Loading and saving students: any Hugging Face causal LM, its tokenizer, a mask token, and the block size (DESIGN §8).

A checkpoint is a plain Hugging Face folder (config, safetensors, tokenizer) plus `tidecache.json`, which says with what
block size, mask token, recipe and cache it was trained; other programs need not know it. A base without a mask token
gets one, initialised with the mean of all embeddings; checkpoints of dLLM and TIDE (`families`) have a trained one, by
the name `<|mask|>`, that their tokenizer need not declare.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from shared.errors import TidecacheError
from shared.tokenization import TextTokenizer
from stage2_student import adapters, attention, families
from stage2_student.batch import Batch
from stage2_student.config import BLOCK_STARTS, METADATA_FILE, TrainConfig
from stage2_student.head import Head
from stage2_student.losses import BatchLosses, ChunkAnswers, batch_losses, chunk_answers

MASK_TOKEN = "<|mask|>"


@dataclass(frozen=True)
class Student:
    """A loaded student. `text` is its tokenizer before any mask token was added: what a cache declares."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    text: TextTokenizer
    mask_id: int
    pad_id: int
    mask_added: bool
    metadata: Mapping[str, Any]  # of `tidecache.json`, empty for a foreign base

    @property
    def block_size(self) -> int | None:
        """Tokens per block that it was trained with; None if it does not say."""
        size = self.metadata.get("block_size")
        return size if isinstance(size, int) else None

    @property
    def block_start(self) -> str:
        """What its blocks count from, `sequence` or `response`; `sequence`, as the paper trains, if it does not say."""
        start = self.metadata.get("block_start")
        return start if start in BLOCK_STARTS else BLOCK_STARTS[0]

    def check_blocks(self, name: str, block_size: int | None, block_start: str | None = None) -> int | None:
        """The block size to run with: what is asked, or what it was trained with; None if neither says.

        Raises:
            TidecacheError: size or start differ from what it was trained with.
        """
        start = self.block_start if "block_start" in self.metadata else None
        for field, trained, asked in (
            ("block_size", self.block_size, block_size),
            ("block_start", start, block_start),
        ):
            if asked is not None and trained is not None and asked != trained:
                raise TidecacheError(
                    f"{name}: trained with {field.replace('_', ' ')} {trained}, asked for {asked}: its blocks would start "
                    f"and end where it never saw any; leave --{field.replace('_', '-')} out (and out of a recipe), or, to "
                    f"train it anew with another, take {field} out of its {METADATA_FILE}"
                )
        return self.block_size if block_size is None else block_size


def load_student(path_or_id: str | Path, attention_implementation: str | None = None) -> Student:
    """Load a base or a checkpoint in float32, ready for training; None: the implementation that the family needs.

    Raises:
        TidecacheError: nothing to load there, no safetensors, or an architecture that block diffusion cannot use.
    """
    text = TextTokenizer.load(path_or_id)
    name = str(path_or_id)
    try:
        config, from_dllm = families.plain_config(name)
        tokenizer = AutoTokenizer.from_pretrained(name, config=config)
        model = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            attn_implementation=attention_implementation or families.attention_implementation(config),
            use_safetensors=True,
        )
    except (OSError, ValueError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TidecacheError(
            f"no student could be loaded from {name}: expected a folder or a Hugging Face model id with config.json "
            f"and safetensors weights of a causal language model, found: {reason}"
        ) from error
    attention.check_attention(model)
    mask_id, added = _mask_token(model, tokenizer, trained=from_dllm)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else text.end_id
    rows = input_and_output(model)[0].num_embeddings
    if max(mask_id, text.vocabulary - 1) >= rows:
        raise TidecacheError(
            f"{name}: the tokenizer has ids up to {max(mask_id, text.vocabulary - 1)}, the model embeddings for "
            f"{rows}: the two do not belong together"
        )
    return Student(
        model=model,
        tokenizer=tokenizer,
        text=text,
        mask_id=mask_id,
        pad_id=mask_id if pad_id is None else pad_id,
        mask_added=added,
        metadata=load_metadata(Path(name)),
    )


def input_and_output(model: PreTrainedModel) -> tuple[nn.Embedding, nn.Linear]:
    """The embedding and the head; where they are tied they share one weight.

    Raises:
        TidecacheError: the model has no linear head.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise TidecacheError(f"{type(model).__name__} has no linear head: take a causal LM, such as Qwen3ForCausalLM")
    return embedding, head


def _mask_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, trained: bool = False) -> tuple[int, bool]:
    """(mask id, whether it is new). A new one gets the mean of all embeddings; spare rows of the model are used.

    `trained`: dLLM's checkpoints learnt `<|mask|>` in the row after their tokenizer's last, and add it as they load.
    """
    if tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id), False
    before = len(tokenizer)
    known = MASK_TOKEN in tokenizer.get_vocab()
    tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
    mask_id = tokenizer.convert_tokens_to_ids(MASK_TOKEN)
    assert isinstance(mask_id, int)
    if known or (trained and mask_id < input_and_output(model)[0].num_embeddings):
        return mask_id, False
    if len(tokenizer) > input_and_output(model)[0].num_embeddings:
        # Mean initialisation is done below, the same for spare rows and new ones.
        level = logging.getLogger("transformers").level
        logging.getLogger("transformers").setLevel(logging.ERROR)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        logging.getLogger("transformers").setLevel(level)
    with torch.no_grad():
        for weight_VD in {id(module.weight): module.weight for module in input_and_output(model)}.values():
            weight_VD[mask_id] = weight_VD[:before].mean(dim=0)
    return mask_id, True


def load_metadata(folder: Path) -> Mapping[str, Any]:
    """The checkpoint folder's `tidecache.json`; empty where there is none.

    Raises:
        TidecacheError: it is not JSON.
    """
    path = folder / METADATA_FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TidecacheError(f"{path}: expected JSON as `tidecache student train` writes it, found: {error}") from error
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class TrainedFrom:
    """A cache as a checkpoint names it: fingerprint of its spec, digest of its content, and its weight in the mixture."""

    fingerprint: str
    content: str
    weight: float


def save_student(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    config: TrainConfig,
    trained: Mapping[str, Any],
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint folder; `trained` says how and from what, for `tidecache.json`; `state`: weights gathered elsewhere.

    Raises:
        OSError: the disk is full or refuses (safetensors raises an error of its own for it).
    """
    folder.mkdir(parents=True, exist_ok=True)
    if adapters.has_adapters(model):
        adapters.save_adapter(model, folder / adapters.FOLDER)
        state = adapters.merged_state(model)
    model.save_pretrained(folder, state_dict=None if state is None else dict(state))
    tokenizer.save_pretrained(folder)
    metadata = {
        "format": 1,
        "block_size": config.block_size,
        "block_start": config.block_start,
        "mask_token": tokenizer.mask_token,
        **trained,
    }
    (folder / METADATA_FILE).write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def restore_student(model: PreTrainedModel, folder: Path) -> None:
    """Put the weights of a run's checkpoint folder into its model in place: the adapters where it has some, else all.

    Raises:
        TidecacheError: the folder holds no such weights.
    """
    if adapters.has_adapters(model):
        adapters.load_adapter(model, folder)
        return
    try:
        model.load_state_dict(load_student(folder).model.state_dict())
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or [""])[-1].strip()
        raise TidecacheError(
            f"{folder}: its weights are not those of a student like this base ({reason}): resume with the same --base"
        ) from error


class TrainableStudent(nn.Module):
    """A causal LM whose forward pass is one batch's losses.

    Everything happens within one forward call, so that wrappers that watch it (DDP, FSDP) see all of it.
    """

    def __init__(self, model: PreTrainedModel, config: TrainConfig) -> None:
        super().__init__()
        self.model = model
        self.train_config = config
        head = Head.of(model)  # refuses a head that cannot be reproduced, before any training
        self._after = (head.soft_cap, head.scale)

    @property
    def config(self) -> Any:
        """The language model's configuration, where reporting integrations look for it."""
        return self.model.config

    def forward(self, batch: Batch, progress: float) -> BatchLosses:
        """Losses of a batch; `progress` is the share of the optimiser steps done."""
        hidden_ND = masked_hidden(self.model, batch, self.train_config.block_size)
        return batch_losses(hidden_ND, self._head(), batch, self.train_config, progress)

    @torch.no_grad()
    def answers(self, batch: Batch) -> ChunkAnswers:
        """The student's answers to a batch, for evaluation; FSDP must be told that this is a forward pass, too."""
        return chunk_answers(masked_hidden(self.model, batch, self.train_config.block_size), self._head(), batch)

    @property
    def _no_split_modules(self) -> Any:
        """Names of the layer classes, where FSDP looks for what to shard one by one."""
        return self.model._no_split_modules

    def tie_weights(self) -> None:
        """Passed on to the model; accelerate asks for it after it has moved weights into FSDP2's shards."""
        self.model.tie_weights()

    def _head(self) -> Head:
        """Made anew for each pass: wrappers may replace the parameters; what follows the product stays."""
        linear = self.model.get_output_embeddings()
        return Head(linear.weight, getattr(linear, "bias", None), *self._after)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Passed on to the model."""
        self.model.gradient_checkpointing_enable(**options)


def masked_hidden(model: PreTrainedModel, batch: Batch, block_size: int) -> Tensor:
    """hidden_ND at the batch's masked tokens."""
    return attention.masked_hidden(model, batch.noisy_BL, batch.clean_BL, batch.groups, block_size)
