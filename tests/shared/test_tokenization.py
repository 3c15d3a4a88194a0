"""Which bytes a token covers, for every kind of fast tokenizer; and digests."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from shared.alignment import chunks_of
from shared.documents import Encoded
from shared.errors import TidecacheError
from shared.tokenization import IrreproducibleText, TextTokenizer
from tests.conftest import TINY_STUDENT, TINY_TEACHER
from tests.shared.real_tokenizers import alignment_oracle, real_tokenizer
from tests.shared.texts import AWKWARD, chat, plain, texts

SENTENCES = [
    "hello world, the quick brown fox",
    "def f(x):\n    return x + 1\n",
    "it is what it is",
    "1234 5678 über é",
] * 8
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def llama2_like(add: str | None) -> TextTokenizer:
    """SentencePiece BPE with byte fallback and a space before every section, as Llama 2 and Mistral have it."""
    words = ["▁", "h", "e", "l", "o", "w", "r", "d", "he", "ll", "hell", "hello", "▁hello", "▁w", "or", "▁wor", "ld"]
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *BYTE_TOKENS, *words])}
    merges = [
        ("h", "e"),
        ("l", "l"),
        ("he", "ll"),
        ("hell", "o"),
        ("▁", "hello"),
        ("▁", "w"),
        ("o", "r"),
        ("▁w", "or"),
        ("l", "d"),
    ]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    if add == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    elif add is None:
        tokenizer.normalizer = replace
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=add, split=False)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    return TextTokenizer(tokenizer, f"llama2-{add}")


def word_piece(normalizer: normalizers.Normalizer | None = None) -> TextTokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]", "[MASK]"])
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return TextTokenizer(tokenizer, "wordpiece", special_tokens={"mask_token": "[MASK]"})


def unigram() -> TextTokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    tokenizer.train_from_iterator(
        SENTENCES, trainers.UnigramTrainer(vocab_size=90, unk_token="<unk>", special_tokens=["<unk>"])
    )
    return TextTokenizer(tokenizer, "unigram")


def byte_bpe(merges: list[tuple[str, str]], template: str | None = None, prefix_space: bool = False) -> TextTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, *("".join(m) for m in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False)
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    return TextTokenizer(tokenizer, "bytes", template)


def word_end_bpe() -> TextTokenizer:
    """BPE that marks word ends and drops white space, as CLIP's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>"], end_of_word_suffix="</w>")
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return TextTokenizer(tokenizer, "word-ends")


@pytest.fixture(scope="module")
def teacher() -> TextTokenizer:
    return TextTokenizer.load(TINY_TEACHER, "teacher")


@pytest.fixture(scope="module")
def zoo(teacher: TextTokenizer) -> list[TextTokenizer]:
    """One of every kind."""
    kinds = [llama2_like(add) for add in ("prepend", "always", "first", "never", None)]
    byte_level = [teacher, TextTokenizer.load(TINY_STUDENT), byte_bpe([("a", "b")], prefix_space=True)]
    return [*kinds, *byte_level, unigram(), word_piece(), word_end_bpe()]


def pieces(tokenizer: TextTokenizer, text: str) -> list[bytes]:
    encoded = tokenizer.encode(plain(text), chat=False, cut=False)
    data = text.encode()
    return [data[a:b] for a, b in zip(encoded.edges[:-1], encoded.edges[1:], strict=True)]


@settings(deadline=None, max_examples=150)
@given(text=texts)
@example(text=" hello")
@example(text="  hello</s> hello</s>hello ")
@example(text="<|mask|>")
def test_tokens_spell_the_text_or_it_is_irreproducible(zoo: list[TextTokenizer], text: str) -> None:
    data = text.encode()
    for tokenizer in zoo:
        try:
            encoded = tokenizer.encode(plain(text), chat=False, cut=False)
        except IrreproducibleText:
            # Byte-level and byte-fallback tokenizers spell everything, but for the symbol that stands for a space and
            # their own mask token.
            if tokenizer.mask_id is not None and tokenizer.token_bytes[tokenizer.mask_id].decode() in text:
                continue
            if tokenizer.name.startswith(("uni", "word")) or ("llama2" in tokenizer.name and "▁" in text):
                continue
            raise
        assert encoded.edges[0] == 0
        assert encoded.edges[-1] == len(data)
        assert (np.diff(encoded.edges) >= 0).all()
        assert encoded.ids_L.tolist() == tokenizer.encode_text(text)
        for token, start, stop in zip(encoded.ids_L, encoded.edges[:-1], encoded.edges[1:], strict=True):
            own, covered = tokenizer.token_bytes[token], data[start:stop]
            # But for white space that the tokenizer adds or drops, a token covers exactly its own bytes.
            if own != covered:
                assert own.decode().strip() == covered.decode().strip()
                assert tokenizer.name not in ("teacher", "tiny", "llama2-never", "llama2-None")


