"""Presets and capture specs by name, a teacher from a TOML file end to end, and memory that runs out in the middle."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.cache import open_cache
from shared.cli import main
from shared.errors import TidecacheError
from stage1_teacher.backends import ScoreRequest, load
from stage1_teacher.presets import find_preset, preset_names
from stage1_teacher.specs import read_spec, spec_names
from tests.conftest import ROOT, TINY_STUDENT, TINY_TEACHER
from tests.stage1_teacher.architectures.checkpoints import write_checkpoint
from tests.stage1_teacher.captures import TEACHER_VOCABULARY, write_corpus
from tests.stage1_teacher.models import save_model
from tests.stage1_teacher.test_capture import SPEC, Silent, assert_same_draws, rows, run


def tidecache(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of the console command."""
    monkeypatch.setattr("sys.argv", ["tidecache", *arguments])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_presets_that_ship() -> None:
    assert preset_names() == ["dense8b", "dream7b", "llada8b", "moe16b", "moe16b-2.1", "tiny"]
    traits = {n: (p.checkpoint, p.layout, p.mask_id, p.logit_shift) for n in preset_names() for p in [find_preset(n)]}
    assert traits["moe16b"] == ("inclusionAI/LLaDA2.0-mini", "bd3lm", 156895, None)
    assert traits["moe16b-2.1"] == ("inclusionAI/LLaDA2.1-mini", *traits["moe16b"][1:])
    assert traits["dense8b"] == ("tencent/WeDLM-8B-Instruct", "reordered", 151665, None)
    assert traits["llada8b"] == ("GSAI-ML/LLaDA-8B-Instruct", "full", 126336, None)
    assert traits["dream7b"] == ("Dream-org/Dream-v0-Instruct-7B", "full", 151666, True)
    assert all(find_preset(n).dtype == "bfloat16" for n in preset_names() if n != "tiny")


@pytest.mark.parametrize("name", ["moe16b", "moe16b-2.1", "dense8b", "llada8b", "dream7b"])
def test_absent_weights_say_what_to_download(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", 3)
    assert tidecache(monkeypatch, "teacher", "capture", "--teacher", name, "--corpus", str(corpus)) == 1
    error = capsys.readouterr().err.strip()
    assert f"`hf download {find_preset(name).checkpoint}`" in error
    assert "\n" not in error


def test_a_preset_of_ones_own(tmp_path: Path) -> None:
    """An SDAR-like checkpoint in its official form, with blocks of 4; paths in the file are meant from where it lies."""
    write_checkpoint(tmp_path / "model", "sdar")
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}")
    preset = tmp_path / "mine.toml"
    preset.write_text(f'checkpoint = "{tmp_path}/model"\nlayout = "bd3lm"\nblock_size = 4\ntemplate = "chat.jinja"\n')
    assert find_preset(preset).template == tmp_path / "chat.jinja"
    teacher = load(preset)
    assert (teacher.layout, teacher.block_size, teacher.mask_id) == ("bd3lm", 4, 95)
    assert find_preset(preset).with_flags("full", 8, 5, True, Path("other")).template == Path("other")
    preset.write_text(f'checkpoint = "{tmp_path}/model"\ntemplate = 3\n')
    with pytest.raises(TidecacheError, match="template: expected str, found 3"):
        find_preset(preset)


@pytest.mark.parametrize("size", [4, 16, 64])
def test_blocks_of_a_preset(size: int, tmp_path: Path) -> None:
    """What a token's likelihood depends on in bd3lm: x_t of its own block and x_0 of the blocks before it."""
    write_checkpoint(tmp_path / "model", "sdar")
    preset = tmp_path / "mine.toml"
    preset.write_text(f'checkpoint = "{tmp_path}/model"\nlayout = "bd3lm"\nblock_size = {size}\n')
    teacher = load(preset)
    length, place = 120, 100
    clean_L = np.random.default_rng(0).integers(0, 90, length)
    noisy_L = clean_L.copy()
    noisy_L[place] = teacher.mask_id
    first = place // size * size

    def request(noisy: int | None = None, clean: int | None = None) -> ScoreRequest:
        a, b = noisy_L.copy(), clean_L.copy()
        for ids, changed in ((a, noisy), (b, clean)):
            if changed is not None:
                ids[changed] = (ids[changed] + 1) % 90
        return ScoreRequest(a, [place], [clean_L[place]], b)

    inside = first if first != place else place + 1
    unseen = [request(noisy=first - 1), request(clean=first), request(clean=length - 1)]
    unseen += [request(noisy=first + size)] if first + size < length else []
    seen = [request(noisy=inside), request(clean=first - 1), request(clean=0)]
    (plain,), same, other = (teacher.score(r, 1).gold_logp_N for r in ([request()], unseen, seen))
    assert (same - plain).abs().max() < 1e-5
    assert (other - plain).abs().min() > 1e-6


