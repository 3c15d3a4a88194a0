"""Candidates in context: windows against the exact way, and the events of stored draws."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from shared.cache.reader import Cache
from shared.cache.records import Draw
from shared.documents import Message, RawDocument
from shared.spelling import Speller, spell_in_document
from shared.tokenization import TextTokenizer
from stage2_student.data import RowMaker, view_document
from tests.conftest import TINY_TEACHER
from tests.stage2_student import synthetic

BLOCK = 32


@pytest.fixture(scope="module")
def chat_cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Chats, whose template is part of every document."""
    return synthetic.make_cache(tmp_path_factory.mktemp("chats") / "cache", synthetic.chats(4), draws=2)


def candidates(draw: Draw) -> dict[int, list[bytes]]:
    """Cache chunk → its candidates' bytes."""
    return {c: [b for b, _ in found] for c, found in zip(draw.chunks.tolist(), draw.candidates, strict=True)}


@pytest.mark.parametrize("kind", ["texts", "chats"])
def test_windows_agree_with_encoding_the_whole_document(
    kind: str, cache: Cache, chat_cache: Cache, tokenizer: TextTokenizer
) -> None:
    speller = Speller(tokenizer)
    compared, events = 0, 0
    for draw in itertools.islice((cache if kind == "texts" else chat_cache).iter_draws(), 0, 12, 2):
        view = view_document(tokenizer, draw.stored, BLOCK)
        wanted = [(c, b) for c, found in candidates(draw).items() for b in found]
        for (own, candidate), spelled in zip(wanted, speller.spell(view, wanted), strict=True):
            assert spelled == spell_in_document(tokenizer, view, own, candidate), (draw.stored.name, own, candidate)
            compared += 1
            events += spelled is not None
    assert compared > 1000
    assert 0.2 < events / compared < 0.9


def test_awkward_candidates(cache: Cache, tokenizer: TextTokenizer) -> None:
    """White space, line ends, digits and joins with the neighbours: where windows could go wrong."""
    view = view_document(tokenizer, cache.read_documents(0)[1], BLOCK)
    awkward = [
        b" ",
        b"  ",
        b"\n",
        b"\n\n",
        b"\n    ",
        b"    ",
        b"x",
        b" x",
        b"_",
        b"0",
        b"12345",
        b"'s",
        b"(",
        b")\n",
        "é".encode(),
        b"",
    ]
    wanted = [(own, candidate) for own in range(len(view.own_first_O)) for candidate in awkward]
    for (own, candidate), spelled in zip(wanted, Speller(tokenizer).spell(view, wanted), strict=True):
        assert spelled == spell_in_document(tokenizer, view, own, candidate), (own, candidate)


def test_splitting_rules_of_other_tokenizers(cache: Cache) -> None:
    """The teacher's rules are Qwen's: line ends stick to punctuation, digits come in threes."""
    other = TextTokenizer.load(TINY_TEACHER)
    edits = [
        b" ",
        b"\n",
        b"\n        ",
        b"):\n",
        b"\t",
        b"7",
        b" 1234",
        b"x",
        b" self",
        b"...",
        b"'t",
        b"  \n",
        "ß".encode(),
    ]
    for stored in cache.read_documents(0)[:3]:
        view = view_document(other, stored, BLOCK)
        wanted = [(own, edit) for own in range(len(view.own_first_O)) for edit in edits]
        for (own, candidate), spelled in zip(wanted, Speller(other).spell(view, wanted), strict=True):
            assert spelled == spell_in_document(other, view, own, candidate), (stored.name, own, candidate)