def test_bytes_of_sentencepiece_tokens() -> None:
    for add, space in (("prepend", True), ("always", True), ("first", True), ("never", False), (None, False)):
        tokenizer = llama2_like(add)
        assert tokenizer.token_bytes[3 + 0x41] == b"A"
        assert tokenizer.token_bytes[2] == b"</s>"
        assert b" hello" in tokenizer.token_bytes
        assert pieces(tokenizer, "hello world") == [b"hello", b" wor", b"ld"], add
        assert (tokenizer.encode_text("hello")[0] == tokenizer.token_bytes.index(b" hello")) == space
        assert pieces(tokenizer, "é👍")[-1] == "👍".encode()[-1:]
        with pytest.raises(IrreproducibleText, match="spell"):
            tokenizer.encode(plain("a▁b"), chat=False, cut=False)


def test_a_space_that_the_tokenizer_adds_covers_no_byte() -> None:
    tokenizer = llama2_like("prepend")
    assert pieces(tokenizer, "é") == [b"", b"\xc3", b"\xa9"]
    assert pieces(tokenizer, "hello</s>hello</s> hello") == [b"hello", b"</s>", b"hello", b"</s>", b"", b" hello"]


def test_bytes_of_word_piece_and_word_end_tokens() -> None:
    tokenizer = word_piece()
    assert pieces(tokenizer, "hello  world\n") == [b"hello", b"  world\n"]
    encoded = tokenizer.encode(plain("the fox"), chat=False, cut=False)
    assert [tokenizer.token_bytes[i] for i in encoded.ids_L] == [b"the", b"fox"]
    assert b"".join(pieces(tokenizer, "über quickf")) == "über quickf".encode()
    with pytest.raises(IrreproducibleText, match="UNK"):
        tokenizer.encode(plain("知识"), chat=False, cut=False)
    with pytest.raises(IrreproducibleText):
        tokenizer.encode(plain("  "), chat=False, cut=False)
    with pytest.raises(IrreproducibleText, match="mask token"):
        tokenizer.encode(plain("hello [MASK]"), chat=False, cut=False)
    lower = word_piece(normalizers.Lowercase())
    assert pieces(lower, "hello world") == [b"hello", b" world"]
    with pytest.raises(IrreproducibleText, match="spell"):
        lower.encode(plain("Hello world"), chat=False, cut=False)
    assert pieces(word_end_bpe(), "the  quick ") == [b"the", b"  quick "]


def test_byte_level_prefix_space() -> None:
    tokenizer = byte_bpe([("Ġ", "a")], prefix_space=True)
    assert pieces(tokenizer, "a a") == [b"a", b" a"]
    assert pieces(tokenizer, " a<|end|>a") == [b" a", b"<|end|>", b"a"]


def test_attributes_of_the_tiny_tokenizer(teacher: TextTokenizer) -> None:
    assert teacher.vocabulary == len(teacher.token_bytes) == 8192
    assert teacher.token_bytes[teacher.mask_id] == b"<|mask|>"
    assert teacher.token_bytes[teacher.end_id] == b"<|endoftext|>"
    assert np.flatnonzero(teacher.special).tolist() == [0, 1, 2, 3]
    assert sorted(b for b in teacher.token_bytes if len(b) == 1) == [bytes([b]) for b in range(256)]
    assert teacher.longest_token == max(map(len, teacher.token_bytes))
    assert (teacher.normal_form, teacher.has_chat_template) == ("none", True)
    assert teacher.encode_text_batch(["a b", ""]) == [teacher.encode_text("a b"), []]


def test_a_copy_in_another_process_does_the_same(teacher: TextTokenizer) -> None:
    copy = pickle.loads(pickle.dumps(teacher))
    assert (copy.digest, copy.name, copy.mask_id) == (teacher.digest, teacher.name, teacher.mask_id)
    (ours,), (theirs,) = (
        t.encode_many([(chat(("user", "a"), ("assistant", "b")), True, False)]) for t in (teacher, copy)
    )
    assert isinstance(ours, Encoded)
    assert np.array_equal(ours.ids_L, theirs.ids_L)


