"""Line plots and bars as inline SVG, and tables, for pages that need no network: `cache inspect --html`, and the demonstration's report.

Colours are told apart by colour-blind readers too (Okabe and Ito), and by the legend's order. A page may set its own
(`--c0` …), and `--ink` and `--grid`, so that plots follow a dark theme; without these they are drawn for white paper.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

COLOURS = ("#777777", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")


@dataclass(frozen=True)
class Curve:
    """One line of a plot. With `low` and `high`, the range that each value surely, or probably, lies in is shaded."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False
    colour: int = 0  # of `COLOURS`; the same for one thing in every plot
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Plot:
    """A titled line plot; `note` says in a sentence how to read it. `include`: values that the y axis must reach."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    note: str = ""
    include: Sequence[float] = ()


@dataclass(frozen=True)
class Bars:
    """Titled bars, one under the other: of each its label, its value, and how the value is written."""

    title: str
    labels: Sequence[str]
    values: Sequence[float]
    texts: Sequence[str]
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A titled table; the first column is text, the others are right-aligned."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def table_html(table: Table) -> str:
    """The table alone, in a box that scrolls where the page is narrower."""
    head = "".join(f'<th scope="col">{html.escape(c)}</th>' for c in table.columns)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in table.rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def note_html(note: str) -> str:
    """The sentence beside a plot or table, if there is one."""
    return f'<p class="note">{html.escape(note)}</p>' if note else ""


def colour(number: int) -> str:
    """A CSS colour that a page's theme may replace."""
    number %= len(COLOURS)
    return f"var(--c{number},{COLOURS[number]})"


def nice_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers that span [low, high]."""
    span = max(high - low, 1e-9)
    power = 10.0 ** math.floor(math.log10(span / wanted))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if span / (power * m) <= wanted)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [step * i for i in range(first, last + 1)]


def svg(
    plot: Plot, width: int = 560, height: int = 330, legend: bool = True, x_range: tuple[float, float] | None = None
) -> str:
    """The plot as an SVG element, its legend at the right, or left to the page; `x_range`: by default the curves'."""
    longest = max((len(curve.name) for curve in plot.curves), default=0)
    left, right, top, bottom = 58, max(165, 40 + 7 * longest) if legend else 12, 14, 44
    xs = [v for c in plot.curves for v in c.x]
    ys = [v for c in plot.curves for v in (*c.y, *c.low, *c.high)] + list(plot.include)
    x0, x1 = x_range or (min(xs), max(xs))
    y0, y1 = min(ys), max(ys)
    pad = 0.06 * (y1 - y0 or 1.0)
    y0, y1 = y0 - pad, y1 + pad

    def px(x: float) -> float:
        return left + (x - x0) / ((x1 - x0) or 1) * (width - left - right)

    def py(y: float) -> float:
        return height - bottom - (y - y0) / ((y1 - y0) or 1) * (height - top - bottom)

    def points(x: Sequence[float], y: Sequence[float]) -> str:
        return " ".join(f"{px(a):.1f},{py(b):.1f}" for a, b in zip(x, y, strict=True))

    parts = [_opening(plot.title, width, height)]
    for tick in nice_ticks(y0, y1):
        parts.append(f'<line {_GRID} x1="{left}" x2="{width - right}" y1="{py(tick):.1f}" y2="{py(tick):.1f}"/>')
        parts.append(_text(left - 6, py(tick) + 4, f"{tick:g}", "end"))
    for tick in nice_ticks(x0, x1):
        parts.append(_text(px(tick), height - bottom + 16, f"{tick:g}", "middle"))
    parts.append(_text((left + width - right) / 2, height - 6, plot.x_label, "middle"))
    parts.append(_text(0, 0, plot.y_label, "middle", f"translate(13 {(top + height - bottom) / 2}) rotate(-90)"))
    for curve in plot.curves:
        if curve.low:
            outline = points([*curve.x, *reversed(curve.x)], [*curve.low, *reversed(curve.high)])
            parts.append(f'<polygon points="{outline}" style="fill:{colour(curve.colour)}" opacity="0.18"/>')
    for number, curve in enumerate(plot.curves):
        ink, dash = colour(curve.colour), ' stroke-dasharray="5 4"' if curve.dashed else ""
        parts.append(
            f'<polyline points="{points(curve.x, curve.y)}" fill="none" style="stroke:{ink}" stroke-width="1.8"{dash}/>'
        )
        if len(curve.x) <= 12:
            parts.extend(
                f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="2.6" style="fill:{ink}">'
                f"<title>{html.escape(curve.name)}: {y:.4g}</title></circle>"
                for x, y in zip(curve.x, curve.y, strict=True)
            )
        if legend:
            line = top + 12 + 19 * number
            parts.append(
                f'<line x1="{width - right + 12}" x2="{width - right + 32}" y1="{line - 4}" y2="{line - 4}" '
                f'style="stroke:{ink}" stroke-width="2"{dash}/>{_text(width - right + 37, line, curve.name)}'
            )
    return "".join(parts) + "</svg>"


def bars_svg(bars: Bars, width: int = 420) -> str:
    """The bars as an SVG element."""
    step, left, right = 21, 150, 96
    longest = max(bars.values, default=0) or 1.0
    parts = [_opening(bars.title, width, step * len(bars.values) + 4)]
    for number, (label, value, text) in enumerate(zip(bars.labels, bars.values, bars.texts, strict=True)):
        length, y = (width - left - right) * value / longest, step * number
        parts.append(_text(left - 7, y + 15, label, "end"))
        parts.append(f'<rect x="{left}" y="{y + 4}" width="{length:.1f}" height="14" style="fill:{colour(1)}"/>')
        parts.append(_text(left + length + 6, y + 15, text))
    return "".join(parts) + "</svg>"


_GRID = 'style="stroke:var(--grid,#e4e4e4)"'


def _opening(title: str, width: int, height: int) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">'


def _text(x: float, y: float, text: str, anchor: str = "start", transform: str = "") -> str:
    place = f' transform="{transform}"' if transform else f' x="{x:.1f}" y="{y:.1f}"'
    return (
        f'<text{place} text-anchor="{anchor}" font-size="11.5" style="fill:var(--ink,#333)">{html.escape(text)}</text>'
    )
