"""Make `report.html` of a demonstration: one page with tables and plots, drawn as inline SVG, that needs no network."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

# Told apart by colour-blind readers too (Okabe and Ito), and by the legend's order.
COLOURS = ("#777777", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")


@dataclass(frozen=True)
class Curve:
    """One line of a plot."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False
    colour: int = 0  # of `COLOURS`; the same for one model in every plot


@dataclass(frozen=True)
class Plot:
    """A titled line plot; `note` says in a sentence how to read it."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A titled table; the first column is text, the others are right-aligned."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def nice_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers that span [low, high]."""
    span = max(high - low, 1e-9)
    power = 10.0 ** math.floor(math.log10(span / wanted))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if span / (power * m) <= wanted)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [step * i for i in range(first, last + 1)]


def svg(plot: Plot, width: int = 560, height: int = 330) -> str:
    """The plot as an SVG element with its legend at the right."""
    left, right, top, bottom = 58, 165, 14, 44
    xs = [v for c in plot.curves for v in c.x]
    ys = [v for c in plot.curves for v in c.y]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    pad = 0.06 * (y1 - y0 or 1.0)
    y0, y1 = y0 - pad, y1 + pad

    def px(x: float) -> float:
        return left + (x - x0) / ((x1 - x0) or 1) * (width - left - right)

    def py(y: float) -> float:
        return height - bottom - (y - y0) / ((y1 - y0) or 1) * (height - top - bottom)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(plot.title)}">']
    for tick in nice_ticks(y0, y1):
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{py(tick):.1f}" y2="{py(tick):.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{py(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in nice_ticks(x0, x1):
        parts.append(f'<text x="{px(tick):.1f}" y="{height - bottom + 16}" text-anchor="middle">{tick:g}</text>')
    parts.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 6}" text-anchor="middle">{html.escape(plot.x_label)}</text>'
        f'<text transform="translate(13 {(top + height - bottom) / 2}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(plot.y_label)}</text>"
    )
    for number, curve in enumerate(plot.curves):
        colour = COLOURS[curve.colour % len(COLOURS)]
        dash = ' stroke-dasharray="5 4"' if curve.dashed else ""
        points = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in zip(curve.x, curve.y, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.8"{dash}/>')
        if len(curve.x) <= 12:
            parts.extend(
                f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="2.6" fill="{colour}">'
                f"<title>{html.escape(curve.name)}: {y:.4g}</title></circle>"
                for x, y in zip(curve.x, curve.y, strict=True)
            )
        legend = top + 12 + 19 * number
        parts.append(
            f'<line x1="{width - right + 12}" x2="{width - right + 32}" y1="{legend - 4}" y2="{legend - 4}" '
            f'stroke="{colour}" stroke-width="2"{dash}/><text x="{width - right + 37}" y="{legend}">{html.escape(curve.name)}</text>'
        )
    return "".join(parts) + "</svg>"


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1180px; margin: 2rem auto; padding: 0 1.2rem }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin: 2rem 0 .4rem }
p { max-width: 75ch } .note { color: #555; font-size: .92rem }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 1rem 1.5rem }
figure { margin: 0 } figcaption { font-weight: 600; margin-bottom: .2rem }
svg { width: 100%; height: auto } svg text { font-size: 11.5px; fill: #333 } .grid { stroke: #e4e4e4 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } .scroll { overflow-x: auto }
th, td { padding: .28rem .7rem; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap }
th:first-child, td:first-child { text-align: left } th { font-weight: 600; border-bottom: 1.5px solid #999 }
"""


def page(title: str, introduction: str, parts: Sequence[Table | Plot]) -> str:
    """The whole page. Neighbouring plots stand side by side."""
    body: list[str] = []
    plots: list[str] = []

    def close_plots() -> None:
        if plots:
            body.append(f'<div class="plots">{"".join(plots)}</div>')
            plots.clear()

    for part in parts:
        note = f'<p class="note">{html.escape(part.note)}</p>' if part.note else ""
        if isinstance(part, Plot):
            plots.append(f"<figure><figcaption>{html.escape(part.title)}</figcaption>{svg(part)}{note}</figure>")
            continue
        close_plots()
        head = "".join(f"<th>{html.escape(c)}</th>" for c in part.columns)
        rows = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in part.rows)
        body.append(
            f'<h2>{html.escape(part.title)}</h2>{note}<div class="scroll"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
        )
    close_plots()
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
        f"<p>{html.escape(introduction)}</p>{''.join(body)}</body></html>"
    )
