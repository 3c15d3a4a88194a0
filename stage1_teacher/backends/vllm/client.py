"""A teacher inside vLLM, with the interface of every backend (DESIGN §7, §11).

The engine runs in the capture's own process (tensor parallelism adds workers), and all requests of a call are queued
before its first step: so which requests share a batch depends on the call and the budget alone, and a shard that is
scored again gives the same bits. For the same reason the size of the key/value cache follows from the budget, not from
what memory happens to be free, and pages are reused within a call, not across calls. An engine that runs out of device
memory in the middle is gone; the pipeline halves the budget, and the next call starts one with that.

A prompt is computed in one step, so it must fit the budget `batch_tokens`: in `bd3lm` a text of L tokens needs 2 L, and
more where blocks are no multiple of a page (`pages`).

Shapes: L tokens of one request, N scored positions, K candidates, T temperatures, P tokens of a prompt.
"""

from __future__ import annotations

import gc
import hashlib
import logging
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.errors import TidecacheError
from stage1_teacher.architectures.memory import ran_out_of_memory
from stage1_teacher.backends import OutOfDeviceMemoryError, ScoreRequest, Scores
from stage1_teacher.backends.requests import Arrays, checked
from stage1_teacher.backends.vllm import crosscheck
from stage1_teacher.backends.vllm.engine import PAGE, require_vllm, start_engine
from stage1_teacher.backends.vllm.pages import place, prompt_sizes
from stage1_teacher.backends.vllm.plugin import architecture
from stage1_teacher.backends.vllm.traits import LAYOUTS, ScorerTraits
from stage1_teacher.presets import Preset, local_folder
from stage1_teacher.weights import configuration_digest, weight_files, weights_digest

log = logging.getLogger(__name__)


