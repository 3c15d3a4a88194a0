"""What a training run of stage 2 is told: one frozen dataclass, read from a small recipe file (DESIGN §2, §6).

A recipe is a TOML file that a user copies and edits; the named ones lie in `recipes/`. Every field of `TrainConfig` can
stand in a recipe and can be overridden by the command line; a field that does not exist is refused by name, since a
misspelt one that is silently ignored costs a training run. The resolved configuration is saved with each checkpoint.
`require` compares a configuration with a cache before anything is loaded, and says which command adds what is missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from shared.errors import TidecacheError
from shared.spec import CONTEXTS, CaptureSpec

METADATA_FILE = "tidecache.json"  # beside a student's weights
OBJECTIVES = ("none", "calm", "reverse-calm", "kl", "reverse-kl")
EVENT_OBJECTIVES = ("kl", "reverse-kl")
BLOCK_STARTS = ("sequence", "response")
TIMESTEP_WEIGHTS = ("uniform", "midrange")
MEASURED = "measured"  # of timestep weights: replaced by numbers once the cache is known, by `reliability`
AUTO = "auto"  # of `fresh` and `reuse`: decided by `automatic_fresh` and `automatic_reuse` once the cache is known
GPU_WORKERS = 2
FRESH_AT_MOST = 0.5  # of what `auto` decides (docs/evidence.md)
VIEWS = 3  # different rows that a draw gives with `reuse` halves: all of its chunks, half A, half B
CHOICES: Mapping[str, tuple[str, ...]] = {
    "objective": OBJECTIVES,
    "context": CONTEXTS,
    "tidal": ("none", "interpolate", "weight"),
    "tidal_axis": ("both", "training", "timestep"),
    "tidal_decay": ("cosine", "linear"),
    "ce_normalisation": ("token", "sequence", "batch"),
    "scheduler": ("cosine", "linear", "constant_with_warmup"),
    "precision": ("float32", "bf16"),
    "block_start": BLOCK_STARTS,
    "reuse": (AUTO, "same", "halves"),
}

LOWEST: Mapping[str, int] = {
    "batch": 1,
    "draws_together": 1,
    "accumulation": 1,
    "block_size": 1,
    "logging_steps": 1,
    "save_steps": 0,
    "steps": 0,
    "eval_steps": 0,
    "eval_documents": 1,
    "workers": -1,
    "lora_rank": 0,
    "lora_alpha": 1,
}


@dataclass(frozen=True)
class TrainConfig:
    """See the module. `batch` counts rows of one process and micro-batch; `steps` optimiser steps (0: from `epochs`);
    `save_steps` 0 writes the result alone.

    A row is one (document, draw); an epoch takes as many rows as there are documents. `warmup` is a share of all steps.
    `gold_share` of the target of KL is the gold, the rest the teacher's distribution. `timestep_weight`: `uniform`,
    `midrange`, `measured` (from how good the teacher is by timestep, which the cache says: `reliability`), or numbers by
    timestep bin with commas between, as `measured` is decided. `draws_together` rows, one after the other, are draws of one
    document, so that they can share its clean half. `fresh` is a share of the rows, or `auto`. `reuse`: what a stored draw
    masks when it is used again: the `same` chunks, or their `halves` in turn, each of which compdemo's teacher scored with
    the other shown (`Draw.half`); `auto`: see `automatic_reuse`. `block_start`: blocks count from the sequence's first token,
    as the paper trains, or from the response's, as it samples. `min_coverage`: least share of masked chunks that must carry
    a teacher's score. `lora_rank` 0 trains all weights; else adapters of that rank on the modules `lora_targets`
    (`all-linear`, or names with commas between), scaled by `lora_alpha` / `lora_rank`. `activation_checkpointing` computes
    each layer again in backward instead of keeping what it computed. `eval_steps`: steps between evaluations on the first
    `eval_documents` held-out documents; 0: never. `peak_tflops`: of one device, what MFU is a share of; 0: measured.
    `workers` prepare batches ahead of the step; −1: `GPU_WORKERS` beside a GPU, none on a CPU, whose cores the step needs.
    """

    objective: str = "reverse-calm"
    temperature: float = 1.0
    distill_weight: float = 1.0
    gold_share: float = 0.0
    context: str = "compdemo"
    tidal: str = "weight"
    tidal_axis: str = "both"
    tidal_decay: str = "cosine"
    lambda_init: float = 0.1
    lambda_max: float = 0.9
    timestep_weight: str = "uniform"
    ce_normalisation: str = "token"
    fresh: float | str = AUTO
    reuse: str = AUTO
    min_coverage: float = 0.5
    draws_together: int = 1
    block_size: int = 32
    block_start: str = "sequence"
    min_timestep: float = 0.0
    max_timestep: float = 1.0
    learning_rate: float = 5e-5
    warmup: float = 0.1
    scheduler: str = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    batch: int = 8
    accumulation: int = 1
    epochs: float = 3.0
    steps: int = 0
    precision: str = "float32"
    activation_checkpointing: bool = False
    lora_rank: int = 0
    lora_alpha: int = 32
    lora_targets: str = "all-linear"
    seed: int = 0
    logging_steps: int = 1
    save_steps: int = 500
    eval_steps: int = 500
    eval_documents: int = 64
    workers: int = -1
    peak_tflops: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what no run can mean."""
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                hint = _nearest(value, allowed)
                raise TidecacheError(f"{name}: expected one of {', '.join(allowed)}, found {value!r}{hint}")
        if self.timestep_weight not in (*TIMESTEP_WEIGHTS, MEASURED):
            bin_weights(self.timestep_weight)
        if self.timestep_weight == MEASURED and "none" in (self.tidal, self.objective):
            raise TidecacheError(
                f"timestep_weight: measured weighs what TIDAL distils, found objective {self.objective} and tidal {self.tidal}: "
                "pass --timestep-weight uniform, or an objective and --tidal weight"
            )
        for name, lowest in LOWEST.items():
            value = getattr(self, name)
            if value < lowest:
                raise TidecacheError(f"{name}: expected a whole number of at least {lowest}, found {value}")
        if isinstance(self.fresh, str) and self.fresh != AUTO:
            raise TidecacheError(f"fresh: expected a number from 0 to 1, or {AUTO}, found {self.fresh!r}")
        shares = ["warmup", "lambda_init", "lambda_max", "min_timestep", "max_timestep", "min_coverage"]
        for name in shares if self.fresh == AUTO else ["fresh", *shares]:
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise TidecacheError(f"{name}: expected a number from 0 to 1, found {getattr(self, name)}")
        for name in ("temperature", "learning_rate"):
            if not getattr(self, name) > 0.0:
                raise TidecacheError(f"{name}: expected a number above 0, found {getattr(self, name)}")
        if self.min_timestep >= self.max_timestep:
            raise TidecacheError(
                f"min_timestep: expected less than max_timestep, found {self.min_timestep} and {self.max_timestep}"
            )
        if self.steps == 0 and not self.epochs > 0.0:
            raise TidecacheError(f"epochs: expected a number above 0 where steps is 0, found {self.epochs}")
        if not self.lora_targets.strip(", "):
            raise TidecacheError("lora_targets: expected all-linear, or names of modules, found none")
        if self.batch % self.draws_together:
            raise TidecacheError(
                f"draws_together: a batch holds whole groups of {self.draws_together} rows, found batch {self.batch}: "
                f"pass --batch with a multiple of it"
            )
        if not 0.0 <= self.gold_share < 1.0:
            raise TidecacheError(f"gold_share: expected a number from 0 to below 1, found {self.gold_share}")
        if self.gold_share and not self.uses_events:
            raise TidecacheError(
                f"gold_share: mixes the gold into the target of kl and reverse-kl, found objective {self.objective}: pass "
                "--gold-share 0"
            )
        if self.reuse == "halves" and (self.context != "compdemo" or self.objective == "none"):
            raise TidecacheError(
                "reuse: halves are what compdemo's teacher scored one by one, so they need an objective that distils and "
                f"context compdemo, found objective {self.objective} and context {self.context}: pass --reuse same"
            )
        if self.reuse == "halves" and self.min_timestep > 0.0:
            raise TidecacheError(
                "reuse: a half of a draw has a smaller timestep than the draw, so halves do not keep to min_timestep "
                f"{self.min_timestep:g}: pass --reuse same, or no --min-timestep"
            )
        if self.tidal == "interpolate" and self.objective == "reverse-kl":
            raise TidecacheError(
                "tidal: `interpolate` mixes the target of a forward objective, or of CALM in either direction; "
                "with reverse-kl take `weight` or `none`"
            )

    @property
    def fresh_share(self) -> float:
        """`fresh` as a number.

        Raises:
            TidecacheError: it is still `auto`.
        """
        if isinstance(self.fresh, str):
            raise TidecacheError(f"fresh: {self.fresh} is decided when the cache is known, by `automatic_fresh`")
        return self.fresh

    @property
    def uses_events(self) -> bool:
        """Whether the objective compares teacher and student on candidates, and so needs the topk lane."""
        return self.objective in EVENT_OBJECTIVES

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, one per field."""
        return dataclasses.asdict(self)


def _nearest(name: object, known: tuple[str, ...] | list[str]) -> str:
    """` (did you mean x?)`, or nothing."""
    close = difflib.get_close_matches(str(name), known, n=2)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


@lru_cache(maxsize=16)
def bin_weights(kind: str) -> tuple[float, ...]:
    """The numbers of a timestep weight that is given by numbers.

    Raises:
        TidecacheError: fewer than two, or one that is negative or none, or all 0.
    """
    try:
        weights = tuple(float(part) for part in kind.split(","))
    except ValueError:
        known = (*TIMESTEP_WEIGHTS, MEASURED)
        raise TidecacheError(
            f"timestep_weight: expected one of {', '.join(known)}, or numbers with commas between, found {kind!r}"
            f"{_nearest(kind, known)}"
        ) from None
    if len(weights) < 2 or not all(0.0 <= weight < math.inf for weight in weights) or not any(weights):
        raise TidecacheError(
            f"timestep_weight: expected at least two numbers from 0 on with commas between, not all 0, found {kind!r}"
        )
    return weights


def resolve(values: Mapping[str, Any], source: str) -> TrainConfig:
    """A configuration from field values as TOML or the command line give them; `source` names them in errors.

    Raises:
        TidecacheError: an unknown field (with close matches), a value of another type, or one out of range.
    """
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields:
            raise TidecacheError(
                f"{source}: unknown field {name!r}{_nearest(name, list(fields))}; the fields are {', '.join(fields)}"
            )
        kind = type(fields[name].default)
        if name == "fresh" and value != AUTO:
            kind = float
            if isinstance(value, str):  # as the command line gives it
                with contextlib.suppress(ValueError):
                    value = float(value)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not kind:
            expected = f"a number or {AUTO}" if name == "fresh" else kind.__name__
            raise TidecacheError(f"{source}: {name}: expected {expected}, found {value!r}")
        checked[name] = value
    return TrainConfig(**checked)


def recipe_names() -> list[str]:
    """The named recipes that come with the project, sorted."""
    folder = resources.files("stage2_student") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def base_defaults(base: str | Path) -> Mapping[str, Any]:
    """What a base says in its `tidecache.json`: field values for where no recipe says more.

    Those under `defaults` (a base of 2M parameters learns at other rates than one of 600M, whatever the recipe), and
    the blocks that it was trained with. Most bases say nothing.

    Raises:
        TidecacheError: an unknown field or a value of another type.
    """
    path = Path(base) / METADATA_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        defaults = {name: found[name] for name in ("block_size", "block_start") if found.get(name) is not None}
        defaults |= dict(found.get("defaults", {}))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise TidecacheError(f"{path}: expected a JSON object, found something else: {error}") from error
    resolve(defaults, str(path))
    return defaults


def load_recipe(
    name_or_path: str, overrides: Mapping[str, Any] | None = None, defaults: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Read a named recipe or a recipe file; `overrides` (by field name) go before it, `defaults` after it.

    Raises:
        TidecacheError: no such recipe, bad TOML, or what `resolve` refuses.
    """
    names = recipe_names()
    if name_or_path in names:
        source = f"recipe {name_or_path}"
        text = (resources.files("stage2_student") / "recipes" / f"{name_or_path}.toml").read_text(encoding="utf-8")
    else:
        path = Path(name_or_path)
        source = f"recipe file {path}"
        if not path.is_file():
            raise TidecacheError(
                f"recipe {name_or_path!r}: neither a named recipe{_nearest(name_or_path, names)} nor a file; "
                f"the named ones are {', '.join(names)}"
            )
        text = path.read_text(encoding="utf-8")
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TidecacheError(f"{source}: not valid TOML: {error}") from error
    resolve(values, source)  # alone, so that its own mistakes are not laid to the command line
    if overrides:
        source = f"{source} with the command line's options"
    return resolve({**(defaults or {}), **values, **(overrides or {})}, source)


