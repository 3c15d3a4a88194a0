"""Preparation: one form for all tokenizers, cuts on chunk boundaries within every limit, and every reason to drop."""

from __future__ import annotations

import itertools
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from shared.alignment import chunks_of
from shared.documents import Dropped, Message, PreparedDocument, RawDocument
from shared.errors import TidecacheError
from shared.preparation import (
    EMPTY,
    IRREPRODUCIBLE,
    NO_BOUNDARY,
    NOTHING_TRAINABLE,
    Limits,
    Preparer,
    common_normal_form,
)
from shared.stdlib_corpus import documents
from shared.tokenization import TextTokenizer
from tests.conftest import TINY_STUDENT, TINY_TEACHER
from tests.shared.texts import chat, plain, texts

CHATML = (TINY_TEACHER / "chat_template.jinja").read_text()
TRIM = "{% for m in messages %}[{{ m.role }}]\n{{ m.content | trim }}<|end|>\n{% endfor %}"


def byte_tokenizer(template: str | None = None, normal_form: str = "none", merges: tuple = ()) -> TextTokenizer:
    """One token per byte, but for `merges`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, *("".join(m) for m in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, list(merges)))
    if normal_form == "NFC":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    return TextTokenizer(tokenizer, f"bytes-{normal_form}", template)


def text(content: str, name: str = "text") -> RawDocument:
    return RawDocument(name, plain(content), chat=False)


def talk(*turns: tuple[str, str]) -> RawDocument:
    return RawDocument("chat", chat(*turns), chat=True)


@pytest.fixture(scope="module")
def tiny() -> tuple[TextTokenizer, TextTokenizer]:
    return TextTokenizer.load(TINY_TEACHER, "teacher"), TextTokenizer.load(TINY_STUDENT, "student")


def check(
    prepared: PreparedDocument | Dropped, raw: RawDocument, preparer: Preparer, limits: Limits
) -> PreparedDocument:
    """What holds for every prepared document."""
    assert isinstance(prepared, PreparedDocument), prepared
    assert prepared.key == raw.key
    tokenizers = preparer._tokenizers
    encodings = [prepared.teacher, *prepared.students]
    for tokenizer, encoding, limit in zip(tokenizers, encodings, (limits.teacher, *limits.students), strict=True):
        assert len(encoding.ids_L) <= limit
        again = tokenizer.encode(prepared.messages, prepared.chat, prepared.cut)
        assert (again.ids_L == encoding.ids_L).all()
        first_C, stop_C = encoding.token_ranges(prepared.chunks)
        for message, start, stop, first, last in zip(
            prepared.chunks.message_C, prepared.chunks.start_C, prepared.chunks.stop_C, first_C, stop_C, strict=True
        ):
            content = prepared.messages[message].content.encode()
            assert b"".join(tokenizer.token_bytes[i] for i in encoding.ids_L[first:last]) == content[start:stop]
            assert encoding.trainable_L[first:last].all()
    trainable = [i for i, m in enumerate(prepared.messages) if m.trainable and m.content]
    expected = chunks_of(encodings, trainable)
    for field in ("message_C", "start_C", "stop_C"):
        assert (getattr(expected, field) == getattr(prepared.chunks, field)).all()
    if prepared.cut:
        assert prepared.chunks.message_C[-1] == len(prepared.messages) - 1
        assert prepared.chunks.stop_C[-1] == len(prepared.messages[-1].content.encode())
        assert prepared.teacher.edges[-1] == prepared.teacher.spans[-1][1]
    return prepared


@settings(deadline=None, max_examples=150)
@given(content=texts, limit=st.integers(1, 30), student_limit=st.integers(1, 30))
def test_texts_are_cut_within_every_limit(tiny, content: str, limit: int, student_limit: int) -> None:
    limits = Limits(limit, (student_limit,))
    preparer = Preparer(tiny[0], [tiny[1]], limits, "none")
    raw = text(content)
    prepared = preparer.prepare(raw)
    whole = [t.encode(raw.messages, chat=False, cut=False) for t in tiny]
    fits = all(len(e.ids_L) <= n for e, n in zip(whole, (limit, student_limit), strict=True))
    if not content:
        assert isinstance(prepared, Dropped)
        assert prepared.reason == EMPTY
    elif fits:
        assert check(prepared, raw, preparer, limits).messages == raw.messages
        assert not prepared.cut
    elif isinstance(prepared, Dropped):
        assert prepared.reason == NOTHING_TRAINABLE
        # Only a first chunk that does not fit, or ends inside a character, may cause it.
        chunks = chunks_of(whole, [0])
        _, stop_C = zip(*(e.token_ranges(chunks) for e in whole), strict=True)
        inside = [s for s in chunks.stop_C.tolist() if _is_whole(content.encode()[:s])]
        first = chunks.stop_C.tolist().index(inside[0])
        assert stop_C[0][first] > limit or stop_C[1][first] > student_limit
    else:
        assert check(prepared, raw, preparer, limits).cut
        assert content.startswith(prepared.messages[0].content)


def _is_whole(data: bytes) -> bool:
    return data.decode(errors="ignore").encode() == data


@settings(deadline=None, max_examples=60)
@given(turns=st.lists(st.tuples(texts, texts), min_size=1, max_size=3), limit=st.integers(8, 80))
def test_chats_are_cut_within_every_limit(tiny, turns: list[tuple[str, str]], limit: int) -> None:
    raw = talk(*(turn for question, answer in turns for turn in (("user", question), ("assistant", answer))))
    limits = Limits(limit, (limit + 5,))
    preparer = Preparer(tiny[0], [tiny[1]], limits, "none")
    prepared = preparer.prepare(raw)
    if isinstance(prepared, Dropped):
        # An answer of line ends alone is swallowed by the template's own: its tokens straddle, and no boundary is common.
        blank = all(not m.content.strip() for m in raw.messages if m.trainable)
        masked = any("<|mask|>" in m.content for m in raw.messages)
        allowed = {EMPTY: True, NOTHING_TRAINABLE: True, NO_BOUNDARY: blank, IRREPRODUCIBLE: masked}
        assert allowed[prepared.reason]
        return
    check(prepared, raw, preparer, limits)
    kept = len(prepared.messages)
    assert prepared.messages[: kept - 1] == raw.messages[: kept - 1]
    assert raw.messages[kept - 1].content.startswith(prepared.messages[-1].content)
    assert prepared.cut == (prepared.messages != raw.messages) or prepared.cut


def test_a_batch_gives_what_single_documents_give(tiny) -> None:
    raws = [text(t, n) for n, t in itertools.islice(documents(held_out=True), 80)]
    raws += [talk(("user", "hi"), ("assistant", r.messages[0].content)) for r in raws[:20]]
    raws += [
        text(""),
        text("a<|mask|>b"),
        talk(("user", "only a question")),
        talk(("user", "long " * 999), ("assistant", "x")),
    ]
    limits = Limits(120, (140,))
    preparer = Preparer(tiny[0], [tiny[1]], limits, "none")
    for raw, many in zip(raws, preparer.prepare_many(raws), strict=True):
        one = preparer.prepare(raw)
        if isinstance(one, Dropped):
            assert one == many
        else:
            check(many, raw, preparer, limits)
            assert (one.messages, one.cut) == (many.messages, many.cut)
            assert (one.teacher.ids_L == many.teacher.ids_L).all()
    reasons = [r.reason for r in preparer.prepare_many(raws[-4:])]
    assert reasons == [EMPTY, IRREPRODUCIBLE, NOTHING_TRAINABLE, NOTHING_TRAINABLE]


def test_one_normal_form_for_all(tiny) -> None:
    composing = byte_tokenizer(normal_form="NFC")
    assert common_normal_form([tiny[0], composing]) == "NFC"
    assert common_normal_form(tiny) == "none"
    raw = text("cafe\u0301 Z\u0351\u0343a\u0328lg\u0317o")
    limits = Limits(99, (99,))
    prepared = check((p := Preparer(tiny[0], [composing], limits, "NFC")).prepare(raw), raw, p, limits)
    assert prepared.messages[0].content == unicodedata.normalize("NFC", raw.messages[0].content)
    dropped = Preparer(tiny[0], [composing], limits, "none").prepare(raw)
    assert isinstance(dropped, Dropped)
    assert (dropped.reason, dropped.key, dropped.name) == (IRREPRODUCIBLE, raw.key, "text")
    assert "bytes-NFC" in dropped.detail


def test_a_template_that_trims_strips_the_contents_of_all(tiny) -> None:
    trimming = byte_tokenizer(TRIM)
    limits = Limits(200, (200,))
    preparer = Preparer(tiny[0], [trimming], limits, "none")
    raw = talk(("user", " q\n"), ("assistant", "\n  two  words \n"))
    prepared = check(preparer.prepare(raw), raw, preparer, limits)
    assert [m.content for m in prepared.messages] == ["q", "two  words"]
    # Without such a template nothing is stripped.
    kept = Preparer(tiny[0], [tiny[1]], limits, "none").prepare(raw)
    assert isinstance(kept, PreparedDocument)
    assert kept.messages == raw.messages


def test_a_cut_never_ends_where_a_template_trims() -> None:
    trimming = byte_tokenizer(TRIM)
    raw = talk(("user", "q"), ("assistant", "words    and more"))
    for limit in range(1, 60):
        limits = Limits(limit, ())
        preparer = Preparer(trimming, [], limits, "none")
        prepared = preparer.prepare(raw)
        if isinstance(prepared, PreparedDocument):
            check(prepared, raw, preparer, limits)
            assert not prepared.messages[-1].content.endswith(" ")
        else:
            assert prepared.reason == NOTHING_TRAINABLE
            assert limit < len("[user]\nq\n[assistant]\nw") + 1


def test_tokenizers_that_share_no_boundary() -> None:
    raw = text("abab")
    apart = byte_tokenizer(merges=(("a", "b"), ("ab", "ab")))
    assert Preparer(byte_tokenizer(), [apart], Limits(9, (9,)), "none").prepare(raw).chunks.stop_C.tolist() == [4]
    template = "{% for m in messages %}({{ m.content }}){% endfor %}"
    straddling = byte_tokenizer(template, merges=(("a", "b"), ("ab", "ab"), ("(", "abab"), ("(abab", ")")))
    dropped = Preparer(byte_tokenizer(template), [straddling], Limits(99, (99,)), "none").prepare(
        talk(("assistant", "abab"))
    )
    assert isinstance(dropped, Dropped)
    assert dropped.reason == NO_BOUNDARY


def test_several_student_tokenizers_shape_the_chunks(tiny) -> None:
    raw = text("def f(x):\n    return x + 1\n" * 3)
    limits = Limits(300, (300, 300))
    preparer = Preparer(tiny[0], [tiny[1], byte_tokenizer()], limits, "none")
    prepared = check(preparer.prepare(raw), raw, preparer, limits)
    pair = Preparer(tiny[0], [tiny[1]], Limits(300, (300,)), "none").prepare(raw)
    assert isinstance(pair, PreparedDocument)
    assert (pair.chunks.start_C == prepared.chunks.start_C).all()  # bytes cut everywhere: they take no boundary away
    coarse = byte_tokenizer(merges=(("r", "e"), ("re", "t")))
    assert len(Preparer(tiny[0], [tiny[1], coarse], limits, "none").prepare(raw).chunks) <= len(pair.chunks)
    with pytest.raises(ValueError, match="limits"):
        Preparer(tiny[0], [tiny[1]], Limits(9, (9, 9)), "none")


def test_a_long_document_is_not_tokenised_as_a_whole_and_cut_alike(tiny) -> None:
    sentence = "The quick brown fox jumps over the lazy dog. "
    limits = Limits(64, (64,))
    preparer = Preparer(tiny[0], [tiny[1]], limits, "none")
    long, longer = (
        check(preparer.prepare(raw), raw, preparer, limits) for raw in (text(sentence * 40), text(sentence * 99999))
    )
    assert long.messages == longer.messages
    assert longer.cut
    shortened = preparer._candidate(text("é" * 10**6))
    assert shortened.cut
    assert len(shortened.messages[0].content.encode()) <= 64 * tiny[0].longest_token


def test_a_long_chat_loses_its_last_turns(tiny) -> None:
    turn = [("user", "what is two and two?"), ("assistant", "it is four, I think")]
    raw = talk(*(turn * 20))
    limits = Limits(100, (130,))
    preparer = Preparer(tiny[0], [tiny[1]], limits, "none")
    prepared = check(preparer.prepare(raw), raw, preparer, limits)
    assert prepared.messages[-1].role == "assistant"
    assert 2 < len(prepared.messages) < 40
    assert set(prepared.chunks.message_C.tolist()) == set(range(1, len(prepared.messages), 2))


def test_an_answer_that_is_part_of_the_question_gets_all_its_chunks(tiny) -> None:
    raw = talk(("user", "Repeat: hello world"), ("assistant", "hello world"))
    limits = Limits(100, (100,))
    preparer = Preparer(tiny[0], [tiny[1]], limits, "none")
    prepared = check(preparer.prepare(raw), raw, preparer, limits)
    assert (prepared.chunks.stop_C - prepared.chunks.start_C).sum() == len("hello world")
    assert (prepared.chunks.message_C == 1).all()


def test_prompts_have_no_chunks_and_chats_need_templates(tiny) -> None:
    raw = RawDocument("mixed", (Message("text", "prompt:\n", False), Message("text", "response", True)), chat=False)
    limits = Limits(100, (100,))
    preparer = Preparer(tiny[0], [tiny[1]], limits, "none")
    prepared = check(preparer.prepare(raw), raw, preparer, limits)
    assert np.unique(prepared.chunks.message_C).tolist() == [1]
    with pytest.raises(TidecacheError, match="no chat template"):
        Preparer(tiny[0], [byte_tokenizer()], limits, "none").prepare(talk(("user", "a"), ("assistant", "b")))
    dropped = preparer.prepare(text("a\ud800b"))
    assert isinstance(dropped, Dropped)
    assert "lone surrogate" in dropped.detail
