"""What `docs/evidence.md` claims, by rules that it states: equivalence of few draws, gains over controls, and what it costs.

A verdict needs at least `ENOUGH` paired seeds; intervals are those of 95 % by Student's t, of differences paired by seed, over all
seeds that both students have.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

from evidence_cells import (
    CONTROLS,
    CROSS_ENTROPY,
    DEFAULT,
    EQUAL_SECONDS,
    GENERATED,
    NAMES,
    OFFLINE,
    CacheChoice,
    Cell,
    events,
    in_context,
    lighter,
    longer,
    measured,
    offline,
    undeclared,
    without_tidal,
)
from evidence_found import Found, Metric, accuracy, bits, completed, infilled, markdown
from evidence_results import half_width, spread

MARGIN = 0.1  # of the distillation gain: the equivalence margin, fixed beforehand
ENOUGH = 3
ONLINE = events()
VERBS = {"better": "gains over", "worse": "loses against", "within the spread": "shows no clear difference from"}
SAID = {"better": "it beats", "worse": "it loses to", "within the spread": "it is within the spread of"}
# (name, metric, sign of what is better, digits)
METRICS: tuple[tuple[str, Metric, int, int], ...] = (
    ("bits per byte", bits, -1, 4),
    ("top-1, points", accuracy, 1, 2),
)
# On more documents.
WIDE_METRICS = (
    *METRICS,
    ("spans filled at 1 token per forward, points", infilled(2), 1, 1),
    ("functions completed to valid code in 48 steps, points", completed(1, "valid"), 1, 1),
)


def equivalent(difference: Sequence[float], gain: Sequence[float], better: int) -> str:
    """The verdict on few draws, by the rule on the page.

    Args:
        difference: few draws minus the teacher in the loop, by seed.
        gain: the teacher in the loop's over cross-entropy by seed, positive where it is better.
        better: the sign of what is better.
    """
    if len(difference) < ENOUGH or len(gain) != len(difference):
        return "too few seeds"
    if statistics.mean(gain) <= half_width(gain):
        return "no gain to keep"

    def interval(sign: int) -> tuple[float, float]:
        """Of the difference plus or minus a tenth of the same seed's gain: the margin is not known better than the gain."""
        values = [better * d + sign * MARGIN * g for d, g in zip(difference, gain, strict=True)]
        return statistics.mean(values) - half_width(values), statistics.mean(values) + half_width(values)

    (low, below), (above, high) = interval(1), interval(-1)
    if below < 0:
        return "worse"
    if above > 0:
        return "better"
    if low <= 0:
        return "undecided"
    return "equivalent" if high < 0 else "no worse"


def equivalence(found: Found) -> str:
    """Whether K draws, with and without fresh rows, equal the teacher in the loop, by the rule."""
    parts, rows = [], [[str(draws), f"{fresh:g}", reuse] for draws, fresh, reuse in OFFLINE]
    head = ["draws", "fresh rows", "reuse"]
    for name, metric, better, digits in METRICS:
        gain = online_gain(found, metric, better)
        if not gain:
            return "Not measured yet."
        parts.append(
            f"In {name} event KL with the teacher in the loop gains {spread(gain, digits)} over cross-entropy with as many masks."
        )
        head += [f"{name} − online's", "verdict", "share of the gain"]
        for row, one in zip(rows, OFFLINE, strict=True):
            difference = found.paired(offline(*one), ONLINE, metric)
            if difference:
                kept = 1 + better * statistics.mean(difference) / statistics.mean(gain)
                share = f"{kept:.0%}" if statistics.mean(gain) > half_width(gain) else ""
                row += [spread(difference, digits, signed=True), verdict_on(found, one, metric, better), share]
            else:
                row += ["", "", ""]
    text = (
        f"The margin of equivalence is {MARGIN:.0%} of the gain, fixed beforehand. *Equivalent*: the interval of the paired "
        "difference lies within the margin; *no worse*: it reaches beyond only where it is better; *worse* and *better*: it "
        "lies beyond; *undecided*: all else. Seeds vary the order of rows and the fresh masks; the stored masks are one set."
    )
    return "\n\n".join([text, *parts, markdown(head, rows)])


