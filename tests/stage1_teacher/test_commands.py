"""`tidecache teacher capture` as a person runs it: killed at any instant, resumed, and given what it cannot use.

Real subprocesses on a random tiny teacher: exit codes, one line of error and no traceback, and nothing lost.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from shared.cache import open_cache
from shared.cache.verify import verify
from tests.conftest import TINY_STUDENT, TINY_TEACHER
from tests.stage1_teacher.captures import write_corpus
from tests.stage1_teacher.models import save_model

VOCABULARY = 8192
COMMAND = [sys.executable, "-c", "from shared.cli import main; main()", "teacher", "capture"]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "random", vocabulary=VOCABULARY, tokenizer=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "small.jsonl", 40)


def arguments(teacher: object, corpus: object, out: Path, *more: str) -> list[str]:
    given = ["--teacher", teacher, "--corpus", corpus, "--out", out, "--held-out", "0.2", "--documents-per-shard", "4"]
    return [*COMMAND, *map(str, given), *more]


def capture(teacher: object, corpus: object, out: Path, *more: str, **keywords: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        arguments(teacher, corpus, out, *more), env=ENVIRONMENT, capture_output=True, text=True, timeout=240, **keywords
    )


def contents(folder: Path) -> list[str]:
    return [open_cache(folder / part).manifest.content for part in ("", "held-out")]


@pytest.fixture(scope="module")
def whole(teacher: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    done = capture(teacher, corpus, folder / "cache", "--context", "both", "--json", str(folder / "summary.json"))
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


def test_what_a_person_reads(whole: Path, teacher: Path) -> None:
    cache, text = open_cache(whole / "cache"), (whole / "stdout").read_text()
    totals = cache.manifest.totals
    for expected in (
        "capture with random", "Qwen3ForCausalLM", "compdemo (2 passes), plain (1 pass)", cache.spec.fingerprint,
        f"{totals.draws:,}, with {totals.masked_chunks:,} masked chunks", f"in {len(cache.shards)} shards", "in the teacher",
    ):  # fmt: skip
        assert expected in text
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["fingerprint"] == cache.spec.fingerprint
    assert summary["train"]["totals"]["scored_tokens"] == totals.scored_tokens
    assert summary["train"]["run"]["tokens_scored"] == 2 * totals.scored_tokens  # both contexts
    assert summary["train"]["totals"]["documents"] + summary["held_out"]["totals"]["documents"] == 40
    assert 0 < summary["teacher_seconds"] <= summary["seconds"]
    assert verify(whole / "cache").problems == ()


def test_a_packed_capture_is_the_raw_one_but_for_its_grid(
    whole: Path, teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    done = capture(teacher, corpus, tmp_path / "cache", "--context", "both", "--codec", "packed")
    assert done.returncode == 0, done.stderr
    assert "codec packed" in done.stdout
    assert verify(tmp_path / "cache").problems == ()
    raw, packed = open_cache(whole / "cache"), open_cache(tmp_path / "cache")
    assert packed.manifest.totals.size_bytes < raw.manifest.totals.size_bytes
    for a, b in zip(raw.iter_draws(), packed.iter_draws(), strict=True):
        assert (a.document, a.draw) == (b.document, b.draw)
        for context in ("compdemo", "plain"):
            x, y = a.scores[context], b.scores[context]
            assert np.array_equal(x.gold_logp_N, y.gold_logp_N)
            assert np.array_equal(x.topk_ids, y.topk_ids)
            assert np.abs(x.topk_logp_MK - y.topk_logp_MK).max(initial=0) < 0.1
    refused = capture(teacher, corpus, tmp_path / "cache", "--context", "both")
    assert refused.returncode == 1
    assert "codec: the cache has 'packed', this capture 'raw'" in refused.stderr


def kill_when(command: list[str], folder: Path, shards: int, delay: float, sent: signal.Signals) -> tuple[int, str]:
    """Start the command, and send the signal `delay` seconds after it has `shards` receipts; (exit code, stdout)."""
    for _ in range(5):
        process = subprocess.Popen(
            command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        deadline = time.monotonic() + 200
        while (
            len(list(folder.glob("shards/*.json"))) < shards and process.poll() is None and time.monotonic() < deadline
        ):
            time.sleep(0.005)
        time.sleep(delay)
        process.send_signal(sent)
        output, _ = process.communicate(timeout=100)
        if process.returncode != 0:
            break
        shutil.rmtree(folder)  # on a busy machine the capture may be over before the signal comes
    return process.returncode, output


def test_a_kill_at_any_instant_loses_nothing(teacher: Path, corpus: Path, whole: Path, tmp_path: Path) -> None:
    """Killed after two shards and a random moment, resumed by the same command: bit for bit the uninterrupted cache."""
    folder = tmp_path / "cache"
    delay = float(np.random.default_rng().uniform(0, 0.2))
    code, _ = kill_when(arguments(teacher, corpus, folder, "--context", "both"), folder, 2, delay, signal.SIGKILL)
    assert code == -signal.SIGKILL, f"not killed in time (delay {delay})"
    kept = {p: p.read_bytes() for p in folder.glob("shards/*.json")}
    assert len(kept) >= 2
    done = capture(teacher, corpus, folder, "--context", "both")
    assert done.returncode == 0, done.stderr
    assert contents(folder) == contents(whole / "cache")
    assert all(p.read_bytes() == data for p, data in kept.items())
    assert [p for p in folder.rglob("*") if p.name.endswith(".tmp")] == []
    assert verify(folder).problems == ()


@pytest.mark.slow
def test_many_kills_lose_nothing(teacher: Path, corpus: Path, whole: Path, tmp_path: Path) -> None:
    """Killed again and again, from the first moment of writing on."""
    folder, rng = tmp_path / "cache", np.random.default_rng()
    command = arguments(teacher, corpus, folder, "--context", "both")
    for shards in (0, 1, 1, 2, 3, 5, 7):
        kill_when(command, folder, shards, float(rng.uniform(0, 6.0 if shards == 0 else 0.3)), signal.SIGKILL)
    assert capture(teacher, corpus, folder, "--context", "both").returncode == 0
    assert contents(folder) == contents(whole / "cache")


def test_ctrl_c_says_how_to_go_on(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    """One line, exit code 130, and the manifest holds what is complete."""
    folder = tmp_path / "cache"
    code, text = kill_when(arguments(teacher, corpus, folder, "--context", "both"), folder, 1, 0.0, signal.SIGINT)
    assert code == 130
    assert f"kept in {folder}: the same command goes on from there" in text
    assert "Traceback" not in text
    assert 1 <= len(open_cache(folder).shards) < 8


def refuse(done: subprocess.CompletedProcess, *words: str) -> None:
    """Exit code 1, exactly one line on stderr, and it says all of this."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert re.search(word, lines[0]), (word, lines[0])