def test_a_batch_gives_what_single_documents_give(teacher: TextTokenizer) -> None:
    documents = [(plain(text), False, False) for text in AWKWARD]
    documents += [(chat(("user", text), ("assistant", text)), True, cut) for text in AWKWARD for cut in (False, True)]
    documents += [(plain("a<|mask|>b"), False, False), (plain("\ud800"), False, False), (plain(""), False, False)]
    results = teacher.encode_many(documents)
    assert [str(r) for r in results if isinstance(r, IrreproducibleText)] == [
        "the text holds teacher's mask token b'<|mask|>'",
        "character 0 is a lone surrogate, which has no UTF-8",
    ]
    for document, result in zip(documents, results, strict=True):
        if isinstance(result, Encoded):
            single = teacher.encode(*document)
            assert (single.ids_L == result.ids_L).all()
            assert (single.trainable_L == result.trainable_L).all()
            assert (single.edges == result.edges).all()
            assert single.spans == result.spans


def test_one_bad_text_does_not_spoil_a_batch() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="?"))  # the unknown word is unknown itself: an error
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    results = TextTokenizer(words, "words").encode_many([(plain(t), False, False) for t in ("a b", "c", "b")])
    assert [type(r) for r in results] == [Encoded, IrreproducibleText, Encoded]


def test_a_token_that_straddles_the_start_of_a_content_costs_only_its_chunk(teacher: TextTokenizer) -> None:
    template = "{% for m in messages %}{{ m.role }}:\n\n{{ m.content }}<|end|>{% endfor %}"
    straddling = byte_bpe([("Ċ", "Ċ"), ("ĊĊ", "Ċ"), ("d", "e")], template)
    messages = chat(("user", "hi"), ("assistant", "\ndef"))
    encoded = straddling.encode(messages, chat=True, cut=False)
    assert [straddling.token_bytes[i] for i in encoded.ids_L][-4:] == [b"\n\n\n", b"de", b"f", b"<|end|>"]
    assert encoded.boundaries(1).tolist() == [1, 3, 4]
    assert encoded.trainable_L.tolist() == [False] * (len(encoded.ids_L) - 3) + [True] * 3
    chunks = chunks_of([encoded, teacher.encode(messages, chat=True, cut=False)], [1])
    assert (chunks.start_C[0], chunks.stop_C[-1]) == (1, 4)


def test_a_cut_document_ends_with_its_last_content_byte(teacher: TextTokenizer) -> None:
    messages = chat(("user", "question"), ("assistant", "answer it"))
    whole, cut = (teacher.encode(messages, chat=True, cut=cut) for cut in (False, True))
    assert cut.edges[-1] == cut.spans[1][1] == whole.spans[1][1]
    assert whole.trainable_L.sum() == cut.trainable_L.sum() + 2  # the end of the turn and its line end
    assert (whole.ids_L[: len(cut.ids_L)] == cut.ids_L).all()


def test_chat_rows_of_the_oracle_align_all_that_its_ranges_lose(teacher: TextTokenizer) -> None:
    student = TextTokenizer.load(TINY_STUDENT)
    for row in alignment_oracle()["chat"]:
        messages = chat(*((m["role"], m["content"]) for m in row["messages"]))
        encodings = [t.encode(messages, chat=True, cut=False) for t in (teacher, student)]
        answers = [i for i, m in enumerate(messages) if m.trainable]
        chunks = chunks_of(encodings, answers)
        for answer in answers:
            content = messages[answer].content.encode()
            mine = chunks.message_C == answer
            spelt = [content[a:b] for a, b in zip(chunks.start_C[mine], chunks.stop_C[mine], strict=True)]
            assert b"".join(spelt) == content.removeprefix(b" " if len(content) > len(b"".join(spelt)) else b"")
            assert len(spelt) > 0, row["name"]


@pytest.mark.slow
@pytest.mark.parametrize("row", alignment_oracle()["chat"], ids=lambda r: f"{r['teacher']}-{r['student']}-{r['name']}")
def test_chat_rows_of_the_oracle(row: dict) -> None:
    last = len(row["messages"]) - 1
    messages = chat(*((m["role"], m["content"]) for m in row["messages"]))
    encodings = []
    for name, prefix in ((row["teacher"], "teacher_"), (row["student"], "")):
        # The oracle trains on the last answer only.
        only_last = tuple(type(m)(m.role, m.content, i == last) for i, m in enumerate(messages))
        encoded = real_tokenizer(name).encode(only_last, chat=True, cut=False)
        encodings.append(encoded)
        ids, labels = row["map"][f"{prefix}input_ids"], row["map"][f"{prefix}labels"]
        assert encoded.ids_L.tolist()[: len(ids)] == ids
        assert len(encoded.ids_L) == len(ids) or row["max_length"]
        found = np.where(encoded.trainable_L, encoded.ids_L, -100).tolist()
        assert found[: len(ids)] == labels
    # Unlike the oracle's ranges, all answers get chunks, wherever else their text occurs.
    answers = [i for i, m in enumerate(messages) if m.trainable]
    chunks = chunks_of(encodings, answers)
    for answer in answers:
        mine = chunks.message_C == answer
        covered = (chunks.stop_C - chunks.start_C)[mine].sum()
        lost = 1 if row["name"] == "lead_space" and row["student"] == "smollm2" else 0  # its token `\n ` straddles
        assert covered == len(messages[answer].content.encode()) - lost


