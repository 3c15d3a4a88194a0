"""`bench/evidence.py`: its controls are what they say, its verdicts follow their rules, and a run goes through and goes on."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import evidence_claims  # noqa: E402
import evidence_costs  # noqa: E402
import evidence_page  # noqa: E402
import evidence_teachers  # noqa: E402
from evidence_cells import (  # noqa: E402
    CROSS_ENTROPY,
    DEFAULT,
    FULL,
    TEST,
    CacheChoice,
    Cell,
    cells,
    events,
    grid,
    measured,
    offline,
    quick_grid,
    undeclared,
    without_tidal,
)  # fmt: skip
from evidence_found import Found  # noqa: E402
from evidence_generation import Function, code_lines, function_body, functions, parses, statements  # noqa: E402
from evidence_results import Results  # noqa: E402
from ngram import BidirectionalNgram  # noqa: E402

from stage1_teacher.backends import ScoreRequest, Scores, load  # noqa: E402


def test_every_cell_has_a_digest_of_its_own() -> None:
    found = cells(FULL)
    assert len({cell.digest(FULL) for cell in found}) == len(found)
    # More seeds keep what is there; another size does not.
    more = dataclasses.replace(FULL, seeds=9)
    assert found[0].digest(more) == found[0].digest(FULL) != found[0].digest(TEST)
    known = {cell for _, cell in grid(FULL)}
    assert {cell for _, cell in quick_grid()} < known


def test_distribution_of_the_ngram_model_is_its_likelihood() -> None:
    rng = np.random.default_rng(0)
    model = BidirectionalNgram([rng.integers(0, 7, 400)], 7)
    ids, masked = rng.integers(0, 7, 60), rng.random(60) < 0.4
    position_N = np.flatnonzero(masked)
    for levels in (1, 5, 8):
        p_NV = model.distribution(ids, masked, position_N, levels)
        np.testing.assert_allclose(p_NV.sum(1), 1.0)
        gold_N = p_NV[np.arange(len(position_N)), ids[position_N]]
        np.testing.assert_allclose(np.log(gold_N), model.gold_logp(ids, masked, levels))


def test_controls_answer_as_they_say() -> None:
    teacher = load("tiny")
    ids = list(range(300, 340))
    noisy = [teacher.mask_id if i % 3 == 0 else token for i, token in enumerate(ids)]
    positions = [i for i in range(len(ids)) if i % 3 == 0]
    requests = [ScoreRequest(noisy, positions, [ids[p] for p in positions]) for _ in range(2)]
    smooth = evidence_teachers.Control(teacher, "smoothing").score(requests, 4)
    torch.testing.assert_close(smooth.gold_logp_N.exp(), torch.full((28,), evidence_teachers.SMOOTHED))
    assert smooth.topk_ids_NK[:, 0].tolist() == [ids[p] for p in positions] * 2
    plain = teacher.score(requests, 4)
    shuffled = evidence_teachers.Control(teacher, "shuffled").score(requests, 4)
    # The same answers, each about another place; the gold of the place is looked up in the answer that moved there.
    assert sorted(map(tuple, shuffled.topk_ids_NK.tolist())) == sorted(map(tuple, plain.topk_ids_NK.tolist()))
    assert (shuffled.topk_ids_NK != plain.topk_ids_NK).any()
    rows = {tuple(r.tolist()): z for r, z in zip(plain.topk_ids_NK, plain.log_z_NT, strict=True)}
    for row, z in zip(shuffled.topk_ids_NK, shuffled.log_z_NT, strict=True):
        torch.testing.assert_close(rows[tuple(row.tolist())], z, atol=1e-4, rtol=1e-4)
    inside = (shuffled.topk_ids_NK == torch.tensor([ids[p] for p in positions] * 2)[:, None]).any(1)
    assert (shuffled.gold_logp_N[~inside] <= shuffled.topk_logp_NK[~inside, -1] + 1e-5).all()
    assert isinstance(shuffled, Scores)


def record(bits: float) -> dict[str, Any]:
    """A result line with this likelihood."""
    quality = {"all": {"accuracy": 0.2 - bits / 100, "calibration_error": 0.1}, "bins": [{"bits_per_byte": bits}] * 5}
    generation = {
        "infilling": [{"exact": 0.1, "valid": 0.5, "spans": 7, "tokens_per_forward": 1}] * 3,
        "completion": [{"valid": 0.6 - bits / 10, "next_line": 0.1, "exact": 0.0, "tokens_per_forward": 1}] * 2,
    }
    chunks = {"tokens_per_chunk": 1.5, "cut": 3}
    return {"bits_per_byte": bits, "quality": quality, "train_seconds": 1.0, "cache": chunks, **generation}


@pytest.mark.parametrize(
    ("offset", "noise", "verdict"),
    [
        (0.0, 0.0001, "equivalent"),
        (0.05, 0.0001, "worse"),
        (-0.05, 0.0001, "better"),
        (-0.0095, 0.003, "no worse"),
        (0.0095, 0.003, "undecided"),
    ],
)
def test_equivalence_follows_its_rule(tmp_path: Path, offset: float, noise: float, verdict: str) -> None:
    """The gain is 0.1, so the margin is 0.01; half of the seeds differ by `noise`."""
    scale = dataclasses.replace(TEST, seeds=4)
    results = Results(tmp_path / "results.jsonl")

    def put(cell: Cell, bits: float, noise: float = 0.0) -> None:
        for seed in range(scale.seeds):
            results.add(dataclasses.replace(cell, seed=seed).digest(scale), record(bits + noise * (seed % 2 - 0.5)))

    put(CROSS_ENTROPY, 2.0)
    put(events(), 1.9)
    put(offline(1, 0.0, "same"), 1.9 + offset, noise)
    found = Found(scale, Results(results.path))
    row = next(line for line in evidence_claims.equivalence(found).splitlines() if line.startswith("| 1 | 0 | same |"))
    assert row.split("|")[5].strip() == verdict
    put(events(CacheChoice(teacher="ngram")), 1.95)
    row = next(line for line in evidence_claims.gains(found).splitlines() if "ngram" in line)
    assert row.split("|")[3].strip() != "better"  # `found` was read before
    row = next(
        line for line in evidence_claims.gains(Found(scale, Results(results.path))).splitlines() if "ngram" in line
    )
    assert row.split("|")[3].strip() == "better"


def test_no_verdict_on_few_seeds() -> None:
    assert evidence_claims.equivalent([0.0, 0.0], [1.0, 1.0], -1) == "too few seeds"
    assert evidence_claims.equivalent([0.0, 0.0, 0.0], [0.1, -0.1, 0.0], -1) == "no gain to keep"
    assert evidence_claims.won([-1.0, -1.0], -1) == "too few seeds"
    assert evidence_claims.won([-1.0, -1.1, -0.9], -1) == "better"
    assert evidence_claims.won([1.0, 1.1, 0.9], -1) == "worse"
    assert evidence_claims.won([-0.2, -1.1, -0.9], -1) == "within the spread"  # 0.73 ± 1.18 by Student's t
    assert evidence_claims.won([-1.0, 1.1, 0.2], -1) == "within the spread"


@pytest.mark.skipif(not evidence_page.FULL_RESULTS.exists(), reason="no results are kept")
def test_the_page_is_what_the_kept_results_say(tmp_path: Path) -> None:
    """Nothing on the page, its plots or README's table is typed by hand."""
    root = Path(__file__).parents[2]
    shutil.copy(root / "README.md", tmp_path / "README.md")
    evidence_page.write_kept(tmp_path / "evidence.md", tmp_path / "README.md")
    assert (tmp_path / "evidence.md").read_text() == (root / "docs" / "evidence.md").read_text()
    plots = sorted((root / "docs" / "evidence").glob("*.svg"))
    assert [path.name for path in plots] == sorted(path.name for path in (tmp_path / "evidence").glob("*.svg"))
    for path in plots:
        assert path.read_text() == (tmp_path / "evidence" / path.name).read_text()
    assert (tmp_path / "README.md").read_text() == (root / "README.md").read_text()


