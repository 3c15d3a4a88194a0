"""What each recipe of stage 2 needs of a cache, in the one place that stage 1 may read too (DESIGN §5, §6).

A capture decides for months which experiments its cache can serve. So whoever plans one is told which recipes it
unlocks, and what the others would need. Stage 2 itself goes by a recipe's objective, and refuses what a cache lacks; a
test holds this table against the recipes' files and against that refusal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shared.spec import CaptureSpec


@dataclass(frozen=True)
class Need:
    """What one recipe reads. `context` None: no teacher's score at all. `temperature`: of the stored log Z, where the
    objective needs it. `tail_samples`: it gains from samples of the tail, but does without.
    """

    context: str | None
    lane: str = "gold"
    temperature: float | None = None
    tail_samples: bool = False


RECIPES: Mapping[str, Need] = {
    "reverse-calm-tidal": Need("compdemo"),
    "tide-cross": Need("plain"),
    "calm": Need("plain"),
    "tide-shared-x": Need("compdemo"),
    "kl": Need("plain", "topk", 2.0, tail_samples=True),
    "tide-shared": Need("compdemo", "topk", 2.0, tail_samples=True),
    "reverse-kl": Need("plain", "topk", 2.0),
    "events": Need("compdemo", "topk", 1.0),
    "cross-entropy": Need(None),
}


@dataclass(frozen=True)
class Unlock:
    """A recipe and a spec: what a cache of this spec lacks for it (nothing: it can be trained), and what would help."""

    recipe: str
    need: Need
    missing: tuple[str, ...]
    advice: str

    @property
    def unlocked(self) -> bool:
        """Whether a cache of this spec serves the recipe."""
        return not self.missing


def unlocks(spec: CaptureSpec) -> list[Unlock]:
    """Every recipe, in the table's order."""
    return [_unlock(spec, recipe, need) for recipe, need in RECIPES.items()]


def _unlock(spec: CaptureSpec, recipe: str, need: Need) -> Unlock:
    missing = []
    if need.context is not None and need.context not in spec.contexts:
        missing.append(f"context {need.context}")
    if need.context is not None and need.lane not in spec.lanes:
        missing.append(f"lane {need.lane}")
    elif need.temperature is not None and need.temperature not in spec.temperatures:
        missing.append(f"temperature {need.temperature:g}")
    advice = "better with tail samples, within one tokenizer" if need.tail_samples and not spec.tail_samples else ""
    return Unlock(recipe, need, tuple(missing), advice if not missing else "")
