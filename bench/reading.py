"""How fast does a cache feed a training run? (Target: 200,000 scored teacher tokens per second at k = 16 on 2 cores.)

    python bench/reading.py [--codec raw] [--k 16] [--shards 12] [--repeat 3] [--cache FOLDER]

Writes a synthetic cache with the real writer (kept in FOLDER, if given): V = 157184 ids; documents of 640 teacher tokens
in chunks of 1 to 3 (85, 10 and 5 %), 64 to a shard, 4 draws each, one context. A filling's ids are Zipf-like over the
whole vocabulary, its log-likelihoods fall as −a·log(rank) with a between 1 and 4. Then reads it, in turns:

- raw Parquet: all likelihoods columns by pyarrow alone, unchecked, one thread: the ceiling;
- read_shard: the checked reader, all draws of a shard;
- DrawStream: draws in shuffled order with their NumPy arrays, over two passes of all draws: 4 draws of a document together
  (a shard is decoded once in a pass), 1 at a time (it is decoded once for each quarter of its draws), the gold lane
  alone; and through a torch DataLoader with 0, 1 and 2 processes, in batches of 16 draws as a few large tensors. Loader
  processes share the rows and not the reading: each decodes every shard.

A figure counts the teacher tokens of the masked chunks of the draws that came out: per second of wall clock, best of
`--repeat` turns, and per second of CPU time of the process and its children in that turn.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from shared import noise
from shared.cache import open_cache
from shared.cache.reader import Cache
from shared.cache.records import ContextScores, Draw, DrawRecord, ShardRange
from shared.cache.stream import DrawStream
from shared.cache.vocabulary import TeacherVocabulary
from shared.cache.writer import CacheWriter
from shared.documents import Chunks, Encoded, Message, PreparedDocument, RawDocument
from shared.spec import CODECS, CaptureSpec, StudentTokenizerSpec, TeacherSpec

VOCABULARY = 157_184
DIGEST = "0" * 32
TOKENS = 640
DOCUMENTS_PER_SHARD = 64
DRAWS = 4
BATCH = 16
PASSES = 2  # so that what is read ahead at the end and never used weighs little


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


def document(
    rng: np.random.Generator, words: TeacherVocabulary, position: int, lengths: Sequence[float] = (0.85, 0.1, 0.05)
) -> PreparedDocument:
    """`lengths`: shares of the chunks of 1, 2, … teacher tokens."""
    ids_L = zipf(rng, TOKENS)
    count_C = rng.choice(np.arange(1, len(lengths) + 1), TOKENS, p=lengths)
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


# --- reading it --------------------------------------------------------------------------------------------------


def tokens_of(draws: Sequence[Draw]) -> int:
    return sum(len(draw.scores[draw.context].gold_logp_N) for draw in draws)


def raw_parquet(cache: Cache) -> int:
    for receipt in cache.shards:
        pq.ParquetFile(cache.path / receipt.likelihoods[0].path).read(use_threads=False)
    return cache.manifest.totals.scored_tokens


def whole_shards(cache: Cache) -> int:
    return sum(tokens_of(cache.read_shard(number).draws) for number in range(len(cache.shards)))


def stream(cache: Cache, together: int, topk: bool = True) -> int:
    draws = DrawStream([cache], together=together, topk=topk)
    return sum(tokens_of([draws[number]]) for number in range(PASSES * cache.manifest.totals.draws))


class Items(Dataset[Draw]):
    """The items of some passes."""

    def __init__(self, cache: Cache, together: int) -> None:
        self.draws = DrawStream([cache], together=together)
        self.count = PASSES * cache.manifest.totals.draws

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Draw:
        return self.draws[number]


def tensors(draws: Sequence[Draw]) -> list[torch.Tensor]:
    scores = [draw.scores[draw.context] for draw in draws]
    columns = [[s.gold_logp_N for s in scores], [s.topk_ids for s in scores], [s.topk_logp_MK for s in scores]]
    return [torch.from_numpy(np.concatenate(column)) for column in columns]


def loader(cache: Cache, together: int, workers: int) -> int:
    batches = DataLoader(Items(cache, together), BATCH, collate_fn=tensors, num_workers=workers)
    return sum(len(gold_logp_N) for gold_logp_N, *_ in batches)


def cpu_seconds() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def measure(ways: dict[str, Callable[[], int]], repeat: int) -> dict[str, tuple[float, float]]:
    """By name: tokens per second of wall clock, best of all turns, and per second of CPU time, likewise."""
    best = dict.fromkeys(ways, (0.0, 0.0))
    for _ in range(repeat):
        for name, way in ways.items():
            begin, cpu = time.perf_counter(), cpu_seconds()
            tokens = way()
            rates = (tokens / (time.perf_counter() - begin), tokens / (cpu_seconds() - cpu))
            best[name] = (max(best[name][0], rates[0]), max(best[name][1], rates[1]))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codec", choices=CODECS, default=CODECS[0])
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--shards", type=int, default=12)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--cache", type=Path, help="where the synthetic cache is kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.cache or Path(temporary) / "cache"
        if not folder.exists():
            build(folder, options.shards, options.k, options.codec)
        cache = open_cache(folder)
        cache.vocabulary()
        ways: dict[str, Callable[[], int]] = {
            "raw Parquet, unchecked": lambda: raw_parquet(cache),
            "read_shard": lambda: whole_shards(cache),
            f"DrawStream, {DRAWS} together": lambda: stream(cache, DRAWS),
            "DrawStream, 1 together": lambda: stream(cache, 1),
            "DrawStream, 1 together, gold": lambda: stream(cache, 1, topk=False),
        }
        for together in (DRAWS, 1):
            for workers in (0, 1, 2):
                name = f"DataLoader ({workers}), {together} together"
                ways[name] = lambda together=together, workers=workers: loader(cache, together, workers)  # type: ignore[misc]
        found = measure(ways, options.repeat)
        totals = cache.manifest.totals
        table = Table(
            title=f"codec {cache.spec.codec}, k = {cache.spec.k}: {totals.scored_tokens:,} tokens in {totals.draws:,} "
            f"draws, {totals.size_bytes / totals.scored_tokens:.1f} bytes per token, {len(cache.shards)} shards"
        )
        for heading in ("read by", "tokens/s", "tokens/CPU s", "of raw Parquet"):
            table.add_column(heading, justify="left" if heading == "read by" else "right")
        ceiling = found["raw Parquet, unchecked"][0]
        for name, (rate, cpu_rate) in found.items():
            table.add_row(name, f"{rate:,.0f}", f"{cpu_rate:,.0f}", f"{rate / ceiling:.2f}")
        Console().print(table)


if __name__ == "__main__":
    main()
