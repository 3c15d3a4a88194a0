"""One training run from start to end: what `tidecache student train` does once its options are read.

What can be wrong is found before the first step: the cache is checked against the recipe, the tokenizer against the
cache, and a plan says what will happen (draws against epochs, coverage, TIDAL's effective weight, tokens).
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from shared.cache import open_cache
from shared.cache.mixing import WeightedCache
from shared.cache.order import DrawIndex
from shared.cache.reader import Cache
from shared.cache.remote import Folder
from shared.cache.selection import Selection
from shared.cache.stream import DrawStream
from shared.errors import TidecacheError
from shared.spec import CaptureSpec
from stage2_student import adapters, checkpoints, families, tidal
from stage2_student.batch import Collator
from stage2_student.callbacks import Display, LogFile
from stage2_student.config import (
    AUTO,
    MEASURED,
    TIMESTEP_WEIGHTS,
    TrainConfig,
    automatic_fresh,
    automatic_reuse,
    require,
)
from stage2_student.data import RowMaker
from stage2_student.dataset import TrainingRows
from stage2_student.losses import Counts, total
from stage2_student.model import (
    Student,
    TrainableStudent,
    TrainedFrom,
    load_student,
    restore_student,
)
from stage2_student.reliability import measured_weights
from stage2_student.trainer import StudentTrainer, fsdp_wanted, training_arguments

COVERAGE_DRAWS = 64  # rows that the plan looks at for coverage and length


@dataclass(frozen=True)
class CachePlan:
    """What a run takes from one cache. `share` of the rows; `uses`: how often each draw is used on average."""

    path: str
    fingerprint: str
    contexts: tuple[str, ...]
    lanes: tuple[str, ...]
    tokenizer: str  # "declared" or "undeclared"
    share: float
    documents: int
    draws: int
    uses: float


@dataclass(frozen=True)
class Plan:
    """What a run will do, known before its first step. Weights are means over the caches' timesteps."""

    caches: tuple[CachePlan, ...]
    rows: int
    steps: int
    epochs: float
    coverage: float
    tidal_weight_first: float
    tidal_weight_last: float
    tokens: int
    fresh_is_automatic: bool = False
    without_tail: tuple[str, ...] = ()  # caches of which KL misses tail samples, see `misses_tail`

    def table(self, config: TrainConfig) -> Table:
        """For people."""
        table = Table(title="Before step 1", show_header=False, title_justify="left")
        distills = config.objective != "none"
        automatic = " (automatic: by draws and epochs)" if self.fresh_is_automatic else ""
        objective = f"{config.objective}, T = {config.temperature:g}, context {config.context}"
        rows: list[tuple[str, str]] = []
        for cache in self.caches:
            share = f" ({cache.share:.1%} of the rows)" if len(self.caches) > 1 else ""
            per_document = f"{cache.draws / cache.documents:.3g} per document"
            rows += [
                ("cache", f"{cache.path}{share}"),
                ("fingerprint", cache.fingerprint),
                ("contexts, lanes", f"{', '.join(cache.contexts)}; {', '.join(cache.lanes)}"),
                ("documents", f"{cache.documents:,}"),
                ("draws", f"{per_document}, each used {cache.uses:.3g} times on average"),
            ]
        tokenizers = " and ".join(dict.fromkeys(cache.tokenizer for cache in self.caches))
        if config.reuse == "halves":
            rows.append(
                ("rows of a draw", "all of its masked chunks, one half of them, the other, with the rest shown")
            )
        rows += [
            ("objective", objective if distills else "cross-entropy only"),
            ("student tokenizer", f"{tokenizers}: {self.coverage:.1%} of the masked chunks carry a teacher's score"),
            ("fresh rows", f"{config.fresh_share:.0%} of each batch, cross-entropy only{automatic}"),
            ("rows", f"{self.rows:,} in {self.steps:,} steps ({self.epochs:.3g} epochs)"),
            ("tokens", f"about {self.tokens:,}"),
        ]
        if distills and config.tidal != "none":
            what = "target share λ" if config.tidal == "interpolate" else "loss weight"
            values = f"{self.tidal_weight_first:.3f} → {self.tidal_weight_last:.3f}"
            rows.append((f"TIDAL, {config.tidal}", f"mean {what} over timesteps {values}"))
            if config.timestep_weight not in TIMESTEP_WEIGHTS:
                rows.append(("timestep weight", f"{config.timestep_weight.replace(',', ', ')} (t from 0 to 1)"))
        rows += [
            (
                "note",
                f"{path} has no tail samples: at T = {config.temperature:g} all that its k fillings leave counts as one "
                "event, and the gradient can be far from that of KL between whole distributions (docs/recipes.md); "
                f"`tidecache teacher extend {path} --tail-samples 32` adds them",
            )
            for path in self.without_tail
        ]
        for name, value in rows:
            table.add_row(name, value)
        return table


@dataclass(frozen=True)
class Prepared:
    """A run that only needs to be started."""

    trained_from: tuple[TrainedFrom, ...]
    student: Student
    rows: TrainingRows
    plan: Plan
    config: TrainConfig  # with every field decided


