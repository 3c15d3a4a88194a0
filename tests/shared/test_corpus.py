"""Every form of corpus that users have, and one clear line for everything that can be wrong with one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from shared.corpus import deduplicated, held_out_rule, in_held_out, open_corpus, paragraphs
from shared.documents import Message, RawDocument
from shared.errors import TidecacheError

ROWS = [{"text": f"text number {i}, ü", "other": i} for i in range(5)]
CONTENTS = [row["text"] for row in ROWS]
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"}]


def lines(rows: Iterable[object]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def contents(source: Path | str, **options: object) -> list[str]:
    found = list(open_corpus(str(source), **options))
    assert all(not d.chat and [m.role for m in d.messages] == ["text"] and d.messages[0].trainable for d in found)
    return [d.messages[0].content for d in found]


def error_of(source: Path | str, **options: object) -> str:
    with pytest.raises(TidecacheError) as caught:
        list(open_corpus(str(source), **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_every_form(folder: Path) -> dict[str, Path]:
    files = {name: folder / f"corpus.{name}" for name in ("jsonl", "jsonl.zst", "json", "parquet")}
    files["jsonl"].write_text(lines(ROWS) + "\n")
    # Two frames, the boundary in the middle of a line and of a character.
    data = lines(ROWS).encode().replace(b"\\u00fc", "ü".encode())
    middle = data.index("ü".encode()) + 1
    files["jsonl.zst"].write_bytes(zstandard.compress(data[:middle]) + zstandard.compress(data[middle:]))
    files["json"].write_text(json.dumps(ROWS, indent=1))
    pq.write_table(pa.Table.from_pylist(ROWS), files["parquet"], row_group_size=2)
    files["saved"] = folder / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(files["saved"])
    files["splits"] = folder / "splits"
    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(splits).save_to_disk(files["splits"])
    return files


def test_every_form_gives_the_same_documents(tmp_path: Path) -> None:
    files = write_every_form(tmp_path)
    for name, path in files.items():
        assert contents(path) == CONTENTS, name
        assert contents(path, limit=2) == CONTENTS[:2], name
    assert contents(files["splits"], split="test") == CONTENTS[:1]
    keys = {tuple(d.key for d in open_corpus(str(path))) for path in files.values()}
    assert len(keys) == 1


def test_text_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b.txt").write_bytes(b"zwei\r\n")
    (tmp_path / "a.md").write_text("# eins\n\ntext\n")
    (tmp_path / "sub" / "c.py").write_text("x = 3\n")
    (tmp_path / "sub" / "d.jsonl").write_text(lines(ROWS[:1]))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / ".hidden" / "e.txt").write_text("no")
    found = list(open_corpus(str(tmp_path)))
    assert [d.messages[0].content for d in found] == ["# eins\n\ntext\n", "zwei\r\n", "x = 3\n", CONTENTS[0]]
    assert [d.name for d in found] == ["a.md#0", "b.txt#0", "sub/c.py#0", "sub/d.jsonl:1"]  # the same on every machine
    assert contents(tmp_path / "b.txt") == ["zwei\r\n"]


def test_byte_order_marks_are_no_content(tmp_path: Path) -> None:
    for name, content in (("a.txt", "x"), ("a.jsonl", '{"text": "x"}'), ("a.json", '[{"text": "x"}]')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert contents(tmp_path / name) == ["x"]


def test_a_dataset_of_the_hub_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, **options: object) -> Iterable[dict]:
        asked.append((name, options))
        yield from ROWS[:3]
        raise ConnectionError("the network is gone")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert contents("owner/name", limit=2, split="test") == CONTENTS[:2]
    assert asked == [("owner/name", {"split": "test", "streaming": True})]
    assert "owner/name broke off after 3 rows: the network is gone" in error_of("owner/name")


@given(
    st.lists(
        st.sampled_from(["\n", "a line\n", "x" * 30 + "\n", "y" * 50 + "\n", "é" * 9 + "\n", " \n", "last"]),
        max_size=30,
    )
)
def test_paragraphs_keep_the_text_and_the_limit(parts: list[str]) -> None:
    text = "".join(parts)
    found = list(paragraphs(text.splitlines(keepends=True), limit=40))
    assert all(document.strip() for document in found)
    assert all(len(document.encode()) <= 40 or "\n" not in document[:-1] for document in found)
    assert "".join("".join(found).split()) == "".join(text.split())


def test_a_book_is_many_documents_that_start_with_paragraphs(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("".join(f"Paragraph {i}.\n{'word ' * 60}\n\n" for i in range(40)))
    found = contents(tmp_path / "book.txt")
    assert 5 < len(found) < 20
    assert all(d.startswith("Paragraph") and len(d.encode()) <= 2048 for d in found)
    assert "".join(found) == (tmp_path / "book.txt").read_text()


def test_chats_and_prompts(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(lines([{"messages": CHAT, "text": "unused"}, {"prompt": "p", "response": "r", "text": "unused"}]))
    first, second = open_corpus(str(file))
    assert first.chat
    assert second.chat
    assert [(m.role, m.content, m.trainable) for m in first.messages] == [
        ("user", "q", False),
        ("assistant", "a", True),
        ("user", "r", False),
    ]
    assert second.messages == (Message("user", "p", False), Message("assistant", "r", True))
    assert contents(file, text_column="text") == ["unused", "unused"]
    pq.write_table(pa.Table.from_pylist([{"messages": CHAT}]), tmp_path / "chats.parquet")
    assert next(open_corpus(str(tmp_path / "chats.parquet"))).messages == first.messages


def test_named_columns(tmp_path: Path) -> None:
    files = write_every_form(tmp_path)
    for path in files.values():
        message = error_of(path, text_column="body")
        assert "`body`" in message
        assert "`text`, `other`" in message
    (tmp_path / "code.jsonl").write_text(lines([{"code": "x"}, {"kode": "y"}]))
    assert "`messages`, or `prompt` with `response`, or `text`" in error_of(tmp_path / "code.jsonl")
    assert "code.jsonl:2: expected the column `code`, found `kode`" in error_of(
        tmp_path / "code.jsonl", text_column="code"
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"text": "a"}\n{"text": \n', "bad.jsonl:2 is not valid JSON"),
        ('{"text": "a"}\n\n["text"]\n', "bad.jsonl:3: expected a JSON object"),
        ('{"text": 5}\n', "bad.jsonl:1, column `text`: expected text, found int"),
        ('{"text": null}\n', "expected text, found nothing"),
        ('{"messages": "hi"}\n', "bad.jsonl:1, column `messages`: expected a list"),
        ('{"messages": [{"role": "user"}]}\n', "bad.jsonl:1, message 0, `content`: expected text, found nothing"),
        ("", "is empty"),
        ("\n\n", "is empty"),
    ],
)
def test_what_is_wrong_with_a_line_is_said_with_its_place(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    assert words in error_of(tmp_path / "bad.jsonl")


def test_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    files = write_every_form(tmp_path)
    whole = files["jsonl.zst"].read_bytes()
    files["jsonl.zst"].write_bytes(whole[:-3])
    assert "truncated" in error_of(files["jsonl.zst"])
    files["jsonl.zst"].write_bytes(b"no zstd at all")
    assert "not a valid zstd file" in error_of(files["jsonl.zst"])
    files["parquet"].write_bytes(files["parquet"].read_bytes()[:-9])
    assert "not a readable Parquet file" in error_of(files["parquet"])
    files["json"].write_text('[{"text": "a"},\n oops]')
    assert "corpus.json:2 is not valid JSON" in error_of(files["json"])
    (files["saved"] / "dataset_info.json").unlink()
    (files["saved"] / "state.json").write_text("{}")
    assert "not a folder that `save_to_disk` wrote" in error_of(files["saved"])
    assert "no split validation: expected one of train, test" in error_of(files["splits"], split="validation")
    for name in ("latin.txt", "latin.jsonl", "latin.json"):
        (tmp_path / name).write_bytes(b'{"text": "\xfc"}')
        assert "not UTF-8" in error_of(tmp_path / name)
    (tmp_path / "latin.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "\xfc"}\n'))
    assert "not UTF-8" in error_of(tmp_path / "latin.jsonl.zst")
    (tmp_path / "locked").symlink_to(tmp_path / "locked")
    assert "there is no corpus" in error_of(tmp_path / "locked")
    (tmp_path / "table.csv").write_text("text\n")
    assert ".jsonl.zst" in error_of(tmp_path / "table.csv")


def test_what_is_not_there(tmp_path: Path) -> None:
    for source in (tmp_path / "none.jsonl", "none.jsonl", "none", "./some/where"):
        with pytest.raises(TidecacheError, match="there is no corpus"):
            open_corpus(str(source))  # at once, not when the first document is asked for
    (tmp_path / "empty").mkdir()
    assert "holds no corpus" in error_of(tmp_path / "empty")
    assert "at least 1" in error_of(tmp_path, limit=0)
    assert "no Hugging Face dataset" in error_of("tidecache-tests/not-there")  # tests run offline


def test_the_standard_library_is_mixed_and_split() -> None:
    found = list(itertools.islice(open_corpus("stdlib"), 400))
    assert found == list(open_corpus("stdlib", limit=400))
    assert len({d.name.split("#")[0] for d in found}) > 150  # modules: a spread, not the first few
    assert 0.03 < sum(bool(d.held_out) for d in found) / len(found) < 0.25
    assert [in_held_out(d, 0.0, "corpus") for d in found] == [bool(d.held_out) for d in found]


def document(text: str, name: str = "", held_out: bool | None = None) -> RawDocument:
    return RawDocument(name, (Message("text", text, True),), chat=False, held_out=held_out)


def test_documents_of_the_same_content_come_once() -> None:
    stream = (document(text, str(i)) for i, text in enumerate("abacab"))
    assert [d.name for d in deduplicated(stream)] == ["0", "1", "3"]
    endless = (document(str(i % 2)) for i in itertools.count())
    assert next(deduplicated(endless)).messages[0].content == "0"


def test_the_held_out_slice_is_a_stable_share() -> None:
    many = [document(str(i)) for i in range(4000)]
    held_out = {d.key for d in many if in_held_out(d, 0.1, "hash")}
    assert 300 < len(held_out) < 500
    assert held_out < {d.key for d in many if in_held_out(d, 0.2, "hash")}
    assert in_held_out(many[7], 0.1, "hash") == in_held_out(document("7", "elsewhere"), 0.1, "hash")
    assert not any(in_held_out(d, 0.1, rule) for d in many for rule in ("none", "corpus"))
    said = [document("x", held_out=value) for value in (True, False)]
    assert [in_held_out(d, 0.5, "hash") for d in said] == [in_held_out(d, 0.5, "corpus") for d in said] == [True, False]
    assert not in_held_out(said[0], 0.5, "none")


def test_rules_of_the_split() -> None:
    assert held_out_rule("hash:0.02") == ("hash", 0.02)
    assert held_out_rule("corpus") == ("corpus", 0.0)
    assert held_out_rule("none") == ("none", 0.0)
    for text in ("hash", "hash:1.5", "hash:x", "hash:nan", "corpus:1", "some"):
        with pytest.raises(TidecacheError, match="held_out"):
            held_out_rule(text)
