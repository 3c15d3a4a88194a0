"""Small caches of real library text with made-up scores, and a random tiny student, for the tests of stage 2."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from shared import noise
from shared.cache import open_cache
from shared.cache.reader import Cache
from shared.cache.records import ContextScores, DrawRecord, ShardRange
from shared.cache.vocabulary import TeacherVocabulary
from shared.cache.writer import CacheWriter
from shared.documents import Message, PreparedDocument, RawDocument
from shared.preparation import Limits, Preparer
from shared.spec import CaptureSpec, StudentTokenizerSpec, TeacherSpec
from shared.stdlib_corpus import documents
from shared.tokenization import TextTokenizer
from tests.conftest import TINY_STUDENT, TINY_TEACHER

K = 4


def texts(count: int, skip: int = 0) -> list[RawDocument]:
    """Documents of the held-out library modules."""
    return [
        RawDocument(name, (Message("text", text, True),), chat=False)
        for name, text in itertools.islice(documents(held_out=True), skip, skip + count)
    ]


def chats(count: int) -> list[RawDocument]:
    """The same text as chats: a module's name asks, its source answers."""
    return [
        RawDocument(
            raw.name, (Message("user", raw.name, False), Message("assistant", raw.messages[0].content, True)), chat=True
        )
        for raw in texts(count)
    ]


def spec_of(teacher: TextTokenizer, student: TextTokenizer, **changes: object) -> CaptureSpec:
    """A spec with both contexts and K candidates."""
    base = CaptureSpec(
        teacher=TeacherSpec(
            "synthetic", "Qwen3ForCausalLM", "0" * 32, teacher.digest, teacher.vocabulary, "full", 32,
            teacher.mask_id or 0, False,
        ),
        students=(StudentTokenizerSpec("tiny", student.digest, 512),),
        length_limit=512,
        contexts=("compdemo", "plain"),
        k=K,
    )  # fmt: skip
    return replace(base, **changes)  # type: ignore[arg-type]


def scores_of(
    spec: CaptureSpec, document: PreparedDocument, masked_C: np.ndarray, rng: np.random.Generator, words: np.ndarray
) -> ContextScores:
    """Random scores. Candidates: the gold with a token replaced by one of `words`, sometimes the gold itself."""
    first_C, stop_C = document.teacher.token_ranges(document.chunks)
    gold = [document.teacher.ids_L[a:b] for a, b, m in zip(first_C, stop_C, masked_C, strict=True) if m]
    tokens = sum(map(len, gold))
    gold_logp_N = -rng.exponential(1.0, tokens).astype(np.float32)
    if "topk" not in spec.lanes:
        return ContextScores(gold_logp_N)
    ids, top = [], np.zeros((len(gold), spec.k), np.float32)
    for m, ids_n in enumerate(gold):
        for filling in range(spec.k):
            other = ids_n.copy()
            if filling or rng.random() < 0.5:
                at = rng.integers(len(other))
                other[at] = rng.choice(words)
            ids.append(other)
        top[m] = np.log(np.sort(rng.dirichlet(np.ones(spec.k + 1))[: spec.k])[::-1] + 1e-4) - 1e-3
    heat = np.array([0.0 if t == 1.0 else 1.5 * (1 - 1 / t) for t in spec.temperatures])
    size_M = np.array([len(g) for g in gold], np.float32)
    return ContextScores(
        gold_logp_N=gold_logp_N,
        log_z_MT=(size_M[:, None] * heat).astype(np.float32).reshape(len(gold), len(heat)),
        topk_ids=np.concatenate(ids or [np.zeros(0)]).astype(np.int32),
        topk_logp_MK=np.minimum(top, 0.0),
    )


def draws_of(
    spec: CaptureSpec, position: int, document: PreparedDocument, numbers: Sequence[int], words: np.ndarray
) -> list[DrawRecord]:
    """The draws of a document, masks and splits as the capture makes them."""
    records = []
    count = len(document.chunks)
    for number in numbers:
        t = noise.timestep(spec.seed, document.key, number, spec.epsilon)
        masked_C = noise.mask_chunks(spec.seed, document.key, number, t, count)
        split_C = noise.split_chunks(spec.seed, document.key, number, spec.demo_ratio, count)
        contexts = {
            x: scores_of(spec, document, masked_C, np.random.default_rng([position, number, i]), words)
            for i, x in enumerate(spec.contexts)
        }
        records.append(DrawRecord(position, number, t, masked_C, split_C[masked_C], contexts))
    return records


def make_cache(
    folder: Path,
    raws: Sequence[RawDocument],
    draws: int = 2,
    per_shard: int = 8,
    draw_ranges: int = 1,
    **changes: object,
) -> Cache:
    """A complete cache with the embedded tokenizers; `draw_ranges`: shards per document range."""
    teacher, student = TextTokenizer.load(TINY_TEACHER), TextTokenizer.load(TINY_STUDENT)
    spec = spec_of(teacher, student, **changes)
    prepared = Preparer(teacher, [student], Limits(512, (512,)), "none").prepare_many(raws)
    kept = [(p, d) for p, d in enumerate(prepared) if isinstance(d, PreparedDocument)]
    assert len(kept) == len(raws)
    vocabulary = TeacherVocabulary("tiny", teacher.digest, teacher.token_bytes, teacher.special)
    words = np.unique(np.concatenate([d.teacher.ids_L for _, d in kept]))
    writer = CacheWriter.open(folder, spec, vocabulary)
    for first in range(0, len(kept), per_shard):
        part = kept[first : first + per_shard]
        for low in range(0, draws, max(1, -(-draws // draw_ranges))):
            numbers = range(low, min(draws, low + -(-draws // draw_ranges)))
            shard = ShardRange(first, first + len(part), numbers.start, numbers.stop)
            records = [r for p, d in part for r in draws_of(spec, p, d, numbers, words)]
            writer.write_shard(shard, part, [], records, "0" * 32, 4096)
    writer.finish()
    return open_cache(folder)


def save_student(folder: Path, layers: int = 2, hidden: int = 64, vocabulary: int = 4096, **config: object) -> Path:
    """A random tiny Qwen3 with the embedded student's tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    shape: dict[str, object] = {
        "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 1024,
        "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    Qwen3ForCausalLM(Qwen3Config(**(shape | config))).save_pretrained(folder)
    return copy_tokenizer(folder)


def copy_tokenizer(folder: Path) -> Path:
    """Put the embedded student's tokenizer into a folder."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY_STUDENT / name, folder / name)
    return folder


def without_mask_token(folder: Path) -> int:
    """Give the mask token of a folder's tokenizer another name and no role; returns the id that a new one would get."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["<|unused|>"] = vocabulary.pop("<|mask|>")
    for token in tokenizer["added_tokens"]:
        token["content"] = token["content"].replace("<|mask|>", "<|unused|>")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["mask_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(vocabulary)


def undeclared_tokenizer(folder: Path, size: int = 700) -> Path:
    """Another byte-level BPE tokenizer, trained on a little of the library: its tokens end elsewhere."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([raw.messages[0].content for raw in texts(30, skip=100)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder


__all__ = [
    "K",
    "chats",
    "copy_tokenizer",
    "make_cache",
    "save_student",
    "spec_of",
    "texts",
    "undeclared_tokenizer",
    "without_mask_token",
]