def test_what_is_said_in_short_follows_the_results(tmp_path: Path) -> None:
    """A loss is called one, and of what was not measured nothing is said."""
    scale = dataclasses.replace(TEST, seeds=3)
    results = Results(tmp_path / "results.jsonl")
    found = Found(scale, results)

    def put(cell: Cell, bits: float) -> None:
        for seed in range(scale.seeds):
            results.add(dataclasses.replace(cell, seed=seed).digest(scale), record(bits + 1e-4 * seed))

    put(CROSS_ENTROPY, 2.0)
    assert evidence_claims.in_short(found) == []
    put(events(), 2.1)
    said = " ".join(evidence_claims.in_short(found))
    assert "event KL loses against cross-entropy (+0.1000 ± 0.0000)" in said
    assert "it loses to cross-entropy, equal steps" in said
    assert "teacher in the loop" not in said
    put(offline(2, 0.0, "halves"), 2.1)
    assert "2 draws, halves: no gain to keep" in " ".join(evidence_claims.in_short(found))
    put(events(), 1.9)
    said = " ".join(evidence_claims.in_short(found))
    assert "event KL gains over cross-entropy (-0.1000 ± 0.0000)" in said
    assert "2 draws, halves: worse" in said
    put(DEFAULT, 1.95)
    assert evidence_claims.verdicts(found, "objectives", DEFAULT) == [
        "-0.0500 ± 0.0000, better",
        "+0.05 ± 0.00, better",
    ]
    assert evidence_claims.verdicts(found, "objectives", CROSS_ENTROPY) == ["", ""]
    put(without_tidal(), 1.89)
    (line, tidal) = evidence_claims.compared(found)
    assert line.startswith(
        "**The default recipe, Reverse CALM with TIDAL, against cross-entropy**: bits per byte better (-0.05"
    )
    assert "without it**: bits per byte worse (+0.0100 ± 0.0000); top-1 worse (-0.01 ± 0.00)" in tidal
    put(dataclasses.replace(CROSS_ENTROPY, documents="wide"), 2.0)
    put(dataclasses.replace(events(), documents="wide"), 1.9)
    likelihood, _, spans, valid = evidence_claims.generated(found)
    assert "bits per byte**, against cross-entropy: better: event KL, tuned (-0.1000 ± 0.0000)." in likelihood
    assert "within the spread: event KL, tuned (+0.0 ± 0.0)" in spans
    assert "better: event KL, tuned (+1.0 ± 0.0)" in valid
    results.add("base", {**record(2.2), "teacher": {}})
    table = evidence_claims.front_table(found)
    assert "| base |  | 2.2000 |" in table
    assert "| cross-entropy | 3 | 2.0001 ± 0.0002 |" in table
    evidence_page.write_page(
        tmp_path / "page.md", found, evidence_page.Exact(Results(tmp_path / "none.jsonl"), evidence_page.Run())
    )
    assert "| event KL, tuned | 3 | 1.9001 ± 0.0002 | -0.1000 ± 0.0000 |" in (tmp_path / "page.md").read_text()


