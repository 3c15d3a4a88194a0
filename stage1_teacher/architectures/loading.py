"""Load a checkpoint as a plain transformers model, or refuse it for one clear reason (DESIGN §7).

The order matters: configuration, files, tensor names and shapes, memory, and only then the weights. For the known
families the official names and shapes that the configuration implies are computed first (an empty model on the meta
device, with the library's own weight conversion run backwards) and compared with the headers of the files, so that a
missing, additional or wrongly shaped tensor is reported under its official name, before gigabytes are read. No teacher
ever runs with randomly initialised weights.
"""

# mypy: disable-error-code="no-untyped-call"
# transformers is not annotated throughout.

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from shared.errors import TidecacheError
from stage1_teacher.architectures.families import Family, read_family
from stage1_teacher.architectures.hub import absent, repository_of
from stage1_teacher.architectures.memory import check_memory, read_shapes
from stage1_teacher.weights import weight_files

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Shapes = dict[str, tuple[int, ...]]


def load_model(folder: Path, dtype: str, device: torch.device) -> Any:
    """The model of a checkpoint's folder, on the device, in evaluation mode and without gradients.

    Raises:
        TidecacheError: an unknown architecture, weights that are absent, incomplete or of another architecture, not
            enough memory, or a checkpoint that transformers cannot read.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    family, config = read_family(folder)
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise TidecacheError(
            f"teacher {folder}: its attention slides over a window of {config.sliding_window} tokens, which has no "
            f"meaning in the layouts of a diffusion model; set sliding_window to null in config.json if it was trained "
            f"without"
        )
    shapes = read_shapes(_files(folder))
    if family is not None:
        check_tensors(folder, family, config, shapes)
    head = config.vocab_size * config.hidden_size
    check_memory(str(folder), shapes, head, dtype, device)
    shown, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # what transformers would print about missing tensors is our error, in one line
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=DTYPES[dtype],
            attn_implementation="sdpa",
            key_mapping=family.key_mapping() if family is not None else None,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        model, info = loaded
        model = model.to(device)
    except TidecacheError:
        raise
    except torch.OutOfMemoryError as error:
        raise TidecacheError(
            f"teacher {folder}: the device ran out of memory while its weights were loaded in {dtype}; free memory, or "
            f"try --dtype bfloat16"
        ) from error
    except Exception as error:  # every failure of a loader is about the checkpoint
        text = " ".join(str(error).split())
        raise TidecacheError(
            f"teacher {folder}: it could not be loaded: {text[:400] or type(error).__name__}"
        ) from error
    finally:
        logging.set_verbosity(shown)
        if bar:
            logging.enable_progress_bar()
    for field, verb in (
        ("missing_keys", "lacks"),
        ("mismatched_keys", "has with another shape"),
        ("unexpected_keys", "has besides"),
    ):
        if names := sorted(str(name) for name in info.get(field, ())):
            raise _wrong_tensors(folder, type(model).__name__, verb, names)
    return model.eval().requires_grad_(False)


def _files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files; if it is a snapshot of the hub, their absence says what to run."""
    try:
        return weight_files(folder)
    except TidecacheError as error:
        repository = repository_of(folder)
        if repository is None:
            raise
        raise absent(repository, f"its weights are not on this machine ({error})") from error


def expected_shapes(config: Any) -> tuple[Shapes, frozenset[str]]:
    """Names and shapes that a configuration implies for a saved checkpoint, and which of them may be absent."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    with init_empty_weights(include_buffers=True):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    tensors = revert_weight_conversion(model, model.state_dict())
    tied = frozenset(model._tied_weights_keys or ()) if config.tie_word_embeddings else frozenset()
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}, tied


def check_tensors(folder: Path, family: Family, config: Any, shapes: Shapes) -> None:
    """Compare a family's checkpoint with its configuration.

    Raises:
        TidecacheError: tensors are missing, additional, or of another shape; the first is named.
    """
    expected, optional = expected_shapes(config)
    found = {family.plain_name(name): name for name in shapes}
    missing = [family.official_name(name) for name in expected if name not in found and name not in optional]
    extra = [official for plain, official in found.items() if plain not in expected]
    wrong = [
        f"{official} {list(shapes[official])}, expected {list(expected[plain])}"
        for plain, official in found.items()
        if plain in expected and shapes[official] != expected[plain]
    ]
    for verb, names in (("lacks", missing), ("has besides", extra), ("has with another shape", wrong)):
        if names:
            raise _wrong_tensors(folder, family.model_type, verb, names)


def _wrong_tensors(folder: Path, kind: str, verb: str, names: list[str]) -> TidecacheError:
    count = f"{len(names)} tensor{'s' if len(names) > 1 else ''}"
    return TidecacheError(
        f"teacher {folder}: the checkpoint {verb} {count} of {kind} (first: {names[0]}): it is incomplete or of "
        f"another architecture than its config.json says, and is not run with random weights"
    )
