"""Synthetic caches for tests: documents, vocabulary and draws that are a pure function of a few numbers.

The documents are ASCII text; the teacher's tokens have one to three bytes, and chunks one to three tokens. Scores look
like a teacher's: −log p exponential, candidates descending, log Z consistent with them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shared import noise
from shared.cache.records import ContextScores, DrawRecord, ShardRange
from shared.cache.vocabulary import TeacherVocabulary
from shared.cache.writer import CacheWriter
from shared.documents import Chunks, Dropped, Encoded, Message, PreparedDocument, RawDocument
from shared.ragged import ranges
from shared.spec import CONTEXTS, CaptureSpec, StudentTokenizerSpec, TeacherSpec

VOCABULARY = 500
FILLINGS = 64  # of each chunk that have a likelihood of their own, whatever k
TOKENIZER = "t" * 32


def spec(**changes) -> CaptureSpec:
    teacher = TeacherSpec(
        name="synthetic",
        architecture="None",
        weights="w" * 32,
        tokenizer=TOKENIZER,
        vocabulary=VOCABULARY,
        layout="full",
        block_size=32,
        mask_id=VOCABULARY - 1,
        logit_shift=False,
    )
    fields = {"teacher": teacher, "students": (StudentTokenizerSpec("student", "s" * 32, 512),), "length_limit": 512}
    return CaptureSpec(**{**fields, "k": 4, **changes})


def vocabulary() -> TeacherVocabulary:
    """Ids 0-255 are the bytes; the rest longer strings; the last two special."""
    longer = [f"{i:x}".encode()[-3:] for i in range(256, VOCABULARY - 2)]
    special_V = np.arange(VOCABULARY) >= VOCABULARY - 2
    return TeacherVocabulary(
        "synthetic", TOKENIZER, [bytes([i]) for i in range(256)] + longer + [b"<e>", b"<m>"], special_V
    )


def document(position: int, chunks: int = 12) -> PreparedDocument:
    rng = np.random.default_rng([7, position])
    count_C = rng.integers(1, 4, chunks)
    ids_L = rng.integers(97, 97 + 26, count_C.sum())
    ids_L[rng.random(len(ids_L)) < 0.3] += 200  # some of three bytes
    words = vocabulary()
    lengths = np.array([len(words.token_bytes[i]) for i in ids_L])
    edges = np.concatenate([[0], np.cumsum(lengths)])
    bounds = edges[np.concatenate([[0], np.cumsum(count_C)])]
    messages = (Message("text", words.spell(ids_L.tolist()).decode(), True),)
    raw = RawDocument(f"document {position}", messages, False)
    encoded = Encoded(ids_L.astype(np.int64), edges, ((0, int(edges[-1])),), np.ones(len(ids_L), bool))
    zeros_C = np.zeros(chunks, dtype=np.int64)
    return PreparedDocument(
        raw.key,
        raw.name,
        messages,
        False,
        position % 5 == 0,
        Chunks(zeros_C, bounds[:-1], bounds[1:]),
        encoded,
        (encoded,),
    )


def draw(spec_: CaptureSpec, position: int, prepared: PreparedDocument, index: int) -> DrawRecord:
    count = len(prepared.chunks)
    t = noise.timestep(spec_.seed, prepared.key, index, spec_.epsilon)
    masked_C = noise.mask_chunks(spec_.seed, prepared.key, index, t, count)
    split_M = noise.split_chunks(spec_.seed, prepared.key, index, spec_.demo_ratio, count)[masked_C]
    first_C, stop_C = prepared.teacher.token_ranges(prepared.chunks)
    count_M = (stop_C - first_C)[masked_C]
    contexts = {}
    for context in spec_.contexts:
        rng = np.random.default_rng([11, position, index, CONTEXTS.index(context)])
        contexts[context] = scores(rng, spec_, count_M)
    return DrawRecord(position, index, t, masked_C, split_M, contexts)


def scores(rng: np.random.Generator, spec_: CaptureSpec, count_M: np.ndarray) -> ContextScores:
    gold_logp_N = -rng.exponential(1.5, count_M.sum()).astype(np.float32)
    if "topk" not in spec_.lanes:
        return ContextScores(gold_logp_N)
    mass_MF = np.sort(rng.dirichlet(np.ones(FILLINGS + 1) * 0.1, len(count_M))[:, :-1] + 1e-9, axis=1)[:, ::-1]
    logp_MF = np.log(mass_MF / (1 + 1e-6))
    ids = rng.integers(97, 123, FILLINGS * count_M.sum()).astype(
        np.int32
    )  # so that the gold is among them now and then
    ids = ids[ranges(FILLINGS * (np.cumsum(count_M) - count_M), spec_.k * count_M)]  # the k best of them
    rest_M = np.maximum(1.0 - mass_MF.sum(1), 1e-9)
    log_z = [np.log(np.exp(logp_MF / t).sum(1) + rest_M ** (1 / t)) for t in spec_.temperatures]
    log_z_MT = np.stack(log_z, axis=1).astype(np.float32)
    log_z_MT[:, [t == 1.0 for t in spec_.temperatures]] = 0.0
    tail = ()
    if spec_.tail_samples:
        count = spec_.tail_samples * int((count_M == 1).sum())
        tail = (
            rng.integers(0, VOCABULARY - 2, count).astype(np.int32),
            -rng.exponential(9.0, count).astype(np.float32),
        )
    return ContextScores(gold_logp_N, log_z_MT, ids, logp_MF[:, : spec_.k].astype(np.float32), *tail)


def write(writer: CacheWriter, shard: ShardRange, drop: Sequence[int] = (), chunks: int = 12) -> None:
    """Commit one shard; `drop` are positions without a document."""
    positions = range(shard.first_document, shard.document_stop)
    prepared = [(p, document(p, chunks)) for p in positions if p not in drop]
    dropped = [(p, Dropped(f"{p:032x}", f"document {p}", "empty", "nothing")) for p in positions if p in drop]
    records = [draw(writer.spec, p, d, k) for p, d in prepared for k in range(shard.first_draw, shard.draw_stop)]
    writer.write_shard(shard, prepared, dropped, records, f"corpus {shard.documents_name}", writer.spec.batch_tokens)


def build(
    folder, documents: int = 12, per_shard: int = 4, draws: int = 4, drop: Sequence[int] = (2,), **changes
) -> CacheWriter:
    """A complete small cache."""
    writer = CacheWriter.open(folder, spec(**changes), vocabulary())
    for first in range(0, documents, per_shard):
        write(writer, ShardRange(first, min(first + per_shard, documents), 0, draws), drop)
    writer.finish()
    return writer
