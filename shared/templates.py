"""Rendering of documents: the text that a tokenizer sees, and where in it the contents lie (DESIGN §4).

A plain document renders as its contents, one after the other. A chat renders through the tokenizer's own chat template,
and the contents are found by construction, never by searching: the template is rendered once per sequence of roles with
a unique sentinel in place of each content, which gives the literal text around the contents; literals and contents put
together must then equal the real rendering. Where they do not, the template reads or changes contents (it trims,
escapes, takes a reasoning block apart), and a second rendering with a sentinel *behind* each content says whether the
contents are there unchanged all the same. If not, the text is irreproducible; whoever calls may strip the contents and
try again.

Offsets count UTF-8 bytes of the rendering.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shared.documents import Message
from shared.errors import TidecacheError

# Templates may ask for today's date. A rendering must not depend on the day of the capture, so they get the one that
# Llama's own templates fall back to.
TEMPLATE_DATE = datetime.datetime(2024, 7, 26)
# Letters and digits only, so that trimming, escaping and JSON quoting leave it as it is.
SENTINEL = "tidecachecontent{number}q7x4hv9kz"
# What a template can raise on a chat that it does not accept; the first is its own `raise_exception` too.
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError)

Range = tuple[int, int]


class IrreproducibleText(Exception):  # noqa: N818 - a finding about a text, not a fault
    """This tokenizer or its template cannot spell this document's bytes; `detail` says what came out instead."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


@dataclass(frozen=True)
class Rendering:
    """What a tokenizer sees of a document. All ranges are [start, stop) in bytes of `data`."""

    text: str
    data: bytes  # `text` in UTF-8
    spans: tuple[Range, ...]  # of the contents, one per message
    trainable: tuple[Range, ...]  # of the trainable messages: rest of the generation prompt, content, end of turn

    def without_tail(self) -> Rendering:
        """The same up to the last content byte: what a cut document shows."""
        stop = self.spans[-1][1]
        data = self.data[:stop]
        ranges = tuple((first, min(last, stop)) for first, last in self.trainable)
        return Rendering(data.decode(), data, self.spans, ranges)


def render_plain(messages: Sequence[Message]) -> Rendering:
    """The contents one after the other.

    Raises:
        IrreproducibleText: a content holds a lone surrogate, which has no UTF-8.
    """
    return _assemble([""] * (len(messages) + 1), messages, [(0, 0)] * len(messages))


