"""What `bench/evidence.py` compares: one frozen cell per trained student, and the questions that the cells answer.

A cell names the cache that its student is trained from (`CacheChoice`), the fields of the recipe that differ from the
common ones, and the seed. Its digest names its result, so a stopped run goes on, and a cell whose configuration
changes is done anew. A cell may answer several questions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
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
    wide_documents: int = 0  # to see other documents, and enough of them for generation
    learning_rate: float = 2e-4
    contexts: str = "both"

    @property
    def draws(self) -> int:
        """Of the captured caches."""
        return self.epochs

    @property
    def steps(self) -> int:
        """Of every student."""
        return self.documents * self.epochs // self.batch


FULL = Scale(
    "full",
    documents=256,
    test_documents=160,
    epochs=4,
    batch=8,
    seeds=5,
    wide_documents=640,
)
QUICK = Scale("quick", documents=48, test_documents=48, epochs=4, batch=8, seeds=2)
TEST = Scale("test", documents=8, test_documents=24, epochs=2, batch=4, seeds=1, wide_documents=24)
SCALES = {scale.name: scale for scale in (FULL, QUICK, TEST)}


# Chosen on the validation documents (the question "settings"), what all claims are about, and the recipe `events`.
BEST: dict[str, Any] = {
    "distill_weight": 20.0,
    "gold_share": 0.5,
    "tidal": "weight",
    "tidal_axis": "timestep",
}
MEASURED = BEST | {"timestep_weight": "measured"}
PLAIN: dict[str, Any] = {
    "tidal": "none", "fresh": 0.0, "reuse": "same", "context": "compdemo", "distill_weight": 1.0, "gold_share": 0.0,
    "timestep_weight": "uniform",
}  # fmt: skip
NAMES = {
    "none": "cross-entropy", "calm": "CALM", "reverse-calm": "Reverse CALM", "kl": "event KL", "reverse-kl": "reverse event KL",
}  # fmt: skip


@dataclass(frozen=True)
class CacheChoice:
    """Which cache a student is trained from. `teacher`: `tiny`, the embedded one, or a control (`evidence_teachers`);
    `completed`: the embedded teacher's own completions as text. `tokenizers`: how many are declared, the student's first;
    `declared` False: as many others, and not the student's.
    """

    teacher: str = "tiny"
    mask_law: str = "chunk"
    tokenizers: int = 1
    declared: bool = True
    draws: int = 0  # 0: all that were captured
    k: int = 16

    def captured(self) -> CacheChoice:
        """The capture that this one is sliced from."""
        return dataclasses.replace(self, draws=0, k=64)


@dataclass(frozen=True)
class Cell:
    """One student: its cache, what its recipe changes, its seed, and what it is measured on: `test`, `validation` or `wide`."""

    cache: CacheChoice = CacheChoice()
    recipe: tuple[tuple[str, Any], ...] = ()
    seed: int = 0
    documents: str = "test"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self) | {"recipe": dict(self.recipe)}

    def digest(self, scale: Scale) -> str:
        """16 digits for this cell at this scale."""
        # More seeds, or more of the wide documents, keep the others' results.
        size = dataclasses.asdict(dataclasses.replace(scale, seeds=0))
        del size["wide_documents"]
        if self.documents == "wide":
            size["test_documents"] = scale.wide_documents
        text = json.dumps([VERSION, self.to_json(), size], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def label(self) -> str:
        """What tables call it, whatever the seed."""
        recipe = dict(self.recipe)
        name = NAMES[recipe.pop("objective")]
        tuned = ((", tuned, measured weights", MEASURED), (", tuned", BEST))
        differing, words, chosen = min(
            (({k for k, v in chosen.items() if recipe.get(k) != v}, words, chosen) for words, chosen in tuned),
            key=lambda one: len(one[0]),
        )
        if len(differing) <= 1:  # as the tuned one but for this
            name += words
            recipe = {k: v for k, v in (PLAIN | recipe).items() if k in differing or (k in recipe and k not in chosen)}
        recipe.pop("min_coverage", None)  # what a cache without the student's tokenizer needs
        if "steps" in recipe:
            recipe.pop("fresh", None)  # what fills the further steps
        default = CacheChoice()
        parts = [f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in recipe.items()]
        parts += [
            f"{f.name}={getattr(self.cache, f.name)}"
            for f in dataclasses.fields(self.cache)
            if getattr(self.cache, f.name) != getattr(default, f.name)
        ]
        return " ".join([name, *parts])


def cell(objective: str, cache: CacheChoice | None = None, **recipe: Any) -> Cell:
    """A cell with the common choices (no TIDAL, no fresh rows, context compdemo, weight 1) where nothing else is said."""
    kept = {"objective": objective} | {k: v for k, v in recipe.items() if PLAIN.get(k) != v}
    return Cell(cache or CacheChoice(), tuple(sorted(kept.items())))


CROSS_ENTROPY = cell("none")
DEFAULT = cell("reverse-calm", tidal="weight")  # the default recipe
WIDE_CROSS_ENTROPY = dataclasses.replace(CROSS_ENTROPY, documents="wide")
VALIDATED_CROSS_ENTROPY = dataclasses.replace(cell("none", learning_rate=2e-4), documents="validation")
CONTROLS = ("unigram", "ngram", "smoothing", "shuffled")
# How many steps of cross-entropy take as long as one of event KL, and as one and its part of the capture, which that one
# student bears alone: as measured (`evidence_costs`).
EQUAL_SECONDS = (1.4, 2.4)


def events(cache: CacheChoice | None = None, **recipe: Any) -> Cell:
    """Event KL as in `BEST`."""
    return cell("kl", cache, **(BEST | recipe))


def measured(cache: CacheChoice | None = None, **recipe: Any) -> Cell:
    """Event KL with timesteps weighed by the teacher's measured reliability: the side questions, each compared within itself."""
    return cell("kl", cache, **(MEASURED | recipe))


