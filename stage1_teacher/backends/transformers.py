"""The reference backend: any causal language model of `transformers`, run with an explicit attention mask (DESIGN §7).

No model code is forked and none is downloaded: the decoder of a plain `Qwen3ForCausalLM` (or Llama, …) runs with the
layout's 4D mask, and its last hidden states go to our own head (`stage1_teacher.head`) at the scored positions only.
Both steps rest on assumptions about the architecture, so both are measured when a teacher is loaded: the probe checks
that attention follows the mask exactly, and that our head gives the model's own logits; a model that fails is refused.

Batches: see `stage1_teacher.packing`; their composition depends on the requests alone.

Shapes: B rows of a batch, S tokens of a padded row, L tokens of one request, N scored positions, K candidates,
T temperatures, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.errors import TidecacheError
from stage1_teacher.architectures.loading import DTYPES, load_model
from stage1_teacher.architectures.memory import ran_out_of_memory
from stage1_teacher.architectures.tokenizers import has_tokenizer, teacher_tokenizer
from stage1_teacher.backends import OutOfDeviceMemoryError, ScoreRequest, Scores, ScoresWithTail
from stage1_teacher.backends.requests import Arrays, checked, tail_samples
from stage1_teacher.head import Head
from stage1_teacher.layouts import Layout, find_layout
from stage1_teacher.packing import Row, attend, plan_batches, prefix_agrees, reduce_row, run_rows
from stage1_teacher.presets import Preset, local_folder
from stage1_teacher.weights import configuration_digest, weights_digest


class TransformersTeacher:
    """See `stage1_teacher.backends.Teacher`; made by `load_transformers_teacher`."""

    def __init__(
        self,
        preset: Preset,
        folder: Path,
        model: Any,
        head: Head,
        mask_id: int | None,
        dtype: str,
        temperatures: tuple[float, ...],
        batch_tokens: int,
    ) -> None:
        self.name = preset.name
        self.folder = folder
        self.architecture = f"{type(model).__name__}:{configuration_digest(folder)}"
        self.layout = preset.layout or "full"
        self.block_size = preset.block_size or 32
        self.mask_id = mask_id
        self.logit_shift = bool(preset.logit_shift)
        self.dtype = dtype
        self.vocabulary = head.vocabulary
        self.length_limit: int | None = getattr(model.config, "max_position_embeddings", None)
        self.temperatures = temperatures
        self.batch_tokens = batch_tokens
        self._layout = find_layout(self.layout)
        self._shift = int(self.logit_shift)
        self._decoder = getattr(model, model.base_model_prefix)
        self._rows = model.get_input_embeddings().weight.shape[0]
        self._head = head
        self._model = model
        self._device = model.device

    def varied(self, layout: str, shift: int, mask_id: int | None) -> TransformersTeacher:
        """The same weights with other traits, for measuring which are right (`stage1_teacher.check`).

        `shift`: logits for position i come from row i − shift; −1 is a trait that no capture can have.
        """
        other = copy.copy(self)
        other.layout, other._layout, other.mask_id = layout, find_layout(layout), mask_id
        other.logit_shift, other._shift = shift > 0, shift
        return other

    @torch.inference_mode()
    def unknown_mass(self, requests: Sequence[ScoreRequest]) -> float:
        """Mean probability that the whole head gives to rows beyond the tokenizer's tokens, at the scored positions."""
        if self._model.get_output_embeddings().weight.shape[0] == self.vocabulary:
            return 0.0
        arrays = [checked(n, request, self, self._rows, self._layout.reads_clean) for n, request in enumerate(requests)]
        whole = Head.of(self._model, None, str(self.folder))
        parts = []
        rows = [self._row(a) for a in arrays]
        for members in plan_batches(rows, self.batch_tokens):
            hidden_ND = run_rows(self._decoder, self._layout, self.block_size, [rows[m] for m in members], self._device)
            for hidden in hidden_ND.split(64):
                parts.append(whole.logits(hidden).softmax(-1)[:, self.vocabulary :].sum(-1))
        return float(torch.cat(parts).mean())

    @cached_property
    def weights(self) -> str:
        """Digest of the weights, by content (`stage1_teacher.weights`)."""
        return weights_digest(self.folder)

    @torch.inference_mode()
    def score(self, requests: Sequence[ScoreRequest], k: int, on_batch: Callable[[int], None] | None = None) -> Scores:
        """See `stage1_teacher.backends.Teacher.score`."""
        if not 1 <= k <= self.vocabulary:
            raise TidecacheError(f"k: expected between 1 and the teacher's {self.vocabulary} tokens, found {k}")
        samples = tail_samples(requests, self)
        if samples and k == self.vocabulary:
            raise TidecacheError(f"tail_samples: with k = {k}, all the teacher's tokens, there is no tail to sample")
        arrays = [
            checked(number, request, self, self._rows, self._layout.reads_clean)
            for number, request in enumerate(requests)
        ]
        count_R = np.array([len(a.position_N) for a in arrays], dtype=np.int64)
        first_R = np.concatenate([[0], np.cumsum(count_R)])
        total, temperatures = int(first_R[-1]), len(self.temperatures)
        scores = Scores(
            gold_logp_N=torch.empty(total),
            topk_ids_NK=torch.empty(total, k, dtype=torch.int64),
            topk_logp_NK=torch.empty(total, k),
            log_z_NT=torch.empty(total, temperatures),
        )
        if samples:
            scores = ScoresWithTail(
                **vars(scores),
                tail_ids_NS=torch.empty(total, samples, dtype=torch.int64),
                tail_logp_NS=torch.empty(total, samples),
            )
        asked = np.flatnonzero(count_R)
        rows = [self._row(arrays[r]) for r in asked]
        for members in plan_batches(rows, self.batch_tokens):
            chosen = asked[members]
            gold_N = torch.from_numpy(np.concatenate([arrays[r].gold_N for r in chosen])).to(self._device)
            tail = None
            if samples:
                chance_N = np.concatenate([np.asarray(requests[r].tail_chances, np.float64) for r in chosen])
                tail = (samples, torch.from_numpy(chance_N).to(self._device))
            try:
                part = self._score_rows([rows[m] for m in members], gold_N, k, tail)
            except RuntimeError as error:
                if not ran_out_of_memory(error):
                    raise
                raise OutOfDeviceMemoryError(
                    f"the teacher {self.name} ran out of memory on {self._device} with a batch of {self.batch_tokens} "
                    f"tokens ({len(members)} sequences); give a smaller --batch-tokens, shorter sequences with --length, "
                    f"or --dtype bfloat16"
                ) from error
            target_N = torch.from_numpy(np.concatenate([np.arange(first_R[r], first_R[r + 1]) for r in chosen]))
            for name, value in vars(part).items():
                getattr(scores, name)[target_N] = value
            if on_batch is not None:
                on_batch(len(target_N))
        return scores

    def _row(self, a: Arrays) -> Row:
        # Read from the row before where the teacher's logits are shifted.
        read_N = a.position_N - self._shift
        return reduce_row(self._layout, self.block_size, self.mask_id, a.token_L, a.clean_L, read_N)

    def _score_rows(
        self, rows: list[Row], gold_N: torch.Tensor, k: int, tail: tuple[int, torch.Tensor] | None
    ) -> Scores:
        """Run the decoder on one batch and the head on its scored rows."""
        hidden_ND = run_rows(self._decoder, self._layout, self.block_size, rows, self._device)
        scores = self._head.score(hidden_ND, gold_N, k, self.temperatures, tail)
        if not torch.isfinite(scores.gold_logp_N).all() or not torch.isfinite(scores.topk_logp_NK).all():
            raise TidecacheError(
                f"the teacher {self.name} gave log-probabilities that are not finite (NaN or infinite), in "
                f"{self.dtype} with the layout {self.layout}: its "
                f"weights may be damaged, or the type too narrow; try --dtype float32"
            )
        return scores


