"""One seed's texts, draws and exact teacher's scores for `bench/exact.py`.

The scores have a cache's content: the gold's log-likelihood and the best fillings of every masked chunk, in both contexts,
and the normalisers at T = 1 and 2, as the teacher's tokens give them; fillings are spelled in the student's tokens.

Shape suffixes as in `bench/exact.py`; S symbols of a text, N tokens of a pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from exact_cells import Setting
from exact_source import Source, token_ids
from torch import Tensor

from shared.noise import van_der_corput
from stage1_teacher.fillings import best_fillings

CANDIDATES = 64  # stored per chunk where there are as many fillings


@dataclass(frozen=True)
class Run:
    """What all cells share; part of their digests."""

    seeds: int = 20
    documents: int = 256
    held_out: int = 128
    epochs: int = 16
    batch: int = 16
    states: int = 8
    radius: int = 8
    width: int = 64
    version: int = 1  # of this script's meaning


@dataclass(frozen=True)
class Scores:
    """The teacher's answers about every chunk of D documents under K draws, in one context; where not masked: 0.

    `candidate_KDCEn`: student token ids of the best fillings, by descending log-likelihood (nats, temperature 1).
    """

    gold_KDC: Tensor
    logp_KDCE: Tensor
    candidate_KDCEn: Tensor
    log_z_KDC: dict[float, Tensor]


@dataclass(frozen=True)
class Corpus:
    """One seed's documents (student tokens), draws and scores; `fresh_KDC`: masks for rows without a teacher."""

    token_DL: Tensor
    timestep_KD: Tensor
    masked_KDC: Tensor
    fresh_timestep_KD: Tensor
    fresh_KDC: Tensor
    split_KDC: Tensor  # of compdemo's passes: True = A
    scores: dict[str, Scores]
    held_out_DL: Tensor
    held_out_timestep_D: Tensor
    held_out_masked_DC: Tensor
    posterior_NU: Tensor  # of every masked student token of the held-out draws, in order


def timesteps(draws: int, documents: int, generator: torch.Generator) -> Tensor:
    """t_k = ε + (1 − ε)·frac(φ(k) + u), φ van der Corput's sequence in base 2 (DESIGN §4)."""
    radical = torch.tensor([van_der_corput(draw) for draw in range(draws)])
    return 1e-3 + (1 - 1e-3) * (radical[:, None] + torch.rand(documents, generator=generator)) % 1.0


def make_corpus(setting: Setting, run: Run, seed: int) -> Corpus:
    """Everything of one seed that cells share."""
    generator = torch.Generator().manual_seed(1000 + seed)
    source = Source.random(run.states, setting.symbols, seed)
    symbol_DS = source.sample(run.documents, setting.length, generator)
    held_DS = source.sample(run.held_out, setting.length, generator)
    chunks = setting.length // setting.chunk

    def masks(draws: int, documents: int) -> tuple[Tensor, Tensor]:
        timestep_KD = timesteps(draws, documents, generator)
        chance_KDC = torch.rand(draws, documents, chunks, generator=generator)
        return timestep_KD, chance_KDC < timestep_KD[:, :, None]

    timestep_KD, masked_KDC = masks(run.epochs, run.documents)
    fresh_timestep_KD, fresh_KDC = masks(run.epochs, run.documents)
    split_KDC = torch.rand(masked_KDC.shape, generator=generator) < 0.5
    held_timestep_1D, held_masked_1DC = masks(1, run.held_out)
    plain = [score(source, setting, symbol_DS, m_DC, m_DC) for m_DC in masked_KDC]
    # Two passes: each half of the masked chunks is scored while the other half is shown.
    passes = [
        [score(source, setting, symbol_DS, m & s, m & s) for s in (a, ~a)]
        for m, a in zip(masked_KDC, split_KDC, strict=True)
    ]
    compdemo = [merged(a, b) for a, b in passes]
    row_N, chunk_N = held_masked_1DC[0].nonzero(as_tuple=True)
    tokens = setting.chunk // setting.student
    first_N = (chunk_N[:, None] * setting.chunk + torch.arange(tokens) * setting.student).flatten()
    posterior_NU = source.posterior(
        held_DS,
        held_masked_1DC[0].repeat_interleave(setting.chunk, 1),
        row_N.repeat_interleave(tokens),
        first_N,
        setting.student,
    )
    return Corpus(
        token_DL=token_ids(symbol_DS, setting.student, setting.symbols),
        timestep_KD=timestep_KD,
        masked_KDC=masked_KDC,
        fresh_timestep_KD=fresh_timestep_KD,
        fresh_KDC=fresh_KDC,
        split_KDC=split_KDC,
        scores={"plain": stacked(plain), "compdemo": stacked(compdemo)},
        held_out_DL=token_ids(held_DS, setting.student, setting.symbols),
        held_out_timestep_D=held_timestep_1D[0],
        held_out_masked_DC=held_masked_1DC[0],
        posterior_NU=posterior_NU.float(),
    )