# (draws, share of fresh rows, what a further use masks), in four epochs; with halves the fresh share is what `auto` takes.
OFFLINE = (
    (1, 0.0, "same"), (1, 0.25, "halves"), (2, 0.0, "same"), (2, 0.5, "same"), (2, 0.0, "halves"),
)  # fmt: skip


def offline(draws: int, fresh: float, reuse: str) -> Cell:
    """Event KL from so many stored draws."""
    return events(CacheChoice(draws=draws), fresh=fresh, reuse=reuse)


def in_context(objective: str, context: str) -> Cell:
    """KL as in `MEASURED`; CALM, which has no gold to mix in, and Reverse CALM, which bears no such weight, without TIDAL."""
    if objective in ("kl", "reverse-kl"):
        return cell(objective, context=context, **MEASURED)
    return cell(objective, context=context, distill_weight=20.0 if objective == "calm" else 1.0)


# On more documents, and in generation: what may win there and lose in likelihood among them.
GENERATED = (
    CROSS_ENTROPY,
    DEFAULT,
    cell("reverse-kl"),
    cell("reverse-kl", **BEST),
    events(CacheChoice(teacher="ngram")),
    offline(2, 0.0, "halves"),
    events(),
)


def lighter(teacher: str) -> Cell:
    """Event KL with weight 1: the tuned weight is for a teacher that knows more."""
    return events(CacheChoice(teacher=teacher), distill_weight=1.0)


def without_tidal() -> Cell:
    """As `BEST`, its mean weight the same on every chunk."""
    return cell("kl", distill_weight=0.9 * BEST["distill_weight"], gold_share=BEST["gold_share"])


def undeclared() -> Cell:
    """From a cache that declares another tokenizer than the student's."""
    return measured(CacheChoice(declared=False), min_coverage=0.0)


def longer(scale: Scale, factor: float) -> Cell:
    """Cross-entropy for so many times the steps; the rows beyond the stored draws have fresh masks."""
    steps = round(scale.steps * factor)
    return cell("none", steps=steps, fresh=round(1 - scale.steps / steps, 4))


