"""How many bytes does a cache take for a scored teacher token, how exact is it, and how fast are its codecs?

    python bench/codec.py [--only embedded,zipf,uniform,single] [--documents 64] [--repeat 3]

Targets: gold lane with timestep, masks and splits ≤ 3 bytes; topk lane with gold and log Z ≤ 44 at k = 16, ≤ 160 at k = 64;
KL between the exact and the stored distribution over the k fillings and *other* ≤ 1e-4 nats. Four samples:

- embedded: the embedded teacher's float32 output on library modules (V = 8192, compdemo, 4 draws each), as a capture has it;
- zipf, uniform, single: V = 157184 and documents of 640 teacher tokens in chunks of 1 to 3 (85, 10 and 5 %), 4 draws each. For each
  masked token the probability of rank r is proportional to r^−a, a ~ U(1, 4), the first 64 times U(0.7, 1) and sorted
  again; log Z is that of all V ranks. The ids are drawn without replacement, zipf: so that their logarithm is uniform,
  independently for each token (a real teacher's repeat more); uniform: all alike. Fillings of longer chunks are the k best
  sums, as always. single: uniform, and all chunks of one token, since longer ones take less: the worst that there can be.

Bytes are those of the shard file that the writer makes of the sample, Parquet and zstd included: *topk* are the lane's column
chunks, *all* the whole file with footers. KL: mean and maximum over chunks at T = 1 and 2;
in both distributions *other* is at least 1e-6, and they are renormalised. *error*: mean and maximum of a stored
log-likelihood's error, nats. Speeds are scored tokens per CPU second, best of `--repeat` turns: *encode* from scores to the file's bytes
without compression, *decode* the lane from its column, *write* and *read* the whole file. For the embedded teacher the last lines
say which share of the teacher's own time encoding takes.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import reading
from rich.console import Console
from rich.table import Table

from shared import noise
from shared.cache import codec, format
from shared.cache.encoding import encode_shard
from shared.cache.records import ContextScores, DrawRecord, ShardRange, StoredDocument
from shared.cache.vocabulary import TeacherVocabulary
from shared.documents import PreparedDocument
from shared.preparation import Limits, Preparer
from shared.ragged import ranges
from shared.spec import CaptureSpec
from stage1_teacher.fillings import best_fillings

KS = (4, 8, 16, 32, 64)
DRAWS = 4
GOLD = ("timestep", "masked", "split", "gold_logp")


@dataclass(frozen=True)
class Sample:
    """Documents with their draws' exact scores at the largest k; `teacher_seconds` that the scores took, if known."""

    name: str
    spec: CaptureSpec
    vocabulary: TeacherVocabulary
    documents: list[tuple[int, PreparedDocument]]
    records: list[DrawRecord]
    teacher_seconds: float | None = None

    @property
    def tokens(self) -> int:
        """Scored teacher tokens."""
        return sum(len(r.contexts[self.spec.contexts[0]].gold_logp_N) for r in self.records)

    def of(self, k: int, name: str) -> Sample:
        """The same with the k best fillings under another codec."""
        spec = replace(self.spec, k=k, codec=name)
        stored = {p: format.stored_document(p, d) for p, d in self.documents}
        records = []
        for record in self.records:
            count_M = stored[record.position].token_count_C[record.masked_C]
            contexts = {x: fewer(s, count_M, k) for x, s in record.contexts.items()}
            records.append(replace(record, contexts=contexts))
        return replace(self, spec=spec, records=records)

    def encode(self) -> bytes:
        """The likelihoods file."""
        shard = ShardRange(0, max(p for p, _ in self.documents) + 1, 0, DRAWS)
        return encode_shard(self.spec, shard, self.documents, [], self.records, "0" * 32, 4096).files[1][1]


def fewer(scores: ContextScores, count_M: np.ndarray, k: int) -> ContextScores:
    """The k best fillings."""
    assert scores.topk_ids is not None
    assert scores.topk_logp_MK is not None
    held = scores.topk_logp_MK.shape[1]
    start_M = np.cumsum(count_M) - count_M
    ids = scores.topk_ids[ranges(held * start_M, k * count_M)]
    return dataclasses.replace(scores, topk_ids=ids, topk_logp_MK=scores.topk_logp_MK[:, :k])


# --- samples -----------------------------------------------------------------------------------------------------


def embedded(documents: int) -> Sample:
    from stage1_teacher.compdemo import Subject, plan_draw, records_of, requests_of
    from stage1_teacher.draft import Draft
    from stage1_teacher.options import CaptureOptions

    draft = Draft.of(CaptureOptions(k=max(KS), limit=documents, held_out="none"))
    teacher, spec = draft.load()
    limits = Limits(spec.length_limit, tuple(s.length_limit for s in spec.students))
    preparer = Preparer(draft.tokenizer, draft.students, limits, spec.normal_form)
    prepared = preparer.prepare_many(list(islice(draft.extent.stream(spec, held_out=False), documents)))
    numbered = [(p, d) for p, d in enumerate(prepared) if isinstance(d, PreparedDocument)]
    draws = [plan_draw(spec, Subject(p, d), i) for p, d in numbered for i in range(DRAWS)]
    requests = requests_of(spec, draws)
    begin = time.process_time()
    scores = teacher.score(requests, spec.k)
    seconds = time.process_time() - begin
    words = TeacherVocabulary(
        draft.tokenizer.name, draft.tokenizer.digest, draft.tokenizer.token_bytes, draft.tokenizer.special
    )
    return Sample("embedded", spec, words, numbered, records_of(spec, draws, scores), seconds)


