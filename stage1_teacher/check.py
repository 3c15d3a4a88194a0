"""Find a wrong preset by measurement, before a long capture makes a cache of it (DESIGN §7).

A teacher with a wrong trait still gives numbers: a wrong layout, a logit shift that is off by one, another token as
mask, a tokenizer of another model. All of them cost likelihood on real text, so each trait is varied with all else
equal, on the same documents and masks, and what does best is compared with what was asked for.

Layouts are compared twice. *As captured*, by timestep: what a cache would hold; but a layout that reads x_0 shows more
of the past than one that does not, and its numbers look better for that alone. *One block*: only a block in the middle
of each document has masks, and all else is clean. There all layouts see the same past, and `full` sees the text behind
the block as well: it wins if the teacher was trained to look there, and loses if it never did. So the second says which
layout is the teacher's own. `block-causal` and `bd3lm` are the same there, and the first comparison decides between
them.

A verdict needs a difference that is large (`MARGIN`) and sure (`SIGMAS` standard errors over documents). Likelihoods in
nats per token.

Shapes: L tokens of a document, N scored positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from shared import noise
from shared.documents import Encoded
from shared.errors import TidecacheError
from shared.tokenization import TextTokenizer
from stage1_teacher.backends import ScoreRequest, Scores
from stage1_teacher.layouts import LAYOUTS

TIMESTEPS = (0.15, 0.5, 0.85)
SHIFTS = (0, 1, -1)
MARGIN = 0.05  # nats per token
SIGMAS = 3.0
PADDING_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5, "float16": 0.1}  # nats, for the worst token
DRIFT = 0.02  # nats per token, of the mean; a tenth of what distillation distinguishes
UNKNOWN_MASS = 0.01
MASK_CANDIDATES = 24

IntArray = npt.NDArray[np.int64]


class VariedTeacher(Protocol):
    """What the check needs of a teacher: scores, and the same weights with other traits."""

    name: str
    layout: str
    block_size: int
    mask_id: int | None
    logit_shift: bool
    dtype: str
    vocabulary: int
    batch_tokens: int

    def score(self, requests: Sequence[ScoreRequest], k: int) -> Scores:
        """See `stage1_teacher.backends.Teacher`."""

    def varied(self, layout: str, shift: int, mask_id: int | None) -> VariedTeacher:
        """The same weights with other traits."""

    def unknown_mass(self, requests: Sequence[ScoreRequest]) -> float:
        """Mean probability of rows of the head that the tokenizer does not know."""


@dataclass(frozen=True)
class Traits:
    """One way to read the teacher."""

    layout: str
    shift: int  # logits for position i come from row i − shift
    mask_id: int


@dataclass(frozen=True)
class Measured:
    """What one way of reading gives: per document, so that ways can be compared in pairs."""

    nll: npt.NDArray[np.float64]  # mean over a document's scored tokens, nats
    top1: float  # share of tokens that are the most likely one

    @property
    def mean(self) -> float:
        """Nats per token, documents weighing alike."""
        return float(self.nll.mean())

    def worse_than(self, other: Measured) -> bool:
        """Whether this is worse by a margin that is large and sure."""
        difference = self.nll - other.nll
        error = float(difference.std(ddof=1)) / math.sqrt(len(difference)) if len(difference) > 1 else math.inf
        return float(difference.mean()) > max(MARGIN, SIGMAS * error)


@dataclass(frozen=True)
class Finding:
    """The verdict on one trait. `flag` is what to change where `wrong`."""

    trait: str
    verdict: str  # ok, WRONG, or unsure
    detail: str
    flag: str = ""

    @property
    def wrong(self) -> bool:
        """Whether it must be changed before a capture."""
        return self.verdict == "WRONG"


@dataclass
class Result:
    """All of a check. `by_timestep` and `one_block` are ranked, best first."""

    traits: Traits
    documents: int
    tokens: int
    by_timestep: list[tuple[str, list[Measured]]] = field(default_factory=list)
    one_block: list[tuple[str, int, Measured]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def wrong(self) -> list[Finding]:
        """What must be changed."""
        return [finding for finding in self.findings if finding.wrong]

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        return {
            "traits": vars(self.traits),
            "documents": self.documents,
            "tokens": self.tokens,
            "timesteps": TIMESTEPS,
            "by_timestep": {n: [{"nll": m.mean, "top1": m.top1} for m in row] for n, row in self.by_timestep},
            "one_block": [{"layout": n, "shift": s, "nll": m.mean, "top1": m.top1} for n, s, m in self.one_block],
            "findings": [vars(finding) for finding in self.findings],
        }


class Check:
    """One check of one teacher on some documents (ids of at least three blocks each)."""

    def __init__(
        self, teacher: VariedTeacher, tokenizer: TextTokenizer, documents: Sequence[IntArray], unigram_nll: float
    ) -> None:
        if teacher.mask_id is None:
            raise TidecacheError(f"the teacher {teacher.name} has no mask token: give its id with --mask-id")
        self._teacher = teacher
        self._tokenizer = tokenizer
        self._documents = documents
        self._unigram = unigram_nll
        self._asked = Traits(teacher.layout, int(teacher.logit_shift), teacher.mask_id)

    def run(self) -> Result:
        """Measure everything; nothing is raised for a wrong trait, see `Result.wrong`."""
        result = Result(self._asked, len(self._documents), sum(map(len, self._documents)))
        mask_id = self._mask_token(result)
        layout = self._layout_and_shift(result, mask_id)
        best = Traits(layout, result.one_block[0][1], mask_id)
        self._timesteps(result, best)
        self._tokens(result, best)
        result.findings.append(self._padding())
        return result

    def _requests(self, traits: Traits, t: float, one_block: bool) -> list[ScoreRequest]:
        """Every document with masks at timestep t, counter-based; with `one_block`, in its middle block alone."""
        size = self._teacher.block_size
        requests = []
        for number, ids_L in enumerate(self._documents):
            length = len(ids_L)
            masked_L = noise.uniforms(noise.stream_key(0, str(number), "check"), length) < t
            middle = (length // size - 1) // 2 * size
            if one_block:
                masked_L[:middle] = masked_L[middle + size :] = False
            # Rows before and behind must exist for every shift, and each document must have something to score.
            masked_L[[0, -1]] = False
            masked_L[middle + 1] |= not masked_L.any()
            requests.append(_masked(ids_L, masked_L, traits.mask_id))
        return requests

    def _measure(self, traits: Traits, t: float, one_block: bool = False) -> Measured:
        requests = self._requests(traits, t, one_block)
        return _scored(self._teacher.varied(traits.layout, traits.shift, traits.mask_id), requests)

    def _mask_token(self, result: Result) -> int:
        """Which token does the teacher take for a mask? Tried over the special tokens, with the traits asked for."""
        special = np.flatnonzero(self._tokenizer.special).tolist()
        named = [i for i in special if b"mask" in self._tokenizer.token_bytes[i].lower()]
        known = [self._tokenizer.mask_id] if self._tokenizer.mask_id is not None else []
        candidates = list(dict.fromkeys([self._asked.mask_id, *known, *named, *special]))[:MASK_CANDIDATES]
        measured = {
            mask_id: min(
                (self._measure(Traits(self._asked.layout, shift, mask_id), 0.5) for shift in SHIFTS),
                key=lambda m: m.mean,
            )
            for mask_id in candidates
        }
        best = min(candidates, key=lambda mask_id: measured[mask_id].mean)
        asked = measured[self._asked.mask_id]
        name = self._name(best)
        if best != self._asked.mask_id and asked.worse_than(measured[best]):
            result.findings.append(
                Finding(
                    "mask id",
                    "WRONG",
                    f"token {self._asked.mask_id} ({self._name(self._asked.mask_id)}) as mask costs {asked.mean:.2f} nats per "
                    f"token, token {best} ({name}) {measured[best].mean:.2f}",
                    f"--mask-id {best}",
                )
            )
            return int(best)
        detail = (
            f"token {self._asked.mask_id} ({self._name(self._asked.mask_id)}) is the best of {len(candidates)} tried"
        )
        result.findings.append(Finding("mask id", "ok", detail))
        return self._asked.mask_id

    def _layout_and_shift(self, result: Result, mask_id: int) -> str:
        """Rank layouts and shifts with one block masked; findings on both. Returns the layout to go on with."""
        grid = {
            (layout, shift): self._measure(Traits(layout, shift, mask_id), 0.5, one_block=True)
            for layout in LAYOUTS
            for shift in SHIFTS
        }
        result.one_block = [(*key, m) for key, m in sorted(grid.items(), key=lambda item: item[1].mean)]
        (best_layout, best_shift), best = min(grid.items(), key=lambda item: item[1].mean)
        asked = grid[self._asked.layout, self._asked.shift]
        # Each trait is judged at its best with the other one free, so that two wrong traits do not hide each other.
        shift_asked = min((m for (_, s), m in grid.items() if s == self._asked.shift), key=lambda m: m.mean)
        layout_asked = min((m for (n, _), m in grid.items() if n == self._asked.layout), key=lambda m: m.mean)
        if best_shift != self._asked.shift and shift_asked.worse_than(best):
            flag = {0: "--no-logit-shift", 1: "--logit-shift"}.get(best_shift, "")
            detail = (
                f"logits from row i − {self._asked.shift} cost {shift_asked.mean:.2f} nats per token, from row "
                f"i − ({best_shift}) {best.mean:.2f}"
            )
            if not flag:
                detail += "; no teacher is known to be trained that way: is the tokenizer that of this model?"
                flag = "--teacher"
            result.findings.append(Finding("logit shift", "WRONG", detail, flag))
        else:
            result.findings.append(Finding("logit shift", "ok", f"{self._asked.shift} is the best of 0, +1 and −1"))
        same = {"block-causal", "bd3lm"}
        twins = {self._asked.layout, best_layout} <= same
        if best_layout != self._asked.layout and not twins and layout_asked.worse_than(best):
            if best_layout in same:  # they tie here; what a draw shows in bd3lm is what such models are trained on
                best_layout = "bd3lm"
            detail = f"with one block masked {layout_asked.mean:.2f} nats per token, {best_layout} {best.mean:.2f}"
            result.findings.append(Finding("layout", "WRONG", detail, f"--layout {best_layout}"))
            return best_layout
        close = [n for (n, s), m in grid.items() if s == self._asked.shift and not m.worse_than(asked)]
        detail = (
            f"{self._asked.layout} is the teacher's own, as far as can be told from {len(self._documents)} documents"
        )
        if len(set(close) - {self._asked.layout}) and not set(close) <= same:
            detail = f"{', '.join(close)} can't be told apart on {len(self._documents)} documents"
            result.findings.append(Finding("layout", "unsure", detail))
        else:
            result.findings.append(Finding("layout", "ok", detail))
        return self._asked.layout

    def _timesteps(self, result: Result, best: Traits) -> None:
        """What draws of each layout would hold, by timestep; decides between block-causal and bd3lm."""
        table = {n: [self._measure(Traits(n, best.shift, best.mask_id), t) for t in TIMESTEPS] for n in LAYOUTS}
        result.by_timestep = sorted(table.items(), key=lambda item: sum(m.mean for m in item[1]))
        if best.layout == "block-causal" and all(
            a.worse_than(b) for a, b in zip(table["block-causal"], table["bd3lm"], strict=True)
        ):
            detail = "as captured, bd3lm is better at every timestep: it shows a block a clean past"
            result.findings.append(Finding("layout as captured", "unsure", f"{detail}; consider --layout bd3lm"))

    def _tokens(self, result: Result, best: Traits) -> None:
        """Do tokenizer and weights belong together?"""
        easy = dict(result.by_timestep)[best.layout][0]
        if easy.mean > self._unigram - MARGIN:
            detail = (
                f"even with {TIMESTEPS[0]:.0%} masked the teacher needs {easy.mean:.2f} nats per token, and the mere frequency of "
                f"tokens in this text gives {self._unigram:.2f}: the tokenizer is not that of these weights, or the text is "
                f"nothing that the teacher knows"
            )
            result.findings.append(
                Finding("tokenizer", "WRONG", detail, "--teacher (a folder whose tokenizer fits its weights)")
            )
        else:
            detail = f"{easy.mean:.2f} nats per token with {TIMESTEPS[0]:.0%} masked; token frequencies give {self._unigram:.2f}"
            result.findings.append(Finding("tokenizer", "ok", detail))
        teacher = self._teacher.varied(best.layout, best.shift, best.mask_id)
        mass = teacher.unknown_mass(self._requests(best, 0.5, False))
        if mass > UNKNOWN_MASS:
            detail = (
                f"{mass:.1%} of the teacher's probability lies on rows of its head beyond the tokenizer's "
                f"{self._teacher.vocabulary} tokens: the tokenizer lacks tokens that the teacher was trained with"
            )
            result.findings.append(
                Finding("vocabulary", "WRONG", detail, "--teacher (a folder with the complete tokenizer)")
            )
        else:
            detail = f"{self._teacher.vocabulary} tokens; {mass:.1e} of the probability lies beyond them"
            result.findings.append(Finding("vocabulary", "ok", detail))

    def _padding(self) -> Finding:
        """The same sequences alone and in one batch with longer ones must score the same."""
        lengths = np.linspace(self._teacher.block_size, max(map(len, self._documents)), 4).astype(int)
        requests = []
        for length, request in zip(lengths, self._requests(self._asked, 0.5, False), strict=False):
            position_N = np.asarray(request.positions)
            kept = (position_N >= 1) & (position_N < min(length, len(np.asarray(request.token_ids))) - 1)
            fields = (request.token_ids, request.clean_ids)
            noisy_L, clean_L = (np.asarray(ids)[:length] for ids in fields)
            requests.append(ScoreRequest(noisy_L, position_N[kept], np.asarray(request.gold_ids)[kept], clean_L))
        together = self._teacher.score(requests, 1).gold_logp_N
        alone = np.concatenate([self._teacher.score([request], 1).gold_logp_N.numpy() for request in requests])
        worst = float(np.abs(together.numpy() - alone).max(initial=0.0))
        if worst > PADDING_TOLERANCE.get(self._teacher.dtype, 0.5):
            detail = (
                f"a sequence scores differently beside longer ones (by {worst:.1e} nats): padding reaches attention"
            )
            return Finding("padding", "WRONG", detail, "--backend transformers with --batch-tokens 1, and report this")
        return Finding("padding", "ok", f"batched and alone differ by at most {worst:.1e} nats")

    def template(self, rendered: Sequence[Encoded], plain: Sequence[Encoded]) -> Finding:
        """The answers of some chats, rendered with the chat template and without any: which does the teacher expect?"""
        with_template, without = (self._measure_answers(encodings) for encodings in (rendered, plain))
        detail = (
            f"answers cost {with_template.mean:.2f} nats per token with the chat template, {without.mean:.2f} without"
        )
        if with_template.worse_than(without):
            return Finding("template", "WRONG", f"{detail}: it is not the one of its training", "--template FILE")
        return Finding("template", "ok" if without.worse_than(with_template) else "unsure", detail)

    def _measure_answers(self, encodings: Sequence[Encoded]) -> Measured:
        requests = []
        for number, encoded in enumerate(encodings):
            clean_L = encoded.ids_L
            answer_L = np.zeros(len(clean_L), dtype=np.bool_)
            first, stop = encoded.spans[-1]
            answer_L[(encoded.edges[:-1] >= first) & (encoded.edges[1:] <= stop)] = True
            masked_L = answer_L & (noise.uniforms(noise.stream_key(0, str(number), "check"), len(clean_L)) < 0.5)
            masked_L[0] = False
            if not masked_L.any():
                masked_L[np.flatnonzero(answer_L)[-1:]] = True
            requests.append(_masked(clean_L, masked_L, self._asked.mask_id))
        return _scored(self._teacher, requests)

    def drift(self, other: VariedTeacher, dtype: str) -> Finding:
        """`dtype` against float32: this teacher is in one of them, `other` in the other; on a few documents."""
        requests = self._requests(self._asked, 0.5, False)
        difference_N = _first(self._teacher, requests) - _first(other, requests)
        bias = float(difference_N.mean()) * (1 if self._teacher.dtype == dtype else -1)
        spread = float(np.abs(difference_N).mean())
        detail = f"{dtype} against float32: {bias:+.3f} nats per token on average, {spread:.3f} in size"
        if abs(bias) > DRIFT or spread > 10 * DRIFT:
            return Finding("dtype", "WRONG", detail, "--dtype float32")
        return Finding("dtype", "ok", detail)

    def _name(self, token: int) -> str:
        return (
            self._tokenizer.token_bytes[token].decode("utf-8", "replace")
            if token < self._tokenizer.vocabulary
            else "unnamed"
        )


def _masked(clean_L: IntArray, masked_L: npt.NDArray[np.bool_], mask_id: int) -> ScoreRequest:
    """Mask these positions and ask for them."""
    position_N = np.flatnonzero(masked_L)
    noisy_L = clean_L.copy()
    noisy_L[position_N] = mask_id
    return ScoreRequest(noisy_L, position_N, clean_L[position_N], clean_L)


def _scored(teacher: VariedTeacher, requests: Sequence[ScoreRequest]) -> Measured:
    scores = teacher.score(requests, 1)
    stops = np.cumsum([len(r.positions) for r in requests])
    logp = np.split(scores.gold_logp_N.numpy().astype(np.float64), stops[:-1])
    hits_N = scores.topk_ids_NK[:, 0].numpy() == np.concatenate([r.gold_ids for r in requests])
    return Measured(np.array([-part.mean() for part in logp]), float(hits_N.mean()))


def _first(teacher: VariedTeacher, requests: Sequence[ScoreRequest]) -> npt.NDArray[np.float64]:
    """Likelihoods of the first few documents: enough for a mean, little enough for a type that the device is slow in."""
    return teacher.score(requests[:4], 1).gold_logp_N.numpy().astype(np.float64)


def unigram_nll(tokenizer: TextTokenizer, texts: Sequence[str], documents: Sequence[IntArray]) -> float:
    """Nats per token of `documents` under the token frequencies of `texts`, add-one smoothed."""
    counts_V = np.ones(tokenizer.vocabulary)
    for ids in tokenizer.encode_text_batch(list(texts)):
        np.add.at(counts_V, ids, 1)
    logp_V = np.log(counts_V / counts_V.sum())
    return float(-np.mean([logp_V[ids].mean() for ids in documents]))
