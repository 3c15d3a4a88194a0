"""The vLLM engine under a teacher: whether this vLLM can be used, and how it is started (DESIGN §7).

What memory an engine takes follows from the batch budget alone: the key/value cache holds a few batches of it. The
checkpoint's config.json is translated into one that names our architecture and its traits; nothing of the repository's
own code runs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from shared.errors import TidecacheError
from stage1_teacher.backends.vllm.plugin import register
from stage1_teacher.backends.vllm.traits import FIELD, ScorerTraits

VERSION = "0.32"  # of vLLM, whose inner interfaces the plug-in uses
PAGE = {"cpu": 32, "cuda": 16}  # the smallest page that the attention kernels take, in tokens
CACHED_BATCHES = 4  # the key/value cache holds so many batches: one in work, the others to be reused


def require_vllm(tensor_parallel: int) -> str:
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


def start_engine(
    folder: Path, config: Any, traits: ScorerTraits, name: str, dtype: str, tensor_parallel: int, batch_tokens: int,
    load_format: str = "safetensors",
) -> Any:  # fmt: skip
    """A vLLM engine with the checkpoint; `load_format` "dummy": with random weights of its shapes, for benchmarks."""
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
            load_format=load_format,
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