def test_what_side_questions_are_held_to() -> None:
    plain, compdemo = evidence_claims.in_context("kl", "plain"), evidence_claims.in_context("kl", "compdemo")
    assert evidence_claims.reference("contexts", plain) == compdemo
    assert evidence_claims.reference("contexts", compdemo) is None
    token = measured(CacheChoice(mask_law="token"))
    assert evidence_claims.reference("mask laws", token) == measured()
    assert evidence_claims.reference("candidates", measured(CacheChoice(k=1))) == measured()


def test_functions_are_cut_where_they_end() -> None:
    assert function_body("def f(x):", "\n    return 1\n\ny = 2\n", cut=False) == ("\n    return 1\n\n", True)
    assert function_body("    def f(x):", "\n        return 1\n    def g", cut=False) == ("\n        return 1\n", True)
    assert function_body("    def f(x):", "\n        return 1\n    def g", cut=True) == ("\n        return 1\n", False)
    assert function_body("    def f(x):", "\n        return 1\n    def g\n  ", cut=True) == (
        "\n        return 1\n",
        True,
    )
    assert function_body("def f(x):", "\n    a = 1\n    b =", cut=True) == ("\n    a = 1\n", False)
    assert function_body("def f(x):\n    a = 1", " + x\n    return a", cut=False) == (" + x\n    return a", True)
    assert function_body("def f(x):", "", cut=True) == ("", False)
    given = "    def f(x):\n        a = 1"
    assert statements(given) == statements(given + " + x\n        # so\n") == 1
    assert statements(given + "\n        return a\n") == 2
    assert statements(given + "\n        return (\n") == 0
    assert code_lines("\n\n    a = 1  \n") == ["    a = 1"]
    assert parses("    def f(self):\n        pass\n")
    assert not parses("def f(:\n    pass\n")


