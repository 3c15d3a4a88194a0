"""LoRA through peft: small trainable matrices beside frozen weights, for students that do not fit otherwise.

The layers are changed in place, so that the student stays the class that everything else knows. A mask token that was
added is new to the base: what its embedding row lacks is learnt beside the adapters, as one vector that is added where
the token is read. (peft can train rows too, but wraps embedding and tied head for it; the head's row of the mask token
is no target of any loss.) A checkpoint folder holds the merged weights, plain as ever, for everything that reads
checkpoints, and in `adapter/` the adapter alone, as peft loads it, with that vector beside it; from these a run resumes.

peft comes with `pip install tidecache[lora]`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from shared.errors import TidecacheError
from stage2_student.config import TrainConfig

FOLDER = "adapter"
WEIGHTS = "adapter_model.safetensors"
ROW_FILE = "mask_row.safetensors"
ROW = "mask_row"  # the embedding's parameter: what is added to the mask token's row
PEFT_PREFIX = "base_model.model."  # what peft puts before names in an adapter's file


def add_adapters(model: PreTrainedModel, config: TrainConfig, new_row: int | None, base: str) -> None:
    """Freeze `model` and put adapters into it, as `lora_rank`, `lora_alpha` and `lora_targets` say.

    Args:
        model: the student; changed in place.
        config: with a rank above 0.
        new_row: id of a mask token that was added, whose embedding row is to be trained; None: none.
        base: the base's name, for the adapter's file.

    Raises:
        TidecacheError: peft is not installed, or no module has a name among the targets.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise TidecacheError("lora_rank: adapters need peft: pip install 'tidecache[lora]'") from error
    names = [name.strip() for name in config.lora_targets.split(",") if name.strip()]
    targets: str | list[str] = names[0] if names == ["all-linear"] else names
    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=_linear_layers(model) if targets == "all-linear" else targets,
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)  # the same start in every process and every run
            inject_adapter_in_model(settings, model)
    except ValueError as error:
        raise TidecacheError(
            f"lora_targets: {config.lora_targets} fits no module of {type(model).__name__}: take all-linear, or names "
            f"such as {', '.join(sorted({name.rpartition('.')[2] for name in _linear_layers(model)}))}"
        ) from error
    if new_row is not None:
        _train_row(model.get_input_embeddings(), new_row)


def _train_row(embedding: torch.nn.Module, row: int) -> None:
    """Add a trainable vector, 0 at first, wherever token `row` is read."""
    weight_VD: Any = embedding.weight
    embedding.register_parameter(ROW, torch.nn.Parameter(torch.zeros_like(weight_VD[0])))

    def add(module: Any, arguments: tuple[Tensor, ...], hidden_BLD: Tensor) -> Tensor:
        added_D = getattr(module, ROW) * getattr(module, "embed_scale", 1.0)  # Gemma scales what it reads
        return torch.where((arguments[0] == row)[..., None], hidden_BLD + added_D, hidden_BLD)

    embedding.register_forward_hook(add)
    cast(Any, embedding).new_row = row


def _linear_layers(model: PreTrainedModel) -> list[str]:
    """Names of all linear layers but the head. (peft's own `all-linear` needs its wrapper.)"""
    head = model.get_output_embeddings()
    return [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head
    ]


def has_adapters(model: PreTrainedModel) -> bool:
    """Whether `add_adapters` was here."""
    return bool(getattr(model, "peft_config", None))


def merged_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The plain model's weights with the adapters added in, under the plain names; the model stays as it is."""
    from peft.tuners.lora import LoraLayer

    state: dict[str, Tensor] = {}
    inside: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            layer: Any = module  # the linear one of its kinds, which alone was asked for
            base = layer.get_base_layer()
            with torch.no_grad():
                state[f"{name}.weight"] = base.weight + layer.get_delta_weight("default").to(base.weight.dtype)
            if base.bias is not None:
                state[f"{name}.bias"] = base.bias
            inside.append(name)
    for name, tensor in model.state_dict().items():
        if not any(name.startswith(f"{part}.") for part in inside) and not name.endswith(f".{ROW}"):
            state[name] = tensor
    embedding: Any = model.get_input_embeddings()
    if hasattr(embedding, ROW):
        for name, tensor in list(state.items()):
            if tensor.data_ptr() == embedding.weight.data_ptr():  # a tied head goes with it
                state[name] = tensor.detach().clone()
                state[name][embedding.new_row] += getattr(embedding, ROW).detach()
    return state


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Write the adapter alone, as peft does; raises OSError where the disk refuses."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    plain = {f"{PEFT_PREFIX}{name}": tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(plain, folder / WEIGHTS, metadata={"format": "pt"})
    embedding: Any = model.get_input_embeddings()
    if hasattr(embedding, ROW):
        save_file({ROW: getattr(embedding, ROW).detach().cpu()}, folder / ROW_FILE)
    settings: Any = model.peft_config
    settings["default"].save_pretrained(folder)


def load_adapter(model: PreTrainedModel, checkpoint: Path) -> None:
    """Put the adapter of a checkpoint folder into a model that has adapters of the same shape.

    Raises:
        TidecacheError: the folder holds no adapter, or one of another shape.
    """
    from peft import set_peft_model_state_dict

    path = checkpoint / FOLDER / WEIGHTS
    try:
        state = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in load_file(path).items()}
        set_peft_model_state_dict(model, state)
        embedding: Any = model.get_input_embeddings()
        if hasattr(embedding, ROW):
            with torch.no_grad():
                getattr(embedding, ROW).copy_(load_file(path.with_name(ROW_FILE))[ROW])
    except (OSError, RuntimeError) as error:
        raise TidecacheError(
            f"{path}: expected the adapter of this run, found: {str(error).splitlines()[0]}: start without --resume"
        ) from error