def test_a_full_disk(teacher: Path, corpus: Path, whole: Path, tmp_path: Path) -> None:
    """A limit on file sizes stands in for it: the manifest and the first files fit, a large shard does not."""
    folder = tmp_path / "cache"
    refuse(
        capture(
            teacher, corpus, folder, "--context", "both", "--k", "64",
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)),
        ),
        r"cannot write \d+ bytes", "free some space and run the same command again",
    )  # fmt: skip
    assert not list(folder.rglob("*.tmp"))
    assert not list(folder.glob("shards/*.json"))


def test_what_is_refused_before_the_teacher_is_loaded(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    """Cheap mistakes show at once: here the weights are not even there."""
    from shared.errors import TidecacheError
    from stage1_teacher.commands import capture as command

    out = tmp_path / "out"
    for changes, words in (
        ({"corpus": str(tmp_path / "nowhere.jsonl")}, "there is no corpus"),
        ({"context": "demo"}, "--context: expected one of compdemo, plain, both"),
        ({"temperatures": "1,warm"}, "--temperatures"),
        ({"temperatures": "2"}, "1 among them"),
        ({"lanes": "topk"}, "expected gold"),
        ({"held_out": "1.5"}, "--held-out"),
        (
            {"mask_law": "token", "students": [str(TINY_STUDENT), str(TINY_TEACHER)]},
            "needs exactly one declared student",
        ),
        ({"codec": "zip"}, "codec: expected one of raw, packed"),
        ({"mask_law": "word"}, "mask_law: expected one of chunk, token"),
        ({"teacher": "no-such-preset"}, "presets: "),
        ({"students": [str(tmp_path)]}, "no tokenizer could be loaded"),
    ):
        given = {"teacher": str(_without_weights(teacher, tmp_path)), "corpus": str(corpus), "out": out}
        with pytest.raises(TidecacheError, match=words):
            command(**_defaults(command) | given | changes)
    assert not out.exists()


def _without_weights(teacher: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "weightless"
    shutil.copytree(teacher, folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    return folder


def _defaults(command: object) -> dict[str, object]:
    import inspect

    return {
        name: p.default
        for name, p in inspect.signature(command).parameters.items()
        if p.default is not inspect.Parameter.empty
    }


def test_teachers_corpora_and_students_that_cannot_be_used(
    teacher: Path, corpus: Path, whole: Path, tmp_path: Path
) -> None:
    """In one process, since each start costs seconds."""
    from shared.errors import TidecacheError
    from stage1_teacher.commands import capture as command

    def run(folder: Path, out: str, **changes: object) -> None:
        given = {"teacher": str(folder), "corpus": str(corpus), "out": tmp_path / out, "students": [str(TINY_STUDENT)]}
        command(**_defaults(command) | given | changes)

    maskless = tmp_path / "maskless"
    shutil.copytree(teacher, maskless)
    settings = json.loads((maskless / "tokenizer_config.json").read_text())
    del settings["mask_token"]
    (maskless / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(TidecacheError, match=r"maskless has no mask token.*--mask-id"):
        run(maskless, "a")
    run(maskless, "a", mask_id=1, limit=6, draws=1)
    assert open_cache(tmp_path / "a").spec.teacher.mask_id == 1

    with pytest.raises(TidecacheError, match=r"--length 5000: the teacher random has positions for 512 tokens"):
        run(teacher, "b", length=5000)

    (tmp_path / "columns.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(TidecacheError, match="body"):
        run(teacher, "c", corpus=str(tmp_path / "columns.jsonl"))

    broken = tmp_path / "broken"
    shutil.copytree(teacher, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.0.self_attn.o_proj.weight"][:] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(TidecacheError, match=r"broken.*not finite"):
        run(broken, "d")

    before = contents(whole / "cache")
    with pytest.raises(TidecacheError, match=r"another spec .*seed: the cache has 0, this capture 3"):
        run(teacher, str(whole / "cache"), seed=3, context="both", held_out="0.2", students=None)
    assert contents(whole / "cache") == before

    with pytest.raises(TidecacheError, match=r"not one document could be captured \(40 × .*strange"):
        run(teacher, "f", students=[_strange_tokenizer(tmp_path / "strange")], held_out="none")


def _strange_tokenizer(folder: Path) -> str:
    """One token for each line: no boundary inside a line is its own, and no byte of one is in its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "ab": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    return str(folder)
