"""`tidecache cache inspect`: what a cache holds, from its manifest and the footers of its files alone.

`inspect_cache` gathers the figures, `to_json` gives them to programs and `render` to people: bytes by lane and per
scored teacher token, and by timestep the teacher's likelihood of the gold, tail mass, calibration, and what rounding
cost.

Shapes: B timestep bins, T temperatures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich import box
from rich.console import Console
from rich.table import Table

from shared.cache.manifest import HELD_OUT_FOLDER, FileRecord, Manifest
from shared.cache.parquet import footer_of, read_metadata
from shared.cache.reader import Cache
from shared.cache.remote import Folder
from shared.cache.statistics import TIMESTEP_BINS, ContextStatistics

LANE_OF_COLUMN = {
    "gold_logp": "gold",
    "topk_ids": "topk",
    "topk_logp": "topk",
    "log_z": "topk",
    "tail_ids": "topk",
    "tail_logp": "topk",
}


@dataclass(frozen=True)
class Inspection:
    """The figures of one cache. `lane_bytes`: compressed bytes by lane, in the order of the table; their sum is that of
    all data files.
    """

    path: Folder
    manifest: Manifest
    lane_bytes: Mapping[str, int]
    statistics: Mapping[str, ContextStatistics]
    held_out: Manifest | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; log-likelihoods in nats, bytes as stored."""
        return {
            "path": str(self.path),
            **{k: v for k, v in self.manifest.to_json().items() if k != "shards"},
            "shards": len(self.manifest.shards),
            "lane_bytes": dict(self.lane_bytes),
            "timesteps": {context: list(_bins(s, self.manifest)) for context, s in self.statistics.items()},
            "held_out": None if self.held_out is None else self.held_out.to_json()["totals"],
        }


def inspect_cache(path: str | Path) -> Inspection:
    """Gather the figures of a cache; reads no column.

    Raises:
        TidecacheError: no cache there, or a footer cannot be read.
    """
    cache = Cache.open(path)
    sizes = _Sizes()
    statistics = {x: ContextStatistics.zero(len(cache.spec.temperatures)) for x in cache.spec.contexts}
    sizes.add_file("vocabulary", cache.manifest.vocabulary)
    for record in {r.documents.path: r.documents for r in cache.shards}.values():
        sizes.add_file("documents", record)
    for receipt in cache.shards:
        for record in receipt.likelihoods:
            metadata = read_metadata(cache.path, record)
            sizes.add_columns(record, metadata)
            for context, sums in footer_of(metadata.metadata).get("statistics", {}).items():
                if f"{context}_gold_logp" in record.columns:
                    statistics[context] = statistics[context] + ContextStatistics.from_json(sums)
    inner = cache.path / HELD_OUT_FOLDER
    held_out = Cache.open(inner).manifest if isinstance(inner, Path) and inner.is_dir() else None
    return Inspection(cache.path, cache.manifest, sizes.by_lane, statistics, held_out)


class _Sizes:
    """Compressed bytes by lane."""

    def __init__(self) -> None:
        self.by_lane: dict[str, int] = {}

    def add_file(self, lane: str, record: FileRecord) -> None:
        self.by_lane[lane] = self.by_lane.get(lane, 0) + record.size_bytes

    def add_columns(self, record: FileRecord, metadata: Any) -> None:
        """A likelihoods file by column; what is no column (footer, page index) comes under its own name."""
        rest = record.size_bytes
        for group in (metadata.row_group(i) for i in range(metadata.num_row_groups)):
            for column in (group.column(i) for i in range(group.num_columns)):
                lane = _lane(column.path_in_schema.split(".")[0])
                self.by_lane[lane] = self.by_lane.get(lane, 0) + column.total_compressed_size
                rest -= column.total_compressed_size
        self.by_lane["footers"] = self.by_lane.get("footers", 0) + rest


def _lane(column: str) -> str:
    context, _, name = column.partition("_")
    if name not in LANE_OF_COLUMN:
        return "timestep, masked, split"
    return f"{context} {LANE_OF_COLUMN[name]}"


def _bins(statistics: ContextStatistics, manifest: Manifest) -> Iterator[dict[str, Any]]:
    """One entry per timestep bin with draws; means per chunk or token, None where the lane is missing."""
    topk = "topk" in manifest.spec.lanes
    calibration_error_B = statistics.calibration_error_B
    for b in range(TIMESTEP_BINS):
        chunks, tokens = statistics.chunks_B[b], statistics.tokens_B[b]
        draws = manifest.totals.timesteps[b] if manifest.totals.timesteps else 0
        if not draws:
            continue
        best = bool(topk and chunks)
        yield {
            "from": b / TIMESTEP_BINS,
            "to": (b + 1) / TIMESTEP_BINS,
            "draws": draws,
            "chunks": int(chunks),
            "gold_logp_per_token": float(statistics.gold_logp_B[b] / tokens) if tokens else None,
            "gold_logp_per_chunk": float(statistics.gold_logp_B[b] / chunks) if chunks else None,
            "tail_mass": _mean(statistics.tail_mass_BT[b], chunks) if best else None,
            "stored_kl": _mean(statistics.kl_BT[b], chunks) if best else None,
            "best_is_gold": float(statistics.hits_BE[b].sum() / chunks) if best else None,
            "calibration_error": float(calibration_error_B[b]) if best else None,
        }


