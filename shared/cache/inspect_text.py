"""What `tidecache cache inspect` prints: the figures of a cache as tables that fit 80 columns."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from shared.cache.inspect import Inspection, calibration, pairs
from shared.cache.manifest import HELD_OUT_FOLDER, Manifest
from shared.cache.survey import Survey, length_at
from shared.cache.tables import number, plain_table


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
    if inspection.survey is not None:
        console.print(_lengths_table(inspection.survey))
        console.print()
    for context in inspection.statistics:
        console.print(_timestep_table(context, inspection))
        console.print()
    if "topk" in manifest.spec.lanes:
        console.print(_calibration_table(inspection))
        console.print()
    if pairs(inspection.survey):
        console.print(_pairs_table(inspection))
        console.print()
    console.print(_legend(inspection), style="dim")


def _legend(inspection: Inspection) -> str:
    """What the headings mean, and what was measured on a sample."""
    lines = ["token, chunk: mean log-likelihood of the gold filling, in nats, per teacher token and per chunk."]
    if "topk" in inspection.manifest.spec.lanes:
        kl = max((max(e["stored_kl"]) for e in _all_bins(inspection) if e["stored_kl"]), default=0.0)
        lines.append(
            "entropy: of a chunk's distribution over all its fillings, in nats, surely within ±; a calibrated teacher's mean "
            "log-likelihood per chunk is minus its entropy. best: share of chunks whose most likely filling is the gold. "
            "ECE: expected calibration error of the probability of that filling. tail T: probability outside the top k "
            f"at temperature T. KL from the exact to the stored top-k distribution: {kl:.1e} nats at most in any row."
        )
    lines += [note] if (note := sample_note(inspection.survey)) else []
    return "\n".join(lines)


def sample_note(survey: Survey | None) -> str:
    """Which figures come from a sample, and from how much; empty where all rows were read."""
    if survey is None:
        return "No row was read (--sample 0): no chunk lengths, coverage, entropy, and compdemo against plain."
    if survey.ranges_read == survey.ranges_total:
        return ""
    return (
        f"Chunk lengths, coverage, entropy, gold among the k, compdemo against plain: from {survey.documents:,} documents, evenly spaced "
        f"({survey.ranges_read} of {survey.ranges_total:,} document ranges; --sample N reads more). All else: exact."
    )


def _all_bins(inspection: Inspection) -> list[dict[str, Any]]:
    return [entry for context in inspection.statistics for entry in inspection.timesteps(context)]


def _overview(inspection: Inspection) -> Table:
    table = Table(title=str(inspection.path), title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in facts(inspection).items():
        table.add_row(name, value)
    return table


def facts(inspection: Inspection) -> dict[str, str]:
    """What the cache is, from its spec and totals: name and value in words."""
    spec, totals = inspection.manifest.spec, inspection.manifest.totals
    students = ", ".join(f"{s.name} (up to {s.length_limit} tokens)" for s in spec.students)
    temperatures = ", ".join(f"{t:g}" for t in spec.temperatures)
    layout = f"{spec.teacher.layout}" + (
        f", blocks of {spec.teacher.block_size}" if spec.teacher.layout != "full" else ""
    )
    lanes = "gold, topk" if "topk" in spec.lanes else "gold"
    dropped = ", ".join(f"{n:,} {reason}" for reason, n in totals.dropped.items())
    share = totals.draws / totals.documents if totals.documents else 0
    shards = len(inspection.manifest.shards)
    return {
        "teacher": f"{spec.teacher.name} ({spec.teacher.architecture}, {layout}, {spec.teacher.dtype})",
        "students": students,
        "draws": f"contexts {', '.join(spec.contexts)}; mask law {spec.mask_law}; seed {spec.seed}",
        "lanes": lanes
        + (f" (k {spec.k}, temperatures {temperatures}, codec {spec.codec})" if "topk" in spec.lanes else ""),
        "documents": f"{totals.documents:,} ({totals.cut:,} cut to the length limit; {dropped or 'none'} dropped)",
        "chunks": f"{totals.chunks:,}{_coverage(inspection.survey)}",
        "draws held": f"{totals.draws:,} ({share:.3g} per document); {totals.masked_chunks:,} masked chunks",
        "scored": f"{totals.scored_tokens:,} teacher tokens in each context",
        "size": f"{_size(totals.size_bytes)} in {shards:,} {'shard' if shards == 1 else 'shards'}",
        "held out": _held_out(inspection.held_out),
        "fingerprint": inspection.manifest.spec.fingerprint,
        "content": inspection.manifest.content[:32] + "…",
    }


def _coverage(survey: Survey | None) -> str:
    if survey is None or not survey.trainable_bytes:
        return ""
    share = survey.chunk_bytes / survey.trainable_bytes
    return f"; {share:.2%} of the trainable bytes lie in one, spelled by all declared students"


def _held_out(manifest: Manifest | None) -> str:
    if manifest is None:
        return "none"
    return f"{manifest.totals.documents:,} documents, {manifest.totals.draws:,} draws in the folder {HELD_OUT_FOLDER}"


def _bytes_table(inspection: Inspection) -> Table:
    tokens = inspection.manifest.totals.scored_tokens
    total = sum(inspection.lane_bytes.values())
    table = plain_table("Bytes", ["lane", "bytes", "share", "per scored token"])
    for lane, size in inspection.lane_bytes.items():
        table.add_row(lane, f"{size:,}", f"{size / total:.1%}", f"{size / tokens:.2f}" if tokens else "–")
    table.add_section()
    table.add_row("all", f"{total:,}", "100.0%", f"{total / tokens:.2f}" if tokens else "–")
    return table


def _lengths_table(survey: Survey) -> Table:
    """Shares of chunks by length: in teacher tokens one by one, in bytes as percentiles."""
    table = plain_table("Chunk lengths", ["in", "mean", "median", "90 %", "99 %", "1", "2", "3", "4 and more"])
    rows = [("bytes", survey.byte_lengths, survey.chunk_bytes), ("teacher tokens", survey.token_lengths, None)]
    for name, counts, total in rows:
        chunks = max(int(counts.sum()), 1)
        mean = (total if total is not None else int(counts @ np.arange(1, len(counts) + 1))) / chunks
        at = [length_at(counts, share) for share in (0.5, 0.9, 0.99)]
        shares = [*counts[:3], counts[3:].sum()]
        table.add_row(
            name,
            f"{mean:.2f}",
            *(f"{length}" if length < len(counts) else f"≥ {length}" for length in at),
            *(f"{share / chunks:.1%}" for share in shares),
        )
    return table


def _timestep_table(context: str, inspection: Inspection) -> Table:
    spec = inspection.manifest.spec
    topk = "topk" in spec.lanes
    headings = ["t", "draws", "chunks", "token", "chunk"]
    if topk:
        headings += [*(["entropy"] if inspection.survey else []), "best", "ECE"]
        headings += [f"tail {t:g}" for t in spec.temperatures]
    table = plain_table(f"By timestep, context {context}", headings)
    for entry in inspection.timesteps(context):
        cells = [
            f"{entry['from']:.1f}–{entry['to']:.1f}",
            _count(entry["draws"]),
            _count(entry["chunks"]),
            number(entry["gold_logp_per_token"], ".3f"),
            number(entry["gold_logp_per_chunk"], ".3f"),
        ]
        if topk:
            if inspection.survey:
                cells.append(_middle(entry["entropy_per_chunk"]))
            cells += [number(entry["best_is_gold"], ".1%"), number(entry["calibration_error"], ".3f")]
            cells += [number(x, ".3f") for x in entry["tail_mass"] or [None] * len(spec.temperatures)]
        table.add_row(*cells)
    return table


def _calibration_table(inspection: Inspection) -> Table:
    """Confidence against accuracy over all timesteps, contexts side by side."""
    contexts = {context: {c["from"]: c for c in calibration(s)} for context, s in inspection.statistics.items()}
    table = plain_table(
        "Calibration of the best filling, all timesteps",
        ["its p", *(h for x in contexts for h in (f"{x}\nchunks", "\nmean p", "\nis gold"))],
    )
    for start in sorted({e for entries in contexts.values() for e in entries}):
        cells = [f"{start:.1f}–{start + 0.1:.1f}"]
        for entries in contexts.values():
            c = entries.get(start)
            cells += (
                ["–"] * 3 if c is None else [f"{c['chunks']:,}", f"{c['confidence']:.3f}", f"{c['best_is_gold']:.3f}"]
            )
        table.add_row(*cells)
    return table


def _pairs_table(inspection: Inspection) -> Table:
    table = plain_table(
        "compdemo minus plain, gold log-likelihood of the same chunks",
        ["t", "chunks", "nats/token", "nats/chunk", "standard error", "compdemo better"],
    )
    entries = pairs(inspection.survey) or []
    for entry in entries:
        if entry is entries[-1]:
            table.add_section()
        table.add_row(
            "all" if entry is entries[-1] else f"{entry['from']:.1f}–{entry['to']:.1f}",
            f"{entry['chunks']:,}",
            f"{entry['gain_per_token']:+.3f}",
            f"{entry['gain_per_chunk']:+.3f}",
            f"{entry['error_per_chunk']:.3f}",
            f"{entry['better']:.1%}",
        )
    return table


def _middle(ends: list[float] | None) -> str:
    """A range by its middle."""
    return "–" if ends is None else f"{(ends[0] + ends[1]) / 2:.2f}±{(ends[1] - ends[0]) / 2:.2f}"


def _count(value: int) -> str:
    """At most six characters."""
    for unit, scale in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if value >= max(scale, 100_000):
            return f"{value / scale:.3g}{unit}"
    return f"{value:,}"


def _size(size: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"
