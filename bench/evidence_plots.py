"""The plots of `docs/evidence.md`, from the results of `bench/evidence.py` and `bench/exact.py`; nothing is read elsewhere."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable

from evidence_cells import BEST, CROSS_ENTROPY, DEFAULT, OFFLINE, CacheChoice, cell, events, in_context, offline
from evidence_found import Found, Metric, accuracy, bits, bits_in
from evidence_results import half_width
from exact_cells import Cell as ExactCell
from exact_page import Exact

from shared.cache.plots import Curve, Plot, svg

HALVES = [one for one in OFFLINE if one[2] == "halves"]
FRESH = [one for one in OFFLINE if one[2] == "same" and one[1]]
SAME = [one for one in OFFLINE if one[2] == "same" and not one[1]]
BINS = (0.1, 0.3, 0.5, 0.7, 0.9)  # middles of the ranges of timesteps that evaluations report


def standalone(plot: Plot) -> str:
    """The plot as a file of its own, on white."""
    return svg(plot).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" style="background:#fff" ', 1) + "\n"


def curve(name: str, points: list[tuple[float, list[float]]], colour: int, dashed: bool = False) -> Curve:
    """A line through means, shaded by its 95 % interval; `points`: (x, one value per seed)."""
    found = [(x, statistics.mean(values), half_width(values)) for x, values in points if values]
    return Curve(
        name,
        [x for x, _, _ in found],
        [y for _, y, _ in found],
        dashed,
        colour,
        low=[y - e for _, y, e in found],
        high=[y + e for _, y, e in found],
    )


def shown(plot: Plot) -> Plot | None:
    """The plot without empty curves; None if nothing is left."""
    kept = [one for one in plot.curves if len(one.x)]
    return Plot(plot.title, plot.x_label, plot.y_label, kept, plot.note, plot.include) if kept else None


def draws_plot(found: Found, metric: Metric, name: str) -> Plot | None:
    """Difference to cross-entropy with fresh masks against stored draws."""
    online = (float(found.scale.draws), found.paired(events(), CROSS_ENTROPY, metric))
    curves = []
    for colour, (title, chosen) in enumerate(
        (("same again", SAME), ("halves again", HALVES), ("half fresh rows", FRESH)), 1
    ):
        points = [(float(one[0]), found.paired(offline(*one), CROSS_ENTROPY, metric)) for one in chosen]
        curves.append(curve(f"event KL, {title}", [*points, online], colour, dashed=chosen is FRESH))
    alone = [
        (float(draws or found.scale.draws), found.paired(made, CROSS_ENTROPY, metric))
        for draws, made in ((1, cell("none", CacheChoice(draws=1))), (0, CROSS_ENTROPY))
    ]
    curves.append(curve("cross-entropy", alone, colour=0))
    title = f"{name} minus cross-entropy's with fresh masks, against stored draws ({found.scale.draws}: the teacher in the loop)"
    return shown(Plot(title, "draws", name, curves))


def timestep_plot(found: Found) -> Plot | None:
    """Difference to cross-entropy by timestep, for both contexts."""
    curves = []
    for colour, (name, objective) in enumerate((("event KL", "kl"), ("Reverse CALM", "reverse-calm")), 1):
        for context in ("compdemo", "plain"):
            made = in_context(objective, context)
            points = [(t, found.paired(made, CROSS_ENTROPY, bits_in(b))) for b, t in enumerate(BINS)]
            curves.append(curve(f"{name}, {context}", points, colour, dashed=context == "plain"))
    return shown(Plot("Bits per byte minus cross-entropy's, by timestep", "t", "bits per byte", curves, include=(0.0,)))


def generation_plot(found: Found, task: str, name: str, title: str) -> Plot | None:
    """Shares of spans (`infilling`) or functions (`completion`) against tokens per forward."""
    curves = []
    firsts = (
        ("cross-entropy", CROSS_ENTROPY),
        ("event KL", events()),
        ("reverse event KL", cell("reverse-kl", **BEST)),
        ("Reverse CALM", DEFAULT),
    )
    for colour, (student, first) in enumerate(firsts):
        records = [r[task] for r in found.records(dataclasses.replace(first, documents="wide"))]
        if records:
            points = [
                (statistics.mean(one["tokens_per_forward"] for one in steps), [100 * float(one[name]) for one in steps])
                for steps in zip(*records, strict=True)
            ]
            curves.append(curve(student, points, colour))
    return shown(Plot(f"{title} against tokens per forward", "tokens per forward", "%", curves))


def exact_draws_plot(exact: Exact) -> Plot | None:
    """KL to the exact posterior against stored draws."""
    curves = []
    for colour, objective in enumerate(("kl", "none"), 1):
        for fresh in (0.0, 0.5):
            points = [
                (float(draws), exact.kl(ExactCell("same", objective, draws=draws, fresh=fresh)))
                for draws in (1, 2, 4, 8, 16)
                if draws > 1 or fresh or objective == "kl"  # cross-entropy from one draw is off the scale
            ]
            name = {"kl": "event KL", "none": "cross-entropy"}[objective]
            curves.append(curve(f"{name}, half fresh" if fresh else name, points, colour, dashed=fresh > 0))
    title = "KL to the exact posterior against stored draws, one tokenizer, plain context, no halves"
    return shown(Plot(title, "draws", "nats per token", curves))


def plots_of(found: Found, exact: Exact) -> dict[str, Plot]:
    """All that have something to show, by file name."""
    made: dict[str, Callable[[], Plot | None]] = {
        "exact-draws": lambda: exact_draws_plot(exact),
        "draws": lambda: draws_plot(found, bits, "bits per byte"),
        "draws-accuracy": lambda: draws_plot(found, accuracy, "top-1, points"),
        "timesteps": lambda: timestep_plot(found),
        "generation": lambda: generation_plot(found, "infilling", "exact", "Spans filled exactly"),
        "functions": lambda: generation_plot(found, "completion", "valid", "Functions completed to valid code"),
    }
    return {name: plot for name, make in made.items() if (plot := make()) is not None}