def load_transformers_teacher(
    preset: Preset, temperatures: tuple[float, ...], dtype: str, batch_tokens: int
) -> TransformersTeacher:
    """Load the checkpoint, refuse what is incomplete or not understood, and probe it. See `backends.load`."""
    if dtype not in DTYPES:
        raise TidecacheError(f"dtype: expected one of {', '.join(DTYPES)}, found {dtype!r}")
    if batch_tokens < 1:
        raise TidecacheError(f"batch_tokens: expected at least 1, found {batch_tokens}")
    if preset.block_size is not None and preset.block_size < 1:
        raise TidecacheError(f"block_size: expected at least 1, found {preset.block_size}")
    if not temperatures or any(t <= 0 for t in temperatures):
        raise TidecacheError(f"temperatures: expected positive numbers, found {temperatures}")
    layout = find_layout(preset.layout or "full")
    folder = local_folder(preset.checkpoint)
    model = load_model(folder, dtype, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    vocabulary, tokenizer_mask = _tokenizer_traits(folder, preset)
    mask_id = preset.mask_id
    if mask_id is None:
        mask_id = tokenizer_mask if tokenizer_mask is not None else getattr(model.config, "mask_token_id", None)
    rows = model.get_input_embeddings().weight.shape[0]
    if mask_id is not None and not 0 <= mask_id < rows:
        raise TidecacheError(
            f"teacher {folder}: the mask id {mask_id} is not among its {rows} embeddings; give another with --mask-id"
        )
    head = Head.of(model, vocabulary, str(folder))
    if layout.name == "reordered" and mask_id is None:
        raise TidecacheError(
            f"teacher {folder}: the layout reordered puts a block's observed tokens before its masked ones, and no "
            f"mask token is known: give its id with --mask-id"
        )
    _probe(model, head, folder, layout)
    return TransformersTeacher(preset, folder, model, head, mask_id, dtype, temperatures, batch_tokens)


def _tokenizer_traits(folder: Path, preset: Preset) -> tuple[int | None, int | None]:
    """(vocabulary, mask id) of the tokenizer beside the weights; (None, None) where there is none at all."""
    if not has_tokenizer(folder):
        return None, None
    tokenizer = teacher_tokenizer(folder, preset.name)
    return tokenizer.vocabulary, tokenizer.mask_id


@torch.inference_mode()
def _probe(model: Any, head: Head, folder: Path, layout: Layout) -> None:
    """Measure the two things that the backend takes for granted: obedience to the mask, and a head that is linear."""
    decoder = getattr(model, model.base_model_prefix)
    rows = model.get_input_embeddings().weight.shape[0]
    length = 4
    plain_S = torch.arange(1, length + 1, device=model.device) % rows
    changed = torch.stack([plain_S, plain_S, plain_S])
    changed[1, 0] = (changed[1, 0] + rows // 2 + 1) % rows
    changed[2, -1] = (changed[2, -1] + rows // 2 + 1) % rows
    position_BS = torch.arange(length, device=model.device)[None].expand(3, -1)
    everything = torch.ones(3, length, length, dtype=torch.bool, device=model.device)
    alone = torch.eye(length, dtype=torch.bool, device=model.device).expand(3, -1, -1)
    try:
        seen_BSD = attend(decoder, changed, position_BS, everything)
        hidden_BSD = attend(decoder, changed, position_BS, alone)
        bias = torch.zeros(3, 1, length, length, dtype=decoder.dtype, device=model.device)
        own_BSV = model(input_ids=changed, attention_mask=bias, position_ids=position_BS, use_cache=False).logits
    except Exception as error:  # a signature or a mask form that the architecture does not have
        raise TidecacheError(
            f"teacher {folder}: {type(model).__name__} does not take a 4D attention mask "
            f"({' '.join(str(error).split())[:200]}); only architectures that do can be run with a diffusion layout"
        ) from error
    if not torch.isfinite(seen_BSD).all() or not torch.isfinite(own_BSV).all():
        raise TidecacheError(
            f"teacher {folder}: its results are not finite (NaN or infinite) in "
            f"{str(decoder.dtype).removeprefix('torch.')}: its weights "
            f"may be damaged, or the type too narrow; try --dtype float32"
        )
    leaks = not _close(hidden_BSD[0, 1:], hidden_BSD[1, 1:]) or not _close(hidden_BSD[0, :-1], hidden_BSD[2, :-1])
    blind = torch.equal(seen_BSD[0, 0], seen_BSD[2, 0]) or torch.equal(seen_BSD[0, -1], seen_BSD[1, -1])
    if leaks or blind:
        what = "sees tokens that the mask hides" if leaks else "does not see later tokens that the mask shows"
        raise TidecacheError(
            f"teacher {folder}: the attention of {type(model).__name__} {what}: it does not follow a 4D attention "
            f"mask, so it cannot be run with a diffusion layout"
        )
    if layout.reads_clean and not prefix_agrees(decoder, plain_S):
        raise TidecacheError(
            f"teacher {folder}: {type(model).__name__} does not give the same when the start of a sequence comes as "
            f"keys and values computed before, which the layout "
            f"{layout.name} needs; only full and block-causal can be used with it"
        )
    own_SV = own_BSV[0, :, : head.vocabulary].float()
    ours_SV = head.logits(seen_BSD[0])
    tolerance = 1e-4 if decoder.dtype == torch.float32 else 2e-2
    gap = (own_SV - ours_SV).abs().max() / own_SV.abs().max().clamp(min=1e-6)
    if gap > tolerance:
        raise TidecacheError(
            f"teacher {folder}: {type(model).__name__} does more to its logits than a linear head with a scale and a "
            f"soft cap (they differ by {float(gap):.1e} of their size): this architecture is not supported"
        )


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for what the order of summation may change."""
    return bool((a - b).abs().max() <= 1e-3 * a.abs().max())
