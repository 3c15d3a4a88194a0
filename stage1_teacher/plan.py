"""`tidecache teacher plan`: what a capture will hold, take and unlock, computed from a sample (`plan_sample`).

Every part of a cache's size is scaled by what it depends on: columns of likelihoods by scored tokens, chunks, rows or
documents; documents files by the text that the length limit leaves; footers by files and row groups; the vocabulary by
caches (the held-out slice is one of its own). What was prepared whole enters exactly, so a small corpus leaves only the
teacher's part to be estimated. The error is twice the standard error of the two samples that the size rests on, shards
prepared and documents scored, and 1 % for what scaling itself neglects.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared.cache import format
from shared.cache.inspect import lane_of
from shared.cache.parquet import ROW_GROUP_ROWS, encode
from shared.cache.vocabulary import TeacherVocabulary
from shared.spec import FORMAT_VERSION, CaptureSpec
from shared.tokenization import TextTokenizer
from shared.unlocks import Unlock, unlocks
from stage1_teacher.capture import Extent
from stage1_teacher.draft import Draft
from stage1_teacher.plan_sample import GROUPS, RUN_DRAWS, Run, Scan, Scored, prepare_runs, scan, score_sample
from stage1_teacher.shards import ShardMaker

NEGLECTED = 0.01  # relative error of the scaling itself
LEAST_SPREAD, MOST_SPREAD = 0.15, 1.0  # relative; no machine keeps its speed better for hours
BUSY = 1.0  # processes per CPU that want to run, above which others take time from this one
UNIT_OF_COLUMN = {"document": "documents", "position": "rows", "draw": "rows", "timestep": "rows", "masked": "chunks"}


@dataclass(frozen=True)
class Plan:
    """What a capture will come to. Bytes of data files as in the manifests' `size_bytes`, held-out slice included;
    `error`: of the bytes, relative, at about 95 %. Seconds are (least, most).
    """

    spec: CaptureSpec
    complete: bool  # the corpus was read to its end; else everything is of the documents read
    documents: int
    held_out: int
    dropped: int
    draws: int
    masked_chunks: int
    scored_tokens: int  # in each context
    shards: int
    largest_shard: int  # bytes
    lane_bytes: Mapping[str, int]
    error: float
    seconds: tuple[float, float]
    tokens_per_second: float  # over all contexts
    measured: Mapping[str, float]
    unlocks: Sequence[Unlock]

    @property
    def size_bytes(self) -> int:
        """All data files."""
        return sum(self.lane_bytes.values())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            **plain,
            "spec": self.spec.to_json(),
            "fingerprint": self.spec.fingerprint,
            "size_bytes": self.size_bytes,
            "lane_bytes": dict(self.lane_bytes),
            "measured": dict(self.measured),
            "unlocks": [
                {"recipe": u.recipe, "unlocked": u.unlocked, "missing": list(u.missing), "advice": u.advice}
                for u in self.unlocks
            ],
        }


def make_plan(draft: Draft, documents: int) -> Plan:
    """Scan, prepare, score and add up; `documents` go through the teacher, which is loaded after the scan.

    Raises:
        TidecacheError: whatever a capture with these options would raise on the sample.
    """
    extent, clock = draft.extent, [time.monotonic()]
    found = scan(extent, draft.spec)
    clock.append(time.monotonic())
    teacher, spec = draft.load()
    clock.append(time.monotonic())
    maker = ShardMaker(spec, draft.tokenizer, draft.students)
    runs = prepare_runs(extent, spec, maker, found)
    clock.append(time.monotonic())
    scored = score_sample(teacher, spec, maker, extent, runs, documents)
    clock.append(time.monotonic())
    steps = zip(("scan", "load", "prepare", "score"), np.diff(clock).tolist(), strict=True)
    measured = {
        **{f"{name}_seconds": round(seconds, 3) for name, seconds in steps},
        "documents_prepared": sum(r.stop - r.first for r in runs),
        "documents_scored": scored.documents,
        "draws_scored": scored.draws,
        "load_average": _load_average(),
        "cpu_share": _cpu_share(scored),
    }
    return _add_up(spec, extent, found, runs, scored, _vocabulary_bytes(draft.tokenizer), measured)


def _vocabulary_bytes(tokenizer: TextTokenizer) -> int:
    vocabulary = TeacherVocabulary(tokenizer.name, tokenizer.digest, tokenizer.token_bytes, tokenizer.special)
    table = format.vocabulary_table(vocabulary)
    return len(encode(table, {"format": FORMAT_VERSION, "name": vocabulary.name, "tokenizer": vocabulary.digest}))


def _load_average() -> float:
    """Processes that want to run, per CPU that there is; 0 where the system doesn't say."""
    return round(os.getloadavg()[0] / (os.cpu_count() or 1), 2) if hasattr(os, "getloadavg") else 0.0


