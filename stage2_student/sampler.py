"""Block-diffusion sampling: a response grows block by block, each block denoised from masks to text (DESIGN §8).

A block attends to the blocks before it, clean, and to itself, as x_t does in training; prompt and finished blocks are
encoded block-causally, as x_0 does. Each denoising step predicts every masked token of the block and commits some: the
most certain ones (`low-confidence`) or any (`random`), as many as the schedule says, and with a threshold also every
token that is more certain than that. Committed tokens stay. A finished block is encoded once more, clean, in the same
pass as the first step of the next block, and stays in the cache from then on.

Rows of a batch are padded on the left to a common first block. Padding is never attended to and moves no position, and
every random number is a function of (seed, prompt, step, place): a row comes out the same in any company.

Where the first block starts must be what training had. `sequence`: blocks count from the sequence's start, so the
prompt's last, partial block is continued with its prompt tokens fixed. `response`: they count from the response's.

Shape suffixes: B rows, T columns of the batch, W columns before the first block, S columns of one pass, K columns of a
block, N masked tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from shared.errors import TidecacheError
from shared.noise import stream_key, uniforms
from stage2_student import families
from stage2_student.denoising import transferred_tokens
from stage2_student.head import Head
from stage2_student.kv_cache import BlockCache, reading_in_place

REMASKING = ("low-confidence", "random")
BLOCKS = ("sequence", "response")
HEAD_ROWS = 256  # masked tokens whose logits are held at once


@dataclass(frozen=True)
class SampleOptions:
    """How to sample.

    `steps`: denoising steps for `max_new_tokens` tokens, 0 for one per token; `threshold`: a probability, or None.
    """

    max_new_tokens: int = 256
    steps: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    remasking: str = "low-confidence"
    threshold: float | None = None
    blocks: str = "sequence"
    seed: int = 0
    kv_cache: bool = True

    def __post_init__(self) -> None:
        """Refuse what no sampling can mean."""
        for name, allowed in (("remasking", REMASKING), ("blocks", BLOCKS)):
            if getattr(self, name) not in allowed:
                raise TidecacheError(f"{name}: expected one of {', '.join(allowed)}, found {getattr(self, name)!r}")
        if self.max_new_tokens < 1 or self.steps < 0:
            raise TidecacheError(
                "expected max_new_tokens of at least 1 and steps of at least 0, "
                f"found {self.max_new_tokens} and {self.steps}"
            )
        if self.temperature < 0 or not math.isfinite(self.temperature):
            raise TidecacheError(f"temperature: expected 0 or a positive number, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise TidecacheError(f"top_p: expected a number above 0 and up to 1, found {self.top_p}")
        if self.top_p < 1 and self.temperature == 0:
            raise TidecacheError("top_p: at temperature 0 the most likely token is taken anyway: set a temperature too")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise TidecacheError(f"threshold: expected a probability above 0 and up to 1, found {self.threshold}")
        if self.threshold is not None and self.remasking == "random":
            raise TidecacheError(
                "threshold: it picks tokens by confidence, `random` remasking does not: take one of the two"
            )

    def block_steps(self, masked: int) -> list[int]:
        """How many of a block's `masked` tokens each of its steps commits at least."""
        steps = self.steps or self.max_new_tokens
        return transferred_tokens(masked, max(1, math.ceil(masked * steps / self.max_new_tokens))) if masked else []


@dataclass
class Usage:
    """What sampling took and gave.

    `forwards`: passes of the model; `row_forwards`: per row, the passes in which it still had masked tokens, summed;
    `positions`: token positions that went through the model, padding and waiting rows included; `tokens`: tokens of the
    responses, end tokens included.
    """

    forwards: int = 0
    row_forwards: int = 0
    positions: int = 0
    tokens: int = 0

    @property
    def tokens_per_forward(self) -> float:
        """Tokens that a row gains per pass of its own, whatever its company; re-encoding costs no pass."""
        return self.tokens / self.row_forwards if self.row_forwards else 0.0


@dataclass(frozen=True)
class Sample:
    """One response: its tokens without the end token, and why it stopped (`end`, `stop` or `length`)."""

    ids: list[int]
    finish: str


# Called with (row, new ids) whenever the settled beginning of a response has grown.
OnTokens = Callable[[int, list[int]], None]
# Called with a response's ids after each block; true ends the response.
Stop = Callable[[list[int]], bool]