class VllmTeacher:
    """See `stage1_teacher.backends.Teacher`; made by `load_vllm_teacher`."""

    def __init__(
        self, preset: Preset, folder: Path, config: Any, start: Callable[[int], Any], traits: ScorerTraits,
        mask_id: int | None, dtype: str, batch_tokens: int,
    ) -> None:  # fmt: skip
        self.name = preset.name
        self.folder = folder
        self.architecture = f"{_class_name(config)}:{configuration_digest(folder)}"
        self.layout = traits.layout
        self.block_size = traits.block_size
        self.mask_id = mask_id
        self.logit_shift = bool(preset.logit_shift)
        self.dtype = dtype
        self.vocabulary = traits.vocabulary
        self.temperatures = traits.temperatures
        self.batch_tokens = batch_tokens
        self.prompt_tokens = 0  # of all calls so far, and those of them that vLLM found in reused pages
        self.reused_tokens = 0
        self._rows = config.vocab_size
        self._traits = traits
        self._config = config
        self._start = start
        self._engine: Any = start(batch_tokens)
        self._engine_tokens = batch_tokens

    @property
    def length_limit(self) -> int | None:
        """The longest text that fits the budget of the moment, in tokens."""
        return _longest(self._traits, self._config, self.batch_tokens)

    @cached_property
    def weights(self) -> str:
        """Digest of the weights, by content (`stage1_teacher.weights`)."""
        return weights_digest(self.folder)

    def score(self, requests: Sequence[ScoreRequest], k: int, on_batch: Callable[[int], None] | None = None) -> Scores:
        """See `stage1_teacher.backends.Teacher.score`."""
        if not 1 <= k <= self.vocabulary:
            raise TidecacheError(f"k: expected between 1 and the teacher's {self.vocabulary} tokens, found {k}")
        self._have_engine()
        needs_clean = self.layout == "bd3lm"
        arrays = [checked(n, request, self, self._rows, needs_clean) for n, request in enumerate(requests)]
        first_R = np.concatenate([[0], np.cumsum([len(a.position_N) for a in arrays])]).astype(np.int64)
        temperatures = len(self.temperatures)
        numbers_NX = torch.empty(int(first_R[-1]), 1 + temperatures + 2 * k)
        if needs_clean:
            self._engine.reset_prefix_cache()
        longest = max(
            (self._queue(str(number), a, k) for number, a in enumerate(arrays) if len(a.position_N)), default=0
        )
        while self._engine.has_unfinished_requests():
            done = 0
            for output in self._step(longest):
                number = int(output.request_id)
                numbers_NX[first_R[number] : first_R[number + 1]] = output.outputs.data
                self.prompt_tokens += len(output.prompt_token_ids)
                self.reused_tokens += output.num_cached_tokens
                done += int(first_R[number + 1] - first_R[number])
            if done and on_batch is not None:
                on_batch(done)
        if not torch.isfinite(numbers_NX).all():
            raise TidecacheError(
                f"the teacher {self.name} gave log-probabilities that are not finite (NaN or infinite), in {self.dtype} with the "
                f"layout {self.layout}: its weights may be damaged, or the type too narrow; try --dtype float32"
            )
        gold_N1, log_z_NT, id_NK, logp_NK = numbers_NX.split([1, temperatures, k, k], dim=1)
        return Scores(gold_N1[:, 0].clone(), id_NK.long(), logp_NK.clone(), log_z_NT.clone())

    def _have_engine(self) -> None:
        """An engine with the budget of the moment: it is built in, so another budget is another engine."""
        if self._engine is not None and self._engine_tokens == self.batch_tokens:
            return
        self.close()
        gc.collect()  # what ran out of memory is kept by nothing any more, but by cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._engine, self._engine_tokens = self._start(self.batch_tokens), self.batch_tokens

    def _queue(self, name: str, a: Arrays, k: int) -> int:
        """Lay a request out in pages and hand it to the engine; the tokens of its prompt."""
        from vllm import PoolingParams
        from vllm.inputs.engine import tokens_input

        traits = self._traits
        placement = place(traits.layout, len(a.token_L), traits.block_size, traits.page)
        row_N = placement.noisy_L[a.position_N - int(self.logit_shift)]
        params = PoolingParams(
            task="token_classify",
            skip_reading_prefix_cache=not placement.clean_pages,
            extra_kwargs={
                "rows": row_N.astype(np.int32).tobytes(),
                "gold": a.gold_N.astype(np.int32).tobytes(),
                "k": k,
                "document": hashlib.blake2b(a.clean_L.tobytes(), digest_size=16).digest(),
                "clean_pages": placement.clean_pages,
            },
        )
        prompt_P = placement.prompt(a.token_L, a.clean_L)
        self._engine.add_request(name, tokens_input(prompt_P.tolist()), params)
        return len(prompt_P)

    def _step(self, longest: int) -> list[Any]:
        """One step of the engine; `longest`: tokens of the longest prompt, which every budget must hold."""
        try:
            return list(self._engine.step())
        except Exception as error:  # that of this process, or a worker's as text
            if not ran_out_of_memory(error):
                raise
            self.close()  # what it had queued and allocated goes with it
            smaller = longest <= self.batch_tokens // 2
            kind = OutOfDeviceMemoryError if smaller else TidecacheError
            raise kind(
                f"the teacher {self.name} ran out of device memory with batches of {self.batch_tokens} tokens"
                + ("" if smaller else f", and half of it does not hold a prompt of {longest}")
                + ": start again with a smaller --batch-tokens, shorter sequences with --length, --dtype bfloat16, or more "
                "devices (--tensor-parallel)"
            ) from error

    def close(self) -> None:
        """Stop the engine and its workers, and free their memory; the next `score` starts another."""
        if self._engine is not None:
            self._engine.engine_core.shutdown()
            self._engine = None


def _class_name(config: Any) -> str:
    """The class that the transformers backend would run, so that both backends name a teacher alike."""
    from transformers import AutoModelForCausalLM

    found: Any = AutoModelForCausalLM._model_mapping[type(config)]
    return str(found.__name__)


def _longest(traits: ScorerTraits, config: Any, batch_tokens: int) -> int:
    """The longest text that a prompt within the budget can hold and that the teacher has positions for."""
    sizes_L = prompt_sizes(traits.layout, batch_tokens, traits.block_size, traits.page)
    fitting = int(np.searchsorted(sizes_L, batch_tokens, side="right"))
    return min(fitting, getattr(config, "max_position_embeddings", None) or fitting)


