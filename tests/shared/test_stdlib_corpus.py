"""The standard library as a corpus: nothing is lost, nothing is long, and held-out modules are never trained on."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from shared.stdlib_corpus import DOCUMENT_BYTES, HELD_OUT, documents, library_folder, module_files, pieces

LINES = st.lists(
    st.sampled_from(["def f():\n", "    pass\n", "\n", "class é:\n", "@d\n", "x = 1\n", "# 字" * 9 + "\n"])
)


@given(LINES, st.integers(60, 200))
def test_pieces_keep_every_line_in_order_within_the_limit(lines: list[str], limit: int) -> None:
    found = list(pieces("".join(lines), limit))
    wanted = [line for line in "".join(lines).splitlines() if line.strip()]
    assert [line for text in found for line in text.splitlines() if line.strip()] == wanted
    assert all(len(text.encode()) <= limit + 1 for text in found)


def test_pieces_part_between_statements() -> None:
    first = "def f():\n" + "    x = 1\n" * 30
    second = "def g():\n" + "    y = 2\n" * 30
    assert list(pieces(first + "\n\n" + second, 400)) == [first, second]


def test_a_decorator_stays_with_its_function() -> None:
    found = list(pieces("x = 1\n" * 10 + "@a\n@b\ndef f():\n" + "    pass\n" * 20, 220))
    assert found[1].startswith("@a\n@b\ndef f():\n")


def test_held_out_modules_exist_here_and_are_apart() -> None:
    held, kept = module_files(held_out=True), module_files(held_out=False)
    names = {p.relative_to(library_folder()).parts[0].removesuffix(".py") for p in held}
    assert names == HELD_OUT
    assert not set(held) & set(kept)
    assert len(kept) > 10 * len(HELD_OUT)


def test_documents_are_short_and_real() -> None:
    found = list(documents(held_out=True))
    assert len(found) > 500
    assert len({name for name, _ in found}) == len(found)
    sizes = [len(text.encode()) for _, text in found]
    assert sum(size > DOCUMENT_BYTES for size in sizes) < 0.01 * len(sizes)
