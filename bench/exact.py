"""Distillation from an exactly known teacher: what each choice costs or gains when the teacher makes no mistakes.

    python bench/exact.py --seeds 20 --out bench/results/exact.jsonl

Texts come from a hidden Markov source (`exact_source`), so the teacher is the exact posterior of the masked text and a
student's error is KL(posterior ‖ student) per masked token, absolutely. Losses and TIDAL are the project's own
(`stage2_student.objectives`, `.tidal`); the student is a small network over a window of tokens. All seeds of a cell are
trained at once, each with its own source, corpus, masks and weights; cells share these by seed, so that differences are
paired. Each cell's result is one JSON line, kept under its configuration's digest: a stopped run goes on.

Shape suffixes: G seeds, D documents, K draws, B rows of a batch, C chunks of a document, L student tokens, n student tokens
of a chunk, U student token ids, E events (candidates), X masked chunks of all rows of a step, W window.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from evidence_results import Results, spread
from exact_cells import SETTINGS, Cell, Setting, grid
from exact_corpus import Corpus, Run, make_corpus
from rich.console import Console
from rich.table import Table
from torch import Tensor

from shared.cache.statistics import TIMESTEP_BINS, ContextStatistics
from stage2_student import objectives, tidal
from stage2_student.dataset import view_of
from stage2_student.reliability import reliability

BINS = 5  # of timesteps, in reports
QUICK = Run(seeds=4, documents=64, held_out=64, epochs=8)
QUICK_QUESTIONS = ("draws and fresh rows", "objectives")


class Students:
    """G students side by side: embedding of a window of tokens, two hidden layers, one logit per token id."""

    def __init__(self, run: Run, ids: int) -> None:
        self.run, self.ids = run, ids
        wide, embedding = run.width, 16
        shapes = [(ids + 2, embedding), ((2 * run.radius + 1) * embedding, wide), (wide, wide), (wide, ids)]
        self.weights, self.biases = [], []
        for i, (rows, columns) in enumerate(shapes):
            per_seed = [
                torch.randn(rows, columns, generator=torch.Generator().manual_seed(7919 * s + i))
                for s in range(run.seeds)
            ]
            scale = 1.0 if i == 0 else 1.0 / math.sqrt(rows)
            self.weights.append((scale * torch.stack(per_seed)).requires_grad_())
            self.biases.append(torch.zeros(run.seeds, 1, columns, requires_grad=True))

    @property
    def parameters(self) -> list[Tensor]:
        """All, each with the seeds first; the embedding has no bias."""
        return [*self.weights, *self.biases[1:]]

    def logits(self, noisy_GBL: Tensor) -> Tensor:
        """logit_GBLU for noisy tokens; id U is the mask, U + 1 lies outside of the text."""
        seeds, rows, length = noisy_GBL.shape
        padded = torch.nn.functional.pad(noisy_GBL, (self.run.radius,) * 2, value=self.ids + 1)
        window_GNW = padded.unfold(2, 2 * self.run.radius + 1, 1).reshape(seeds, rows * length, -1)
        offset_G11 = torch.arange(seeds)[:, None, None] * (self.ids + 2)
        hidden = torch.nn.functional.embedding(window_GNW + offset_G11, self.weights[0].flatten(0, 1)).flatten(2)
        for weight, bias in zip(self.weights[1:3], self.biases[1:3], strict=True):
            hidden = torch.nn.functional.gelu(torch.baddbmm(bias, hidden, weight))
        return torch.baddbmm(self.biases[3], hidden, self.weights[3]).view(seeds, rows, length, -1)


def train(cell: Cell, run: Run, setting: Setting, corpora: list[Corpus]) -> Students:
    """All seeds of a cell."""
    students = Students(run, setting.symbols**setting.student)
    optimiser = torch.optim.Adam(students.parameters, lr=cell.learning_rate, fused=True)
    steps = run.epochs * run.documents // run.batch
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min(1.0, (s + 1) / (0.1 * steps)) * 0.5 * (1 + math.cos(math.pi * s / steps))
    )
    cached = round(run.batch * (1 - cell.fresh))
    by_timestep = (cell.axis, "uniform")
    if cell.axis == "measured":
        by_timestep = ("training", measured_weights(corpora, scored_context(cell)))
    for step in range(steps):
        rows = [batch_rows(seed, run, step, cached, cell.draws, cell.context == "halves") for seed in range(run.seeds)]
        loss = step_loss(cell, setting, students, corpora, rows, step / steps, by_timestep)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
    return students


def scored_context(cell: Cell) -> str:
    """Whose scores a cell takes; halves are compdemo's."""
    return "compdemo" if cell.context == "halves" else cell.context