def load_vllm_teacher(
    preset: Preset, temperatures: tuple[float, ...], dtype: str, batch_tokens: int, tensor_parallel: int = 1
) -> VllmTeacher:
    """Start an engine with the checkpoint and compare it with the transformers backend. See `backends.load`.

    Raises:
        TidecacheError: no usable vLLM, a layout or an architecture that this backend does not have, a checkpoint that is
            absent or incomplete, an engine that does not start, or one that disagrees with the transformers backend.
    """
    _check_arguments(preset, temperatures, dtype, batch_tokens, tensor_parallel)
    platform = require_vllm(tensor_parallel)
    from stage1_teacher.architectures.families import read_family
    from stage1_teacher.architectures.loading import check_tensors
    from stage1_teacher.architectures.memory import read_shapes
    from stage1_teacher.architectures.tokenizers import has_tokenizer, teacher_tokenizer

    folder = local_folder(preset.checkpoint)
    family, config = read_family(folder)
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise TidecacheError(
            f"teacher {folder}: its attention slides over a window of {config.sliding_window} tokens, which has no meaning in "
            f"the layouts of a diffusion model; set sliding_window to null in config.json if it was trained without"
        )
    layout = preset.layout or "full"
    name = architecture(config.model_type, layout)
    if name is None:
        raise TidecacheError(
            f"teacher {folder}: the backend vllm runs Qwen3, Qwen2, Llama and LLaDA2-MoE and the models that are these under "
            f"another name; this is {config.model_type!r}: use --backend transformers"
        )
    shapes = read_shapes(weight_files(folder))
    if family is not None:
        check_tensors(folder, family, config, shapes)
    tokenizer = teacher_tokenizer(folder, preset.name, preset.template) if has_tokenizer(folder) else None
    tokens = tokenizer.vocabulary if tokenizer is not None else None
    if tokens is not None and tokens > config.vocab_size:
        raise TidecacheError(
            f"teacher {folder}: the tokenizer knows {tokens} tokens, and the head has {config.vocab_size} rows: they do not belong together"
        )
    mask_id = preset.mask_id
    if mask_id is None and tokenizer is not None:
        mask_id = tokenizer.mask_id
    if mask_id is None:
        mask_id = getattr(config, "mask_token_id", None)
    if mask_id is not None and not 0 <= mask_id < config.vocab_size:
        raise TidecacheError(
            f"teacher {folder}: the mask id {mask_id} is not among its {config.vocab_size} embeddings; give another with --mask-id"
        )
    traits = ScorerTraits(
        family=family.model_type if family is not None else config.model_type,
        layout=layout,
        block_size=preset.block_size or 32,
        page=PAGE.get(platform, PAGE["cuda"]),
        vocabulary=tokens if tokens is not None else config.vocab_size,
        temperatures=temperatures,
    )
    longest = _longest(traits, config, batch_tokens)
    if longest < 1:
        raise TidecacheError(
            f"batch_tokens: {batch_tokens} tokens hold no text in the layout {layout}; expected at least {3 * traits.page}"
        )
    requests = crosscheck.sequences(longest, traits.vocabulary, traits.block_size, mask_id, layout == "bd3lm")
    expected = None
    if crosscheck.fits(folder, traits.vocabulary, config.hidden_size, dtype):
        expected = crosscheck.reference(preset, temperatures, dtype, batch_tokens, requests)
    else:
        log.warning(
            "%s: too large for the transformers backend on this device: its scores are not cross-checked", folder
        )
    start = partial(start_engine, folder, config, traits, name, dtype, tensor_parallel)
    teacher = VllmTeacher(preset, folder, config, start, traits, mask_id, dtype, batch_tokens)
    if expected is not None:
        try:
            crosscheck.compare(teacher, requests, expected)
        except TidecacheError:
            teacher.close()
            raise
        teacher.prompt_tokens = teacher.reused_tokens = 0
    return teacher


def _check_arguments(
    preset: Preset, temperatures: tuple[float, ...], dtype: str, batch_tokens: int, tensor_parallel: int
) -> None:
    if preset.layout is not None and preset.layout not in LAYOUTS:
        raise TidecacheError(
            f"layout: the backend vllm has {', '.join(LAYOUTS)}, found {preset.layout!r}; use --backend transformers for it"
        )
    if dtype not in crosscheck.TOLERANCES:
        raise TidecacheError(f"dtype: expected one of {', '.join(crosscheck.TOLERANCES)}, found {dtype!r}")
    if not temperatures or any(t <= 0 for t in temperatures):
        raise TidecacheError(f"temperatures: expected positive numbers, found {temperatures}")
    for field, value in (
        ("batch_tokens", batch_tokens),
        ("block_size", preset.block_size or 32),
        ("tensor_parallel", tensor_parallel),
    ):
        if value < 1:
            raise TidecacheError(f"{field}: expected at least 1, found {value}")