class ChatTemplate:
    """One tokenizer's chat template, compiled; sequences of roles that were seen before cost one rendering each."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens`: names a template may use (`bos_token`, `eos_token`, …) and their text.

        Raises:
            TidecacheError: the template is not valid Jinja.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = TEMPLATE_DATE.strftime
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise TidecacheError(f"the chat template is not a valid Jinja template: {error}") from error
        self._special_tokens = dict(special_tokens)
        self._literals: dict[tuple[str, ...], list[str]] = {}
        self._prompts: dict[tuple[str, ...], tuple[str | None, str | None]] = {}

    def render(self, messages: Sequence[Message]) -> Rendering:
        """Render a chat and locate its contents.

        Raises:
            IrreproducibleText: the template refuses these roles, or does not show every content unchanged and once.
        """
        roles = tuple(m.role for m in messages)
        contents = [m.content for m in messages]
        real = self._text(roles, contents, generate=False)
        if roles not in self._literals:
            marks = _sentinels(len(roles))
            self._literals[roles] = _split(self._text(roles, marks, generate=False), marks)
        literals = self._literals[roles]
        if _join(literals, contents) != real:
            literals = self._literals_of_contents(roles, contents, real)
        margins = [
            self._margins(roles, number, literals) if message.trainable else (0, 0)
            for number, message in enumerate(messages)
        ]
        return _assemble(literals, messages, margins)

    def _literals_of_contents(self, roles: tuple[str, ...], contents: list[str], real: str) -> list[str]:
        """The text around the contents where it depends on them, by sentinels behind the contents.

        The sentinel fixes where a content stops; that it starts its own length before, unchanged, is checked. A content
        with outer white space is refused here: trimmed, it may find the same white space in the template before it.
        """
        marks = _sentinels(len(roles))
        marked = self._text(roles, [c + mark for c, mark in zip(contents, marks, strict=True)], generate=False)
        literals = _split(marked, marks)
        for number, content in enumerate(contents):
            before = literals[number]
            if content != content.strip() or not before.endswith(content):
                raise IrreproducibleText(f"the chat template changes the content of message {number} ({roles[number]})")
            literals[number] = before[: len(before) - len(content)]
        if _join(literals, contents) != real:
            raise IrreproducibleText("the chat template renders the contents otherwise than one by one")
        return literals

    def _margins(self, roles: tuple[str, ...], number: int, literals: list[str]) -> Range:
        """(before, after): trainable bytes before message `number`'s content and behind it.

        Before: what the literal has beyond the generation prompt (an empty reasoning block, say). After: the end of the
        turn, that is all that follows when the chat ends here.
        """
        turn = roles[: number + 1]
        if turn not in self._prompts:
            prompt = self._last_literal(turn[:-1], generate=True)
            if prompt == self._last_literal(turn[:-1], generate=False):
                prompt = None  # it knows no generation prompt: all that stands before the content is one
            self._prompts[turn] = (prompt, self._last_literal(turn, generate=False))
        prompt, end = self._prompts[turn]
        before, after = literals[number], literals[number + 1]
        lead = before[len(prompt) :] if prompt is not None and before.startswith(prompt) else ""
        tail = after if number + 1 == len(roles) else after[: _common_prefix(after, end or "")]
        return len(lead.encode()), len(tail.encode())

    def _last_literal(self, roles: tuple[str, ...], generate: bool) -> str | None:
        """What follows the last content of a chat with these roles; None where the template refuses it."""
        marks = _sentinels(len(roles))
        try:
            return _split(self._text(roles, marks, generate), marks)[-1]
        except IrreproducibleText:
            return None

    def _text(self, roles: Sequence[str], contents: Sequence[str], generate: bool) -> str:
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        try:
            return self._template.render(messages=messages, add_generation_prompt=generate, **self._special_tokens)
        except TEMPLATE_ERRORS as error:
            raise IrreproducibleText(f"the chat template refuses the roles {', '.join(roles)}: {error}") from error


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks answers for other software; here its body is just rendered."""

    tags = {"generation"}  # noqa: RUF012 - the form that jinja2 asks for

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _assemble(literals: Sequence[str], messages: Sequence[Message], margins: Sequence[Range]) -> Rendering:
    text = _join(literals, [m.content for m in messages])
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise IrreproducibleText(f"character {error.start} is a lone surrogate, which has no UTF-8") from error
    spans: list[Range] = []
    trainable: list[Range] = []
    position = 0
    for literal, message, (before, after) in zip(literals, messages, margins, strict=False):
        start = position + len(literal.encode())
        position = start + len(message.content.encode())
        spans.append((start, position))
        if message.trainable:
            trainable.append((start - before, position + after))
    return Rendering(text, data, tuple(spans), tuple(trainable))


def _sentinels(count: int) -> list[str]:
    return [SENTINEL.format(number=number) for number in range(count)]


def _split(text: str, marks: Sequence[str]) -> list[str]:
    """The pieces of `text` between the sentinels, which must stand in it once each and in order."""
    literals = []
    for number, mark in enumerate(marks):
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise IrreproducibleText(f"the chat template does not show the content of message {number} once, in order")
        literals.append(before)
    return [*literals, text]


def _join(literals: Sequence[str], contents: Sequence[str]) -> str:
    return "".join(part for pair in zip(literals, [*contents, ""], strict=True) for part in pair)


def _common_prefix(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    """As chat templates expect it: without the HTML escapes of jinja2's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