def test_functions_are_asked_without_their_last_statement() -> None:
    text = (
        "    x = 0\n\n    def f(self):\n        a = 1\n\n        # last\n        return a\n\n    def g(self):\n        pass\n"
        "    def h(self):\n        '''Said.'''\n        return (1,\n                2)\n"
    )

    def draw(name: str, content: str, cut: bool = False) -> Any:
        return SimpleNamespace(
            document=name, stored=SimpleNamespace(cut=cut, messages=[SimpleNamespace(content=content)])
        )

    draws = [draw("a", text), draw("a", text), draw("b", text, cut=True), draw("c", "def f(:\n    pass\n")]
    first, second = functions(SimpleNamespace(iter_draws=lambda: draws))  # type: ignore[arg-type]
    assert first == Function(
        "    x = 0\n\n", "    def f(self):\n        a = 1", "\n\n        # last\n        return a\n"
    )
    assert second.before + second.given + second.rest == text
    assert code_lines(second.rest) == ["        return (1,", "                2)"]
    assert function_body(second.given, second.rest, cut=False) == (second.rest, True)
    assert statements(second.given + second.rest) == 2


@pytest.mark.slow
def test_a_run_goes_through_goes_on_and_writes_its_page(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    command = [
        sys.executable, str(BENCH / "evidence.py"), "--scale", "test", "--out", str(tmp_path / "work"),
        "--results", str(results), "--page", str(tmp_path / "evidence.md"), "--question", "tokenizers",
    ]  # fmt: skip
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr[-2000:]
    page = (tmp_path / "evidence.md").read_text()
    for student in (measured(CacheChoice(tokenizers=4)), undeclared()):
        assert f"| {student.label} | 1 |" in page
    lines = results.read_text().splitlines()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-2000:]
    assert results.read_text().splitlines() == lines
    assert (tmp_path / "evidence.md").read_text() == page


@pytest.mark.slow
def test_costs_are_measured_in_processes_of_their_own(tmp_path: Path) -> None:
    found = evidence_costs.costs_of(tmp_path, "test")
    assert list(found["captures"]) == ["1", "2"]
    assert found["captures"]["2"]["bytes"] > found["captures"]["1"]["bytes"] > 0
    assert list(found["trains"]) == ["cross-entropy", "default", "halves", "cache", "online"]
    assert found["trains"]["online"]["seconds"] > found["trains"]["online"]["teacher_seconds"] > 0
    assert all(part["peak_mb"] > 100 for part in (*found["captures"].values(), *found["trains"].values()))
    assert "| 2 |" in evidence_claims.costs(found)


@pytest.mark.slow
def test_the_gpu_script_runs_three_steps_on_a_cpu(tmp_path: Path) -> None:
    model = str(Path(__file__).parents[2] / "stage2_student" / "tiny")
    found = subprocess.run(
        [
            sys.executable, str(BENCH / "evidence_gpu.py"), "--model", model, "--scale", "smoke", "--out", str(tmp_path),
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    assert "| cross-entropy |" in found.stdout
    assert "teacher=ngram" in found.stdout