def _cpu_share(scored: Scored) -> float:
    """The share of its threads' time that a teacher on CPUs really ran; 1 where it runs elsewhere."""
    import torch

    if torch.cuda.is_available():
        return 1.0
    wanted = sum(g.seconds for g in scored.groups) * torch.get_num_threads()
    return round(min(1.0, sum(g.cpu_seconds for g in scored.groups) / wanted), 3)


@dataclass(frozen=True)
class _Scale:
    """From the runs to the whole: `reach` as in `Slice.reach`, of everything and of each run."""

    whole: float
    run_R: np.ndarray[Any, np.dtype[np.float64]]
    share: float  # of all shards, that are runs; 1 only if the runs are all of them in full

    def up(self, counts: Sequence[float]) -> float:
        """A total from the runs' counts, in proportion to reach."""
        return float(sum(counts)) * self.whole / float(self.run_R.sum())

    def error(self, counts: Sequence[float]) -> float:
        """Relative standard error of `up`: that of a ratio estimate from some of the shards."""
        if self.share == 1.0:
            return 0.0
        count_R = np.array(counts, dtype=np.float64)
        rest_R = count_R - count_R.sum() / self.run_R.sum() * self.run_R
        variance = rest_R.var(ddof=1) if len(count_R) > 1 else count_R.sum() ** 2  # one shard tells of no other
        return float(np.sqrt(len(count_R) * variance * (1 - min(self.share, 0.99))) / count_R.sum())


def _add_up(
    spec: CaptureSpec,
    extent: Extent,
    found: Scan,
    runs: Sequence[Run],
    scored: Scored,
    vocabulary_bytes: int,
    measured: Mapping[str, float],
) -> Plan:
    cap = spec.length_limit * sum(r.text_bytes for r in runs) / sum(r.text_tokens for r in runs)
    shards = [(held_out, *shard) for held_out, s in found.slices.items() for shard in s.shards(extent)]
    reach_S = [found.slices[held_out].reach(first, stop, cap) for held_out, first, stop in shards]
    run_R = np.array([found.slices[r.held_out].reach(r.first, r.stop, cap) for r in runs])
    whole = {(r.held_out, r.first, r.stop) for r in runs} == set(shards)
    scale = _Scale(sum(reach_S), run_R, len(runs) / len(shards) if not whole else 1.0)
    positions = sum(stop - first for _, first, stop in shards)
    kept_share = sum(len(r.subjects) for r in runs) / sum(r.stop - r.first for r in runs)
    documents = round(positions * kept_share)
    more_draws = extent.draws / min(extent.draws, RUN_DRAWS)
    tokens = scale.up([r.scored_tokens for r in runs]) * more_draws
    totals = {
        "documents": float(documents),
        "rows": float(documents * extent.draws),
        "chunks": scale.up([r.chunks for r in runs]) * extent.draws,
        "tokens": tokens,
    }
    lanes = _lane_bytes(extent, scale, runs, scored, totals, shards, kept_share)
    lanes = {"vocabulary": vocabulary_bytes * len(found.slices), **lanes}
    data_bytes = sum(lanes.values()) - lanes["vocabulary"]
    token_error, byte_error = scale.error([r.scored_tokens for r in runs]), _byte_error(scored, documents)
    speed = sum(g.positions for g in scored.groups) / sum(g.seconds for g in scored.groups)
    return Plan(
        spec=spec,
        complete=found.complete,
        documents=documents,
        held_out=round(kept_share * sum(stop - first for held_out, first, stop in shards if held_out)),
        dropped=positions - documents,
        draws=documents * extent.draws,
        masked_chunks=round(scale.up([r.masked_chunks for r in runs]) * more_draws),
        scored_tokens=round(tokens),
        shards=len(shards),
        largest_shard=round(data_bytes * max(reach_S) / sum(reach_S)),
        lane_bytes={name: round(size) for name, size in lanes.items()},
        error=2 * math.hypot(token_error, byte_error) + NEGLECTED,
        seconds=_seconds(spec, scored, tokens, scale.up([r.seconds for r in runs]), measured),
        tokens_per_second=speed,
        measured=measured,
        unlocks=unlocks(spec),
    )