@dataclass
class _Row:
    """One response in the making. Columns are the batch's."""

    number: int  # in the caller's order
    name: str  # digest of the prompt: what its random numbers hang on
    real: int  # first column that is not padding
    first: int  # first column of the response
    limit: int  # column after its last
    step: int = 0
    settled: int = 0  # columns up to here are final
    schedule: list[int] = field(default_factory=list)
    finish: str | None = None


class Sampler:
    """Samples responses from one student. Not for training mode; the model is left as it was."""

    def __init__(
        self, model: PreTrainedModel, block_size: int, mask_id: int, end_ids: Sequence[int], vocabulary: int
    ) -> None:
        """`end_ids` end a response; ids from `vocabulary` on, which the tokenizer does not know, are never sampled."""
        self.model = model
        self.block_size = block_size
        self.mask_id = mask_id
        self.end_ids = frozenset(end_ids)
        self.vocabulary = vocabulary
        self.head = Head.of(model)
        self.usage = Usage()  # of all calls

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        options: SampleOptions,
        on_tokens: OnTokens | None = None,
        stop: Stop | None = None,
    ) -> list[Sample]:
        """Sample one response per prompt, as one batch.

        Raises:
            TidecacheError: an empty prompt, one that holds the mask token, or one too long for the model's context.
        """
        for number, prompt in enumerate(prompts):
            self.check(f"prompt {number}", prompt, options)
        if not prompts:
            return []
        with _evaluating(self.model):
            return _Batch(self, prompts, options, on_tokens, stop).run()

    def check(self, name: str, prompt: Sequence[int], options: SampleOptions) -> None:
        """Refuse a prompt that cannot be used; `name` is what errors call it.

        Raises:
            TidecacheError: see `sample`.
        """
        limits = [getattr(self.model.config, "max_position_embeddings", None), families.window(self.model.config)]
        context = min((limit for limit in limits if limit is not None), default=None)
        if not len(prompt):
            raise TidecacheError(f"{name} has no tokens: expected at least one")
        if self.mask_id in prompt:
            raise TidecacheError(f"{name} holds the mask token (id {self.mask_id}): take it out")
        if context is not None and len(prompt) + options.max_new_tokens > context:
            raise TidecacheError(
                f"{name} has {len(prompt)} tokens, which with {options.max_new_tokens} new ones is more than the model's "
                f"context of {context}: shorten it or lower --max-new-tokens"
            )

    @torch.inference_mode()
    def predict(self, hidden_ND: Tensor, uniform_N: Tensor | None, options: SampleOptions) -> tuple[Tensor, Tensor]:
        """(id_N, confidence_N): a token for each masked position and its probability at temperature 1.

        `uniform_N`: numbers in [0, 1) that decide at temperatures above 0.
        """
        ids, confidences = [], []
        for start in range(0, len(hidden_ND), HEAD_ROWS):
            logits_NV = self.head.logits(hidden_ND[start : start + HEAD_ROWS])[:, : self.vocabulary].float()
            logits_NV[:, self.mask_id] = -torch.inf
            if options.temperature == 0:
                id_N = logits_NV.argmax(dim=1)
            else:
                assert uniform_N is not None
                id_N = _draw(logits_NV / options.temperature, uniform_N[start : start + HEAD_ROWS], options.top_p)
            logp_N = logits_NV.gather(1, id_N[:, None])[:, 0] - logits_NV.logsumexp(dim=1)
            ids.append(id_N)
            confidences.append(logp_N.exp())
        return torch.cat(ids), torch.cat(confidences)


def _draw(logits_NV: Tensor, uniform_N: Tensor, top_p: float) -> Tensor:
    """One id per row by inversion of the cumulative distribution of the likeliest ids that make up `top_p`."""
    share_NV = logits_NV.double().softmax(dim=1)
    order_NV = None
    if top_p < 1:
        share_NV, order_NV = share_NV.sort(dim=1, descending=True, stable=True)
        share_NV[share_NV.cumsum(dim=1) - share_NV >= top_p] = 0.0
    sums_NV = share_NV.cumsum(dim=1)
    place_N = torch.searchsorted(sums_NV, uniform_N.to(sums_NV)[:, None] * sums_NV[:, -1:], right=True)[:, 0]
    place_N = place_N.clamp(max=logits_NV.shape[1] - 1)
    return place_N if order_NV is None else order_NV.gather(1, place_N[:, None])[:, 0]


