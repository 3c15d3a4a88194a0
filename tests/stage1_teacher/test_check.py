"""`teacher check` on the embedded teacher: nothing wrong as it is, and each seeded fault is found with its flag."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.cli import main
from shared.corpus import open_corpus
from shared.tokenization import TextTokenizer
from stage1_teacher import layouts
from stage1_teacher.backends import load
from stage1_teacher.check import Check, Finding, Measured, Result, unigram_nll
from stage1_teacher.check_command import _documents, _template
from tests.conftest import TINY_TEACHER

COUNT, LENGTH = 6, 130


def checked(folder: Path = TINY_TEACHER, count: int = COUNT, **traits: Any) -> Check:
    raws = list(itertools.islice(open_corpus("stdlib"), 100))
    tokenizer = TextTokenizer.load(folder)
    documents = _documents(raws, tokenizer, count, LENGTH, 32)
    texts = ["".join(m.content for m in raw.messages) for raw in raws]
    return Check(load(folder, **traits), tokenizer, documents, unigram_nll(tokenizer, texts, documents))


def findings(check: Check) -> dict[str, Finding]:
    return {finding.trait: finding for finding in check.run().findings}


def about_tokens(check: Check) -> dict[str, Finding]:
    """The findings on tokenizer and vocabulary alone, with the other traits taken as right."""
    result = Result(check._asked, 0, 0)
    check._timesteps(result, check._asked)
    check._tokens(result, check._asked)
    return {finding.trait: finding for finding in result.findings}


@pytest.fixture(scope="module")
def right() -> Check:
    return checked()


def test_nothing_is_wrong_with_the_embedded_teacher(right: Check) -> None:
    result = right.run()
    assert not result.wrong
    assert result.one_block[0][:2] == ("full", 0)
    assert dict(result.by_timestep)["full"][0].mean < dict(result.by_timestep)["full"][2].mean
    assert [f.trait for f in result.findings] == [
        "mask id",
        "logit shift",
        "layout",
        "tokenizer",
        "vocabulary",
        "padding",
    ]
    json.dumps(result.to_json())


@pytest.mark.slow
def test_three_faults_at_once() -> None:
    """They do not hide each other."""
    found = findings(checked(count=14, layout="bd3lm", logit_shift=True, mask_id=0))
    assert found["mask id"].flag == "--mask-id 1"
    assert found["logit shift"].flag == "--no-logit-shift"
    assert found["layout"].flag == "--layout full"
    assert all(found[trait].wrong for trait in ("mask id", "logit shift", "layout"))
    assert not found["tokenizer"].wrong


@pytest.mark.slow
@pytest.mark.parametrize(
    ("traits", "trait", "flag"),
    [
        ({"layout": "reordered"}, "layout", "--layout full"),
        ({"layout": "block-causal"}, "layout", "--layout full"),
        ({"logit_shift": True}, "logit shift", "--no-logit-shift"),
        ({"mask_id": 2}, "mask id", "--mask-id 1"),
    ],
    ids=str,
)
def test_single_faults(traits: dict, trait: str, flag: str) -> None:
    found = findings(checked(count=14, **traits))
    assert {f.trait for f in found.values() if f.wrong} == {trait}
    assert found[trait].flag == flag


class Shifted:
    """The embedded teacher as if it had been trained to give its logits one row later (+1) or earlier (−1)."""

    def __init__(self, teacher: Any, trained: int) -> None:
        self._teacher, self._trained = teacher, trained

    def __getattr__(self, name: str) -> Any:
        return getattr(self._teacher, name)

    def varied(self, layout: str, shift: int, mask_id: int | None) -> Any:
        return self._teacher.varied(layout, shift - self._trained, mask_id)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trained", "asked", "flag"), [(1, False, "--logit-shift"), (-1, False, "--teacher"), (1, True, "")]
)
def test_teachers_that_were_trained_with_a_shift(trained: int, asked: bool, flag: str) -> None:
    check = checked(logit_shift=asked)
    check._teacher = Shifted(check._teacher, trained)
    found = findings(check)["logit shift"]
    assert found.wrong == bool(flag), found.detail
    assert found.flag == flag


def copy_of_tiny(folder: Path) -> Path:
    shutil.copytree(TINY_TEACHER, folder, ignore=shutil.ignore_patterns("*.md"))
    return folder


def test_tokenizer_of_another_model(tmp_path: Path) -> None:
    """The same tokens under other ids: every id is valid, and nothing fits."""
    folder = copy_of_tiny(tmp_path / "mixed")
    definition = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = definition["model"]["vocab"]
    ordinary = sorted(i for i in vocabulary.values() if i > 300)
    moved = dict(zip(ordinary, np.random.default_rng(0).permutation(ordinary).tolist(), strict=True))
    definition["model"]["vocab"] = {token: moved.get(i, i) for token, i in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    found = about_tokens(checked(folder))["tokenizer"]
    assert found.wrong
    assert "--teacher" in found.flag


def test_vocabulary_that_the_tokenizer_lacks(tmp_path: Path) -> None:
    """Rows of the head that the tokenizer does not know, and that the teacher predicts."""
    folder = copy_of_tiny(tmp_path / "wider")
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    frequent = TextTokenizer.load(folder).encode_text("\n return self = ( def")
    weights["model.embed_tokens.weight"] = torch.cat([embedding, embedding[frequent].repeat(8, 1)])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] = len(weights["model.embed_tokens.weight"])
    (folder / "config.json").write_text(json.dumps(config))
    check = checked(folder)
    assert check._teacher.unknown_mass(check._requests(check._asked, 0.5, False)) > 0.05
    assert about_tokens(check)["vocabulary"].wrong


def test_padding_that_reaches_attention(right: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not right._padding().wrong
    monkeypatch.setattr(layouts, "_both_valid", lambda queries, keys: torch.ones((), dtype=torch.bool))
    monkeypatch.setitem(
        layouts.LAYOUTS, "full", layouts.Layout("full", lambda query, key: query.block_BS == query.block_BS, None)
    )
    monkeypatch.setattr(right, "_teacher", right._teacher.varied("full", 0, 1))
    found = right._padding()
    assert found.wrong
    assert "--batch-tokens 1" in found.flag


def test_dtype_that_drifts(right: Check, tmp_path: Path) -> None:
    """Weights rounded to 8 bits of mantissa pass; rounded to 2 they do not."""
    for bits, wrong in ((8, False), (2, True)):
        folder = copy_of_tiny(tmp_path / str(bits))
        weights = load_file(folder / "model.safetensors")
        for name, weight in weights.items():
            mantissa, exponent = torch.frexp(weight.float())
            weights[name] = torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent).half()
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        found = right.drift(load(folder), "bfloat16")
        assert found.wrong == wrong, found.detail
        assert found.flag == ("--dtype float32" if wrong else "")


def test_template_of_another_model(right: Check, tmp_path: Path) -> None:
    """Chats whose answers go on with the prompt's text, and a template that puts noise between the two."""
    rows = []
    for raw in itertools.islice(open_corpus("stdlib"), 24):
        text = raw.messages[0].content[:500]
        rows.append({"prompt": text[: len(text) // 2], "response": text[len(text) // 2 :].strip()})
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    raws = list(open_corpus(str(tmp_path / "chats.jsonl")))
    noise = "{% for m in messages %}{% for i in range(60) %}<|im_end|> zq{{ i }}{% endfor %}{{ m.content }}{% endfor %}"
    found = _template(right, TextTokenizer.load(TINY_TEACHER, template=noise), raws, 24, 300)
    assert found.wrong, found.detail
    assert found.flag == "--template FILE"
    plain = "{% for m in messages %}{{ m.content }}{% if not loop.last %}\n\n{% endif %}{% endfor %}"
    assert not _template(right, TextTokenizer.load(TINY_TEACHER, template=plain), raws, 24, 300).wrong


def test_verdicts_need_a_difference_that_is_large_and_sure() -> None:
    base = np.array([2.0, 3.0, 4.0, 5.0])
    assert Measured(base + 0.2, 0.0).worse_than(Measured(base, 0.0))
    assert not Measured(base + 0.01, 0.0).worse_than(Measured(base, 0.0))
    assert not Measured(base + np.array([2.0, -1.0, 0.5, -0.5]), 0.0).worse_than(Measured(base, 0.0))


def test_command_names_the_flags_and_writes_the_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = tmp_path / "check.json"
    arguments = ["teacher", "check", "--documents", "5", "--length", "110", "--json", str(result), "--logit-shift"]
    monkeypatch.setattr("sys.argv", ["tidecache", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: the teacher tiny is not read as it was trained:")
    assert "change --no-logit-shift" in error
    assert "\n" not in error
    data = json.loads(result.read_text())
    assert {"by_timestep", "one_block", "findings"} <= data.keys()


def test_texts_that_are_too_short(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "short.txt").write_text("too short\n")
    monkeypatch.setattr("sys.argv", ["tidecache", "teacher", "check", "--corpus", str(tmp_path / "short.txt")])
    with pytest.raises(SystemExit):
        main()
    assert "three blocks of 32: give a corpus with longer texts" in capsys.readouterr().err