def automatic_reuse(config: TrainConfig, uses: float, mask_laws: Collection[str]) -> str:
    """What `reuse` is where it is `auto`: `halves` where draws are used again and the teacher scored their halves.

    That is, the recipe distils from compdemo, of caches that mask whole chunks, at all timesteps: a half of a draw has a
    smaller one than the draw. `uses`: how often a draw is used on average, without fresh rows.
    """
    may = config.objective != "none" and config.context == "compdemo" and config.min_timestep == 0.0
    return "halves" if may and uses > 1.0 and set(mask_laws) == {"chunk"} else "same"


def automatic_fresh(uses: float, reuse: str) -> float:
    """The share of fresh rows where `fresh` is `auto`: enough that no row comes twice, but at most half.

    `uses`: how often a draw would be used on average, were no row fresh. With halves a draw gives `VIEWS` different rows.
    """
    rows = VIEWS if reuse == "halves" else 1
    return round(min(FRESH_AT_MOST, max(0.0, 1.0 - rows / uses)), 4)


def require(config: TrainConfig, spec: CaptureSpec, cache: str) -> None:
    """Check that the cache called `cache` holds what the configuration asks for.

    Raises:
        TidecacheError: a context, lane or temperature is missing; the message says what to capture, or to choose.
    """
    if config.objective == "none":
        return
    missing, instead, options = [], [], []
    if config.context not in spec.contexts:
        missing.append(f"context: the recipe asks for {config.context}, the cache holds {', '.join(spec.contexts)}")
        instead.append(f"--context {spec.contexts[0]}")
        options.append(f"--context {config.context}")
    if config.uses_events and "topk" not in spec.lanes:
        missing.append(f"objective: {config.objective} needs the topk lane, the cache holds {', '.join(spec.lanes)}")
        instead.append("--objective reverse-calm or calm, which need the gold lane alone")
        options.append("--lanes topk")
    if config.uses_events and config.temperature not in spec.temperatures:
        held = ", ".join(f"{t:g}" for t in spec.temperatures)
        missing.append(
            f"temperature: {config.objective} at {config.temperature:g} needs the teacher's normaliser at that "
            f"temperature, the cache holds {held}"
        )
        instead.append("--temperature with one of these")
        options.append(f"--temperatures {config.temperature:g}")
    if missing:
        raise TidecacheError(
            f"{cache}: {'; '.join(missing)}: pass {' and '.join(instead)}, or add what is missing with `tidecache teacher "
            f"extend {cache} {' '.join(options)}`"
        )
