"""How fast does a cache feed a training run? (Target: 200,000 scored teacher tokens per second at k = 16 on 2 cores.)

    python bench/reading.py [--codec raw] [--k 16] [--shards 12] [--repeat 3] [--cache FOLDER]

Writes a synthetic cache with the real writer: V = 157184 ids; documents of 640 teacher tokens in chunks of 1 to 3 (85,
10 and 5 %), 64 to a shard, 4 draws each, one context. A filling's ids are Zipf-like over the whole vocabulary, its
log-likelihoods fall as −a·log(rank) with a between 1 and 4. Then reads it in several ways, in turns, best of `--repeat`:

- raw Parquet: `pyarrow.parquet.read_table` of the likelihoods' columns, unchecked, one thread: the ceiling;
- read_shard: the checked reader, all draws of a shard;
- DrawStream: draws in shuffled order, with their NumPy arrays, 4 draws of a document together (each shard is decoded
  once) and 1 (each is decoded once per epoch for a quarter of its draws), with the gold lane alone, and with 0, 1 and 2
  loader processes, which hand batches of 16 draws over as a few large arrays.

A figure counts the teacher tokens of the masked chunks of the draws that came out, per second of wall clock.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from shared import noise
from shared.cache.records import ContextScores, DrawRecord, ShardRange
from shared.cache.vocabulary import TeacherVocabulary
from shared.cache.writer import CacheWriter
from shared.documents import Chunks, Encoded, Message, PreparedDocument, RawDocument
from shared.spec import CaptureSpec, StudentTokenizerSpec, TeacherSpec

VOCABULARY = 157_184
DIGEST = "0" * 32
TOKENS = 640
DOCUMENTS_PER_SHARD = 64
DRAWS = 4
BATCH = 16


def spec_of(k: int, codec: str) -> CaptureSpec:
    teacher = TeacherSpec("synthetic", "None", DIGEST, DIGEST, VOCABULARY, "full", 32, VOCABULARY - 1, False)
    return CaptureSpec(teacher, (StudentTokenizerSpec("student", DIGEST, 1024),), 1024, k=k, codec=codec)


def vocabulary() -> TeacherVocabulary:
    """Distinct ASCII strings of 1 to 4 bytes."""
    digits = "abcdefghijklmnopqrstuvwxyz"
    words = []
    for number in range(VOCABULARY):
        word = ""
        while number >= 0:
            word, number = digits[number % 26] + word, number // 26 - 1
        words.append(word.encode())
    return TeacherVocabulary("synthetic", DIGEST, words, np.zeros(VOCABULARY, np.bool_))


def zipf(rng: np.random.Generator, count: int) -> np.ndarray:
    """Ids whose logarithm is uniform: rank r comes with probability about 1/r."""
    return np.minimum(np.exp(rng.random(count) * np.log(VOCABULARY)).astype(np.int64), VOCABULARY - 1)


def document(rng: np.random.Generator, words: TeacherVocabulary, position: int) -> PreparedDocument:
    ids_L = zipf(rng, TOKENS)
    count_C = rng.choice([1, 2, 3], TOKENS, p=[0.85, 0.1, 0.05])
    stop_C = np.unique(np.minimum(np.cumsum(count_C), TOKENS))
    edges = np.concatenate([[0], np.cumsum([len(words.token_bytes[i]) for i in ids_L])])
    bounds = edges[np.concatenate([[0], stop_C])]
    message = Message("text", words.spell(ids_L.tolist()).decode(), True)
    raw = RawDocument(f"document {position}", (message,), False)
    encoded = Encoded(ids_L, edges, ((0, int(edges[-1])),), np.ones(TOKENS, np.bool_))
    chunks = Chunks(np.zeros(len(stop_C), np.int64), bounds[:-1], bounds[1:])
    return PreparedDocument(raw.key, raw.name, raw.messages, False, False, chunks, encoded, (encoded,))


def draw(
    rng: np.random.Generator, spec: CaptureSpec, position: int, prepared: PreparedDocument, number: int
) -> DrawRecord:
    count = len(prepared.chunks)
    t = noise.timestep(spec.seed, prepared.key, number, spec.epsilon)
    masked_C = noise.mask_chunks(spec.seed, prepared.key, number, t, count)
    split_M = noise.split_chunks(spec.seed, prepared.key, number, spec.demo_ratio, count)[masked_C]
    first_C, stop_C = prepared.teacher.token_ranges(prepared.chunks)
    tokens = int((stop_C - first_C)[masked_C].sum())
    rank_K = np.arange(1, spec.k + 1)
    slope_M = rng.uniform(1.0, 4.0, int(masked_C.sum()))
    mass_MK = rank_K ** -slope_M[:, None] * rng.uniform(0.7, 1.0, (len(slope_M), spec.k))
    mass_MK = -np.sort(-mass_MK, axis=1)
    topk_logp_MK = np.log(mass_MK / (mass_MK.sum(1, keepdims=True) * rng.uniform(1.01, 1.5, (len(slope_M), 1))))
    scores = ContextScores(
        gold_logp_N=-rng.exponential(1.5, tokens).astype(np.float32),
        log_z_MT=np.stack([np.zeros(len(slope_M)), rng.uniform(0.0, 2.0, len(slope_M))], axis=1).astype(np.float32),
        topk_ids=zipf(rng, tokens * spec.k).astype(np.int32),
        topk_logp_MK=topk_logp_MK.astype(np.float32),
    )
    return DrawRecord(position, number, t, masked_C, split_M, {spec.contexts[0]: scores})


def build(folder: Path, shards: int, k: int, codec: str) -> None:
    words, spec, rng = vocabulary(), spec_of(k, codec), np.random.default_rng(0)
    writer = CacheWriter.open(folder, spec, words)
    for number in range(shards):
        positions = range(number * DOCUMENTS_PER_SHARD, (number + 1) * DOCUMENTS_PER_SHARD)
        prepared = [(p, document(rng, words, p)) for p in positions]
        records = [draw(rng, spec, p, d, i) for p, d in prepared for i in range(DRAWS)]
        writer.write_shard(ShardRange(positions.start, positions.stop, 0, DRAWS), prepared, [], records, DIGEST, 4096)
    writer.finish()
