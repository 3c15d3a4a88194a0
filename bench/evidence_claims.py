"""What `docs/evidence.md` claims, by rules that it states: equivalence of few draws, gains over controls, and what it costs.

A verdict needs at least `ENOUGH` paired seeds; an interval is the mean ± twice the standard error of the paired differences.
"""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

from evidence_cells import CONTROLS, CROSS_ENTROPY, OFFLINE, CacheChoice, Cell, cell, events, lighter, longer, offline
from evidence_found import Found, Metric, accuracy, bits, infilled, markdown
from evidence_results import spread, twice_error

MARGIN = 0.1  # of the distillation gain: the equivalence margin, fixed beforehand
ENOUGH = 3
ONLINE = events()
QUESTION = "offline and online"
# (name, metric, sign of what is better, digits)
METRICS: tuple[tuple[str, Metric, int, int], ...] = (
    ("bits per byte", bits, -1, 4),
    ("top-1, points", accuracy, 1, 2),
)


def equivalent(difference: list[float], margin: float, better: int) -> str:
    """The verdict on a paired difference to the teacher in the loop, by the rule on the page."""
    if len(difference) < ENOUGH:
        return "too few seeds"
    mean, wide = better * statistics.mean(difference), twice_error(difference)
    low, high = mean - wide, mean + wide
    if high < -margin:
        return "worse"
    if low > margin:
        return "better"
    if low <= -margin:
        return "undecided"
    return "equivalent" if high < margin else "no worse"


def equivalence(found: Found) -> str:
    """Whether K draws, with and without fresh rows, equal the teacher in the loop, by the rule."""
    parts, rows = [], [[str(draws), f"{fresh:g}", reuse] for draws, fresh, reuse in OFFLINE]
    head = ["draws", "fresh rows", "reuse"]
    for name, metric, better, digits in METRICS:
        gain = [better * d for d in found.paired(ONLINE, CROSS_ENTROPY, metric, QUESTION)]
        if not gain:
            return "Not measured yet."
        if statistics.mean(gain) <= twice_error(gain):
            parts.append(
                f"In {name} the gain of the teacher in the loop, {spread(gain, digits)}, is within its spread."
            )
            continue
        margin = MARGIN * statistics.mean(gain)
        parts.append(
            f"In {name} event KL with the teacher in the loop gains {spread(gain, digits)} over cross-entropy with as many "
            f"masks; the margin is {margin:.{digits}f}."
        )
        head += [f"{name} − online's", "verdict", "share of the gain"]
        for row, one in zip(rows, OFFLINE, strict=True):
            difference = found.paired(offline(*one), ONLINE, metric, QUESTION)
            if difference:
                kept = 1 + better * statistics.mean(difference) / statistics.mean(gain)
                row += [spread(difference, digits, signed=True), equivalent(difference, margin, better), f"{kept:.0%}"]
            else:
                row += ["", "", ""]
    text = (
        f"The margin of equivalence is {MARGIN:.0%} of the gain, fixed beforehand. *Equivalent*: the interval of the paired "
        "difference lies within the margin; *no worse*: it reaches beyond only where it is better; *worse* and *better*: it "
        "lies beyond; *undecided*: all else."
    )
    return "\n\n".join([text, *parts, markdown(head, rows)])


def others(found: Found) -> list[tuple[str, Cell]]:
    """What the best recipe must beat."""
    return [
        ("cross-entropy, equal steps", CROSS_ENTROPY),
        ("cross-entropy, equal seconds", longer(found.scale)),
        ("cross-entropy on completed text", dataclasses.replace(CROSS_ENTROPY, cache=CacheChoice(teacher="completed"))),
        *((f"event KL, {teacher} teacher", events(CacheChoice(teacher=teacher))) for teacher in CONTROLS),
        ("event KL, ngram teacher, weight 1", lighter("ngram")),
    ]


def won(difference: list[float], better: int) -> str:
    """Whether a paired difference is beyond its spread."""
    if len(difference) < ENOUGH:
        return "too few seeds"
    mean, wide = better * statistics.mean(difference), twice_error(difference)
    return "better" if mean > wide else "worse" if -mean > wide else "within the spread"


def gains(found: Found) -> str:
    """Whether the best cross-tokenizer recipe beats cross-entropy and the controls, by the rule."""
    metrics = (*METRICS, ("spans at 1 token per forward, points", infilled(2), 1, 2))
    head = ["event KL minus …", *[part for name, *_ in metrics for part in (name, "verdict")]]
    rows = []
    for name, other in others(found):
        row = [name]
        for _, metric, better, digits in metrics:
            difference = found.paired(ONLINE, other, metric, "controls")
            row += [spread(difference, digits, signed=True), won(difference, better)] if difference else ["", ""]
        rows.append(row)
    return markdown(head, rows)