def prepare(
    config: TrainConfig, caches: str | Folder | Sequence[WeightedCache], base: str | Path, ranks: int = 1
) -> Prepared:
    """Open everything and make the plan; `ranks` processes share each step.

    Raises:
        TidecacheError: a cache lacks what the recipe needs, or base or cache cannot be read.
    """
    sources = [WeightedCache(str(caches))] if isinstance(caches, str | Folder) else caches
    opened = [open_cache(source.path) for source in sources]
    for cache in opened:
        require(config, cache.spec, str(cache.path))
    student = load_student(base)
    student.check_blocks(str(base), config.block_size, config.block_start)  # `base_defaults` took them from it
    if config.lora_rank:
        adapters.add_adapters(student.model, config, student.mask_id if student.mask_added else None, str(base))
    distills = config.objective != "none"
    draws = DrawStream(
        opened,
        [source.weight for source in sources],
        seed=config.seed,
        together=config.draws_together,
        selection=Selection(config.min_timestep, config.max_timestep),
        context=config.context if distills else None,
        topk=config.uses_events,
    )
    documents = sum(index.documents for index in draws.indexes)
    batch_rows = config.batch * config.accumulation * ranks
    steps = config.steps or max(1, math.ceil(config.epochs * documents / batch_rows))
    automatic = config.fresh == AUTO
    shares = zip(draws.mixture.shares, draws.indexes, strict=True)
    uses = max(share * steps * batch_rows / index.draws for share, index in shares)  # of a draw, were no row fresh
    if config.reuse == AUTO:
        laws = {cache.spec.mask_law for cache in opened}
        config = dataclasses.replace(config, reuse=automatic_reuse(config, uses, laws))
    if automatic:
        config = dataclasses.replace(config, fresh=automatic_fresh(uses, config.reuse))
    if config.timestep_weight == MEASURED:
        weights = measured_weights(opened, draws.mixture.shares, config.context)
        config = dataclasses.replace(config, timestep_weight=weights)
    makers = [
        RowMaker(
            student.text,
            cache.spec,
            config.block_size,
            config.context if distills else None,
            temperature=config.temperature if config.uses_events else None,
            seed=config.seed,
            timesteps=(config.min_timestep, config.max_timestep),
            block_start=config.block_start,
        )
        for cache in opened
    ]
    rows = TrainingRows(draws, makers, config.fresh_share, steps * batch_rows, halves=config.reuse == "halves")
    trained_from = tuple(
        TrainedFrom(cache.spec.fingerprint, cache.manifest.content, source.weight)
        for cache, source in zip(opened, sources, strict=True)
    )
    plan = dataclasses.replace(_plan(config, rows, steps, student), fresh_is_automatic=automatic)
    return Prepared(trained_from, student, rows, plan, config)


def _plan(config: TrainConfig, rows: TrainingRows, steps: int, student: Student) -> Plan:
    draws = rows.draws
    caches = [
        _cache_plan(config, cache, student, share, rows, index)
        for cache, share, index in zip(draws.caches, draws.mixture.shares, draws.indexes, strict=True)
    ]
    looked_at = [rows[number] for number in range(min(COVERAGE_DRAWS, len(rows)))]
    masked = sum(row.coverage.masked for row in looked_at)
    coverage = sum(row.coverage.usable for row in looked_at) / masked if masked else 1.0
    if coverage < config.min_coverage and config.objective != "none":
        names = ", ".join(dict.fromkeys(s.name for cache in draws.caches for s in cache.spec.students))
        paths = ", ".join(cache.path for cache in caches)
        raise TidecacheError(
            f"min_coverage: with the student's tokenizer {coverage:.1%} of the masked chunks in {len(looked_at)} rows can "
            f"carry a teacher's score, expected at least {config.min_coverage:.0%}: the caches {paths} were captured "
            f"for {names}; capture one that declares this tokenizer with `tidecache teacher capture --students`, or lower "
            "--min-coverage"
        )
    families.check_length(student.model.config, max(len(row.ids_L) for row in looked_at))
    mean_length = sum(len(row.ids_L) for row in looked_at) / len(looked_at)
    schedule = (config.lambda_init, config.lambda_max, config.tidal_decay)

    def weight(progress: float) -> float:
        if config.tidal == "none":
            return 1.0
        mean = 0.0
        for share, index in zip(draws.mixture.shares, draws.indexes, strict=True):
            timestep_R = torch.from_numpy(index.timestep_R).double()
            if config.tidal == "interpolate":
                weight_R = tidal.strength(progress, timestep_R, config.tidal_axis, *schedule)
            else:
                weight_R = tidal.sample_weight(
                    progress, timestep_R, config.tidal_axis, config.timestep_weight, *schedule
                )
            mean += share * float(weight_R.mean())
        return mean

    return Plan(
        caches=tuple(caches),
        rows=len(rows),
        steps=steps,
        epochs=len(rows) / sum(cache.documents for cache in caches),
        coverage=coverage,
        tidal_weight_first=weight(0.0),
        tidal_weight_last=weight(1.0),
        tokens=round(mean_length * len(rows)),
        without_tail=tuple(str(c.path) for c in draws.caches if misses_tail(config, c.spec, student.text.digest)),
    )