def test_chunks_that_split_characters(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    """A gold that is part of a character leaves a prefix that is no text; nothing can be spelled there."""
    text = "naïve café — 東京 🙂 Ωμέγα, straße\n" * 3
    made = synthetic.make_cache(tmp_path / "signs", [RawDocument("signs", (Message("text", text, True),), chat=False)])
    view = view_document(tokenizer, made.read_documents(0)[0], BLOCK)
    edits = [b"a", b" a", "é".encode(), "京".encode(), "🙂".encode(), "🙂".encode()[:2], "🙂".encode()[2:], b"\n"]
    wanted = [(own, edit) for own in range(len(view.own_first_O)) for edit in edits]
    spelled = Speller(tokenizer).spell(view, wanted)
    assert spelled == [spell_in_document(tokenizer, view, *key) for key in wanted]
    assert any(s is not None for s in spelled)
    maker = RowMaker(tokenizer, made.spec, BLOCK, "compdemo", temperature=1.0)
    assert all(maker.cached_row(draw).events is not None for draw in made.iter_draws())


def test_a_tokenizer_that_puts_spaces_first_is_spelled_exactly_too(cache: Cache, sentencepiece: TextTokenizer) -> None:
    draw = next(cache.iter_draws())
    view = view_document(sentencepiece, draw.stored, BLOCK)
    speller = Speller(sentencepiece)
    owns = list(range(len(view.own_first_O)))
    wanted = [(own, b) for own in owns for b in (b" the", b"x", b" self", b"\n    ", b"_name")]
    for (own, candidate), spelled in zip(wanted, speller.spell(view, wanted), strict=True):
        assert spelled == spell_in_document(sentencepiece, view, own, candidate), (own, candidate)
    # Were windows of no use here, every candidate would cost a whole document.
    windows = speller._windows(view, owns)
    assert sum(window is not None for window in windows.values()) > 0.8 * len(owns)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """A Llama-like tokenizer: `▁` for spaces, one put before every text, no splitting, bytes as a fallback."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    text = [raw.messages[0].content for raw in synthetic.texts(40, skip=100)]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trained.train_from_iterator(text, trainers.BpeTrainer(vocab_size=600, show_progress=False))
    import json

    learned = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [piece for piece in sorted(learned["vocab"], key=learned["vocab"].get) if "\n" not in piece]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [tuple(m) for m in learned["merges"] if all("\n" not in part for part in m)]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    folder = tmp_path_factory.mktemp("sentencepiece")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return TextTokenizer.load(folder)


def test_special_tokens_and_half_characters_are_no_events(cache: Cache, tokenizer: TextTokenizer) -> None:
    view = view_document(tokenizer, cache.read_documents(0)[0], BLOCK)
    wanted = [(5, b"<|endoftext|>"), (5, b"<|mask|>"), (5, b"\xc3"), (5, "é".encode()[1:])]
    assert Speller(tokenizer).spell(view, wanted) == [None] * 4
    assert [spell_in_document(tokenizer, view, *key) for key in wanted] == [None] * 4


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_events_of_a_draw(cache: Cache, tokenizer: TextTokenizer, temperature: float) -> None:
    """Gold first with the student's ids; masses from the stored lane; equal bytes added up; the gold's left out."""
    maker = RowMaker(tokenizer, cache.spec, BLOCK, "compdemo", temperature=temperature)
    column = cache.spec.temperatures.index(temperature)
    several = doubled = 0
    for draw in itertools.islice(cache.iter_draws(), 8):
        row, view = maker.cached_row(draw), view_document(tokenizer, draw.stored, BLOCK)
        assert row.events is not None
        log_z_M = draw.scores["compdemo"].log_z_MT[:, column]  # type: ignore[index]
        ends = [*row.events.start_E[1:].tolist(), len(row.events.ids_P)]
        for m, chunk in enumerate(draw.chunks.tolist()):
            gold = draw.stored.chunk_bytes(chunk)
            expected: dict[bytes, float] = {}
            for spelling, logp in draw.candidates[m]:
                if spelling != gold and spell_in_document(tokenizer, view, chunk, spelling) is not None:
                    doubled += spelling in expected
                    expected[spelling] = expected.get(spelling, 0.0) + float(np.exp(logp / temperature - log_z_M[m]))
            found = np.flatnonzero(row.events.chunk_E == m)
            ids = [row.events.ids_P[row.events.start_E[e] : ends[e]] for e in found]
            assert ids[0].tolist() == view.ids_L[view.own_token_first_O[chunk] : view.own_token_stop_O[chunk]].tolist()
            np.testing.assert_allclose(
                row.events.log_mass_E[found[0]], draw.gold_logp[m] / temperature - log_z_M[m], rtol=1e-4, atol=1e-5
            )
            by_bytes = {b"".join(tokenizer.token_bytes[i] for i in e): e for e in ids[1:]}
            assert set(by_bytes) == set(expected)
            masses = np.exp(row.events.log_mass_E[found[1:]])
            np.testing.assert_allclose(masses, [expected[s] for s in by_bytes], rtol=1e-4)
            assert all(len(e) == len(ids[0]) for e in ids)
            several += len(ids) > 1
    assert several > 100
    assert doubled > 0


def test_special_fillings_of_the_teacher_are_no_events(cache: Cache, tokenizer: TextTokenizer) -> None:
    """Its end token's text may be ordinary text to the student; the teacher did not mean that text."""
    from dataclasses import replace

    draw = next(cache.iter_draws())
    scores = draw.scores["compdemo"]
    assert scores.topk_ids is not None
    special = int(np.flatnonzero(draw.vocabulary.special_V)[0])
    changed = replace(
        draw, scores={**draw.scores, "compdemo": replace(scores, topk_ids=np.full_like(scores.topk_ids, special))}
    )
    row = RowMaker(tokenizer, cache.spec, BLOCK, "compdemo", temperature=1.0).cached_row(changed)
    assert row.events is not None
    assert len(row.events.chunk_E) == len(draw.chunks)


def test_unions_of_chunks_have_the_gold_alone(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = TextTokenizer.load(synthetic.undeclared_tokenizer(tmp_path_factory.mktemp("other")))
    maker = RowMaker(other, cache.spec, BLOCK, "plain", temperature=2.0)
    unions = 0
    for draw in itertools.islice(cache.iter_draws(), 6):
        row, view = maker.cached_row(draw), view_document(other, draw.stored, BLOCK)
        assert row.events is not None
        column, log_z = (
            cache.spec.temperatures.index(2.0),
            dict(zip(draw.chunks.tolist(), draw.scores["plain"].log_z_MT, strict=True)),
        )  # type: ignore[arg-type]
        by_token = {int(a): o for o, a in enumerate(view.own_token_first_O)}
        for q, first in enumerate(row.token_first_Q.tolist()):
            own = by_token[first]
            a, b = int(view.own_first_O[own]), int(view.own_stop_O[own])
            found = np.flatnonzero(row.events.chunk_E == q)
            expected = row.teacher_logp_Q[q] / 2.0 - sum(log_z[c][column] for c in range(a, b))
            np.testing.assert_allclose(row.events.log_mass_E[found[0]], expected, rtol=1e-4, atol=1e-5)
            if b - a > 1:
                unions += 1
                assert len(found) == 1
    assert unions > 0


def test_answers_are_remembered_and_the_memory_is_bounded(
    cache: Cache, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stage2_student.data.SPELLINGS_KEPT", 500)
    maker = RowMaker(tokenizer, cache.spec, BLOCK, "compdemo", temperature=1.0)
    for draw in cache.iter_draws():
        first = maker.cached_row(draw)
        again = maker.cached_row(draw)
        assert first.events is not None
        assert again.events is not None
        assert first.events.ids_P.tolist() == again.events.ids_P.tolist()
        kept = sum(len(view.spelled) for view in maker._views.values() if view is not None)
        assert kept == maker._spellings
        assert len(maker._views) <= 3