def online_gain(found: Found, metric: Metric, better: int) -> list[float]:
    """Of the teacher in the loop over cross-entropy, by seed; positive where it is better."""
    return [better * d for d in found.paired(ONLINE, CROSS_ENTROPY, metric)]


def verdict_on(found: Found, one: tuple[int, float, str], metric: Metric, better: int) -> str:
    """`equivalent` of few draws, over the seeds that all three have."""
    seeds = [
        seed
        for seed in range(found.scale.seeds)
        if all(found.record(first, seed) is not None for first in (offline(*one), ONLINE, CROSS_ENTROPY))
    ]

    def values(first: Cell) -> list[float]:
        return [metric(record) for seed in seeds if (record := found.record(first, seed)) is not None]

    few, online, none = values(offline(*one)), values(ONLINE), values(CROSS_ENTROPY)
    difference = [a - b for a, b in zip(few, online, strict=True)]
    return equivalent(difference, [better * (a - b) for a, b in zip(online, none, strict=True)], better)


def others(found: Found) -> list[tuple[str, Cell]]:
    """What the best recipe must beat."""
    return [
        ("cross-entropy, equal steps", CROSS_ENTROPY),
        *(
            (f"cross-entropy, {name}", longer(found.scale, factor))
            for name, factor in zip(
                ("equal training seconds", "equal seconds with the capture"), EQUAL_SECONDS, strict=True
            )
        ),
        ("cross-entropy on completed text", dataclasses.replace(CROSS_ENTROPY, cache=CacheChoice(teacher="completed"))),
        *((f"event KL, {teacher} teacher", events(CacheChoice(teacher=teacher))) for teacher in CONTROLS),
        ("event KL, ngram teacher, weight 1", lighter("ngram")),
    ]


def won(difference: Sequence[float], better: int) -> str:
    """Whether a paired difference is beyond its spread."""
    if len(difference) < ENOUGH:
        return "too few seeds"
    mean, wide = better * statistics.mean(difference), half_width(difference)
    return "better" if mean > wide else "worse" if -mean > wide else "within the spread"


def gains(found: Found) -> str:
    """Whether the best cross-tokenizer recipe beats cross-entropy and the controls, by the rule."""
    metrics = (*METRICS, ("spans at 1 token per forward, points", infilled(2), 1, 2))
    head = ["event KL minus …", *[part for name, *_ in metrics for part in (name, "verdict")]]
    rows = []
    for name, other in others(found):
        row = [name]
        for _, metric, better, digits in metrics:
            difference = found.paired(ONLINE, other, metric)
            row += [spread(difference, digits, signed=True), won(difference, better)] if difference else ["", ""]
        rows.append(row)
    return markdown(head, rows)


def costs(record: dict[str, Any] | None) -> str:
    """Seconds, bytes and memory of the cache against the teacher in the loop; from how many students on it pays."""
    if record is None:
        return "Not measured yet."
    captures, trains = record["captures"], record["trains"]
    online, student = trains["online"], trains["cache"]
    rows = []
    for draws, capture in sorted(captures.items(), key=lambda pair: int(pair[0])):
        cached = {2: trains.get("halves"), max(map(int, captures)): student}.get(int(draws))
        row = [draws, f"{capture['bytes'] / 1e6:.2f} MB", f"{capture['seconds']:.0f} s, {capture['peak_mb']:.0f} MB"]
        for took in (cached, online):
            row.append(f"{took['seconds']:.0f} s, {took['peak_mb']:.0f} MB" if took else "")
        extra = online["seconds"] - cached["seconds"] if cached else 0.0
        rows.append([*row, f"{math.ceil(capture['seconds'] / extra)}" if extra > 0 else ""])
    head = [
        "draws",
        "cache, k = 16",
        "capture, once",
        "student from cache",
        "student online",
        "pays from student … on",
    ]
    plain = trains["cross-entropy"]["seconds"]
    return markdown(head, rows) + (
        f"\n\nEach in a process of its own, with one thread; memory is the process's peak, most of it libraries. *Online* is the "
        f"same training plus the {online['teacher_seconds']:.0f} s that the teacher needs for the same masks, with its weights "
        f"in memory. Cross-entropy alone takes {plain:.0f} s, so a student of event KL takes "
        f"{student['seconds'] / plain:.2f} times as long, and with the whole capture on its account "
        f"{(student['seconds'] + captures[str(max(map(int, captures)))]['seconds']) / plain:.2f}; *equal training seconds* above stands "
        f"for {EQUAL_SECONDS[0]:g}, *with the capture* for {EQUAL_SECONDS[1]:g}. Of two draws, the student by halves."
    )


