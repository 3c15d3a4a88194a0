"""Will a teacher fit? Asked before its weights are read, and answered with what would; and did a batch not fit?

The parameters are counted from the headers of the safetensors files, so that the estimate costs nothing and is of this
checkpoint, not of its name. What else is needed is small beside the weights: a float32 copy of the head where the
weights are narrower (`stage1_teacher.head`), and a working set for one batch.

Sizes in bytes; shown in GB of 10^9 bytes.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import TidecacheError

if TYPE_CHECKING:
    import torch

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
WORKING_SET = 200_000_000  # activations of one batch and the tile of logits, for models of common width
_FACTORS = {"cpu": 1.02, "cuda": 1.05}  # allocators hold somewhat more than is asked of them
_SIGNS_OF_FULL_MEMORY = ("out of memory", "outofmemoryerror", "_status_alloc_failed", "can't allocate memory")


@dataclass(frozen=True)
class Need:
    """What a teacher needs in one dtype."""

    parameters: int
    head: int  # parameters of its language-model head
    dtype: str

    @property
    def bytes(self) -> int:
        """Weights, the head's float32 copy where the weights are narrower, and the working set."""
        copy = 0 if self.dtype == "float32" else 4 * self.head
        return self.parameters * DTYPE_BYTES[self.dtype] + copy + WORKING_SET


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether this says that a device's memory is full: torch's own exception, a library's status, a worker's text."""
    import torch

    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(sign in text for sign in _SIGNS_OF_FULL_MEMORY)


def read_shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors by name, from the headers alone.

    Raises:
        TidecacheError: a file is no safetensors file, or cut short.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        size = path.stat().st_size
        header: Any = None
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if 0 < length <= size - 8:
                try:
                    header = json.loads(file.read(length))
                except ValueError:
                    header = None
        if not isinstance(header, dict):
            raise TidecacheError(f"{path}: not a safetensors file, or cut short: download it again")
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end > size:
            raise TidecacheError(f"{path}: cut short: {size} bytes, expected {end}: download it again")
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items()}
    return shapes


def available_bytes(device: torch.device) -> int | None:
    """Free memory of the device, or None where that cannot be known."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    try:  # a container may have less than its machine
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        stat = Path("/sys/fs/cgroup/memory.stat").read_text(encoding="ascii").splitlines()
        cached = next(int(line.split()[1]) for line in stat if line.startswith("inactive_file "))
    except (OSError, StopIteration, ValueError):
        return free
    return min(free, limit - used + cached)


def check_memory(
    where: str, shapes: dict[str, tuple[int, ...]], head_parameters: int, dtype: str, device: torch.device
) -> None:
    """Refuse a teacher that would not fit on the device.

    Raises:
        TidecacheError: with the estimate, what is free, and what would fit.
    """
    free = available_bytes(device)
    if free is None:
        return
    parameters = sum(math.prod(shape) for shape in shapes.values())
    factor = _FACTORS.get(device.type, 1.05)
    need = Need(parameters, head_parameters, dtype)
    if need.bytes * factor <= free:
        return
    name = "this GPU" if device.type == "cuda" else "this machine"
    narrow = Need(parameters, head_parameters, "bfloat16")
    if dtype == "float32" and narrow.bytes * factor <= free:
        advice = f"--dtype bfloat16 needs {_gb(narrow.bytes * factor)} and would fit"
    else:
        smallest = min(need.bytes, narrow.bytes)
        devices = math.ceil(smallest * factor / free)
        fits = int(free / factor - WORKING_SET) // DTYPE_BYTES["bfloat16"]
        advice = (
            f"it needs {_gb(smallest * factor)} in bfloat16: take a device that has that, or split it over {devices} "
            f"such devices (backend vllm, tensor parallel); some {max(fits, 0) / 1e9:.1f} billion parameters fit here"
        )
    raise TidecacheError(
        f"teacher {where}: not enough memory: {parameters / 1e9:.2f} billion parameters in {dtype} need about "
        f"{_gb(need.bytes * factor)}, and {name} has {_gb(free)} free; {advice}"
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