def measured_weights(corpora: list[Corpus], context: str) -> str:
    """TIDAL's timestep weights from the exact teacher's likelihoods of all seeds; it is calibrated by construction."""
    total = ContextStatistics.zero(1)
    for corpus in corpora:
        gold_KDC = corpus.scores[context].gold_KDC * corpus.masked_KDC
        bin_KD = (corpus.timestep_KD * TIMESTEP_BINS).long().clamp_max(TIMESTEP_BINS - 1).flatten()
        total.gold_logp_B[:] += torch.bincount(bin_KD, gold_KDC.sum(2).flatten().double(), TIMESTEP_BINS).numpy()
        total.tokens_B[:] += torch.bincount(bin_KD, corpus.masked_KDC.sum(2).flatten(), TIMESTEP_BINS).numpy()
    return ",".join(f"{weight:.4g}" for weight in reliability(total))


@dataclass(frozen=True)
class Row:
    """One row of a batch; `view`: 0: all of the draw's chunks are masked, 1: half A of them, 2: half B."""

    fresh: bool
    draw: int
    document: int
    view: int = 0

    def masks(self, corpus: Corpus) -> tuple[Tensor, Tensor]:
        """(masked_C, timestep)."""
        at = self.draw, self.document
        if self.fresh:
            return corpus.fresh_KDC[at], corpus.fresh_timestep_KD[at]
        if self.view == 0:
            return corpus.masked_KDC[at], corpus.timestep_KD[at]
        kept_C = corpus.split_KDC[at] if self.view == 1 else ~corpus.split_KDC[at]
        return corpus.masked_KDC[at] & kept_C, corpus.timestep_KD[at] / 2


def batch_rows(seed: int, run: Run, step: int, cached: int, draws: int, halves: bool) -> list[Row]:
    """The rows of a seed's batch; each stream goes through its own epochs. With `halves` a draw's uses go through its views,
    all of it first; which half is next is drawn for it (`stage2_student.dataset`).
    """
    rows: list[Row] = []
    for fresh, count in ((False, cached), (True, run.batch - cached)):
        for place in range(step * count, (step + 1) * count):
            epoch, within = divmod(place, run.documents)
            document = _document_order(seed * 1000 + epoch * 2 + fresh, run.documents)[within]
            if fresh or not halves:
                rows.append(Row(fresh, epoch if fresh else epoch % draws, document))
                continue
            uses, draw = divmod(epoch, draws)
            rows.append(Row(False, draw, document, view_of(seed, str(document), draw, uses)))
    return rows


