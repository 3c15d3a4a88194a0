"""A teacher inside vLLM, with the interface of every backend (DESIGN §7, §11).

The engine runs in the capture's own process (tensor parallelism adds workers), and all requests of a call are queued
before its first step: so which requests share a batch depends on the call and the budget alone, and a shard that is
scored again gives the same bits. For the same reason the size of the key/value cache follows from the budget, not from
what memory happens to be free, and pages are reused within a call, not across calls.

A prompt is computed in one step, so it must fit the budget `batch_tokens`: in `bd3lm` a text of L tokens needs 2 L, and
more where blocks are no multiple of a page (`pages`).

Shapes: L tokens of one request, N scored positions, K candidates, T temperatures, P tokens of a prompt.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.errors import TidecacheError
from stage1_teacher.backends import ScoreRequest, Scores
from stage1_teacher.backends.requests import Arrays, checked
from stage1_teacher.backends.vllm import crosscheck
from stage1_teacher.backends.vllm.pages import place, prompt_sizes
from stage1_teacher.backends.vllm.plugin import architecture, register
from stage1_teacher.backends.vllm.traits import FIELD, LAYOUTS, ScorerTraits
from stage1_teacher.presets import Preset, local_folder
from stage1_teacher.weights import configuration_digest, weight_files, weights_digest

VERSION = "0.32"  # of vLLM, whose inner interfaces the plug-in uses
PAGE = {"cpu": 32, "cuda": 16}  # the smallest page that the attention kernels take, in tokens
CACHED_BATCHES = 4  # the key/value cache holds so many batches: one in work, the others to be reused
log = logging.getLogger(__name__)


class VllmTeacher:
    """See `stage1_teacher.backends.Teacher`; made by `load_vllm_teacher`."""

    def __init__(
        self, preset: Preset, folder: Path, config: Any, engine: Any, traits: ScorerTraits, mask_id: int | None, dtype: str,
        batch_tokens: int,
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
        self.length_limit: int | None = _longest(traits, config, batch_tokens)
        self.prompt_tokens = 0  # of all calls so far, and those of them that vLLM found in reused pages
        self.reused_tokens = 0
        self._rows = config.vocab_size
        self._traits = traits
        self._engine = engine

    @cached_property
    def weights(self) -> str:
        """Digest of the weights, by content (`stage1_teacher.weights`)."""
        return weights_digest(self.folder)

    def score(self, requests: Sequence[ScoreRequest], k: int, on_batch: Callable[[int], None] | None = None) -> Scores:
        """See `stage1_teacher.backends.Teacher.score`."""
        if not 1 <= k <= self.vocabulary:
            raise TidecacheError(f"k: expected between 1 and the teacher's {self.vocabulary} tokens, found {k}")
        needs_clean = self.layout == "bd3lm"
        arrays = [checked(n, request, self, self._rows, needs_clean) for n, request in enumerate(requests)]
        first_R = np.concatenate([[0], np.cumsum([len(a.position_N) for a in arrays])]).astype(np.int64)
        temperatures = len(self.temperatures)
        numbers_NX = torch.empty(int(first_R[-1]), 1 + temperatures + 2 * k)
        if needs_clean:
            self._engine.reset_prefix_cache()
        for number, a in enumerate(arrays):
            if len(a.position_N):
                self._queue(str(number), a, k)
        while self._engine.has_unfinished_requests():
            done = 0
            for output in self._step():
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

    def _queue(self, name: str, a: Arrays, k: int) -> None:
        """Lay a request out in pages and hand it to the engine."""
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
        self._engine.add_request(name, tokens_input(placement.prompt(a.token_L, a.clean_L).tolist()), params)

    def _step(self) -> list[Any]:
        try:
            return list(self._engine.step())
        except torch.OutOfMemoryError as error:  # the budget is built into the engine: only another start can lower it
            raise TidecacheError(
                f"the teacher {self.name} ran out of device memory with batches of {self.batch_tokens} tokens: start again with "
                f"a smaller --batch-tokens, --dtype bfloat16, or more devices (--tensor-parallel)"
            ) from error

    def close(self) -> None:
        """Stop the engine and its workers, and free their memory."""
        self._engine.engine_core.shutdown()


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
    platform = _require_vllm(tensor_parallel)
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
    engine = _start(folder, config, traits, name, dtype, batch_tokens, tensor_parallel)
    teacher = VllmTeacher(preset, folder, config, engine, traits, mask_id, dtype, batch_tokens)
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


def _require_vllm(tensor_parallel: int) -> str:
    """Import vLLM and make our architectures known to it; "cpu" or "cuda", where it will run."""
    if importlib.util.find_spec("vllm") is None:
        raise TidecacheError(
            "the backend vllm needs vLLM, which is not installed: with CUDA, pip install 'tidecache[vllm]'; on a CPU, `make vllm-env` "
            "makes an environment for it (.venv-vllm)"
        )
    # vLLM has no other form for these: an engine in this process (composition of batches), no report to its makers, and
    # workers on CPUs that share one memory node.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if tensor_parallel > 1:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    try:
        import vllm
        from vllm.platforms import current_platform

        register()
    except Exception as error:  # a broken installation fails in many ways
        text = " ".join(str(error).split())[:300]
        raise TidecacheError(
            f"vLLM is installed but cannot be imported ({type(error).__name__}: {text}): on a CPU torchvision, torchaudio and "
            f"torchcodec break it beside torch 2.13; `make vllm-env` makes an environment that works"
        ) from error
    if not vllm.__version__.startswith(VERSION):
        raise TidecacheError(
            f"tidecache's plug-in is written for vLLM {VERSION}, found {vllm.__version__}: install vllm=={VERSION}.*"
        )
    if tensor_parallel > 1 and "tidecache" not in {e.name for e in entry_points(group="vllm.general_plugins")}:
        raise TidecacheError(
            "vLLM's workers do not find tidecache's plug-in (entry point vllm.general_plugins): install tidecache again in this "
            "environment, for example pip install --no-deps -e ."
        )
    return "cpu" if current_platform.is_cpu() else "cuda"


def _start(
    folder: Path, config: Any, traits: ScorerTraits, name: str, dtype: str, batch_tokens: int, tensor_parallel: int
) -> Any:
    """A vLLM engine with the checkpoint."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for field, value in (("attention heads", config.num_attention_heads), ("key/value heads", kv_heads)):
        if value % tensor_parallel and not (field == "key/value heads" and tensor_parallel % value == 0):
            raise TidecacheError(
                f"tensor_parallel: {tensor_parallel} workers cannot share the {value} {field} of {folder} evenly"
            )
    if traits.page == PAGE["cpu"]:
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        sizes = CPUAttentionBackend.get_supported_head_sizes()
        if head_dim not in sizes:
            raise TidecacheError(
                f"teacher {folder}: its attention heads have {head_dim} dimensions, and vLLM's kernels for CPUs take only "
                f"{', '.join(map(str, sizes))}: use --backend transformers"
            )
    sequences = max(1, min(1024, batch_tokens // 8))
    pages = CACHED_BATCHES * -(-batch_tokens // traits.page) + sequences + 8
    width = 4 if dtype == "float32" else 2
    page_bytes = 2 * config.num_hidden_layers * max(1, kv_heads // tensor_parallel) * head_dim * width * traits.page
    fields = config.to_dict() | {
        "architectures": [name],
        "model_type": config.model_type,
        "max_position_embeddings": max(config.max_position_embeddings, batch_tokens),  # of the table of rotations only
        "dtype": dtype,
        FIELD: traits.to_json(),
    }
    with tempfile.TemporaryDirectory(prefix="tidecache-vllm-") as translated:
        (Path(translated) / "config.json").write_text(json.dumps(fields, default=str), encoding="utf-8")
        arguments = EngineArgs(
            model=str(folder),
            hf_config_path=translated,
            skip_tokenizer_init=True,
            load_format="safetensors",
            use_tqdm_on_load=False,
            runner="pooling",
            dtype=dtype,
            enforce_eager=True,
            max_model_len=batch_tokens,
            max_num_batched_tokens=batch_tokens,
            max_num_seqs=sequences,
            block_size=traits.page,
            kv_cache_memory_bytes=pages * page_bytes,
            enable_chunked_prefill=False,
            enable_prefix_caching=traits.layout == "bd3lm",
            scheduler_cls="stage1_teacher.backends.vllm.scheduler.DocumentScheduler",
            async_scheduling=False,
            tensor_parallel_size=tensor_parallel,
            distributed_executor_backend="mp" if tensor_parallel > 1 else "uni",
            disable_log_stats=False,
            seed=0,
        )
        try:
            return LLMEngine.from_engine_args(arguments)
        except TidecacheError:
            raise
        except Exception as error:  # vLLM's start fails in many ways: memory, kernels, weights
            text = " ".join(str(error).split())[:400]
            raise TidecacheError(
                f"teacher {folder}: vLLM could not be started with it ({type(error).__name__}: {text}); "
                f"--backend transformers does without vLLM"
            ) from error
