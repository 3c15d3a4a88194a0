"""Contents are found by construction, whatever a chat template does around them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import TidecacheError
from shared.templates import SENTINEL, ChatTemplate, IrreproducibleText, Rendering, render_plain
from tests.shared.real_tokenizers import alignment_oracle
from tests.shared.texts import chat, texts

CHATML = alignment_oracle()["templates"]["chatml"]
THINK = alignment_oracle()["templates"]["chatml_think"]
# In short what the released Qwen3 does with answers: it takes reasoning out of earlier ones, formats the last one's.
QWEN = (
    "{% for m in messages %}{% set content = m.content %}{% set reasoning = '' %}"
    "{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ reasoning.strip('\\n') }}\n</think>\n\n{% endif %}"
    "{{ content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIM = (
    "{% for m in messages %}[{{ m.role }}]\n{{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def parts(rendering: Rendering, ranges: tuple[tuple[int, int], ...]) -> list[str]:
    return [rendering.data[start:stop].decode() for start, stop in ranges]


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), texts), min_size=1, max_size=5))
def test_contents_are_where_they_were_put(turns: list[tuple[str, str]]) -> None:
    messages = chat(*turns)
    rendering = ChatTemplate(CHATML, {}).render(messages)
    assert rendering.data == rendering.text.encode()
    assert parts(rendering, rendering.spans) == [content for _, content in turns]
    answers = [content for role, content in turns if role == "assistant"]
    assert parts(rendering, rendering.trainable) == [f"{answer}<|im_end|>\n" for answer in answers]
    before = rendering.data[: rendering.spans[-1][0]].decode()
    assert before.endswith(f"<|im_start|>{turns[-1][0]}\n")


@given(st.lists(texts, min_size=1, max_size=4))
def test_plain_text_is_its_contents(contents: list[str]) -> None:
    rendering = render_plain(chat(*(("assistant", content) for content in contents)))
    assert rendering.text == "".join(contents)
    assert parts(rendering, rendering.spans) == parts(rendering, rendering.trainable) == contents


@pytest.mark.parametrize(
    "answer", ["user", "assistant\n", "<|im_start|>", SENTINEL.format(number=1), "hello", "", "\ndef"]
)
def test_an_answer_that_occurs_elsewhere(answer: str) -> None:
    messages = chat(("user", f"repeat: {answer}"), ("assistant", answer))
    rendering = ChatTemplate(CHATML, {}).render(messages)
    start = len(f"<|im_start|>user\nrepeat: {answer}<|im_end|>\n<|im_start|>assistant\n".encode())
    assert rendering.spans[1] == (start, start + len(answer.encode()))


def test_the_template_after_the_generation_prompt_is_trainable_and_within_it_is_not() -> None:
    messages = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    inside = ChatTemplate(THINK, {}).render(messages)
    assert parts(inside, inside.trainable) == ["b<|im_end|>\n", "d<|im_end|>\n"]
    behind = ChatTemplate(QWEN, {}).render(messages)
    assert parts(behind, behind.trainable) == ["b<|im_end|>\n", "<think>\n\n</think>\n\nd<|im_end|>\n"]


def test_without_a_generation_prompt_all_before_the_content_is_prompt() -> None:
    template = ChatTemplate("{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}", {})
    rendering = template.render(chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")))
    assert parts(rendering, rendering.trainable) == ["b;", "d;"]


def test_a_template_that_takes_reasoning_apart_and_puts_it_together_again() -> None:
    template = ChatTemplate(QWEN, {})
    answer = "<think>\nlong thought\n</think>\n\nanswer"
    rendering = template.render(chat(("user", "q"), ("assistant", answer)))
    assert parts(rendering, rendering.spans) == ["q", answer]
    assert parts(rendering, rendering.trainable) == [f"{answer}<|im_end|>\n"]
    with pytest.raises(IrreproducibleText):  # of an earlier answer it drops the reasoning
        template.render(chat(("user", "q"), ("assistant", answer), ("user", "r"), ("assistant", "s")))
    with pytest.raises(IrreproducibleText):  # and it changes the line ends of this one
        template.render(chat(("user", "q"), ("assistant", "<think>thought</think>answer")))


def test_a_template_that_trims_is_not_taken_for_one_that_does_not() -> None:
    template = ChatTemplate(TRIM, {})
    rendering = template.render(chat(("user", "a"), ("assistant", "b")))
    assert parts(rendering, rendering.spans) == ["a", "b"]
    # The template has a line end before the content, which must not pass for the one that it trimmed.
    for answer in ("\nb", "b\n", " b", "\n\nb "):
        with pytest.raises(IrreproducibleText, match="changes the content of message 1"):
            template.render(chat(("user", "a"), ("assistant", answer)))


def test_a_template_that_escapes() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content | tojson }};{% endfor %}", {})
    rendering = template.render(chat(("user", "a"), ("assistant", "é")))
    assert parts(rendering, rendering.spans) == ["a", "é"]
    with pytest.raises(IrreproducibleText):
        template.render(chat(("user", "a"), ("assistant", 'say "b"')))


def test_a_template_that_insists_on_alternating_roles() -> None:
    source = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    template = ChatTemplate(source, {"eos_token": "</s>"})
    rendering = template.render(chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")))
    assert parts(rendering, rendering.trainable) == ["b</s>", "d</s>"]
    with pytest.raises(IrreproducibleText, match="roles must alternate"):
        template.render(chat(("user", "a"), ("user", "b"), ("assistant", "c")))
    with pytest.raises(IrreproducibleText, match="roles must alternate"):
        template.render(chat(("assistant", "a")))


def test_a_template_that_drops_or_moves_or_repeats_a_content() -> None:
    for source in (
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}",
        "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    ):
        with pytest.raises(IrreproducibleText, match="once, in order"):
            ChatTemplate(source, {}).render(chat(("system", "be good"), ("user", "a"), ("assistant", "b")))


def test_a_system_message_inside_the_first_turn() -> None:
    source = (
        "{% if messages[0].role == 'system' %}"
        "{% set system = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
        "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}[{{ m.role }}]{{ system if loop.first else '' }}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    rendering = ChatTemplate(source, {}).render(chat(("system", "be good"), ("user", "a"), ("assistant", "b")))
    assert rendering.text == "[user]be good\n\na[assistant]b"
    assert parts(rendering, rendering.spans) == ["be good", "a", "b"]


def test_dates_do_not_depend_on_the_day() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}", {})
    assert template.render(chat(("assistant", "b"))).text == "26 Jul 2024b"


def test_generation_marks_are_rendered_through() -> None:
    source = "{% for m in messages %}[{% generation %}{{ m.content }}{% endgeneration %}]{% endfor %}"
    assert ChatTemplate(source, {}).render(chat(("assistant", "b"))).text == "[b]"


def test_nothing_follows_the_last_content_of_a_cut_document() -> None:
    rendering = ChatTemplate(CHATML, {}).render(chat(("user", "é"), ("assistant", "ü"))).without_tail()
    assert rendering.text.endswith("assistant\nü")
    assert rendering.data == rendering.text.encode()
    assert parts(rendering, rendering.trainable) == ["ü"]


def test_a_template_that_is_no_template() -> None:
    with pytest.raises(TidecacheError, match="not a valid Jinja template"):
        ChatTemplate("{% for %}", {})
    with pytest.raises(IrreproducibleText, match="refuses"):
        ChatTemplate("{{ messages[5].content + 1 }}", {}).render(chat(("assistant", "b")))