@pytest.mark.slow
def test_a_token_of_qwen3_that_straddles_the_start_of_an_answer() -> None:
    messages = chat(("user", "go"), ("assistant", "\ndef f(): pass"))
    qwen, llama = (real_tokenizer(n).encode(messages, chat=True, cut=False) for n in ("qwen3", "llama3"))
    assert 0 not in qwen.boundaries(1).tolist()
    chunks = chunks_of([llama, qwen], [1])
    assert (chunks.start_C[0], chunks.stop_C[-1]) == (1, len("\ndef f(): pass"))


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(text=texts)
def test_real_tokenizers_spell_random_texts(text: str) -> None:
    for name in ("llama3", "gemma3", "qwen3"):
        tokenizer = real_tokenizer(name)
        try:
            encoded = tokenizer.encode(plain(text), chat=False, cut=False)
        except IrreproducibleText:
            assert (name, "▁" in text) == ("gemma3", True) or name == "qwen3"
            continue
        assert b"".join(tokenizer.token_bytes[i] for i in encoded.ids_L) == text.encode()


DIGEST = """
import sys
from tokenizers import Tokenizer
from shared.tokenization import TextTokenizer
print(TextTokenizer(Tokenizer.from_file(sys.argv[1]), "", open(sys.argv[2]).read()).digest)
"""


def test_the_digest_is_the_same_in_every_process_and_after_saving(teacher: TextTokenizer, tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(TINY_TEACHER).save_pretrained(tmp_path / "again")
    assert TextTokenizer.load(tmp_path / "again").digest == teacher.digest
    for seed in ("1", "2"):
        files = [str(TINY_TEACHER / name) for name in ("tokenizer.json", "chat_template.jinja")]
        output = subprocess.run(
            [sys.executable, "-c", DIGEST, *files],
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        )
        assert output.stdout.strip() == teacher.digest


def test_the_digest_follows_content_and_nothing_else(teacher: TextTokenizer) -> None:
    definition = json.loads((TINY_TEACHER / "tokenizer.json").read_text())
    template = (TINY_TEACHER / "chat_template.jinja").read_text()

    def digest(changed: dict, template: str = template, **special: str) -> str:
        return TextTokenizer(Tokenizer.from_str(json.dumps(changed)), "another name", template, special).digest

    as_strings = [m if isinstance(m, str) else " ".join(m) for m in definition["model"]["merges"]]
    assert digest(definition | {"model": definition["model"] | {"merges": as_strings}}) == teacher.digest
    shuffled = dict(sorted(definition["model"]["vocab"].items()))
    assert digest(definition | {"model": definition["model"] | {"vocab": shuffled}}) == teacher.digest
    assert digest(definition, bos_token="<|im_start|>") == teacher.digest  # its template does not name that
    swapped = [as_strings[1], as_strings[0], *as_strings[2:]]
    assert digest(definition | {"model": definition["model"] | {"merges": swapped}}) != teacher.digest
    assert digest(definition | {"normalizer": {"type": "NFC"}}) != teacher.digest
    assert digest(definition, template + " ") != teacher.digest
    assert digest(definition, template + "{{ bos_token }}") != digest(
        definition, template + "{{ bos_token }}", bos_token="x"
    )
    assert len({teacher.digest, TextTokenizer.load(TINY_STUDENT).digest}) == 2


def test_what_cannot_be_loaded_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    for folder, words in ((tmp_path / "none", "no tokenizer could be loaded"), (tmp_path / "slow", "slow")):
        with pytest.raises(TidecacheError, match=words) as caught:
            TextTokenizer.load(folder)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_chats_need_a_chat_template() -> None:
    with pytest.raises(TidecacheError, match="no chat template"):
        byte_bpe([]).encode(chat(("user", "a")), chat=True, cut=False)


def test_a_mask_token_with_options_is_found_after_loading(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    mask = AddedToken("<mask>", lstrip=True, special=True)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token=mask).save_pretrained(tmp_path)
    loaded = TextTokenizer.load(tmp_path)
    assert loaded.mask_id == 1
    assert loaded.special.tolist() == [False, True]
    assert loaded.end_id is None
