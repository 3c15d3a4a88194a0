"""What `bench/evidence.py` compares: one frozen cell per trained student, and the questions that the cells answer.

A cell names the cache that its student is trained from (`CacheChoice`), the fields of the recipe that differ from the
common ones, and the seed. Its digest names its result, so a stopped run goes on, and a cell whose configuration
changes is done anew. A cell may answer several questions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

VERSION = 1  # of what the scripts mean; another one does every cell anew


@dataclass(frozen=True)
class Scale:
    """How large a run is; part of every digest. `draws` are captured: as many as epochs is the teacher in the loop,
    since each epoch then has masks that no other had.
    """

    name: str
    documents: int
    test_documents: int
    epochs: int
    batch: int
    seeds: int
    infill_documents: int
    prompts: int
    learning_rate: float = 2e-4  # of those on the page, the best for both
    contexts: str = "both"

    @property
    def draws(self) -> int:
        """Of the captured caches."""
        return self.epochs

    @property
    def steps(self) -> int:
        """Of every student."""
        return self.documents * self.epochs // self.batch


FULL = Scale("full", documents=128, test_documents=160, epochs=8, batch=8, seeds=5, infill_documents=96, prompts=48)
QUICK = Scale("quick", documents=48, test_documents=48, epochs=4, batch=8, seeds=2, infill_documents=24, prompts=8)
TEST = Scale("test", documents=8, test_documents=24, epochs=2, batch=4, seeds=1, infill_documents=3, prompts=2)
SCALES = {scale.name: scale for scale in (FULL, QUICK, TEST)}


@dataclass(frozen=True)
class CacheChoice:
    """Which cache a student is trained from. `teacher`: `tiny`, the embedded one, or a control (`evidence_teachers`);
    `completed`: the embedded teacher's own completions as text. `tokenizers`: declared ones, the student's first.
    """

    teacher: str = "tiny"
    mask_law: str = "chunk"
    tokenizers: int = 1
    draws: int = 0  # 0: all that were captured
    k: int = 16

    def captured(self) -> CacheChoice:
        """The capture that this one is sliced from."""
        return dataclasses.replace(self, draws=0, k=64)


@dataclass(frozen=True)
class Cell:
    """One student: its cache, what its recipe changes, its seed."""

    cache: CacheChoice = CacheChoice()
    recipe: tuple[tuple[str, Any], ...] = ()
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"cache": dataclasses.asdict(self.cache), "recipe": dict(self.recipe), "seed": self.seed}

    def digest(self, scale: Scale) -> str:
        """16 digits for this cell at this scale."""
        size = dataclasses.asdict(dataclasses.replace(scale, seeds=0))  # more seeds keep the others' results
        text = json.dumps([VERSION, self.to_json(), size], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def label(self) -> str:
        """What tables call it, whatever the seed."""
        recipe = dict(self.recipe)
        name = str(recipe.pop("objective"))
        if name == "none":
            name = "cross-entropy"
            recipe.pop("context", None)
        default = CacheChoice()
        parts = [f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in recipe.items()]
        parts += [
            f"{f.name}={getattr(self.cache, f.name)}"
            for f in dataclasses.fields(self.cache)
            if getattr(self.cache, f.name) != getattr(default, f.name)
        ]
        return " ".join([name, *parts])


def cell(objective: str, cache: CacheChoice | None = None, **recipe: Any) -> Cell:
    """A cell with the common choices (no TIDAL, no fresh rows, context compdemo) where nothing else is said."""
    values = {"objective": objective, "tidal": "none", "fresh": 0.0, "context": "compdemo"} | recipe
    plain = {"tidal": "none", "fresh": 0.0, "context": "compdemo"}
    kept = {k: v for k, v in values.items() if plain.get(k) != v}
    return Cell(cache or CacheChoice(), tuple(sorted(kept.items())))


CROSS_ENTROPY = cell("none")
REVERSE_CALM = cell("reverse-calm")
EVENTS = cell("kl", distill_weight=5.0)
TIDAL: dict[str, Any] = {"tidal": "weight"}
CONTROLS = ("unigram", "ngram", "smoothing", "shuffled")


def grid() -> Iterator[tuple[str, Cell]]:
    """(question, cell) for seed 0, in the order of the page."""
    change = dataclasses.replace
    for rate in (1e-4, 2e-4, 5e-4, 1e-3):
        yield "learning rate", cell("none", learning_rate=rate)
        yield "learning rate", cell("kl", distill_weight=5.0, learning_rate=rate)

    yield "offline and online", CROSS_ENTROPY
    for draws in (1, 2, 4, 0):
        for fresh in (0.0, 0.5):
            if draws == 0 and fresh:
                continue
            yield "offline and online", cell("none", CacheChoice(draws=draws), fresh=fresh)
            yield "offline and online", cell("kl", CacheChoice(draws=draws), distill_weight=5.0, fresh=fresh)
            yield "offline and online", cell("reverse-calm", CacheChoice(draws=draws), fresh=fresh)

    yield "objectives", CROSS_ENTROPY
    for temperature in (1.0, 2.0, 5.0):
        yield "objectives", cell("calm", temperature=temperature)
        yield "objectives", cell("reverse-calm", temperature=temperature)
    for weight in (1.0, 5.0, 20.0):
        for objective in ("calm", "reverse-calm", "kl", "reverse-kl"):
            yield "objectives", cell(objective, distill_weight=weight)

    for k in (1, 4, 16, 64):
        for objective in ("kl", "reverse-kl"):
            yield "candidates", cell(objective, CacheChoice(k=k), distill_weight=5.0)

    for context in ("plain", "compdemo"):
        for objective in ("calm", "reverse-calm", "kl", "reverse-kl"):
            yield "contexts", cell(objective, context=context, distill_weight=5.0)

    for objective in ("reverse-calm", "calm", "kl"):
        yield "TIDAL", cell(objective, distill_weight=5.0)
        for axis in ("both", "training", "timestep"):
            yield "TIDAL", cell(objective, distill_weight=5.0, tidal_axis=axis, **TIDAL)
        yield "TIDAL", cell(objective, distill_weight=5.0, tidal="interpolate")

    yield "controls", CROSS_ENTROPY
    yield "controls", change(CROSS_ENTROPY, cache=CacheChoice(teacher="completed"))
    for teacher in ("tiny", *CONTROLS):
        yield "controls", cell("kl", CacheChoice(teacher=teacher), distill_weight=5.0)
        yield "controls", cell("reverse-calm", CacheChoice(teacher=teacher))

    for law in ("chunk", "token"):
        yield "mask laws", cell("none", CacheChoice(mask_law=law))
        yield "mask laws", cell("kl", CacheChoice(mask_law=law), distill_weight=5.0)

    for tokenizers in (1, 2, 3, 4):
        yield "tokenizers", cell("kl", CacheChoice(tokenizers=tokenizers), distill_weight=5.0)


def quick_grid() -> Iterator[tuple[str, Cell]]:
    """What `make evidence-quick` has time for: event KL from few draws, and the controls."""
    short = {EVENTS, CROSS_ENTROPY, *(dataclasses.replace(EVENTS, cache=CacheChoice(teacher=t)) for t in CONTROLS)}
    for question, found in grid():
        offline = (
            question == "offline and online" and dict(found.recipe)["objective"] == "kl" and found.cache.draws != 4
        )
        if offline or (question in ("offline and online", "controls") and found in short):
            yield question, found


def seeds_of(question: str, scale: Scale) -> range:
    """Tuning and side questions take fewer seeds than those with a claim."""
    if question == "learning rate":
        return range(1)
    return range(scale.seeds if question in ("offline and online", "controls") else min(3, scale.seeds))


def cells(scale: Scale) -> list[Cell]:
    """All cells of a run, each once, seed by seed so that early results are already paired."""
    wanted: list[tuple[int, Cell]] = []
    for question, first in quick_grid() if scale is QUICK else grid():
        wanted += [(seed, dataclasses.replace(first, seed=seed)) for seed in seeds_of(question, scale)]
    return list(dict.fromkeys(found for _, found in sorted(wanted, key=lambda pair: pair[0])))
