"""Random texts for property tests, and small documents."""

from __future__ import annotations

from hypothesis import strategies as st

from shared.documents import Message

# What tokenizers stumble over: combining marks, joined emoji, control characters, line ends, symbols of SentencePiece.
AWKWARD = [
    *("\r\n", "\n\n", "\t", "  ", " ", "\x00", "\x1b", "\u200b", "\ufeff", "\u2028", "e\u0301", "a\u0328\u0351"),
    *(
        "\u212b",
        "\ufb01",
        "👍🏽",
        "👨‍👩‍👧‍👦",
        "🇫🇷",
        "知识蒸馏",
        "नमस्ते",
        "안녕",
        "\u1112\u1161\u11ab",
        "اللغة",
        "▁",
        "##ing",
        "<0x41>",
        "Ġ",
    ),
    *("def f(x):\n    return x\n", "hello world", "The quick brown fox", "1234.5", "it's", "…", "é", "</s>"),
]
texts = st.lists(st.one_of(st.sampled_from(AWKWARD), st.text(max_size=8)), max_size=12).map("".join)


def plain(text: str) -> tuple[Message, ...]:
    return (Message("text", text, True),)


def chat(*turns: tuple[str, str]) -> tuple[Message, ...]:
    return tuple(Message(role, content, role == "assistant") for role, content in turns)