class _Batch:
    """One batch from prompts to responses: the columns' layout, the passes, the commits."""

    def __init__(
        self,
        sampler: Sampler,
        prompts: Sequence[Sequence[int]],
        options: SampleOptions,
        on_tokens: OnTokens | None,
        stop: Stop | None,
    ) -> None:
        self.sampler, self.options, self.on_tokens, self.stop = sampler, options, on_tokens, stop
        self.device = sampler.model.device
        size = sampler.block_size
        whole = [len(p) // size * size if options.blocks == "sequence" else len(p) for p in prompts]
        self.before = max(whole)  # W
        self.rows = [
            _Row(
                number=number,
                name=hashlib.blake2b(np.asarray(prompt, np.int64).tobytes(), digest_size=16).hexdigest(),
                real=self.before - whole[number],
                first=self.before - whole[number] + len(prompt),
                limit=self.before - whole[number] + len(prompt) + options.max_new_tokens,
            )
            for number, prompt in enumerate(prompts)
        ]
        columns = max(row.limit for row in self.rows)
        self.ids_BT = torch.full((len(prompts), columns), sampler.mask_id, dtype=torch.long)
        for row, prompt in zip(self.rows, prompts, strict=True):
            self.ids_BT[row.number, row.real : row.first] = torch.tensor(list(prompt))
            row.settled = row.first
        self.ids_BT = self.ids_BT.to(self.device)
        self.block_T = torch.div(torch.arange(columns, device=self.device) - self.before, size, rounding_mode="floor")
        self.cache = BlockCache(columns) if options.kv_cache else None
        self.results: dict[int, Sample] = {}

    def run(self) -> list[Sample]:
        start, size, clean = self.before, self.sampler.block_size, 0
        while self.rows:
            stop = min(start + size, max(row.limit for row in self.rows))
            clean = self._denoise(clean, start, stop)
            self._leave(start, stop)
            start = stop
        return [self.results[number] for number in sorted(self.results)]

    def _denoise(self, clean: int, start: int, stop: int) -> int:
        """Denoise the block of columns [start, stop).

        Clean columns from `clean` on are not in the cache yet. Returns what `clean` is for the next block.
        """
        column_K = torch.arange(start, stop, device=self.device)
        first_B = torch.tensor([row.first for row in self.rows], device=self.device)
        limit_B = torch.tensor([row.limit for row in self.rows], device=self.device)
        masked_BK = (column_K >= first_B[:, None]) & (column_K < limit_B[:, None])
        for row, masked in zip(self.rows, masked_BK.sum(dim=1).tolist(), strict=True):
            row.schedule = self.options.block_steps(masked)
        while bool(masked_BK.any()):
            hidden_BKD = self._pass(clean if self.cache is not None else 0, start, stop)
            clean = start
            self.sampler.usage.row_forwards += int(masked_BK.any(dim=1).sum())
            self._commit(hidden_BKD, masked_BK, start)
            self._settle(masked_BK, start, stop)
        return clean

    def _pass(self, begin: int, start: int, stop: int) -> Tensor:
        """Run the model on columns [begin, stop) and return the hidden states of the block, [start, stop)."""
        real_B = torch.tensor([row.real for row in self.rows], device=self.device)
        limit_B = torch.tensor([row.limit for row in self.rows], device=self.device)
        column_T = torch.arange(stop, device=self.device)
        real_BT = (column_T >= real_B[:, None]) & (column_T < limit_B[:, None])
        seen_ST = self.block_T[None, :stop] <= self.block_T[begin:stop, None]
        itself_ST = column_T[None, :] == column_T[begin:stop, None]  # padding sees itself, so that no softmax is empty
        seen_BST = (seen_ST & real_BT[:, None, :]) | (itself_ST & ~real_BT[:, begin:, None])
        base = self.sampler.model.base_model
        dtype = next(base.parameters()).dtype
        mask_BST = torch.zeros(seen_BST.shape, dtype=dtype, device=self.device)
        mask_BST.masked_fill_(~seen_BST, torch.finfo(dtype).min)
        if self.cache is not None:
            self.cache.start = begin
        output = base(
            input_ids=self.ids_BT[:, begin:stop],
            position_ids=(column_T[begin:] - real_B[:, None]).clamp(min=0),
            attention_mask=mask_BST[:, None],
            past_key_values=self.cache,
            use_cache=self.cache is not None,
        )
        usage = self.sampler.usage
        usage.forwards += 1
        usage.positions += len(self.rows) * (stop - begin)
        hidden_BSD: Tensor = output.last_hidden_state
        return hidden_BSD[:, start - begin :]

    def _commit(self, hidden_BKD: Tensor, masked_BK: Tensor, start: int) -> None:
        """Predict the masked tokens, write those that this step commits, and unmask them in `masked_BK`."""
        options = self.options
        uniform_BK = self._uniforms("sample", masked_BK) if options.temperature > 0 else None
        uniform_N = None if uniform_BK is None else uniform_BK[masked_BK]
        id_N, confidence_N = self.sampler.predict(hidden_BKD[masked_BK], uniform_N, options)
        worth_BK = torch.full(masked_BK.shape, -torch.inf, dtype=torch.float64, device=self.device)
        if options.remasking == "random":
            worth_BK[masked_BK] = self._uniforms("remask", masked_BK)[masked_BK]
        else:
            worth_BK[masked_BK] = confidence_N.double()
        active = masked_BK.any(dim=1).tolist()
        least = [
            row.schedule.pop(0) if on and row.schedule else int(on) for row, on in zip(self.rows, active, strict=True)
        ]
        rank_BK = worth_BK.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)
        commit_BK = rank_BK < torch.tensor(least, device=self.device)[:, None]
        if options.threshold is not None:
            commit_BK |= worth_BK >= options.threshold
        commit_BK &= masked_BK
        block_BK = self.ids_BT[:, start : start + masked_BK.shape[1]]  # a view: writing here fills the batch
        predicted_BK = block_BK.clone()
        predicted_BK[masked_BK] = id_N
        block_BK[commit_BK] = predicted_BK[commit_BK]
        masked_BK &= ~commit_BK
        for row, on in zip(self.rows, active, strict=True):
            row.step += on

    def _uniforms(self, purpose: str, masked_BK: Tensor) -> Tensor:
        """Numbers in [0, 1) by (seed, prompt, row's own step, place in the block)."""
        values = [
            uniforms(stream_key(self.options.seed, row.name, purpose, row.step), masked_BK.shape[1])
            for row in self.rows
        ]
        return torch.from_numpy(np.stack(values)).to(self.device)

    def _settle(self, masked_BK: Tensor, start: int, stop: int) -> None:
        """See how far each row is final, report it, and end rows whose end token is among it."""
        ids_BK, open_BK = self.ids_BT[:, start:stop].tolist(), masked_BK.tolist()
        for place, row in enumerate(self.rows):
            if row.finish is not None:
                continue
            new: list[int] = []
            for column in range(max(row.settled, start), min(stop, row.limit)):
                if open_BK[place][column - start]:
                    break
                row.settled = column + 1
                token = ids_BK[place][column - start]
                if token in self.sampler.end_ids:
                    row.finish = "end"
                    masked_BK[place] = False  # what follows the end token is of no interest
                    break
                new.append(token)
            if new and self.on_tokens:
                self.on_tokens(row.number, new)

    def _leave(self, start: int, stop: int) -> None:
        """Take finished rows out of the batch."""
        staying = []
        for place, row in enumerate(self.rows):
            ids = self.ids_BT[place, row.first : max(row.settled, row.first)].tolist()
            if row.finish == "end":
                ids = ids[:-1]
            elif self.stop is not None and self.stop(ids):
                row.finish = "stop"
            elif row.limit <= stop:
                row.finish = "length"
            if row.finish is None:
                staying.append(place)
            else:
                self.results[row.number] = Sample(ids, row.finish)
                self.sampler.usage.tokens += row.settled - row.first
        if len(staying) < len(self.rows):
            self.rows = [self.rows[place] for place in staying]
            self.ids_BT = self.ids_BT[staying]
            if self.cache is not None:
                self.cache.start = start
                self.cache.keep(staying)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout and gradients, reading the cache in place."""
    training = model.training
    model.eval()
    try:
        with reading_in_place(model):
            yield
    finally:
        model.train(training)
