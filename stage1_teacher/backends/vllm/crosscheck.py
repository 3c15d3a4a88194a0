"""Before a vLLM teacher scores anything, a few sequences are scored by the transformers backend too (DESIGN §7).

vLLM's networks read some fields of a configuration with silent defaults, and its kernels differ from machine to machine.
What they do to likelihoods is seen at once when both backends score the same sequences, and a capture that would store
wrong numbers for days is refused in its first minute.

Shapes: N scored positions, L tokens of a sequence.
"""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import torch

from shared.errors import TidecacheError
from stage1_teacher.architectures.memory import Need, available_bytes, read_shapes
from stage1_teacher.backends import ScoreRequest, Scores, Teacher
from stage1_teacher.presets import Preset
from stage1_teacher.weights import weight_files

K = 8
# Largest difference (nats, for log-probabilities of size up to 1, in proportion beyond) and its mean. Narrow types round
# differently in every kernel, and a router's near tie may send a token to another expert: there only the mean is bounded.
TOLERANCES = {"float32": (2e-5, 2e-5), "float16": (float("inf"), 1e-2), "bfloat16": (float("inf"), 6e-2)}


def sequences(
    length_limit: int, vocabulary: int, block_size: int, mask_id: int | None, with_clean: bool
) -> list[ScoreRequest]:
    """Five noised sequences of three texts: one token short of nothing, within a block, and over several blocks."""
    rng = np.random.default_rng(20260424)
    requests = []
    for length, draws in ((2, 1), (block_size + 3, 2), (2 * block_size + 9, 2)):
        clean_L = rng.integers(0, vocabulary, min(length, length_limit))
        for _ in range(draws):
            masked_L = rng.random(len(clean_L)) < 0.5
            masked_L[-1] = True
            masked_L[0] = False
            noise = rng.integers(0, vocabulary) if mask_id is None else mask_id
            (position_N,) = np.nonzero(masked_L)
            requests.append(
                ScoreRequest(
                    token_ids=np.where(masked_L, noise, clean_L),
                    positions=position_N,
                    gold_ids=clean_L[position_N],
                    clean_ids=clean_L if with_clean else None,
                )
            )
    return [request for request in requests if len(request.positions) and request.positions[0] > 0]


def fits(folder: Path, vocabulary: int, hidden: int, dtype: str) -> bool:
    """Whether the device has room for the transformers backend (alone: it is gone before vLLM starts)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    free = available_bytes(device)
    parameters = sum(int(np.prod(shape)) for shape in read_shapes(weight_files(folder)).values())
    return free is None or 1.1 * Need(parameters, vocabulary * hidden, dtype).bytes <= free


def reference(
    preset: Preset, temperatures: tuple[float, ...], dtype: str, batch_tokens: int, requests: list[ScoreRequest]
) -> Scores:
    """The transformers backend's scores; its memory is free again afterwards."""
    from stage1_teacher.backends.transformers import load_transformers_teacher

    teacher = load_transformers_teacher(preset, temperatures, dtype, batch_tokens)
    scores = teacher.score(requests, min(K, teacher.vocabulary))
    del teacher
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return scores


def compare(teacher: Teacher, requests: list[ScoreRequest], expected: Scores) -> float:
    """The largest difference in nats, in proportion for log-probabilities beyond 1.

    Raises:
        TidecacheError: the backends disagree by more than the type allows.
    """
    found = teacher.score(requests, expected.topk_logp_NK.shape[1])
    differences = torch.cat(
        [
            ((ours - theirs).abs() / theirs.abs().clamp(min=1.0)).flatten()
            for ours, theirs in (
                (found.gold_logp_N, expected.gold_logp_N),
                (found.topk_logp_NK, expected.topk_logp_NK),
                (found.log_z_NT, expected.log_z_NT),
            )
        ]
    )
    largest, mean = float(differences.max()), float(differences.mean())
    most, most_mean = TOLERANCES[teacher.dtype]
    if not (largest <= most and mean <= most_mean):
        raise TidecacheError(
            f"the backend vllm does not agree with the backend transformers on the teacher {teacher.name} (layout "
            f"{teacher.layout}, {teacher.dtype}): log-probabilities differ by up to {largest:.1e}, {mean:.1e} on average, "
            f"allowed are {most:.0e} and {most_mean:.0e}: this vLLM does not compute the same network; use --backend transformers"
        )
    return largest