def _mean(sum_T: npt.NDArray[np.float64], chunks: float) -> list[float]:
    return [float(x / chunks) for x in sum_T]


# --- for people --------------------------------------------------------------------------------------------------


def render(inspection: Inspection, console: Console) -> None:
    """Print the figures as tables."""
    manifest = inspection.manifest
    console.print(_overview(inspection))
    console.print()
    if not manifest.shards:
        console.print("No shard is complete yet: run the capture that began this cache again, it goes on from here.")
        return
    console.print(_bytes_table(inspection))
    console.print()
    for context, statistics in inspection.statistics.items():
        console.print(_timestep_table(context, statistics, manifest))
        console.print()
    console.print(_legend(inspection), style="dim")


def _legend(inspection: Inspection) -> str:
    gold = "nats: mean log-likelihood of the gold filling, per teacher token and per chunk."
    if "topk" not in inspection.manifest.spec.lanes:
        return gold
    kl = max((max(entry["stored_kl"]) for entry in _all_bins(inspection) if entry["stored_kl"]), default=0.0)
    return (
        f"{gold} best: share of chunks whose most likely filling is the gold. ECE: expected calibration error of the "
        f"probability of that filling. tail T: probability outside the top k at temperature T. KL from the exact to the "
        f"stored top-k distribution: {kl:.1e} nats at most in any row."
    )


def _all_bins(inspection: Inspection) -> Iterator[dict[str, Any]]:
    for statistics in inspection.statistics.values():
        yield from _bins(statistics, inspection.manifest)


def _plain_table(title: str, headings: list[str]) -> Table:
    """Numbers to the right, light rules, 80 columns."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column(headings[0], no_wrap=True)
    for heading in headings[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _overview(inspection: Inspection) -> Table:
    spec, totals = inspection.manifest.spec, inspection.manifest.totals
    table = Table(title=str(inspection.path), title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    students = ", ".join(f"{s.name} (up to {s.length_limit} tokens)" for s in spec.students)
    temperatures = ", ".join(f"{t:g}" for t in spec.temperatures)
    layout = f"{spec.teacher.layout}" + (
        f", blocks of {spec.teacher.block_size}" if spec.teacher.layout != "full" else ""
    )
    lanes = "gold, topk" if "topk" in spec.lanes else "gold"
    dropped = ", ".join(f"{n:,} {reason}" for reason, n in totals.dropped.items())
    share = totals.draws / totals.documents if totals.documents else 0
    shards = len(inspection.manifest.shards)
    rows = {
        "teacher": f"{spec.teacher.name} ({spec.teacher.architecture}, {layout}, {spec.teacher.dtype})",
        "students": students,
        "draws": f"contexts {', '.join(spec.contexts)}; mask law {spec.mask_law}; seed {spec.seed}",
        "lanes": lanes
        + (f" (k {spec.k}, temperatures {temperatures}, codec {spec.codec})" if "topk" in spec.lanes else ""),
        "documents": f"{totals.documents:,} ({totals.cut:,} cut to the length limit; {dropped or 'none'} dropped)",
        "chunks": f"{totals.chunks:,}",
        "draws held": f"{totals.draws:,} ({share:.3g} per document); {totals.masked_chunks:,} masked chunks",
        "scored": f"{totals.scored_tokens:,} teacher tokens in each context",
        "size": f"{_size(totals.size_bytes)} in {shards:,} {'shard' if shards == 1 else 'shards'}",
        "held out": _held_out(inspection.held_out),
        "fingerprint": inspection.manifest.spec.fingerprint,
        "content": inspection.manifest.content[:32] + "…",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _held_out(manifest: Manifest | None) -> str:
    if manifest is None:
        return "none"
    return f"{manifest.totals.documents:,} documents, {manifest.totals.draws:,} draws in the folder {HELD_OUT_FOLDER}"


def _bytes_table(inspection: Inspection) -> Table:
    tokens = inspection.manifest.totals.scored_tokens
    total = sum(inspection.lane_bytes.values())
    table = _plain_table("Bytes", ["lane", "bytes", "share", "per scored token"])
    for lane, size in inspection.lane_bytes.items():
        table.add_row(lane, f"{size:,}", f"{size / total:.1%}", f"{size / tokens:.2f}" if tokens else "–")
    table.add_section()
    table.add_row("all", f"{total:,}", "100.0%", f"{total / tokens:.2f}" if tokens else "–")
    return table


def _timestep_table(context: str, statistics: ContextStatistics, manifest: Manifest) -> Table:
    spec = manifest.spec
    topk = "topk" in spec.lanes
    headings = ["t", "draws", "chunks", "nats/token", "nats/chunk"]
    if topk:
        headings += ["best", "ECE", *(f"tail {t:g}" for t in spec.temperatures)]
    table = _plain_table(f"By timestep, context {context}", headings)
    for entry in _bins(statistics, manifest):
        cells = [
            f"{entry['from']:.1f}–{entry['to']:.1f}",
            f"{entry['draws']:,}",
            f"{entry['chunks']:,}",
            _number(entry["gold_logp_per_token"], ".3f"),
            _number(entry["gold_logp_per_chunk"], ".3f"),
        ]
        if topk:
            tails = entry["tail_mass"] or [None] * len(spec.temperatures)
            cells += [_number(entry["best_is_gold"], ".1%"), _number(entry["calibration_error"], ".3f")]
            cells += [_number(x, ".3f") for x in tails]
        table.add_row(*cells)
    return table


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _size(size: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"
