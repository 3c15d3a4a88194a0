"""How a teacher is asked: `load` gives an object whose `score` turns requests into likelihoods (DESIGN §7, §11).

A request is one noised sequence and the positions whose tokens it should predict; the answer holds, per position and
at temperature 1 over the rows of the head that the tokenizer knows, the log-probability of the gold token and the
k most likely tokens, and what is needed to change the temperature later. Everything above this interface (draws,
CompDemo, chunks, shards) is the same for every backend.

Shapes: L tokens of one request, N scored positions of all requests in their order, K candidates, T temperatures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from shared.errors import TidecacheError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    Ids = Sequence[int] | npt.NDArray[np.integer] | torch.Tensor

BACKENDS = ("transformers", "vllm")
BATCH_TOKENS = 4096  # the default budget of one batch, in padded tokens


class OutOfDeviceMemoryError(TidecacheError):
    """A batch did not fit on the device; with half the `batch_tokens` it may, and the teacher can be asked again."""


@dataclass(frozen=True)
class ScoreRequest:
    """One noised sequence and what to predict in it; fields are sequences, arrays or tensors of integers.

    Attributes:
        token_ids: x_t, L ids, mask ids in place.
        positions: where the tokens to predict stand in x_t, before any logit shift.
        gold_ids: the true token at each of these positions.
        clean_ids: x_0, L ids; required by the layout `bd3lm`, unused by the others.
        tail_chances: for each position a number in [0, 1) that decides its tail samples; None: none are wanted.
        tail_samples: how many, per position.
    """

    token_ids: Ids
    positions: Ids
    gold_ids: Ids
    clean_ids: Ids | None = None
    tail_chances: npt.NDArray[np.float64] | None = None
    tail_samples: int = 0


@dataclass(frozen=True)
class Scores:
    """One row per scored position, in the order of the requests; on the CPU, log-probabilities in nats (float32).

    Attributes:
        gold_logp_N: log p of the gold token.
        topk_ids_NK: int64; the k most likely tokens, most likely first, the smaller id first where equal.
        topk_logp_NK: their log-probabilities.
        log_z_NT: log Σ_v exp(logp_v / T) for each temperature of the teacher; 0 at T = 1.
    """

    gold_logp_N: torch.Tensor
    topk_ids_NK: torch.Tensor
    topk_logp_NK: torch.Tensor
    log_z_NT: torch.Tensor


@dataclass(frozen=True)
class ScoresWithTail(Scores):
    """The same with tail samples, where the requests want some (S per position).

    Attributes:
        tail_ids_NS: tokens from beyond the k most likely, each with a chance in proportion to p_T at
            `shared.spec.TAIL_TEMPERATURE`, S per position (systematic sampling: the S points chance, chance + 1, … of the tail's
            cumulative distribution in the order of ids, divided by S).
        tail_logp_NS: their log-probabilities at temperature 1.
    """

    tail_ids_NS: torch.Tensor
    tail_logp_NS: torch.Tensor


class Teacher(Protocol):
    """A loaded teacher. `weights` and `architecture` identify it by content, for the spec."""

    name: str
    folder: Path
    architecture: str
    layout: str
    block_size: int
    mask_id: int | None
    logit_shift: bool
    dtype: str
    vocabulary: int
    temperatures: tuple[float, ...]
    batch_tokens: int  # may be changed between two calls

    @property
    def length_limit(self) -> int | None:
        """The longest sequence that it has positions for, in tokens; None: no limit."""

    @property
    def weights(self) -> str:
        """Digest of the weights, by content."""

    def score(self, requests: Sequence[ScoreRequest], k: int, on_batch: Callable[[int], None] | None = None) -> Scores:
        """Score all requests; `on_batch` hears the number of positions done after each batch.

        Raises:
            TidecacheError: a request that cannot be scored (named by its number), or NaN from the teacher.
        """


def load(
    path_or_preset: str | Path,
    backend: str = "transformers",
    layout: str | None = None,
    block_size: int | None = None,
    mask_id: int | None = None,
    logit_shift: bool | None = None,
    temperatures: Sequence[float] = (1.0, 2.0),
    dtype: str = "float32",
    batch_tokens: int = BATCH_TOKENS,
    tensor_parallel: int = 1,
) -> Teacher:
    """Load a teacher by preset, TOML file, folder or hub id.

    What is None comes from the preset, else from the checkpoint; else the layout is `full`, the block size 32, and
    there is no logit shift. `batch_tokens` bounds the padded tokens of one batch; batches are a pure function of it and
    of the requests' lengths. `tensor_parallel` devices share one teacher (vllm only).

    Raises:
        TidecacheError: unknown preset, backend, layout or dtype; a checkpoint that is absent, incomplete, of an unknown
            architecture, or whose attention does not follow an explicit mask.
    """
    from stage1_teacher.presets import find_preset

    if backend not in BACKENDS:
        raise TidecacheError(f"backend: expected {' or '.join(BACKENDS)}, found {backend!r}")
    preset = find_preset(path_or_preset).with_flags(layout, block_size, mask_id, logit_shift)
    numbers = tuple(float(t) for t in temperatures)
    if backend == "vllm":
        from stage1_teacher.backends.vllm.client import load_vllm_teacher

        return load_vllm_teacher(preset, numbers, dtype, batch_tokens, tensor_parallel)
    if tensor_parallel != 1:
        raise TidecacheError(f"tensor_parallel: {tensor_parallel} devices for one teacher need the backend vllm")

    from stage1_teacher.backends.transformers import load_transformers_teacher

    return load_transformers_teacher(preset, numbers, dtype, batch_tokens)


__all__ = [
    "BACKENDS",
    "BATCH_TOKENS",
    "OutOfDeviceMemoryError",
    "ScoreRequest",
    "Scores",
    "ScoresWithTail",
    "Teacher",
    "load",
]