def _lane_bytes(
    extent: Extent,
    scale: _Scale,
    runs: Sequence[Run],
    scored: Scored,
    totals: Mapping[str, float],
    shards: Sequence[tuple[bool, int, int]],
    kept_share: float,
) -> dict[str, float]:
    """Bytes by lane, named as `cache inspect` names them; footers of documents files go with these, as there."""
    sample = {
        "documents": scored.rows / scored.draws,
        "rows": scored.rows,
        "chunks": scored.chunks,
        "tokens": scored.scored_tokens,
    }
    footers = float(np.mean([r.footer_bytes for r in runs])) * len(shards)
    lanes = {"documents": scale.up([r.document_bytes for r in runs]) + footers}
    for column, size in scored.column_bytes.items():
        unit = UNIT_OF_COLUMN.get(column, "tokens")
        name = lane_of(column)
        lanes[name] = lanes.get(name, 0.0) + size * totals[unit] / max(sample[unit], 1)
    groups = [
        max(1, math.ceil((stop - first) * kept_share * extent.draws / ROW_GROUP_ROWS)) for _, first, stop in shards
    ]
    lanes["footers"] = scored.footer_bytes * len(shards) + scored.group_bytes * sum(n - 1 for n in groups)
    return lanes


def _byte_error(scored: Scored, documents: int) -> float:
    """Relative standard error of the columns' bytes, from how far the groups lie from a line over their positions."""
    size_G = np.array([g.size_bytes for g in scored.groups], dtype=np.float64)
    position_G = np.array([g.positions for g in scored.groups], dtype=np.float64)
    groups = len(size_G)
    share = min(1.0, scored.documents / max(documents, 1))
    if groups < GROUPS or not position_G.std():
        return 0.05 * math.sqrt(1 - share)
    rest_G = size_G - np.polyval(np.polyfit(position_G, size_G, 1), position_G)
    return float(np.sqrt(groups * (rest_G**2).sum() / (groups - 2) * (1 - share)) / size_G.sum())


def _seconds(
    spec: CaptureSpec, scored: Scored, tokens: float, preparing: float, measured: Mapping[str, float]
) -> tuple[float, float]:
    """(least, most) of a whole capture.

    The teacher, preparing and encoding run side by side: at best the slowest of them decides, at worst they take turns.
    Groups of the sample differ in speed, and so will the hours to come. On a busy machine the least is what an idle one
    would take, by the share of the CPUs that this process got, and the most allows for twice as many others.
    """
    seconds = sum(g.seconds for g in scored.groups)
    speeds = np.array([g.positions / g.seconds for g in scored.groups if g.positions])
    mean = sum(g.positions for g in scored.groups) / seconds
    spread = min(max(LEAST_SPREAD, 2 * float(speeds.std()) / mean), MOST_SPREAD)
    teacher = tokens * len(spec.contexts) / mean
    encoding = sum(g.encoding_seconds for g in scored.groups) * tokens * len(spec.contexts)
    encoding /= max(sum(g.positions for g in scored.groups), 1)
    least = max(teacher / (1 + spread), preparing, encoding)
    most = teacher * (1 + spread) + preparing + encoding
    load = measured["load_average"]
    if load > BUSY:
        least *= max(measured["cpu_share"], 1 / load)
        most *= 2
    return measured["load_seconds"] + least, measured["load_seconds"] + most