@lru_cache(maxsize=256)
def _document_order(seed: int, documents: int) -> list[int]:
    order: list[int] = torch.randperm(documents, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def step_loss(
    cell: Cell,
    setting: Setting,
    students: Students,
    corpora: list[Corpus],
    rows: list[list[Row]],
    progress: float,
    by_timestep: tuple[str, str],
) -> Tensor:
    """Σ over seeds of cross-entropy + weight · distillation, each a mean over the seed's own items.

    `by_timestep`: TIDAL's axis and timestep weight.
    """
    token, masked, timestep, chosen = [], [], [], []
    for corpus, batch in zip(corpora, rows, strict=True):
        masks = [row.masks(corpus) for row in batch]
        token.append(torch.stack([corpus.token_DL[row.document] for row in batch]))
        masked.append(torch.stack([masked_C for masked_C, _ in masks]))
        timestep.append(torch.stack([t for _, t in masks]))
        chosen.append(torch.tensor([not row.fresh for row in batch]))
    token_GBL, masked_GBC, timestep_GB, cached_GB = (torch.stack(x) for x in (token, masked, timestep, chosen))
    tokens = setting.chunk // setting.student
    masked_GBL = masked_GBC.repeat_interleave(tokens, 2)
    logit_GBLU = students.logits(token_GBL.masked_fill(masked_GBL, students.ids))
    logp_GBL = torch.log_softmax(logit_GBLU, 3).gather(3, token_GBL[..., None])[..., 0]
    weight_GB1 = objectives.cross_entropy_weight(timestep_GB)[:, :, None]
    loss = -(logp_GBL * masked_GBL * weight_GB1).sum() / token_GBL[0].numel()
    if cell.objective == "none":
        return loss
    where = (masked_GBC & cached_GB[:, :, None]).nonzero()
    seed_X, row_X, chunk_X = where.unbind(1)
    draw_GB = torch.tensor([[row.draw for row in batch] for batch in rows])
    document_GB = torch.tensor([[row.document for row in batch] for batch in rows])
    place = [
        (draw_GB[g][r], document_GB[g][r], c) for g, (r, c) in enumerate(_by_seed(seed_X, row_X, chunk_X, len(rows)))
    ]
    scores = [corpus.scores[scored_context(cell)] for corpus in corpora]
    gold_X = torch.cat([s.gold_KDC[p] for s, p in zip(scores, place, strict=True)])
    timestep_X = timestep_GB[seed_X, row_X]
    strength_X = tidal.strength(progress, timestep_X, cell.axis) if cell.tidal == "interpolate" else None
    logp_X = logp_GBL.unflatten(2, (-1, tokens)).sum(3)[seed_X, row_X, chunk_X]
    if cell.objective in ("calm", "reverse-calm", "bernoulli-reverse-kl"):
        reverse = cell.objective != "calm"
        if strength_X is not None:
            loss_X = objectives.tidal_calm_loss(logp_X, gold_X, strength_X, cell.temperature, reverse)
        else:
            loss_X = (objectives.reverse_calm_loss if reverse else objectives.calm_loss)(
                logp_X, gold_X, cell.temperature
            )
        if cell.objective == "bernoulli-reverse-kl":
            loss_X = loss_X - _bernoulli_entropy(logp_X, cell.temperature)
    else:
        candidate_XEn = torch.cat(
            [s.candidate_KDCEn[p][:, : cell.k] for s, p in zip(scores, place, strict=True)]
        ).long()
        candidate_XE = torch.cat([s.logp_KDCE[p][:, : cell.k] for s, p in zip(scores, place, strict=True)])
        log_z_X = torch.cat([s.log_z_KDC[cell.temperature][p] for s, p in zip(scores, place, strict=True)])
        gold_Xn = token_GBL.unflatten(2, (-1, tokens))[seed_X, row_X, chunk_X]
        logit_XnU = logit_GBLU.unflatten(2, (-1, tokens))[seed_X, row_X, chunk_X]
        loss_X = _event_loss(cell, logit_XnU, gold_Xn, gold_X, candidate_XEn, candidate_XE, log_z_X, strength_X)
    if cell.tidal == "weight":
        loss_X = loss_X * tidal.sample_weight(progress, timestep_X, *by_timestep)
    count_G = torch.bincount(seed_X, minlength=len(rows)).clamp_min(1)
    return loss + cell.weight * (loss_X / count_G[seed_X]).sum()


def _bernoulli_entropy(logp_X: Tensor, temperature: float) -> Tensor:
    """What Reverse CALM leaves out of the reverse KL of "the gold or something else": the student's entropy."""
    p_X = torch.exp(logp_X / temperature).clamp(objectives.CLAMP, 1 - objectives.CLAMP)
    return -(p_X * p_X.log() + (1 - p_X) * torch.log1p(-p_X))


def _by_seed(seed_X: Tensor, row_X: Tensor, chunk_X: Tensor, seeds: int) -> list[tuple[Tensor, Tensor]]:
    count = torch.bincount(seed_X, minlength=seeds).tolist()
    return list(zip(row_X.split(count), chunk_X.split(count), strict=True))


def _event_loss(
    cell: Cell,
    logit_XnU: Tensor,
    gold_Xn: Tensor,
    gold_X: Tensor,
    candidate_XEn: Tensor,
    candidate_XE: Tensor,
    log_z_X: Tensor,
    strength_X: Tensor | None,
) -> Tensor:
    """KL over gold, the candidates that are not the gold, and the rest (or no rest)."""
    ids_XEn = torch.cat([gold_Xn[:, None], candidate_XEn], dim=1)
    teacher_XE = torch.cat([gold_X[:, None], candidate_XE], dim=1)
    valid_XE = torch.cat(
        [
            torch.ones_like(gold_X, dtype=torch.bool)[:, None],
            (candidate_XEn != gold_Xn[:, None]).any(2) & (candidate_XE > -1e8),
        ],
        dim=1,
    )
    logit_XE = logit_XnU.gather(2, ids_XEn.transpose(1, 2)).sum(dim=1)
    own_z_X = torch.logsumexp(logit_XnU / cell.temperature, 2).sum(dim=1)
    teacher_XE = teacher_XE.masked_fill(~valid_XE, 0.0)
    student = objectives.event_log_mass(logit_XE, own_z_X, valid_XE, cell.temperature)
    teacher = objectives.event_log_mass(teacher_XE, log_z_X, valid_XE, cell.temperature)
    if cell.tail == "none":
        student, teacher = (
            torch.cat([m[:, :-1], torch.full_like(m[:, -1:], -torch.inf)], 1) for m in (student, teacher)
        )
        student, teacher = (m - torch.logsumexp(m, 1, keepdim=True) for m in (student, teacher))
    if strength_X is not None:
        return objectives.tidal_event_kl_loss(student, teacher, strength_X, cell.temperature)
    loss = objectives.reverse_event_kl_loss if cell.objective == "reverse-kl" else objectives.event_kl_loss
    return loss(student, teacher, cell.temperature)


@torch.no_grad()
def evaluate(students: Students, setting: Setting, corpora: list[Corpus]) -> dict[str, list[float] | list[list[float]]]:
    """Per seed, on the held-out draws: KL(posterior ‖ student) in nats per masked token (all, by timestep) and accuracy."""
    tokens = setting.chunk // setting.student
    token_GDL = torch.stack([c.held_out_DL for c in corpora])
    masked_GDL = torch.stack([c.held_out_masked_DC for c in corpora]).repeat_interleave(tokens, 2)
    logp_GDLU = torch.log_softmax(students.logits(token_GDL.masked_fill(masked_GDL, students.ids)), 3)
    kl, by_timestep, accuracy, best = [], [], [], []
    for corpus, token_DL, masked_DL, logp_DLU in zip(corpora, token_GDL, masked_GDL, logp_GDLU, strict=True):
        logp_NU, gold_N = logp_DLU[masked_DL], token_DL[masked_DL]
        kl_N = (corpus.posterior_NU.exp() * (corpus.posterior_NU - logp_NU)).nan_to_num(0.0).sum(1)
        bin_N = (
            (corpus.held_out_timestep_D[:, None].expand(token_DL.shape)[masked_DL] * BINS).long().clamp_max(BINS - 1)
        )
        kl.append(float(kl_N.mean()))
        by_timestep.append([float(kl_N[bin_N == b].mean()) for b in range(BINS)])
        accuracy.append(float((logp_NU.argmax(1) == gold_N).float().mean()))
        best.append(float((corpus.posterior_NU.argmax(1) == gold_N).float().mean()))
    return {"kl": kl, "kl_by_timestep": by_timestep, "accuracy": accuracy, "accuracy_of_posterior": best}


def show(console: Console, run: Run, results: dict[str, dict]) -> None:
    """One table per setting and question; differences are paired by seed with cross-entropy's."""
    for setting in SETTINGS:
        reference = results.get(Cell(setting, "none").digest(run))
        questions: dict[str, list[Cell]] = {}
        for question, cell in grid(setting):
            questions.setdefault(question, []).append(cell)
        for question, cells in questions.items():
            table = Table(
                title=f"{question} — {setting} tokenizer{'s' if setting == 'cross' else ''}", title_justify="left"
            )
            for name in ("cell", "KL to the posterior", "− cross-entropy's", "top-1 %", "KL by timestep"):
                table.add_column(name, justify="left" if name == "cell" else "right", overflow="fold")
            for cell in cells:
                if (found := results.get(cell.digest(run))) is None:
                    continue
                difference = (
                    ""
                    if reference is None
                    else spread([a - b for a, b in zip(found["kl"], reference["kl"], strict=True)], signed=True)
                )
                bins = " ".join(f"{statistics.mean(b):.3f}" for b in zip(*found["kl_by_timestep"], strict=True))
                table.add_row(
                    cell.label, spread(found["kl"]), difference, f"{100 * statistics.mean(found['accuracy']):.2f}", bins
                )
            if table.row_count:
                console.print(table)


def main() -> None:
    """Train the cells that have no result yet, then print the tables."""
    arguments = argparse.ArgumentParser(description="Distillation from an exactly known teacher.")
    arguments.add_argument("--seeds", type=int, default=20)
    arguments.add_argument("--setting", choices=list(SETTINGS), help="one setting instead of both")
    arguments.add_argument("--out", type=Path, default=Path("runs/exact.jsonl"))
    arguments.add_argument("--quick", action="store_true", help="few seeds and short runs, two questions")
    options = arguments.parse_args()
    run, console = QUICK if options.quick else Run(seeds=options.seeds), Console()
    results = Results(options.out)
    for setting in [options.setting] if options.setting else SETTINGS:
        cells = dict.fromkeys(
            cell
            for question, cell in grid(setting)
            if cell.digest(run) not in results.cells and (not options.quick or question in QUICK_QUESTIONS)
        )
        if not cells:
            continue
        begin = time.monotonic()
        corpora = [make_corpus(SETTINGS[setting], run, seed) for seed in range(run.seeds)]
        console.print(
            f"{setting}: {run.seeds} sources scored in {time.monotonic() - begin:.0f} s, {len(cells)} cells to go"
        )
        for number, cell in enumerate(cells, 1):
            begin = time.monotonic()
            figures = evaluate(train(cell, run, SETTINGS[setting], corpora), SETTINGS[setting], corpora)
            seconds = time.monotonic() - begin
            results.add(cell.digest(run), {"cell": cell.to_json(), **figures, "seconds": seconds})
            console.print(
                f"{number}/{len(cells)} {cell.label}: {spread(figures['kl'])}, {seconds:.0f} s", highlight=False
            )
    show(console, run, results.cells)


if __name__ == "__main__":
    main()