Flat = tuple[Tensor, Tensor, Tensor, dict[float, Tensor]]  # gold_DC, logp_DCE, candidate_DCEn, log_z_DC by temperature


def score(source: Source, setting: Setting, symbol_DS: Tensor, hidden_DC: Tensor, scored_DC: Tensor) -> Flat:
    """One pass of the teacher: each scored chunk's gold, its best fillings and its normalisers."""
    count = setting.chunk // setting.teacher
    row_X, chunk_X = scored_DC.nonzero(as_tuple=True)
    first_Xn = chunk_X[:, None] * setting.chunk + torch.arange(count) * setting.teacher
    hidden_DS = hidden_DC.repeat_interleave(setting.chunk, 1)
    logp_NU = source.posterior(
        symbol_DS, hidden_DS, row_X.repeat_interleave(count), first_Xn.flatten(), setting.teacher
    )
    gold_DL = token_ids(symbol_DS, setting.teacher, setting.symbols)
    gold_N = gold_DL[row_X.repeat_interleave(count), (first_Xn // setting.teacher).flatten()]
    gold_X = logp_NU.gather(1, gold_N[:, None]).view(-1, count).sum(dim=1)
    fillings = min(CANDIDATES, setting.symbols**setting.chunk)
    top = logp_NU.sort(dim=1, descending=True, stable=True)
    kept = min(fillings, logp_NU.shape[1])
    width = fillings if count > 1 else kept
    padded_logp_NK = torch.full((len(logp_NU), width), -1e9, dtype=torch.float64)
    padded_ids_NK = torch.zeros(len(logp_NU), width, dtype=torch.int64)
    padded_logp_NK[:, :kept], padded_ids_NK[:, :kept] = top.values[:, :kept], top.indices[:, :kept]
    ids, logp_XE = best_fillings(
        padded_ids_NK.numpy(), padded_logp_NK.numpy(), torch.full((len(row_X),), count).numpy()
    )
    digits = symbols_of(torch.from_numpy(ids).long().view(len(row_X), width, count), setting.teacher, setting.symbols)
    shape = (*scored_DC.shape, width)
    gold_DC, logp_DCE = torch.zeros(scored_DC.shape), torch.full(shape, -1e9)
    candidate_DCEn = torch.zeros(*shape, setting.chunk // setting.student, dtype=torch.int64)
    gold_DC[row_X, chunk_X] = gold_X.float()
    logp_DCE[row_X, chunk_X] = torch.from_numpy(logp_XE).float()
    flat = digits.view(-1, setting.chunk)
    candidate_DCEn[row_X, chunk_X] = token_ids(flat, setting.student, setting.symbols).view(len(row_X), width, -1)
    log_z_DC = {}
    for temperature in (1.0, 2.0):
        z_DC = torch.zeros(scored_DC.shape)
        z_DC[row_X, chunk_X] = torch.logsumexp(logp_NU / temperature, 1).view(-1, count).sum(dim=1).float()
        log_z_DC[temperature] = z_DC
    return gold_DC, logp_DCE, candidate_DCEn, log_z_DC


def symbols_of(token: Tensor, width: int, symbols: int) -> Tensor:
    """Token ids [..., n] as symbols [..., n · width]."""
    place_W = symbols ** torch.arange(width - 1, -1, -1)
    return ((token[..., None] // place_W) % symbols).flatten(-2)


def merged(a: Flat, b: Flat) -> Flat:
    """Two passes that score disjoint chunks; what a pass leaves out is 0 (log-likelihoods of candidates: −1e9)."""
    logp = torch.maximum(a[1], b[1])
    return a[0] + b[0], logp, a[2] + b[2], {t: a[3][t] + b[3][t] for t in a[3]}


def stacked(draws: list[Flat]) -> Scores:
    """K draws as one."""
    gold, logp, candidate, log_z = zip(*draws, strict=True)
    return Scores(
        torch.stack(gold),
        torch.stack(logp),
        torch.stack(candidate).to(torch.int32),
        {t: torch.stack([z[t] for z in log_z]) for t in log_z[0]},
    )