def synthetic(name: str, documents: int) -> Sample:
    rng, words = np.random.default_rng(0), reading.vocabulary()
    spec = reading.spec_of(max(KS), "raw")
    lengths = (1.0,) if name == "single" else (0.85, 0.1, 0.05)
    numbered = [(p, reading.document(rng, words, p, lengths)) for p in range(documents)]
    records = [synthetic_draw(rng, spec, name, p, d, i) for p, d in numbered for i in range(DRAWS)]
    return Sample(name, spec, words, numbered, records)


def synthetic_draw(
    rng: np.random.Generator, spec: CaptureSpec, ids: str, position: int, prepared: PreparedDocument, number: int
) -> DrawRecord:
    chunks = len(prepared.chunks)
    t = noise.timestep(spec.seed, prepared.key, number, spec.epsilon)
    masked_C = noise.mask_chunks(spec.seed, prepared.key, number, t, chunks)
    split_C = noise.split_chunks(spec.seed, prepared.key, number, spec.demo_ratio, chunks)
    first_C, stop_C = prepared.teacher.token_ranges(prepared.chunks)
    count_M = (stop_C - first_C)[masked_C]
    tokens = int(count_M.sum())
    ids_NK = np.stack([distinct(rng, ids) for _ in range(tokens)]) if tokens else np.zeros((0, max(KS)), np.int64)
    logp_NK, log_z_NT = ranked(rng, tokens, spec.temperatures)
    flat, logp_MK = best_fillings(ids_NK, logp_NK, count_M)
    start_M = np.cumsum(count_M) - count_M
    log_z_MT = np.add.reduceat(log_z_NT, start_M, axis=0) if tokens else np.zeros((0, 2))
    scores = ContextScores(
        gold_logp_N=-rng.exponential(1.5, tokens).astype(np.float32),
        log_z_MT=log_z_MT.astype(np.float32),
        topk_ids=flat,
        topk_logp_MK=logp_MK.astype(np.float32),
    )
    return DrawRecord(position, number, t, masked_C, split_C[masked_C], {spec.contexts[0]: scores})


def distinct(rng: np.random.Generator, ids: str) -> np.ndarray:
    """The ids of a token's 64 likeliest, in order."""
    found = np.zeros(0, np.int64)
    while len(found) < max(KS):
        more = reading.zipf(rng, 256) if ids == "zipf" else rng.integers(0, reading.VOCABULARY, 256)
        found = np.concatenate([found, more])
        found = found[np.sort(np.unique(found, return_index=True)[1])]
    return found[: max(KS)]


