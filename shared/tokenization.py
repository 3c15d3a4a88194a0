"""Tokenizers as this project needs them: which bytes does every token of a document cover? (DESIGN §4)

A `TextTokenizer` wraps one fast Hugging Face tokenizer. Token bytes come from the tokenizer's own model, never from
decoding ids one at a time (half a character decodes to nothing): the byte alphabet of byte-level BPE, or `▁` and
`<0xNN>` of SentencePiece. Other tokenizers (WordPiece, BPE with word ends) drop white space, so their tokens are placed
by the offsets they report, and dropped white space counts to the token that follows. In every case the tokens must
spell the rendering exactly; otherwise the text is irreproducible for this tokenizer, and the document is dropped and
counted.

The digest is of content: what the tokenizer does, not what it is called or where it lies. Two tokenizers with the same
digest give the same ids.

Shapes: L tokens of one sequence, V ids.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from shared.documents import Encoded, IntArray, Message
from shared.errors import TidecacheError
from shared.templates import ChatTemplate, IrreproducibleText, Rendering, render_plain

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

__all__ = ["IrreproducibleText", "TextTokenizer"]

SPACE_SYMBOL = "▁"  # how SentencePiece writes a space
Document = tuple[tuple[Message, ...], bool, bool]  # messages, chat, cut


class TextTokenizer:
    """One fast tokenizer: its ids, the bytes of every token, its chat template, and a digest of all that.

    Attributes: `name` (for people), `vocabulary` (largest id + 1, added tokens included), `token_bytes` (id → bytes;
    added tokens: their text), `special` (bool per id), `mask_id` and `end_id` (None where it has none).
    """

    def __init__(
        self,
        backend: Tokenizer,
        name: str,
        template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """`special_tokens`: text of `mask_token`, `eos_token`, `bos_token`, … as far as there are any.

        Raises:
            TidecacheError: the chat template is not valid Jinja.
        """
        self.name = name
        self._backend = backend
        self._template_source = template
        self._special_tokens = {k: str(v) for k, v in (special_tokens or {}).items() if isinstance(v, str)}
        self._template = ChatTemplate(template, self._special_tokens) if template is not None else None
        backend.no_padding()
        backend.no_truncation()
        self._definition: dict[str, Any] = json.loads(backend.to_str())
        self._spelling = _Spelling(self._definition)
        self.token_bytes = self._spelling.token_bytes(backend.get_vocab(with_added_tokens=True))
        self.vocabulary = len(self.token_bytes)
        self._length_V = np.array([len(b) for b in self.token_bytes], dtype=np.int64)
        self.special: npt.NDArray[np.bool_] = np.zeros(self.vocabulary, dtype=np.bool_)
        self._added_V = np.zeros(self.vocabulary, dtype=np.bool_)
        for token in self._definition["added_tokens"]:
            self._added_V[token["id"]] = True
            self.special[token["id"]] = token["special"]
        self.mask_id = self._id_of("mask_token")
        self.end_id = self._id_of("eos_token")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as what it was made of, so that another process makes the same."""
        return type(self), (self._backend, self.name, self._template_source, self._special_tokens)

    @classmethod
    def load(cls, path_or_id: str | Path, name: str | None = None, template: str | None = None) -> TextTokenizer:
        """Load a folder's or a hub id's tokenizer; `template` replaces its chat template.

        Raises:
            TidecacheError: there is none, or it is not a fast one.
        """
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        try:
            try:
                # Never the code that a repository brings along, and no question about it either.
                tokenizer = AutoTokenizer.from_pretrained(str(path_or_id), trust_remote_code=False)
            except ValueError as error:
                # A tokenizer class or model type of the repository's own; but the fast tokenizer's file says all there is.
                try:
                    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path_or_id))
                except (OSError, ValueError, TypeError):
                    raise error from None
        except (OSError, ValueError, ImportError, LookupError, TypeError, AttributeError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise TidecacheError(
                f"no tokenizer could be loaded from {path_or_id}: expected a folder with tokenizer.json or a Hugging "
                f"Face model id, found: {reason[0]}"
            ) from error
        return cls.of(tokenizer, str(path_or_id), name, template)

    @classmethod
    def of(cls, tokenizer: Any, path_or_id: str, name: str | None = None, template: str | None = None) -> TextTokenizer:
        """Wrap a tokenizer of `transformers`; `template` replaces its chat template.

        Raises:
            TidecacheError: it is not a fast one.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise TidecacheError(
                f"the tokenizer of {path_or_id} is a slow one ({type(tokenizer).__name__}), which cannot say which "
                f"bytes its tokens cover: convert it to a fast one (a tokenizer.json) first"
            )
        own = tokenizer.chat_template
        if isinstance(own, dict):
            own = own.get("default")
        return cls(backend, name or Path(path_or_id).name, template or own, tokenizer.special_tokens_map)

    @functools.cached_property
    def digest(self) -> str:
        """32 hexadecimal digits: BLAKE2b of model, added tokens, normaliser, pre-tokeniser and chat template.

        Canonical: vocabulary sorted, merges as pairs, fields that are off or empty left out, so that the same tokenizer
        written by another library version keeps its digest.
        """
        model = dict(self._definition["model"])
        if isinstance(model.get("vocab"), dict):
            model["vocab"] = sorted(model["vocab"].items(), key=lambda item: (item[1], item[0]))
        if "merges" in model:
            model["merges"] = [m.split(" ", 1) if isinstance(m, str) else list(m) for m in model["merges"]]
        template = self._template_source
        named = {k: v for k, v in self._special_tokens.items() if template is not None and k in template}
        content = {
            "model": model,
            "added_tokens": sorted(self._definition["added_tokens"], key=lambda token: token["id"]),
            "normalizer": self._definition.get("normalizer"),
            "pre_tokenizer": self._definition.get("pre_tokenizer"),
            "chat_template": template,
            "special_tokens": named,
        }
        text = json.dumps(_without_empty(content), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def has_chat_template(self) -> bool:
        """Whether it can render chats."""
        return self._template is not None

    @property
    def normal_form(self) -> Literal["none", "NFC"]:
        """The Unicode form that its normaliser brings text into. Other normalisers show as irreproducible text."""
        return "NFC" if any(part["type"] == "NFC" for part in _parts(self._definition.get("normalizer"))) else "none"

    @property
    def longest_token(self) -> int:
        """Bytes of its longest token: n tokens never spell more than n times as many."""
        return max(1, int(self._length_V.max(initial=1)))

    def encode(self, messages: tuple[Message, ...], chat: bool, cut: bool) -> Encoded:
        """Render and tokenise a document (`cut`: nothing after the last content byte).

        A token is trainable if its first byte lies in a trainable range: a trainable content, what the template puts
        between the generation prompt and it, or the end of its turn.

        Raises:
            IrreproducibleText: template or tokens do not spell the contents.
            TidecacheError: `chat`, and there is no chat template.
        """
        result = self.encode_many([(messages, chat, cut)])[0]
        if isinstance(result, IrreproducibleText):
            raise result
        return result

    def encode_many(self, documents: Sequence[Document]) -> list[Encoded | IrreproducibleText]:
        """`encode` for many documents, tokenised as one batch; the exceptions stand in their places.

        Raises:
            TidecacheError: a chat, and there is no chat template.
        """
        renderings = [self._render(*document) for document in documents]
        texts = [r.text for r in renderings if isinstance(r, Rendering)]
        encodings = iter(self._tokenize(texts))
        return [self._encoded(r, next(encodings)) if isinstance(r, Rendering) else r for r in renderings]

    def encode_text(self, text: str) -> list[int]:
        """The ids of a piece of text, nothing added; no check that they spell it."""
        return self.encode_text_batch([text])[0]

    def encode_text_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_text` for many, as one batch."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _id_of(self, name: str) -> int | None:
        token = self._special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)

    def _render(self, messages: tuple[Message, ...], chat: bool, cut: bool) -> Rendering | IrreproducibleText:
        if chat and self._template is None:
            raise TidecacheError(
                f"the tokenizer {self.name} has no chat template, and the corpus holds chats: add a chat_template to "
                f"the tokenizer, or take a corpus with a column `text`"
            )
        try:
            rendering = self._template.render(messages) if chat and self._template else render_plain(messages)
            return rendering.without_tail() if cut else rendering
        except IrreproducibleText as error:
            return error

    def _tokenize(self, texts: list[str]) -> list[Encoding | IrreproducibleText]:
        """One batch. The library fails a whole batch for one text (an unknown word, say); then they go one by one."""
        encode = self._backend.encode_batch if self._spelling.by_offsets else self._backend.encode_batch_fast
        try:
            return list(encode(texts, add_special_tokens=False))
        except Exception as error:  # the library raises nothing narrower
            if len(texts) == 1:
                return [IrreproducibleText(f"the tokenizer {self.name} refuses the text: {error}")]
            return [result for text in texts for result in self._tokenize([text])]

    def _encoded(self, rendering: Rendering, encoding: Encoding | IrreproducibleText) -> Encoded | IrreproducibleText:
        if isinstance(encoding, IrreproducibleText):
            return encoding
        ids_L = np.array(encoding.ids, dtype=np.int64)
        if self.mask_id is not None and (ids_L == self.mask_id).any():
            return IrreproducibleText(f"the text holds {self.name}'s mask token {self.token_bytes[self.mask_id]!r}")
        try:
            if self._spelling.by_offsets:
                edges = self._edges_by_offsets(encoding, rendering)
            else:
                edges = self._edges_by_bytes(encoding.ids, rendering.data)
        except IrreproducibleText as error:
            return error
        starts = edges[:-1]
        trainable_L = np.zeros(len(ids_L), dtype=np.bool_)
        for start, stop in rendering.trainable:
            trainable_L |= (starts >= start) & (starts < stop)
        return Encoded(ids_L=ids_L, edges=edges, spans=rendering.spans, trainable_L=trainable_L)

    def _edges_by_bytes(self, ids: list[int], data: bytes) -> IntArray:
        """Token edges (L + 1) from the bytes of the tokens, which must make up `data`."""
        pieces = list(map(self.token_bytes.__getitem__, ids))
        edges = np.zeros(len(ids) + 1, dtype=np.int64)
        np.cumsum(self._length_V[ids], out=edges[1:])
        if b"".join(pieces) != data:
            if not self._spelling.prefix_space:
                raise self._misspelt(b"".join(pieces), data)
            edges[1:] -= np.cumsum(self._added_spaces(ids, pieces, data))
        return edges

    def _added_spaces(self, ids: list[int], pieces: list[bytes], data: bytes) -> IntArray:
        """Per token, 1 where its first byte is a space that the tokenizer put before a section of its own accord.

        Sections are what lies between added tokens (the tokenizer splits there before all else). A token that is
        nothing but such a space is left with no bytes.
        """
        spaces_L = np.zeros(len(ids), dtype=np.int64)
        spelt = bytearray()
        start = 0
        for position in range(len(ids) + 1):
            if position < len(ids) and not self._added_V[ids[position]]:
                continue
            # The added token behind a section, or the end, tells whether the space belongs to the text.
            whole = b"".join(pieces[start : position + 1])
            if position > start and whole.startswith(b" ") and not data.startswith(whole, len(spelt)):
                spaces_L[start] = 1
                whole = whole[1:]
            spelt += whole
            start = position + 1
        if spelt != data:
            raise self._misspelt(bytes(spelt), data)
        return spaces_L

    def _edges_by_offsets(self, encoding: Encoding, rendering: Rendering) -> IntArray:
        """Token edges (L + 1) from the offsets (characters) that the tokenizer reports.

        White space between tokens goes to the next one, at the end to the last.
        """
        text = rendering.text
        width = np.array([len(c.encode()) for c in text], dtype=np.int64) if len(text) < len(rendering.data) else None
        byte_of = np.arange(len(text) + 1) if width is None else np.concatenate([[0], np.cumsum(width)])
        edges = np.zeros(len(encoding.ids) + 1, dtype=np.int64)
        reached = 0
        for position, (token, (first, stop)) in enumerate(zip(encoding.ids, encoding.offsets, strict=True)):
            gap, found = text[reached:first], text[first:stop].encode()
            if gap.strip() or first < reached or found != self.token_bytes[token]:
                raise self._misspelt(self.token_bytes[token], (gap.strip() + text[first:stop]).encode())
            edges[position + 1] = byte_of[stop]
            reached = stop
        if text[reached:].strip() or (text and not encoding.ids):
            raise self._misspelt(b"", text[reached:].encode())
        edges[-1] = len(rendering.data)
        return edges

    def _misspelt(self, spelt: bytes, data: bytes) -> IrreproducibleText:
        differing = (i for i, (a, b) in enumerate(zip(spelt, data, strict=False)) if a != b)
        place = next(differing, min(len(spelt), len(data)))
        ours, text = spelt[place : place + 12], data[place : place + 12]
        return IrreproducibleText(f"the tokens of {self.name} spell {ours!r} where the text has {text!r}")


class _Spelling:
    """How a tokenizer's vocabulary writes bytes, read off its definition (tokenizer.json)."""

    def __init__(self, definition: Mapping[str, Any]) -> None:
        normalizers = list(_parts(definition.get("normalizer")))
        splitters = list(_parts(definition.get("pre_tokenizer")))
        model = definition["model"]
        self._added = {token["content"]: token for token in definition["added_tokens"]}
        self._byte_level = any(part["type"] == "ByteLevel" for part in normalizers + splitters)
        self._space_symbol = any(part["type"] == "Metaspace" for part in splitters) or any(
            part["type"] == "Replace" and part["content"] == SPACE_SYMBOL for part in normalizers
        )
        self._byte_fallback = bool(model.get("byte_fallback"))
        self._prefix = model.get("continuing_subword_prefix") or ""
        self._suffix = model.get("end_of_word_suffix") or ""
        self.by_offsets = not (self._byte_level or self._space_symbol)
        # Whether it may put a space before text of its own accord.
        self.prefix_space = any(
            part.get("add_prefix_space") or part.get("prepend_scheme", "never") != "never" for part in splitters
        ) or any(part["type"] == "Prepend" for part in normalizers)

    def token_bytes(self, vocabulary: Mapping[str, int]) -> list[bytes]:
        """id → bytes, for all ids up to the largest; ids that no token has: no bytes."""
        table = [b""] * (max(vocabulary.values(), default=-1) + 1)
        for token, number in vocabulary.items():
            table[number] = self._bytes_of(token)
        return table

    def _bytes_of(self, token: str) -> bytes:
        added = self._added.get(token)
        if added is not None and (added["special"] or not self._space_symbol):
            return token.encode()
        if self._byte_level:
            alphabet = byte_alphabet()
            return bytes(alphabet[c] for c in token) if all(c in alphabet for c in token) else token.encode()
        if self._space_symbol:
            if self._byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                return bytes([int(token[3:5], 16)])
            return token.replace(SPACE_SYMBOL, " ").encode()
        if self._prefix and token.startswith(self._prefix) and token != self._prefix:
            token = token[len(self._prefix) :]
        return token.removesuffix(self._suffix).encode() if self._suffix else token.encode()


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """Character → byte of byte-level BPE: printable Latin-1 bytes stand for themselves, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _parts(component: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """A normaliser or pre-tokeniser, or the parts of a sequence of such."""
    if component is None:
        return
    if component["type"] != "Sequence":
        yield component
        return
    for part in component.get("normalizers") or component.get("pretokenizers") or []:
        yield from _parts(part)


def _without_empty(value: Any) -> Any:
    """Without dictionary fields that are None or False: library versions differ in whether they write these."""
    if isinstance(value, dict):
        return {k: _without_empty(v) for k, v in value.items() if v is not None and v is not False}
    if isinstance(value, list):
        return [_without_empty(v) for v in value]
    return value
