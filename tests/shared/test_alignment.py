"""Chunks against a slow reference, and against the oracle's minimal common byte boundaries."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.alignment import chunks_of, common_chunks
from shared.documents import Encoded
from shared.tokenization import TextTokenizer, byte_alphabet
from tests.conftest import TINY_STUDENT, TINY_TEACHER
from tests.shared.real_tokenizers import alignment_oracle, real_tokenizer
from tests.shared.texts import plain, texts

PAIRS = alignment_oracle()["pairs"]
boundaries = st.sets(st.integers(0, 60)).map(sorted)


@pytest.fixture(scope="module")
def tiny() -> tuple[TextTokenizer, TextTokenizer]:
    return TextTokenizer.load(TINY_TEACHER, "teacher"), TextTokenizer.load(TINY_STUDENT, "student")


@given(st.lists(boundaries, min_size=1, max_size=4))
def test_common_chunks_equals_a_search_through_every_offset(many: list[list[int]]) -> None:
    expected = [offset for offset in range(61) if all(offset in one for one in many)]
    assert common_chunks(*many).tolist() == expected
    assert common_chunks(*(np.array(one, dtype=np.int32) for one in many)).tolist() == expected


def test_common_chunks_of_lists_as_outsiders_pass_them() -> None:
    assert common_chunks([0, 3, 5, 9], [0, 2, 5, 9]).tolist() == [0, 5, 9]
    assert common_chunks([3, 9], (0, 9), np.array([0, 1, 9])).tolist() == [9]
    assert common_chunks([1, 2], []).tolist() == []
    assert common_chunks([0, 10**15], [10**15]).tolist() == [10**15]
    with pytest.raises(ValueError, match="at least one"):
        common_chunks()


def encoded(lengths: list[int]) -> Encoded:
    edges = np.cumsum([0, *lengths])
    ids_L = np.zeros(len(lengths), dtype=np.int64)
    return Encoded(ids_L, edges, ((0, int(edges[-1])),), np.ones(len(lengths), dtype=np.bool_))


def token_bytes(tokens: list[str]) -> list[bytes]:
    return [bytes(byte_alphabet()[c] for c in token) for token in tokens]


def minimal_chunks(teacher: Encoded, student: Encoded) -> list[list[int]]:
    chunks = chunks_of([teacher, student], [0])
    ranges = (*teacher.token_ranges(chunks), *student.token_ranges(chunks))
    return np.stack(ranges, axis=1).tolist()


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p['teacher']}-{p['student']}")
def test_minimal_chunks_of_the_oracle_from_its_tokens(pair: dict) -> None:
    differing = []
    for row in pair["rows"]:
        teacher, student = token_bytes(row["teacher_tokens"]), token_bytes(row["student_tokens"])
        if row["same_bytes"]:
            found = minimal_chunks(encoded(list(map(len, teacher))), encoded(list(map(len, student))))
            assert found == row["min_chunks"], row["name"]
        else:
            differing.append(row["name"])
            assert unicodedata.normalize("NFC", b"".join(teacher).decode()) == b"".join(student).decode()
    assert differing == ["nfd_combining", "zalgo"]


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p['teacher']}-{p['student']}")
def test_minimal_chunks_of_the_oracle_from_its_texts(pair: dict) -> None:
    teacher, student = real_tokenizer(pair["teacher"]), real_tokenizer(pair["student"])
    for row in pair["rows"]:
        # One normal form for all, up front: what Qwen3 applies.
        text = row["text"] if row["same_bytes"] else unicodedata.normalize(student.normal_form, row["text"])
        t, s = (tokenizer.encode(plain(text), chat=False, cut=False) for tokenizer in (teacher, student))
        assert s.ids_L.tolist() == row["student_ids"], row["name"]
        if row["same_bytes"]:
            assert t.ids_L.tolist() == row["teacher_ids"], row["name"]
            assert minimal_chunks(t, s) == row["min_chunks"], row["name"]
        else:
            assert len(minimal_chunks(t, s)) > 1, row["name"]


@settings(deadline=None)
@given(text=texts)
def test_chunks_are_spelt_by_whole_tokens_of_every_tokenizer_and_are_minimal(tiny, text: str) -> None:
    data = text.encode()
    encodings = [tokenizer.encode(plain(text), chat=False, cut=False) for tokenizer in tiny]
    chunks = chunks_of(encodings, [0])
    spelt = [data[a:b] for a, b in zip(chunks.start_C, chunks.stop_C, strict=True)]
    assert b"".join(spelt) == data
    for tokenizer, encoding in zip(tiny, encodings, strict=True):
        first_C, stop_C = encoding.token_ranges(chunks)
        pieces = [tokenizer.token_bytes[i] for i in encoding.ids_L]
        assert [b"".join(pieces[a:b]) for a, b in zip(first_C, stop_C, strict=True)] == spelt
    edges = [set(encoding.edges.tolist()) for encoding in encodings]
    expected = [offset for offset in range(len(data) + 1) if all(offset in e for e in edges)]
    assert [*chunks.start_C.tolist(), *chunks.stop_C[-1:].tolist()] == (expected if data else [])


def test_chunks_of_several_messages_count_from_each_content() -> None:
    # Renderings `..abcd..efg`: contents at 2–6 and 8–11; the second tokenizer has a token across each content's start.
    first = Encoded(np.zeros(6, dtype=np.int64), np.array([0, 2, 4, 6, 8, 9, 11]), ((2, 6), (8, 11)), np.ones(6, bool))
    second = Encoded(np.zeros(4, dtype=np.int64), np.array([0, 4, 6, 9, 11]), ((2, 6), (8, 11)), np.ones(4, bool))
    chunks = chunks_of([first, second], [0, 1])
    assert chunks.message_C.tolist() == [0, 1]
    assert chunks.start_C.tolist() == [2, 1]
    assert chunks.stop_C.tolist() == [4, 3]
    assert len(chunks_of([first, second], [])) == 0
    assert len(chunks_of([first], [0])) == 2


def test_a_token_without_bytes_is_in_no_chunk() -> None:
    encoding = encoded([0, 2, 3])
    chunks = chunks_of([encoding], [0])
    first_C, stop_C = encoding.token_ranges(chunks)
    assert (chunks.start_C.tolist(), chunks.stop_C.tolist()) == ([0, 2], [2, 5])
    assert (first_C.tolist(), stop_C.tolist()) == ([1, 2], [2, 3])