def ranked(rng: np.random.Generator, tokens: int, temperatures: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """(logp_NK, log_z_NT) of power laws over all V ranks; the ranks beyond the first 64 by their integral."""
    slope_N = rng.uniform(1.0, 4.0, tokens)
    rank_K = np.arange(1, max(KS) + 1)
    weight_NK = -np.sort(-(rank_K ** -slope_N[:, None]) * rng.uniform(0.7, 1.0, (tokens, len(rank_K))), axis=1)

    def total(t: float) -> np.ndarray:
        power_N = 1.0 - slope_N / t
        first, last = len(rank_K) + 0.5, reading.VOCABULARY + 0.5
        with np.errstate(divide="ignore", invalid="ignore"):
            tail_N = (last**power_N - first**power_N) / power_N
        return (weight_NK ** (1 / t)).sum(1) + np.where(np.abs(power_N) < 1e-9, np.log(last / first), tail_N)

    log_NT = np.stack([np.log(total(t)) - np.log(total(1.0)) / t for t in temperatures], axis=1)
    return np.log(weight_NK) - np.log(total(1.0))[:, None], log_NT


# --- measures ----------------------------------------------------------------------------------------------------


def kls(exact: ContextScores, stored: ContextScores, temperature: float, column: int) -> np.ndarray:
    """KL(exact ‖ stored) over the fillings and *other* by chunk, nats."""
    sides = []
    for scores in (exact, stored):
        assert scores.topk_logp_MK is not None
        assert scores.log_z_MT is not None
        log_z_M1 = scores.log_z_MT[:, [column]].astype(np.float64)
        p_MK = np.exp(scores.topk_logp_MK.astype(np.float64) / temperature - log_z_M1)
        p_ME = np.concatenate([np.maximum(p_MK, 1e-300), np.maximum(1 - p_MK.sum(1, keepdims=True), 1e-6)], axis=1)
        sides.append(p_ME / p_ME.sum(1, keepdims=True))
    return np.asarray((sides[0] * (np.log(sides[0]) - np.log(sides[1]))).sum(1))


def column_bytes(data: bytes, names: Sequence[str]) -> int:
    """Bytes in the file of the columns that end so."""
    metadata = pq.ParquetFile(pa.BufferReader(data)).metadata
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    columns = [g.column(i) for g in groups for i in range(g.num_columns)]
    return sum(c.total_compressed_size for c in columns if c.path_in_schema.split(".")[0].endswith(tuple(names)))


def rate(tokens: int, work: Callable[[], object], repeat: int) -> float:
    """Tokens per CPU second of one thread, the best turn."""
    best = float("inf")
    for _ in range(repeat):
        begin = time.thread_time()
        work()
        best = min(best, time.thread_time() - begin)
    return tokens / max(best, 1e-9)


def sizes(sample: Sample) -> Table:
    table = Table(title=f"{sample.name}: {sample.tokens:,} scored tokens, V = {sample.spec.teacher.vocabulary}")
    headings = [
        "k",
        "codec",
        "topk",
        "+ gold + log Z",
        "gold, t, masks, splits",
        "all",
        "KL, T = 1",
        "KL, T = 2",
        "error",
    ]
    for heading in headings:
        table.add_column(heading, justify="right")
    context = sample.spec.contexts[0]
    for k in KS:
        for name in ("raw", "packed"):
            cut = sample.of(k, name)
            data = cut.encode()
            topk = column_bytes(data, [c.removeprefix(context) for c in codec.columns_of(cut.spec, context)])
            gold = column_bytes(data, ("gold_logp",))
            lane = column_bytes(data, GOLD)
            pairs = [(r.contexts[context], format.stored_scores(cut.spec, r.contexts[context])) for r in cut.records]
            hot = cut.spec.temperatures.index(2.0)
            found = [np.concatenate([kls(*p, t, c) for p in pairs]) for t, c in ((1.0, 0), (2.0, hot))]
            errors = np.concatenate([np.abs(a.topk_logp_MK - b.topk_logp_MK).reshape(-1) for a, b in pairs])
            table.add_row(
                str(k), name,
                *(f"{size / cut.tokens:.1f}" for size in (topk, topk + gold)), f"{lane / cut.tokens:.2f}",
                f"{len(data) / cut.tokens:.1f}",
                *(f"{kl.mean():.1e} ≤ {kl.max():.1e}" for kl in found), f"{errors.mean():.4f} ≤ {errors.max():.3f}",
            )  # fmt: skip
    return table


def speeds(sample: Sample, repeat: int) -> Table:
    table = Table(title=f"{sample.name}: scored tokens per CPU second")
    for heading in ("k", "codec", "encode", "decode", "write", "read", "of the teacher's time"):
        table.add_column(heading, justify="right")
    for k in (16, 64):
        for name in ("raw", "packed"):
            cut = sample.of(k, name)
            rates = speed(cut, repeat)
            share = ""
            if sample.teacher_seconds is not None:
                share = f"{sample.tokens / rates['write'] / sample.teacher_seconds:.1%}"
            table.add_row(str(k), name, *(f"{rates[n]:,.0f}" for n in ("encode", "decode", "write", "read")), share)
    return table


def speed(cut: Sample, repeat: int) -> dict[str, float]:
    spec, context = cut.spec, cut.spec.contexts[0]
    documents = {p: format.stored_document(p, d) for p, d in cut.documents}
    by_key: dict[str, StoredDocument] = {d.key: d for d in documents.values()}
    exact = [codec.TopK.of(r.contexts[context]) for r in cut.records]
    counts = [documents[r.position].token_count_C[r.masked_C] for r in cut.records]
    chunks, tokens = [len(n) for n in counts], [int(n.sum()) for n in counts]
    stored = codec.stored(spec, exact)
    columns = pa.table(codec.to_columns(spec, context, stored, counts))
    data = cut.encode()

    def encode() -> None:
        codec.to_columns(spec, context, codec.stored(spec, exact), counts)

    def read() -> None:
        table = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read(use_threads=False)
        format.draws_of(table, spec, by_key, context, cut.vocabulary)

    return {
        "encode": rate(cut.tokens, encode, repeat),
        "decode": rate(cut.tokens, lambda: codec.of_columns(spec, context, columns, chunks, tokens), repeat),
        "write": rate(cut.tokens, cut.encode, repeat),
        "read": rate(cut.tokens, read, repeat),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="embedded,zipf,uniform,single", help="samples, parted by commas")
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    console = Console(width=max(150, Console().width))
    for name in options.only.split(","):
        sample = embedded(options.documents) if name == "embedded" else synthetic(name, options.documents)
        console.print(sizes(sample))
        console.print(speeds(sample, options.repeat))


if __name__ == "__main__":
    main()
