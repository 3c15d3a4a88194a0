"""`tidecache cache inspect --html`: one page with a cache's figures and a reader of its documents, which needs no network.

The page's markup, style and script are the files in `page_parts`; here is what is put into them. Everything from the
cache is anybody's text: it is escaped in markup, and reaches the script as JSON in which no `<` is left. As a second
wall the page's policy lets only that one script run, by its digest, and nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from shared import __version__
from shared.cache.excerpts import plain, read_excerpts
from shared.cache.inspect import Inspection, calibration, pairs
from shared.cache.inspect_text import facts, sample_note
from shared.cache.plots import Bars, Curve, Plot, Table, bars_svg, colour, note_html, svg, table_html
from shared.cache.reader import Cache
from shared.errors import TidecacheError

PARTS = Path(__file__).parent / "page_parts"
COLOUR_OF_CONTEXT = {"compdemo": 1, "plain": 2}
BYTES_SHOWN = 16  # chunk lengths one by one up to here


def write_page(path: Path, inspection: Inspection, documents: int) -> int:
    """Write the page, with `documents` documents in its reader; returns its size in bytes.

    Raises:
        TidecacheError: a file of the cache is missing or damaged, or the page can't be written.
    """
    text = page(inspection, read_excerpts(Cache.open(inspection.path), documents)).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    except OSError as error:
        raise TidecacheError(f"--html {path}: cannot be written: {error.strerror}: give another file") from error
    return len(text)


def page(inspection: Inspection, excerpts: dict[str, Any]) -> str:
    """The page's HTML. `excerpts`: see `shared.cache.excerpts.read_excerpts`."""
    script = (PARTS / "page.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(f"\n{script}".encode()).digest()).decode()
    template = Template((PARTS / "page.html").read_text("utf-8"))
    return template.substitute(
        SCRIPT_HASH=f"sha256-{digest}",
        STYLE=(PARTS / "page.css").read_text("utf-8"),
        TITLE=_escape(str(inspection.path).rstrip("/").rpartition("/")[2]),
        LEAD=_escape(_lead(inspection)),
        FACTS="".join(f"<div><dt>{_escape(k)}</dt><dd>{_escape(v)}</dd></div>" for k, v in facts(inspection).items()),
        SAMPLE=note_html(sample_note(inspection.survey)),
        FIGURES="".join(_figures(inspection)),
        TABLES="".join(_tables(inspection)),
        FOOTER=_escape(f"Made by tidecache {__version__}. Content {inspection.manifest.content}."),
        DATA=_json(excerpts),
        SCRIPT=script,
    )


def _escape(text: str) -> str:
    return html.escape(plain(text))


def _json(value: Any) -> str:
    """JSON in ASCII without `<`, `>` and `&`: nothing in it can end the element that it stands in."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _lead(inspection: Inspection) -> str:
    totals, spec = inspection.manifest.totals, inspection.manifest.spec
    return (
        f"What {spec.teacher.name} said about {totals.masked_chunks:,} masked chunks in {totals.draws:,} draws of "
        f"{totals.documents:,} documents."
    )


# --- figures -----------------------------------------------------------------------------------------------------


def _figures(inspection: Inspection) -> list[str]:
    """All plots for which the cache has something to show."""
    if not inspection.manifest.totals.draws:
        return ["<p>No shard is complete yet.</p>"]
    plots = [_likelihood(inspection), *_topk_plots(inspection), _pairs_plot(inspection)]
    bars = [_lane_bars(inspection), *_length_bars(inspection)]
    drawn = [_plot_figure(plot) for plot in plots if plot is not None and any(c.x for c in plot.curves)]
    return drawn + [_figure(b.title, bars_svg(b), b.note) for b in bars]


def _figure(title: str, body: str, note: str) -> str:
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{body}{note_html(note)}</figure>"


def _plot_figure(plot: Plot) -> str:
    """A plot with its legend above it, in text of the page's size."""
    key = "".join(
        f'<li><i class="{"dashed" if c.dashed else ""}" style="border-color:{colour(c.colour)}"></i>{html.escape(c.name)}</li>'
        for c in plot.curves
    )
    legend = f'<ul class="key">{key}</ul>' if len(plot.curves) > 1 else ""
    return _figure(plot.title, legend + svg(plot, 400, 260, legend=False, x_range=(0.0, 1.0)), plot.note)


def _curve(
    name: str, entries: Sequence[dict[str, Any]], values: Sequence[Any], context: str, dashed: bool = False
) -> Curve:
    """Values at the middle of each timestep bin; a pair of values is a range, drawn with its middle."""
    found = [((e["from"] + e["to"]) / 2, v) for e, v in zip(entries, values, strict=True) if v is not None]
    number = COLOUR_OF_CONTEXT.get(context, 3)
    x = [a for a, _ in found]
    if any(isinstance(v, list) for _, v in found):
        low, high = [v[0] for _, v in found], [v[1] for _, v in found]
        return Curve(name, x, [(a + b) / 2 for a, b in zip(low, high, strict=True)], dashed, number, low, high)
    return Curve(name, x, [v for _, v in found], dashed, number)


def _likelihood(inspection: Inspection) -> Plot:
    rows = {x: inspection.timesteps(x) for x in inspection.statistics}
    return Plot(
        "Gold log-likelihood per teacher token",
        "timestep t",
        "nats",
        [_curve(x, r, [e["gold_logp_per_token"] for e in r], x) for x, r in rows.items()],
        "Higher is better. The more is masked, the less the teacher has to go by.",
    )


def _topk_plots(inspection: Inspection) -> list[Plot]:
    """What needs the topk lane."""
    spec = inspection.manifest.spec
    if "topk" not in spec.lanes:
        return []
    rows = {x: inspection.timesteps(x) for x in inspection.statistics}
    reliability = [Curve("calibrated", [0.0, 1.0], [0.0, 1.0], dashed=True)]
    for x, sums in inspection.statistics.items():
        found = calibration(sums)
        points = [c["confidence"] for c in found], [c["best_is_gold"] for c in found]
        reliability.append(Curve(x, *points, colour=COLOUR_OF_CONTEXT.get(x, 3)))
    entropy = [
        curve
        for x, r in rows.items()
        for curve in (
            _curve(f"entropy, {x}", r, [e["entropy_per_chunk"] for e in r], x),
            _curve(f"−log-likelihood, {x}", r, [_minus(e["gold_logp_per_chunk"]) for e in r], x, dashed=True),
        )
    ]
    tails = [
        _curve(f"{x}, T = {t:g}", r, [e["tail_mass"] and e["tail_mass"][i] for e in r], x, dashed=t != 1.0)
        for x, r in rows.items()
        for i, t in enumerate(spec.temperatures)
    ]
    errors = [_curve(x, r, [e["calibration_error"] for e in r], x) for x, r in rows.items()]
    best = [_curve(x, r, [e["best_is_gold"] for e in r], x) for x, r in rows.items()]
    best += [_curve(f"{x}, among the {spec.k}", r, [e["gold_among_k"] for e in r], x, True) for x, r in rows.items()]
    return [
        Plot(
            "Calibration: reliability of the best filling",
            "its probability",
            "share that is the gold",
            reliability,
            "Above the diagonal the teacher is right more often than it says, below less often. All timesteps.",
        ),
        *_reliability_by_timestep(inspection),
        Plot(
            "Calibration error (ECE) by timestep",
            "timestep t",
            "ECE",
            errors,
            "Mean gap, over ten bins, between the best filling's probability and how often it is the gold.",
            include=[0.0],
        ),
        Plot(
            "The gold is the best filling",
            "timestep t",
            "share of chunks",
            [c for c in best if c.x],
            f"Dashed: it is one of the {spec.k} stored.",
            include=[0.0],
        ),
        Plot(
            "Entropy of a chunk's fillings",
            "timestep t",
            "nats",
            [c for c in entropy if c.x],
            "The shade is what the stored fillings and log Z leave open. A calibrated teacher's mean −log-likelihood of the "
            "gold equals its entropy.",
            include=[0.0],
        ),
        Plot(
            "Tail mass outside the k fillings",
            "timestep t",
            "probability",
            tails,
            f"What a student of the {spec.k} stored fillings cannot see, at each temperature.",
            include=[0.0],
        ),
    ]


def _reliability_by_timestep(inspection: Inspection) -> list[Plot]:
    """Per context the reliability curve for little, middling and much noise."""
    plots = []
    for context, sums in inspection.statistics.items():
        curves = [Curve("calibrated", [0.0, 1.0], [0.0, 1.0], dashed=True)]
        for name, bins, number in (
            ("t < 0.3", slice(0, 3), 3),
            ("0.3 – 0.7", slice(3, 7), 6),
            ("t ≥ 0.7", slice(7, 10), 4),
        ):
            found = calibration(sums, bins)
            curves.append(
                Curve(name, [c["confidence"] for c in found], [c["best_is_gold"] for c in found], colour=number)
            )
        plots.append(
            Plot(
                f"Calibration by timestep, {context}",
                "its probability",
                "share that is the gold",
                [c for c in curves if c.x],
            )
        )
    return plots


def _minus(value: float | None) -> float | None:
    return None if value is None else -value


def _pairs_plot(inspection: Inspection) -> Plot | None:
    entries = (pairs(inspection.survey) or [])[:-1]
    if not entries:
        return None
    x = [(e["from"] + e["to"]) / 2 for e in entries]
    gain = [e["gain_per_chunk"] for e in entries]
    spread = [2 * e["error_per_chunk"] for e in entries]
    low, high = ([g + sign * s for g, s in zip(gain, spread, strict=True)] for sign in (-1, 1))
    return Plot(
        "compdemo minus plain, on the same chunks",
        "timestep t",
        "nats per chunk",
        [Curve("compdemo minus plain", x, gain, colour=3, low=low, high=high)],
        "Difference in the gold's log-likelihood. Above 0, showing half of the masked chunks helps the teacher. Shade: 2 standard errors.",
        include=[0.0],
    )


def _lane_bars(inspection: Inspection) -> Bars:
    lanes = inspection.lane_bytes
    total, tokens = sum(lanes.values()), max(inspection.manifest.totals.scored_tokens, 1)
    return Bars(
        "Bytes by lane",
        list(lanes),
        list(lanes.values()),
        [f"{size / total:.1%}, {size / tokens:.2f}" for size in lanes.values()],
        f"Share of {total:,} bytes, and bytes per scored teacher token (each context counted once).",
    )


def _length_bars(inspection: Inspection) -> list[Bars]:
    if inspection.survey is None:
        return []
    survey = inspection.survey
    found = []
    for name, counts, most in (
        ("bytes", survey.byte_lengths, BYTES_SHOWN),
        ("teacher tokens", survey.token_lengths, 5),
    ):
        shown = [*counts[: most - 1].tolist(), int(np.sum(counts[most - 1 :]))]
        labels = [*(str(n) for n in range(1, most)), f"{most} and more"]
        shares = [count / max(int(counts.sum()), 1) for count in shown]
        found.append(Bars(f"Chunk lengths in {name}", labels, shares, [f"{share:.1%}" for share in shares], ""))
    return found


# --- numbers -----------------------------------------------------------------------------------------------------


def _tables(inspection: Inspection) -> list[str]:
    """The figures' numbers, closed until they are asked for."""
    return [
        f"<details><summary>{html.escape(t.title)}</summary>{note_html(t.note)}{table_html(t)}</details>"
        for t in _numbers(inspection)
    ]


def _numbers(inspection: Inspection) -> list[Table]:
    tables = [Table("Bytes by lane", ["lane", "bytes"], [[k, f"{v:,}"] for k, v in inspection.lane_bytes.items()])]
    tables += [_records_table(f"By timestep, context {x}", inspection.timesteps(x)) for x in inspection.statistics]
    if "topk" in inspection.manifest.spec.lanes:
        tables += [
            _records_table(f"Calibration, context {x}", calibration(s)) for x, s in inspection.statistics.items()
        ]
    tables.append(_records_table("compdemo against plain", pairs(inspection.survey) or []))
    return [t for t in tables if t.rows]


def _records_table(title: str, records: Sequence[dict[str, Any]]) -> Table:
    columns = list(records[0]) if records else []
    names = [c.replace("_", " ") for c in columns]
    return Table(title, names, [[_cell(record[c]) for c in columns] for record in records])


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):
        return " · ".join(_cell(v) for v in value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