@pytest.mark.parametrize("kind", ["llada2_moe", "qwen3"])
def test_capture_from_a_toml_file(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layouts with x_0 and the mixture of experts, from a file of traits to a cache on disk."""
    more: dict[str, Any] = {}
    if kind == "llada2_moe":
        from stage1_teacher.architectures.families import register

        register()
        more = {"num_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        more |= {"pad_token_id": None}
    save_model(tmp_path / "model", kind, vocabulary=TEACHER_VOCABULARY, tokenizer=True, **more)
    layout = "bd3lm" if kind == "llada2_moe" else "reordered"
    (tmp_path / "mine.toml").write_text(
        f'checkpoint = "{tmp_path}/model"\nlayout = "{layout}"\nblock_size = 8\nbatch_tokens = 1000\nlength = 64\n'
        f'students = ["{TINY_STUDENT}"]\n'
    )
    corpus = write_corpus(tmp_path / "c.jsonl", 8)
    arguments = ["--teacher", str(tmp_path / "mine.toml"), "--corpus", str(corpus), "--out", str(tmp_path / "cache")]
    assert (
        tidecache(monkeypatch, "teacher", "capture", *arguments, "--held-out", "none", "--k", "4", "--draws", "3") == 0
    )
    assert tidecache(monkeypatch, "cache", "verify", str(tmp_path / "cache")) == 0
    cache = open_cache(tmp_path / "cache")
    spec = cache.spec
    assert (spec.teacher.layout, spec.teacher.block_size, spec.batch_tokens, spec.length_limit) == (layout, 8, 1000, 64)
    assert spec.teacher.architecture.startswith("LLaDA2Moe" if more else "Qwen3")
    assert sum(1 for _ in cache.iter_draws()) == 24


def test_specs_set_what_the_released_code_has() -> None:
    assert spec_names() == ["paper-cross", "paper-shared"]
    names = ("teacher", "corpus", "layout", "block_size", "mask_law", "context", "demo_ratio", "temperatures")
    options = dict.fromkeys((*names, "length", "student_length", "students", "k", "tail_samples"))
    cross, shared = read_spec("paper-cross", options), read_spec("paper-shared", options)
    for spec, teacher, layout, context, length in (
        (cross, "moe16b", "full", "plain", 1024),
        (shared, "dense8b", "bd3lm", "compdemo", 768),
    ):
        assert (spec["teacher"], spec["layout"], spec["context"], spec["length"]) == (teacher, layout, context, length)
        assert (spec["mask_law"], spec["student_length"], spec["corpus"]) == ("token", 512, "paper-mixture")
    assert (shared["temperatures"], shared["k"], shared["tail_samples"]) == ("1,2", 32, 32)
    assert not {"k", "tail_samples"} & set(cross)  # CALM needs the gold lane alone


def test_flags_win_over_a_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", 3)
    arguments = [
        "--spec",
        "paper-shared",
        "--teacher",
        "tiny",
        "--corpus",
        str(corpus),
        "--students",
        str(TINY_STUDENT),
    ]
    arguments += ["--length", "100", "--out", str(tmp_path / "cache"), "--held-out", "none", "--draws", "1"]
    assert tidecache(monkeypatch, "teacher", "capture", *arguments) == 0
    spec = open_cache(tmp_path / "cache").spec
    assert (spec.teacher.name, spec.teacher.layout, spec.teacher.block_size) == ("tiny", "bd3lm", 32)
    assert (spec.mask_law, spec.contexts, spec.demo_ratio) == ("token", ("compdemo",), 0.5)
    assert (spec.length_limit, spec.students[0].length_limit) == (100, 512)
    assert (spec.k, spec.tail_samples) == (32, 32)


def test_bad_specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "odd.toml").write_text("colour = 3\n")
    (tmp_path / "torn.toml").write_text("teacher = \n")
    for name, words in (
        ("paper-crss", "expected paper-cross, paper-shared or a TOML file"),
        (str(tmp_path / "odd.toml"), "unknown field 'colour'"),
        (str(tmp_path / "torn.toml"), "not a TOML file"),
    ):
        assert tidecache(monkeypatch, "teacher", "capture", "--spec", name) == 1
        assert words in capsys.readouterr().err


def test_make_passes_the_spec_on() -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")

    def command(*words: str) -> str:
        made = subprocess.run(
            ["make", "-n", "-s", "-o", ".venv/.installed", *words], cwd=ROOT, capture_output=True, text=True
        )
        return " ".join(made.stdout.replace("\\", " ").split())

    assert "teacher capture --spec paper-cross" in command("cache", "SPEC=paper-cross")
    assert "--teacher" not in command("cache", "SPEC=paper-cross")
    assert "teacher capture --teacher moe16b" in command("cache", "TEACHER=moe16b")


class Narrowing(Silent):
    """Also hears about smaller budgets."""

    def __init__(self) -> None:
        super().__init__()
        self.budgets: list[int] = []

    def narrowed(self, batch_tokens: int) -> None:
        self.budgets.append(batch_tokens)


def test_out_of_memory_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shard again with half the budget until it fits, said in its footer; the next shard starts from the full one."""
    folder = save_model(tmp_path / "model", vocabulary=TEACHER_VOCABULARY, tokenizer=True)
    corpus = str(write_corpus(tmp_path / "c.jsonl", 12))
    teacher: Any = load(folder, batch_tokens=SPEC.batch_tokens)
    run(teacher, tmp_path / "whole", corpus, size=4)
    score_rows = teacher._score_rows
    failures = [400, 200]
    errors: list[Exception] = [
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ]

    def small_device(batch: list[Any], *rest: Any) -> Any:
        if failures and teacher.batch_tokens == failures[0] and sum(len(row.token_S) for row in batch) > 100:
            failures.pop(0)
            raise errors.pop()
        return score_rows(batch, *rest)

    monkeypatch.setattr(teacher, "_score_rows", small_device)
    watcher = Narrowing()
    run(teacher, tmp_path / "cache", corpus, size=4, watcher=watcher)
    assert watcher.budgets == [200, 100]
    assert teacher.batch_tokens == 400
    assert sorted(receipt.batch_tokens for receipt in open_cache(tmp_path / "cache").shards)[0] == 100
    assert max(receipt.batch_tokens for receipt in open_cache(tmp_path / "cache").shards) == 400
    assert_same_draws(rows(tmp_path / "cache"), rows(tmp_path / "whole"), 2e-5)
    kept = np.concatenate([d.gold_logp for d in open_cache(tmp_path / "cache").iter_draws()])
    assert np.isfinite(kept).all()


def test_out_of_memory_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tmp_path / "model", vocabulary=TEACHER_VOCABULARY, tokenizer=True)
    teacher: Any = load(folder, batch_tokens=400)

    def too_small(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(teacher, "_score_rows", too_small)
    with pytest.raises(TidecacheError, match=r"ran out of memory .*--batch-tokens.*--dtype bfloat16"):
        run(teacher, tmp_path / "cache", str(write_corpus(tmp_path / "c.jsonl", 4)), watcher=Narrowing())


def test_tokenizers_of_official_repositories_without_their_code(tmp_path: Path) -> None:
    """A tokenizer class of the repository's own is never run, and nobody is asked whether to."""
    from stage1_teacher.architectures.tokenizers import teacher_tokenizer

    expected = teacher_tokenizer(TINY_TEACHER, "tiny").encode_text("def f(x):\n    return x")
    definition = json.loads((TINY_TEACHER / "tokenizer.json").read_text())
    for kind, own_class, fast in (("llada", "PreTrainedTokenizerFast", True), ("Dream", "DreamTokenizer", False)):
        folder = tmp_path / kind
        folder.mkdir()
        own = {"auto_map": {"AutoConfig": f"configuration_{kind.lower()}.Config"}}
        (folder / "config.json").write_text(json.dumps({"model_type": kind} | own))
        tokenizer = {"tokenizer_class": own_class, "mask_token": "<|mask|>", "eos_token": "<|endoftext|>"}
        if fast:
            shutil.copy(TINY_TEACHER / "tokenizer.json", folder)
        else:
            tokenizer["auto_map"] = {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}
            (folder / "vocab.json").write_text(json.dumps(definition["model"]["vocab"]))
            merges = [m if isinstance(m, str) else " ".join(m) for m in definition["model"]["merges"]]
            (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        found = teacher_tokenizer(folder, kind)
        assert found.encode_text("def f(x):\n    return x") == expected
        assert found.mask_id == 1
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}!")
    assert (
        teacher_tokenizer(TINY_TEACHER, "tiny", tmp_path / "t.jinja").digest
        != teacher_tokenizer(TINY_TEACHER, "a").digest
    )
    with pytest.raises(TidecacheError, match=r"template .*cannot be read"):
        teacher_tokenizer(TINY_TEACHER, "tiny", tmp_path / "none.jinja")
