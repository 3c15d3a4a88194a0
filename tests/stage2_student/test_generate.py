"""Checkpoints opened for answering, prompts rendered, `generate` from file to file, and `chat`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shared.errors import TidecacheError
from stage2_student import commands
from stage2_student.chat import Printer, chat
from stage2_student.generate import generate, read_requests
from stage2_student.inference import EMPTY_THINK_BLOCK, Checkpoint, open_checkpoint
from stage2_student.sampler import SampleOptions, Sampler
from tests.conftest import TINY_STUDENT

OPTIONS = SampleOptions(24, 12)
THINKING_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint("tiny")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows: list[dict[str, Any]] = [
        {"id": "code", "prompt": "import os\n\n\ndef read(path):\n"},
        {"prompt": "class Parser:\n    def"},
        {
            "id": 7,
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a list?"}],
        },
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


def edited(folder: Path, change: Callable[[dict[str, Any]], Any], name: str) -> Path:
    shutil.copytree(TINY_STUDENT, folder)
    found = json.loads((folder / name).read_text())
    change(found)
    (folder / name).write_text(json.dumps(found))
    return folder


def test_the_embedded_student_says_what_it_is(checkpoint: Checkpoint) -> None:
    assert checkpoint.block_size == 32
    names = checkpoint.student.tokenizer.convert_ids_to_tokens(list(checkpoint.end_ids))
    assert sorted(names) == ["<|endoftext|>", "<|im_end|>"]
    assert not checkpoint.thinks
    text = checkpoint.render_chat([{"role": "user", "content": "hi"}], prefix="Sure")
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nSure"
    assert checkpoint.digest == open_checkpoint(TINY_STUDENT).digest


@pytest.mark.parametrize("template", ["plain", "thinking"])
def test_models_that_think_get_one_empty_think_block(tmp_path: Path, template: str) -> None:
    def know_think(tokenizer: dict[str, Any]) -> None:
        for number, name in ((4094, "<think>"), (4095, "</think>")):
            tokenizer["added_tokens"].append(
                {"id": number, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                 "normalized": False, "special": False}
            )  # fmt: skip
            replaced = next(token for token, place in tokenizer["model"]["vocab"].items() if place == number)
            tokenizer["model"]["vocab"][name] = tokenizer["model"]["vocab"].pop(replaced)
            tokenizer["model"]["merges"] = [m for m in tokenizer["model"]["merges"] if "".join(m) != replaced]

    folder = edited(tmp_path / "thinks", know_think, "tokenizer.json")
    if template == "thinking":
        (folder / "chat_template.jinja").write_text(THINKING_TEMPLATE)
    opened = open_checkpoint(folder)
    assert opened.thinks
    text = opened.render_chat([{"role": "user", "content": "hi"}], prefix="42")
    assert text.count(EMPTY_THINK_BLOCK) == 1
    assert text.endswith("assistant\n" + EMPTY_THINK_BLOCK + "42")
    assert opened.decode(opened.encode("<think>\nwell\n</think>\n\nthe answer")) == "the answer"


def test_answers_are_written_once_and_resumed(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    requests = read_requests(prompts, checkpoint)
    assert [request.id for request in requests] == ["code", "2", "7"]
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    count, usage = generate(checkpoint, requests, whole, OPTIONS, batch=8, quiet=True)
    assert count == 3
    assert usage.tokens >= 24
    assert generate(checkpoint, requests[:1], parts, OPTIONS, batch=1, quiet=True)[0] == 1
    parts.write_bytes(parts.read_bytes() + b'{"id": "2", "te')  # a torn line of a killed run
    assert generate(checkpoint, requests, parts, OPTIONS, batch=1, quiet=True)[0] == 2
    assert generate(checkpoint, requests, parts, OPTIONS, batch=1, quiet=True)[0] == 0
    found = [{row["id"]: row for row in map(json.loads, path.read_text().splitlines()[1:])} for path in (whole, parts)]
    assert found[0] == found[1]
    assert set(found[0]) == {"code", "2", "7"}
    assert all(set(row) == {"id", "text", "tokens", "finish"} for row in found[0].values())
    with pytest.raises(TidecacheError, match="seed 0 instead of 1"):
        generate(checkpoint, requests, whole, SampleOptions(24, 12, seed=1), batch=1, quiet=True)


def test_an_interruption_keeps_complete_lines(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample, calls = Sampler.sample, []

    def interrupted(self: Sampler, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(self, *arguments, **options)

    monkeypatch.setattr(Sampler, "sample", interrupted)
    out = tmp_path / "out.jsonl"
    arguments = ["generate", str(prompts), "--out", str(out), "--batch", "1", "--max-new-tokens", "8"]
    runner = CliRunner()
    result = runner.invoke(commands.app, arguments)
    assert result.exit_code == 130
    assert "the same command goes on" in result.output
    assert len(out.read_text().splitlines()) == 2
    result = runner.invoke(commands.app, arguments)
    assert result.exit_code == 0, result.output
    assert "2 answers" in result.output
    assert len(out.read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("", "no requests"),
        ("{", "not JSON lines"),
        ("[1]", "expected a JSON object"),
        ('{"text": "x"}', "either prompt or messages, found text"),
        ('{"prompt": "x", "messages": []}', "either prompt or messages"),
        ('{"prompt": ""}', "not empty"),
        ('{"messages": [{"role": "user"}]}', "role and content"),
        ('{"id": 1, "prompt": "x"}\n{"id": "1", "prompt": "y"}', "occurs before at .*:1"),
        (json.dumps({"prompt": "word " * 2000}), r":1 has \d+ tokens, .* context of 1024"),
        ('{"prompt": "x <|mask|>"}', "holds the mask token"),
    ],
)
def test_bad_requests_are_named(checkpoint: Checkpoint, tmp_path: Path, lines: str, words: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(lines)
    with pytest.raises(TidecacheError, match=words):
        generate(checkpoint, read_requests(path, checkpoint), tmp_path / "out.jsonl", OPTIONS, 1, quiet=True)


def test_checkpoints_that_cannot_be_asked_are_refused(tmp_path: Path) -> None:
    base = edited(tmp_path / "base", lambda found: found.pop("mask_token"), "tokenizer_config.json")
    # Nor one of the known name that is merely not declared: that would be taken.
    tokenizer = base / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<|mask|>", "<|spare|>"))
    with pytest.raises(TidecacheError, match="no mask token"):
        open_checkpoint(base)
    with pytest.raises(TidecacheError, match="trained with block size 32, asked for 16"):
        open_checkpoint(TINY_STUDENT, block_size=16)
    silent = edited(tmp_path / "silent", lambda found: found.pop("block_size"), "tidecache.json")
    with pytest.raises(TidecacheError, match="does not say its block size"):
        open_checkpoint(silent)
    assert open_checkpoint(silent, block_size=16).block_size == 16
    for options in ({"device": "tpu9"}, {"dtype": "int4"}):
        with pytest.raises(TidecacheError, match=f"--{next(iter(options))}"):
            open_checkpoint(TINY_STUDENT, **options)
    wordless = tmp_path / "wordless"
    shutil.copytree(TINY_STUDENT, wordless)
    (wordless / "chat_template.jinja").unlink()
    with pytest.raises(TidecacheError, match="no chat template"):
        open_checkpoint(wordless).render_chat([{"role": "user", "content": "x"}])


def test_a_conversation_streams_what_it_keeps(checkpoint: Checkpoint) -> None:
    written: list[str] = []
    chat(checkpoint, iter(["What is a list?", "/new", " ", "And a tuple?", "/quit", "never"]), written.append, OPTIONS)
    text = "".join(written)
    first, second = text.split("(a new conversation)\n")
    sampler = checkpoint.sampler()
    expected = [
        checkpoint.decode(sampler.sample([checkpoint.encode(checkpoint.render_chat([message]))], options)[0].ids)
        for message, options in (
            ({"role": "user", "content": "What is a list?"}, OPTIONS),
            ({"role": "user", "content": "And a tuple?"}, OPTIONS),
        )
    ]
    assert [first, second] == [answer + "\n" for answer in expected]
    assert len(written) > 4  # it came in pieces


def test_text_never_ends_inside_a_character(checkpoint: Checkpoint) -> None:
    text = "naïve café – 日本語 ✓"
    ids = checkpoint.encode(text)
    assert len(ids) > len(text)
    written: list[str] = []
    printer = Printer(checkpoint, written.append)
    for token in ids:
        printer.add(0, [token])
    assert printer.finish() == text
    assert "".join(written) == text
    assert not any("\ufffd" in piece for piece in written)


def test_a_conversation_that_grew_too_long_says_so(checkpoint: Checkpoint) -> None:
    written: list[str] = []
    chat(checkpoint, iter(["word " * 2000]), written.append, OPTIONS)
    assert "/new starts another" in "".join(written)
