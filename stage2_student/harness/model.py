"""A block-diffusion student as a model of lm-evaluation-harness: `generate_until` through our sampler.

Only generative tasks: a diffusion model has no cheap log-likelihood of a given answer. Chats are rendered as everywhere
here (empty think block included), and a task's prefix of the answer goes behind that. Answers are cut at the task's stop
strings and written to an `AnswerFile` batch by batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from rich.progress import Progress

from shared.errors import TidecacheError
from stage2_student.harness.answers import AnswerFile
from stage2_student.inference import Checkpoint, open_checkpoint
from stage2_student.sampler import SampleOptions, Sampler


@register_model("tidecache")
class StudentLM(LM):
    """See the module. `options` may be replaced between tasks; `usage` of the sampler counts over all of them."""

    def __init__(
        self,
        pretrained: str | Checkpoint,
        options: SampleOptions | None = None,
        answers: AnswerFile | None = None,
        batch_size: int | str = 8,
        truncate: bool = False,
        device: str | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.checkpoint = (
            pretrained if isinstance(pretrained, Checkpoint) else open_checkpoint(pretrained, device=device)
        )
        self.options = options or SampleOptions()
        self.answers = answers
        self.batch_size = int(batch_size)
        self.truncate = truncate
        self.truncated = 0  # prompts that lost their beginning
        self.sampler: Sampler = self.checkpoint.sampler()

    @property
    def tokenizer_name(self) -> str:
        """What the harness calls the tokenizer in its caches."""
        return self.checkpoint.text.digest

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template's source, for the harness's records."""
        return str(self.checkpoint.student.tokenizer.chat_template or "")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a chat; a last message of the assistant is the beginning of the answer."""
        if add_generation_prompt or not chat_history or chat_history[-1]["role"] != "assistant":
            return self.checkpoint.render_chat(chat_history)
        return self.checkpoint.render_chat(chat_history[:-1], prefix=chat_history[-1]["content"])

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer all requests, those of the answer file first."""
        keyed = []
        for request in requests:
            prompt, settings = request.args
            until = settings.get("until") or []
            until = [until] if isinstance(until, str) else list(until)
            keyed.append((AnswerFile.key(prompt, until, self.options), prompt, until))
        found: dict[str, str] = {}
        for key, _, _ in keyed:
            answer = self.answers.get(key) if self.answers else None
            if answer is not None:
                found[key] = answer
        waiting = {key: (self._encode(prompt), until) for key, prompt, until in keyed if key not in found}
        order = sorted(waiting, key=lambda key: len(waiting[key][0]))
        with Progress(disable=disable_tqdm, transient=True) as progress:
            task = progress.add_task("answers", total=len(keyed), completed=len(keyed) - len(order))
            for start in range(0, len(order), self.batch_size):
                keys = order[start : start + self.batch_size]
                texts = self._answer([waiting[key][0] for key in keys], [waiting[key][1] for key in keys])
                found.update(zip(keys, texts, strict=True))
                if self.answers is not None:
                    self.answers.add(list(zip(keys, texts, strict=True)))
                progress.update(task, advance=len(keys))
        return [found[key] for key, _, _ in keyed]

    def _encode(self, prompt: str) -> list[int]:
        ids = self.checkpoint.encode(prompt)
        room = (
            getattr(self.checkpoint.model.config, "max_position_embeddings", None) or 2**62
        ) - self.options.max_new_tokens
        if self.truncate and len(ids) > room > 0:
            self.truncated += 1
            ids = ids[-room:]
        try:
            self.sampler.check("a question's prompt", ids, self.options)
        except TidecacheError as error:
            raise TidecacheError(f"{error}; --truncate cuts the beginning of such prompts instead") from error
        return ids

    def _answer(self, prompts: list[list[int]], until: list[list[str]]) -> list[str]:
        """Sample one batch. All rows may stop at any row's stop strings' union only if they share them."""
        shared = until[0] if all(strings == until[0] for strings in until) else []
        decode = self.checkpoint.decode
        stop = (lambda ids: _cut(decode(ids), shared)[1]) if shared else None
        samples = self.sampler.sample(prompts, self.options, stop=stop)
        return [_cut(decode(sample.ids), strings)[0] for sample, strings in zip(samples, until, strict=True)]

    def loglikelihood(self, requests: list[Instance], *_: Any) -> list[tuple[float, bool]]:
        """Refused: see the module."""
        raise TidecacheError(
            f"task {requests[0].task_name}: it compares log-likelihoods, which a block-diffusion student does not give: "
            "take a generative variant (mmlu-gen, hellaswag-gen, …)"
        )

    def loglikelihood_rolling(self, requests: list[Instance], *_: Any) -> list[float]:
        """Refused: see the module; `tidecache student score` gives bits per byte."""
        raise TidecacheError(f"task {requests[0].task_name}: for bits per byte take `tidecache student score`")


def _cut(text: str, until: Sequence[str]) -> tuple[str, bool]:
    """The text up to the first stop string, and whether there was one."""
    places = [place for string in until if string and (place := text.find(string)) >= 0]
    return (text[: min(places)], True) if places else (text, False)