def in_short(found: Found) -> list[str]:
    """The claims as sentences, by the same rules; nothing is said of what was not measured."""
    lines = []
    for name, metric, better, digits in METRICS:
        unit = "" if metric is bits else " points"
        gain = found.paired(ONLINE, CROSS_ENTROPY, metric)
        if len(gain) < ENOUGH:
            continue
        verb = VERBS[won(gain, better)]
        size = f" ({spread(gain, digits, signed=True)}{unit})"
        held = [(other, found.paired(ONLINE, first, metric)) for other, first in others(found)]
        by_verdict: dict[str, list[str]] = {}
        for other, difference in held:
            if len(difference) >= ENOUGH:
                by_verdict.setdefault(won(difference, better), []).append(other)
        said = [f"{SAID[verdict]} {'; '.join(names)}" for verdict, names in by_verdict.items()]
        lines.append(
            f"**{name.removesuffix(', points')}**: event KL {verb} cross-entropy{size}. "
            f"Of what it is held to, {' — '.join(said)}."
        )
        few = {one: verdict_on(found, one, metric, better) for one in OFFLINE}
        decided = [f"{named(one)} {verdict}" for one, verdict in few.items() if verdict != "too few seeds"]
        if decided:
            lines.append(
                f"**Few draws against the teacher in the loop, {name.removesuffix(', points')}**: {'; '.join(decided)}."
            )
    return lines + generated(found) + compared(found)


def reference(question: str, first: Cell) -> Cell | None:
    """What a student of a side question is held to; None: it is that itself, or its section has no such verdict."""
    references = {
        "objectives": CROSS_ENTROPY,
        "TIDAL": without_tidal(),
        "contexts": dataclasses.replace(first, recipe=tuple(p for p in first.recipe if p[0] != "context")),
        "candidates": measured(),
        "mask laws": dataclasses.replace(first, cache=CacheChoice()),
        "tokenizers": measured(),
    }
    found = references.get(question)
    return None if found == first else found


REFERENCE_NAMES = {
    "objectives": "cross-entropy", "TIDAL": "no TIDAL", "contexts": "compdemo", "candidates": "k = 16",
    "mask laws": "whole chunks", "tokenizers": "its tokenizer alone",
}  # fmt: skip


def verdicts(found: Found, question: str, first: Cell) -> list[str]:
    """Whether a student of a side question is better or worse than its reference in bits per byte and in top-1, by the rule of
    gains; of the reference itself nothing.
    """
    held = reference(question, first)
    if held is None:
        return ["", ""]
    return [verdict(found.paired(first, held, metric), better, digits) for _, metric, better, digits in METRICS]


def verdict(difference: Sequence[float], better: int, digits: int) -> str:
    """The paired difference, and what it is; nothing of what was not measured."""
    return f"{spread(difference, digits, signed=True)}, {won(difference, better)}" if difference else ""


