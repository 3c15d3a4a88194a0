"""A conversation in the terminal, printed as it settles (`tidecache student chat`).

A block-diffusion model fills a block in any order, so what appears is the part of the answer that is final up to its
first gap. `/new` forgets the conversation, `/quit` or the end of input leaves. Ctrl-C stops the answer, not the chat.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from shared.errors import TidecacheError
from stage2_student.inference import Checkpoint
from stage2_student.sampler import SampleOptions, Sampler

Write = Callable[[str], None]


class Printer:
    """Writes growing ids as text: each time only what is new and does not end inside a character."""

    def __init__(self, checkpoint: Checkpoint, write: Write) -> None:
        self.checkpoint, self.write = checkpoint, write
        self.ids: list[int] = []
        self.text = ""

    def add(self, row: int, ids: list[int]) -> None:
        """Take in new ids (the sampler's `on_tokens`)."""
        self.ids.extend(ids)
        self._show(self.checkpoint.decode(self.ids).rstrip("\ufffd"))

    def finish(self) -> str:
        """Write what is left and return the whole text."""
        self._show(self.checkpoint.decode(self.ids))
        return self.text

    def _show(self, text: str) -> None:
        if text.startswith(self.text):
            self.write(text[len(self.text) :])
            self.text = text


def chat(checkpoint: Checkpoint, lines: Iterator[str], write: Write, options: SampleOptions) -> None:
    """Answer each line of `lines` in one conversation, written through `write`.

    Each turn has its own seed, counted up from the options' seed.

    Raises:
        TidecacheError: the tokenizer has no chat template.
    """
    sampler = checkpoint.sampler()
    messages: list[dict[str, str]] = []
    turn = 0
    for line in lines:
        text = line.strip()
        if text == "/quit":
            return
        if text == "/new":
            messages = []
            write("(a new conversation)\n")
        elif text:
            messages.append({"role": "user", "content": text})
            answer = _answer(
                checkpoint, sampler, messages, write, dataclasses.replace(options, seed=options.seed + turn)
            )
            messages = [*messages, {"role": "assistant", "content": answer}] if answer is not None else messages[:-1]
            turn += 1


def _answer(
    checkpoint: Checkpoint, sampler: Sampler, messages: list[dict[str, str]], write: Write, options: SampleOptions
) -> str | None:
    """Write one answer; None if there is none (the conversation grew too long, or was interrupted)."""
    prompt = checkpoint.encode(checkpoint.render_chat(messages))
    try:
        sampler.check("the conversation", prompt, options)
    except TidecacheError as error:
        write(f"{error}; /new starts another\n")
        return None
    printer = Printer(checkpoint, write)
    try:
        sampler.sample([prompt], options, on_tokens=printer.add)
    except KeyboardInterrupt:
        write(" (stopped)\n")
        return printer.text or None
    answer = printer.finish()
    write("\n")
    return answer