def misses_tail(config: TrainConfig, spec: CaptureSpec, tokenizer: str) -> bool:
    """Whether forward KL above temperature 1, where the tail weighs most, would gain from tail samples that the cache lacks.

    They serve one tokenizer alone: `tokenizer` is the digest of the student's.
    """
    softened = config.objective == "kl" and config.temperature > 1.0
    return softened and tokenizer == spec.teacher.tokenizer and not spec.tail_samples


def _cache_plan(
    config: TrainConfig, cache: Cache, student: Student, share: float, rows: TrainingRows, index: DrawIndex
) -> CachePlan:
    declared = student.text.digest in {s.tokenizer for s in cache.spec.students}
    return CachePlan(
        path=str(cache.path),
        fingerprint=cache.spec.fingerprint,
        contexts=cache.spec.contexts,
        lanes=cache.spec.lanes,
        tokenizer="declared" if declared else "undeclared",
        share=share,
        documents=index.documents,
        draws=index.draws,
        uses=len(rows) * (1.0 - config.fresh_share) * share / index.draws,
    )


def dry_run(config: TrainConfig, prepared: Prepared, console: Console) -> float:
    """The loss of the first batch, without training; returns it in nats."""
    student = prepared.student
    rows = [prepared.rows[number] for number in range(min(config.batch, len(prepared.rows)))]
    batch = Collator(student.mask_id, student.pad_id)(rows)
    with torch.no_grad():
        losses = TrainableStudent(student.model, config)(batch, 0.0)
    counts = Counts.of([batch], config)
    loss = float(total(losses, counts, config))
    console.print(
        f"first batch: loss {loss:.4f} (cross-entropy {float(losses.ce.over()):.4f}, distillation "
        f"{float(losses.distill.over()):.4f}; {len(batch)} rows, {len(batch.target_N)} masked tokens, "
        f"{len(batch.sample_C)} scored chunks); nothing was trained or written"
    )
    return loss


def train(
    config: TrainConfig,
    caches: str | Folder | Sequence[WeightedCache],
    base: str | Path,
    out: Path,
    *,
    report_to: Sequence[str] = (),
    resume: bool = False,
    stop_before_training: bool = False,
    eval_cache: str | Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train a student; `out` becomes a plain checkpoint folder with `train_log.jsonl` beside it. Returns a summary.

    Raises:
        TidecacheError: whatever `prepare` refuses; an `out` that holds a run already; a loss that is not finite.
    """
    console = console or Console(stderr=True)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    _check_launch(config)
    if not stop_before_training:
        checkpoints.check_out(out, resume)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    is_first = int(os.environ.get("RANK", "0")) == 0
    prepared = prepare(config, caches, base, ranks)
    plan, config = prepared.plan, prepared.config
    if is_first:
        console.print(plan.table(config))
        if prepared.student.mask_added:
            console.print("note: the base had no mask token; one was added, with the mean of all embeddings")
    if stop_before_training:
        return {"loss": dry_run(config, prepared, console)}
    identity = checkpoints.Identity(config, prepared.trained_from, prepared.student.text.digest, ranks)
    checkpoint = checkpoints.last(out) if resume else None
    if checkpoint is not None:
        identity.check(checkpoint)
        restore_student(prepared.student.model, checkpoint)
    checkpoints.check_space(out, prepared.student.model, config, plan.steps)
    held_out = _held_out(config, prepared.rows.draws.caches[0], eval_cache)
    display = Display(console)
    trainer = StudentTrainer(
        prepared.student,
        prepared.rows,
        config,
        training_arguments(config, out, plan.steps, report_to, evaluates=held_out is not None),
        identity.to_json(),
        callbacks=[LogFile(out), display],
        held_out=held_out,
    )
    try:
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except OSError as error:
        raise TidecacheError(
            f"{out}: the log cannot be written ({error.strerror or error}): free some space and go on from the last "
            "checkpoint with --resume"
        ) from error
    finally:
        display.close()
    trainer.save_result()
    seconds = float(result.metrics["train_runtime"])
    return {"steps": plan.steps, "rows": plan.rows, "seconds": seconds, "loss": float(result.training_loss)}


def _held_out(config: TrainConfig, cache: Cache, asked: str | Path | None) -> Cache | None:
    """The cache to evaluate on: what is asked for, or the held-out part of the first cache, if it has one."""
    if not config.eval_steps:
        return None
    return open_cache(asked) if asked is not None else cache.held_out()


def _check_launch(config: TrainConfig) -> None:
    """What `accelerate launch` was asked for must be something that is trained here."""
    if not fsdp_wanted():
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise TidecacheError("FSDP 1 is not supported: pass --fsdp_version 2 to `accelerate launch`")
    if config.lora_rank:
        raise TidecacheError(
            "lora_rank: adapters are not trained under FSDP2: leave --use_fsdp out of `accelerate launch` (the frozen "
            "weights then lie in every process), or pass --lora-rank 0"
        )