def costs(record: dict[str, Any] | None) -> str:
    """Seconds, bytes and memory of the cache against the teacher in the loop; from how many students on it pays."""
    if record is None:
        return "Not measured yet."
    captures, trains = record["captures"], record["trains"]
    online = trains["online"]
    rows = []
    for draws, capture in sorted(captures.items(), key=lambda pair: int(pair[0])):
        student = trains["cache"]["seconds"]
        extra = online["seconds"] - student
        rows.append(
            [
                draws,
                f"{capture['bytes'] / 1e6:.2f} MB",
                f"{capture['seconds']:.0f} s, {capture['peak_mb']:.0f} MB",
                f"{student:.0f} s, {trains['cache']['peak_mb']:.0f} MB",
                f"{online['seconds']:.0f} s, {online['peak_mb']:.0f} MB",
                f"{capture['seconds'] / extra:.1f}" if extra > 0 else "never",
            ]
        )
    head = [
        "draws",
        "cache, k = 16",
        "capture, once",
        "student from cache",
        "student online",
        "pays from … students on",
    ]
    return markdown(head, rows) + (
        f"\n\nEach in a process of its own on one core; memory is the process's peak, most of it libraries. *Online* is the "
        f"same training plus the {online['teacher_seconds']:.0f} s that the teacher needs for the same masks, with its weights "
        f"in memory. Cross-entropy alone takes {trains['cross-entropy']['seconds']:.0f} s."
    )


def in_short(found: Found) -> list[str]:
    """The claims as sentences, by the same rules."""
    lines = []
    for name, metric, better, digits in METRICS:
        gain = [better * d for d in found.paired(ONLINE, CROSS_ENTROPY, metric, "controls")]
        verdicts = [won(found.paired(ONLINE, other, metric, "controls"), better) for _, other in others(found)]
        if gain:
            lines.append(
                f"Event KL gains {spread(gain, digits)} {name.replace(', points', ' points')} over cross-entropy and is better, "
                f"beyond the spread, than {verdicts.count('better')} of the {len(verdicts)} things it is held against."
            )
        within = [
            f"{draws} draw{'s' if draws > 1 else ''}"
            + (f", {fresh:.0%} fresh rows" if fresh else "")
            + (", halves" if reuse == "halves" else "")
            for draws, fresh, reuse in OFFLINE
            if gain and within_margin(found, (draws, fresh, reuse), metric, better)
        ]
        if gain:
            lines.append(f"Within the margin of the teacher in the loop, in {name}: {'; '.join(within) or 'none'}.")
    return lines


def within_margin(found: Found, one: tuple[int, float, str], metric: Metric, better: int) -> bool:
    """Whether few draws are equivalent to, or no worse than, the teacher in the loop."""
    gain = [better * d for d in found.paired(ONLINE, CROSS_ENTROPY, metric, QUESTION)]
    if not gain or statistics.mean(gain) <= twice_error(gain):
        return False
    difference = found.paired(offline(*one), ONLINE, metric, QUESTION)
    return equivalent(difference, MARGIN * statistics.mean(gain), better) in ("equivalent", "no worse", "better")


def front_table(found: Found) -> str:
    """What a reader of README wants to know: quality, bytes, seconds, memory."""
    took = found.results.cells.get("costs")
    base = found.results.cells["base"]
    rows = [["base", f"{bits(base):.4f}", f"{accuracy(base):.2f}", f"{infilled(2)(base):.1f}", "", "", ""]]
    trains, captures = (took["trains"], took["captures"]) if took else ({}, {})

    def row(name: str, first: Cell, question: str, draws: int, train: str) -> None:
        records = found.records(first, question)
        size = captures.get(str(draws))
        rows.append(
            [
                name,
                spread([bits(r) for r in records]),
                spread([accuracy(r) for r in records], 2),
                spread([infilled(2)(r) for r in records], 1),
                f"{size['bytes'] / 1e6:.1f} MB" if size else "",
                f"{trains[train]['seconds']:.0f}" if train in trains else "",
                f"{trains[train]['peak_mb']:.0f} MB" if train in trains else "",
            ]
        )

    whole = found.scale.draws
    row("cross-entropy", CROSS_ENTROPY, "controls", 0, "cross-entropy")
    row("Reverse CALM, TIDAL (default)", cell("reverse-calm", tidal="weight"), "objectives", whole, "cache")
    row("event KL, n-gram teacher", events(CacheChoice(teacher="ngram")), "controls", whole, "cache")
    row("**event KL, cached**, 2 draws, halves again", offline(2, 0.25, "halves"), QUESTION, 2, "cache")
    row("**event KL, cached**, a draw per epoch", ONLINE, QUESTION, whole, "cache")
    row("event KL, teacher in the loop", ONLINE, QUESTION, 0, "online")
    head = ["student", "bits per byte", "top-1 %", "spans %", "cache", "training, s", "memory"]
    return markdown(head, rows)