def grid(scale: Scale) -> Iterator[tuple[str, Cell]]:
    """(question, cell) for seed 0, in the order of the page."""
    yield from settings()
    yield "offline and online", CROSS_ENTROPY
    yield "offline and online", cell("none", CacheChoice(draws=1))
    yield "offline and online", longer(scale, EQUAL_SECONDS[0])
    for draws, fresh, reuse in OFFLINE:
        yield "offline and online", offline(draws, fresh, reuse)
    yield "offline and online", events()

    yield "controls", CROSS_ENTROPY
    for factor in EQUAL_SECONDS:
        yield "controls", longer(scale, factor)
    yield "controls", dataclasses.replace(CROSS_ENTROPY, cache=CacheChoice(teacher="completed"))
    for teacher in ("tiny", *CONTROLS):
        yield "controls", events(CacheChoice(teacher=teacher))
    yield "controls", lighter("ngram")

    for found in GENERATED:
        yield "generation", dataclasses.replace(found, documents="wide")

    yield "objectives", CROSS_ENTROPY
    yield "objectives", DEFAULT
    for objective in ("reverse-calm", "calm", "kl", "reverse-kl"):
        yield "objectives", cell(objective)
    yield "objectives", cell("reverse-calm", temperature=5.0)
    yield "objectives", cell("reverse-calm", CacheChoice(teacher="ngram"))
    yield "objectives", cell("calm", distill_weight=20.0)
    yield "objectives", events()
    yield "objectives", measured()
    yield "objectives", cell("reverse-kl", **MEASURED)
    yield "objectives", measured(gold_share=0.0)

    # At matched mean weight: λ is ½ on average over training, and λ_max = 0.9 on the timestep's axis.
    mean, gold = 0.9 * BEST["distill_weight"], BEST["gold_share"]
    yield "TIDAL", without_tidal()
    for axis in ("both", "training", "timestep"):
        weight = round(mean / (0.9 if axis == "timestep" else 0.5), 4)
        yield "TIDAL", cell("kl", tidal="weight", tidal_axis=axis, distill_weight=weight, gold_share=gold)
        if axis != "both":
            yield "TIDAL", measured(tidal_axis=axis, distill_weight=weight)
    yield "TIDAL", cell("kl", tidal="interpolate", distill_weight=mean, gold_share=gold)

    for context in ("plain", "compdemo"):
        for objective in ("calm", "reverse-calm", "kl", "reverse-kl"):
            yield "contexts", in_context(objective, context)

    for k in (1, 4, 16, 64):
        yield "candidates", measured(CacheChoice(k=k))

    for law in ("chunk", "token"):
        yield "mask laws", cell("none", CacheChoice(mask_law=law))
        yield "mask laws", measured(CacheChoice(mask_law=law))

    for tokenizers in (1, 2, 3, 4):
        yield "tokenizers", measured(CacheChoice(tokenizers=tokenizers))
    yield "tokenizers", undeclared()


def settings() -> Iterator[tuple[str, Cell]]:
    """What is chosen on the validation documents: the learning rate, event KL's weight and that of its timesteps."""
    chosen = [make(learning_rate=rate) for rate in (1e-4, 2e-4, 5e-4) for make in (partial(cell, "none"), measured)]
    chosen += [measured(gold_share=share) for share in (0.0, 0.8)]
    chosen += [measured(distill_weight=5.0), events()]
    for found in chosen:
        yield "settings", dataclasses.replace(found, documents="validation")


def quick_grid() -> Iterator[tuple[str, Cell]]:
    """What `make evidence-quick` has time for: event KL from few draws, and the controls."""
    asked = [("offline and online", found) for found in (CROSS_ENTROPY, events())]
    asked += [("offline and online", offline(*found)) for found in OFFLINE if found[0] == 2]
    asked += [("controls", found) for found in (CROSS_ENTROPY, events())]
    asked += [("controls", events(CacheChoice(teacher=teacher))) for teacher in CONTROLS]
    yield from asked


def seeds_of(question: str, scale: Scale) -> range:
    """Settings and side questions take fewer seeds than those with a claim."""
    if question == "settings":
        return range(1)
    return range(scale.seeds if question == "offline and online" else min(3, scale.seeds))


def cells(scale: Scale, questions: Collection[str] = ()) -> list[Cell]:
    """All cells of a run, or of some questions, each once, seed by seed so that early results are paired already."""
    wanted: list[tuple[int, Cell]] = []
    for question, first in quick_grid() if scale is QUICK else grid(scale):
        if not questions or question in questions:
            wanted += [(seed, dataclasses.replace(first, seed=seed)) for seed in seeds_of(question, scale)]
    return list(dict.fromkeys(found for _, found in sorted(wanted, key=lambda pair: pair[0])))
