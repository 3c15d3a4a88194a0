"""`bench/exact.py`: its teacher is the exact posterior, its scores fit the text, and a stopped run goes on."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import exact  # noqa: E402
import exact_corpus  # noqa: E402
from evidence_results import Results  # noqa: E402
from exact_cells import SETTINGS, Cell, grid  # noqa: E402
from exact_source import Source, token_ids  # noqa: E402


def likelihood(source: Source, symbols: list[int]) -> float:
    """p(text) by the forward recursion, one text at a time."""
    state_S = source.start_S
    for place, symbol in enumerate(symbols):
        state_S = state_S * source.emit_SV[:, symbol]
        if place < len(symbols) - 1:
            state_S = state_S @ source.move_SS
    return float(state_S.sum())


@pytest.mark.parametrize("width", [1, 2])
def test_posterior_is_the_sum_over_all_texts(width: int) -> None:
    source = Source.random(states=3, symbols=3, seed=width)
    text_BL = source.sample(2, 6, torch.Generator().manual_seed(0))
    masked_BL = torch.tensor([[0, 0, 1, 1, 0, 1], [1, 1, 1, 1, 0, 0]]).bool()
    logp_NU = source.posterior(text_BL, masked_BL, torch.tensor([0, 1]), torch.tensor([2, 2]), width)
    for row, logp_U in enumerate(logp_NU):
        weight_U = torch.zeros(3**width, dtype=torch.float64)
        free = masked_BL[row].nonzero()[:, 0].tolist()
        for filling in itertools.product(range(3), repeat=len(free)):
            symbols = text_BL[row].tolist()
            for place, symbol in zip(free, filling, strict=True):
                symbols[place] = symbol
            weight_U[token_ids(torch.tensor([symbols[2 : 2 + width]]), width, 3)[0, 0]] += likelihood(source, symbols)
        torch.testing.assert_close(logp_U.exp(), weight_U / weight_U.sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_scores_fit_the_text(name: str) -> None:
    setting, run = SETTINGS[name], exact_corpus.Run(seeds=1, documents=32, held_out=2, epochs=4)
    corpus = exact_corpus.make_corpus(setting, run, 0)
    gold_DCn = corpus.token_DL.unflatten(1, (-1, setting.chunk // setting.student))
    for scores in corpus.scores.values():
        found_KDCE = (scores.candidate_KDCEn == gold_DCn[None, :, :, None]).all(4) & corpus.masked_KDC[..., None]
        assert found_KDCE.any(), "the gold is never among the candidates"
        position = found_KDCE.nonzero(as_tuple=True)
        torch.testing.assert_close(scores.logp_KDCE[position], scores.gold_KDC[position[:3]])
        assert (scores.logp_KDCE.diff(dim=3) <= 1e-6).all()
        masked = corpus.masked_KDC
        assert (scores.logp_KDCE[masked].exp().sum(1) <= 1 + 1e-5).all()
        assert not scores.gold_KDC[~masked].any()
    # CompDemo shows about half of what plain hides: the gold is likelier on the whole.
    plain, shown = (corpus.scores[x].gold_KDC.sum() for x in ("plain", "compdemo"))
    assert shown > plain


def test_every_cell_trains_and_digests_differ() -> None:
    run = exact_corpus.Run(seeds=2, documents=16, held_out=8, epochs=1, batch=8, width=8)
    for name, setting in SETTINGS.items():
        cells = list(dict.fromkeys(cell for _, cell in grid(name)))
        assert len({cell.digest(run) for cell in cells}) == len(cells)
        corpora = [exact_corpus.make_corpus(setting, run, seed) for seed in range(run.seeds)]
        losses = {}
        for cell in cells:
            figures = exact.evaluate(exact.train(cell, run, setting, corpora), setting, corpora)
            losses[cell] = tuple(figures["kl"])
            assert all(kl > 0 for kl in figures["kl"])
        of = {"kl": losses[Cell(name)], "none": losses[Cell(name, "none")], "calm": losses[Cell(name, "calm")]}
        assert len(set(of.values())) == 3


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    run = exact_corpus.Run(seeds=1)
    cell = Cell("same", "none")
    out.write_text(f'{{"digest": "{cell.digest(run)}", "kl": [0.5]}}\n{{"digest": "cut', encoding="utf-8")
    assert list(Results(out).cells) == [cell.digest(run)]
    found = subprocess.run([sys.executable, str(BENCH / "exact.py"), "--help"], capture_output=True, text=True)
    assert found.returncode == 0


def test_halves_are_the_parts_that_compdemo_scored_with_the_rest_shown() -> None:
    """The exact teacher's scores of a half are those of a pass over the text in which just that half is masked."""
    setting, run = SETTINGS["same"], exact_corpus.Run(seeds=1, documents=4, held_out=2, epochs=2)
    corpus = exact_corpus.make_corpus(setting, run, 0)
    source = Source.random(run.states, setting.symbols, 0)
    for view, share in ((0, 1.0), (1, 0.5), (2, 0.5)):
        masked_C, t = exact.Row(False, 1, 2, view).masks(corpus)
        assert float(t) == pytest.approx(share * float(corpus.timestep_KD[1, 2]))
        if share == 1.0:
            assert torch.equal(masked_C, corpus.masked_KDC[1, 2])
            continue
        assert not (masked_C & ~corpus.masked_KDC[1, 2]).any()
        scores = exact_corpus.score(source, setting, corpus.token_DL[2:3], masked_C[None], masked_C[None])
        assert masked_C.any()
        torch.testing.assert_close(scores[0][0][masked_C], corpus.scores["compdemo"].gold_KDC[1, 2][masked_C])


def test_uses_of_a_draw_go_through_its_views() -> None:
    run = exact_corpus.Run(seeds=1, documents=32, epochs=6, batch=8)
    views: dict[tuple[int, int], list[int]] = {}
    for step in range(run.epochs * run.documents // run.batch):
        for row in exact.batch_rows(0, run, step, run.batch, draws=2, halves=True):
            views.setdefault((row.document, row.draw), []).append(row.view)
        assert {row.view for row in exact.batch_rows(0, run, step, run.batch, draws=2, halves=False)} == {0}
    assert {tuple(found) for found in views.values()} == {(0, 1, 2), (0, 2, 1)}