def compared(found: Found) -> list[str]:
    """One side question per line: what each choice changes, all else the same."""
    fours = CacheChoice(tokenizers=4)
    pairs = (
        ("The default recipe, Reverse CALM with TIDAL, against cross-entropy", DEFAULT, CROSS_ENTROPY),
        ("TIDAL on the timestep's axis, against the same mean weight without it", ONLINE, without_tidal()),
        ("Measured timestep weights, against uniform ones", measured(), ONLINE),
        *(
            (f"CompDemo's context against the plain one, {NAMES[o]}", in_context(o, "compdemo"), in_context(o, "plain"))
            for o in ("kl", "reverse-kl", "calm", "reverse-calm")
        ),
        ("One stored candidate per chunk, against 16", measured(CacheChoice(k=1)), measured()),
        ("Four declared tokenizers, against the student's alone", measured(fours), measured()),
        ("A cache that does not declare the student's tokenizer", undeclared(), measured()),
        ("Masking by tokens instead of whole chunks", measured(CacheChoice(mask_law="token")), measured()),
    )
    lines = []
    for name, one, other in pairs:
        said = []
        for metric_name, metric, better, digits in METRICS:
            difference = found.paired(one, other, metric)
            if len(difference) >= ENOUGH:
                size = spread(difference, digits, signed=True)
                said.append(f"{metric_name.removesuffix(', points')} {won(difference, better)} ({size})")
        if said:
            lines.append(f"**{name}**: {'; '.join(said)}.")
    return lines


def generated(found: Found) -> list[str]:
    """What wins or loses against cross-entropy on more documents, in likelihood and in generation."""
    wide = [dataclasses.replace(first, documents="wide") for first in GENERATED]
    lines = []
    for name, metric, better, digits in WIDE_METRICS:
        by_verdict: dict[str, list[str]] = {}
        for first in wide[1:]:
            difference = found.paired(first, wide[0], metric)
            if len(difference) >= ENOUGH:
                size = f"{first.label} ({spread(difference, digits, signed=True)})"
                by_verdict.setdefault(won(difference, better), []).append(size)
        if by_verdict:
            said = " — ".join(f"{verdict}: {'; '.join(sizes)}" for verdict, sizes in by_verdict.items())
            lines.append(
                f"**On {found.scale.wide_documents} further documents, {name}**, against cross-entropy: {said}."
            )
    return lines


def named(one: tuple[int, float, str]) -> str:
    """Few draws in words."""
    draws, fresh, reuse = one
    parts = [
        f"{draws} draw{'s' if draws > 1 else ''}",
        f"{fresh:.0%} fresh" if fresh else "",
        "halves" * (reuse == "halves"),
    ]
    return ", ".join(part for part in parts if part) + ":"


def front_table(found: Found) -> str:
    """What a reader of README wants to know: quality, bytes, seconds, memory."""
    took = found.results.cells.get("costs")
    base = found.results.cells["base"]
    trains, captures = (took["trains"], took["captures"]) if took else ({}, {})
    rows = [["base", "", f"{bits(base):.4f}", f"{accuracy(base):.2f}", "", "", "", ""]]

    def row(name: str, first: Cell, train: str, draws: int = 0) -> None:
        records = found.records(first)
        spans = [infilled(2)(r) for r in found.records(dataclasses.replace(first, documents="wide"))]
        size = captures.get(str(draws))
        rows.append(
            [
                name,
                str(len(records)),
                spread([bits(r) for r in records]),
                spread([accuracy(r) for r in records], 2),
                spread(spans, 1),
                f"{size['bytes'] / 1e6:.1f} MB, {size['seconds']:.0f} s" if size else "",
                f"{trains[train]['seconds']:.0f} s" if train in trains else "",
                f"{trains[train]['peak_mb']:.0f} MB" if train in trains else "",
            ]
        )

    row("cross-entropy", CROSS_ENTROPY, "cross-entropy")
    row("Reverse CALM, TIDAL (default)", DEFAULT, "default", found.scale.draws)
    row("event KL, n-gram teacher", events(CacheChoice(teacher="ngram")), "")
    row("**event KL**, two draws for four epochs", offline(2, 0.0, "halves"), "halves", 2)
    row("**event KL**, a draw per epoch (as online)", ONLINE, "cache", found.scale.draws)
    if trains:
        online = trains["online"]
        rows.append(
            ["the same, teacher in memory", *[""] * 5, f"{online['seconds']:.0f} s", f"{online['peak_mb']:.0f} MB"]
        )
    head = ["student", "seeds", "bits per byte", "top-1 %", "spans %", "cache, once", "training", "memory"]
    return markdown(head, rows)
