"""Make `report.html` of a demonstration: one page with tables and plots that needs no network."""

from __future__ import annotations

import html
from collections.abc import Sequence

from shared.cache.plots import Plot, Table, note_html, svg, table_html

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1180px; margin: 2rem auto; padding: 0 1.2rem }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin: 2rem 0 .4rem }
p { max-width: 75ch } .note { color: #555; font-size: .92rem }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 1rem 1.5rem }
figure { margin: 0 } figcaption { font-weight: 600; margin-bottom: .2rem }
svg { width: 100%; height: auto }
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
        if isinstance(part, Plot):
            figure = f"<figcaption>{html.escape(part.title)}</figcaption>{svg(part)}{note_html(part.note)}"
            plots.append(f"<figure>{figure}</figure>")
            continue
        close_plots()
        body.append(f"<h2>{html.escape(part.title)}</h2>{note_html(part.note)}{table_html(part)}")
    close_plots()
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
        f"<p>{html.escape(introduction)}</p>{''.join(body)}</body></html>"
    )
