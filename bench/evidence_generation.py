"""Generation on held-out code, for `bench/evidence.py`: infilled spans and completed functions, against tokens per forward.

A mode-seeking objective can lose in likelihood and win here, so both are shown. *Infilling*: in every whole block of a
document a span of four tokens is masked, what surrounds it in its block and all earlier blocks are given, and the
span is denoised in one to four steps. Blocks do not see each other's masks, so all spans of a document go through one
pass. *Completion*: the sampler writes a function's last statement, given all before it. The prompt ends before the newline,
since a tokenizer spells a newline and the indentation after it as one token: after a bare newline a model expects a
line without any.

Shape suffixes: B rows, L tokens of a row, N masked tokens (spans × width), S spans, W tokens of a span.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shared.cache.reader import Cache
from shared.cache.records import StoredDocument
from stage2_student.batch import Collator
from stage2_student.data import Row, RowMaker
from stage2_student.denoising import transferred_tokens
from stage2_student.head import Head, argmax_and_logp
from stage2_student.inference import Checkpoint
from stage2_student.model import masked_hidden
from stage2_student.sampler import SampleOptions

WIDTH = 4
MARGIN = 14  # tokens of the block before the span
INFILL_STEPS = (1, 2, 4)
NEW_TOKENS = 48
COMPLETION_STEPS = (12, 48)
ROWS = 16


def parsed(text: str) -> tuple[ast.Module, int] | None:
    """The text as Python, and the lines put before it: a document may be a piece of a class. None: it is not valid."""
    for before in ("", "class Piece:\n"):
        try:
            return ast.parse(before + text), before.count("\n")
        except (SyntaxError, ValueError):
            continue
    return None


def parses(text: str) -> bool:
    """Whether the text is valid Python."""
    return parsed(text) is not None


def documents_of(cache: Cache) -> list[StoredDocument]:
    """The documents that are whole and valid Python."""
    found: dict[str, StoredDocument] = {}
    for draw in cache.iter_draws():
        if not draw.stored.cut and parses(draw.stored.messages[0].content):
            found.setdefault(draw.document, draw.stored)
    return list(found.values())


@torch.no_grad()
def infilling(checkpoint: Checkpoint, cache: Cache) -> list[dict[str, Any]]:
    """One record per number of steps: shares of spans that are right and that leave the document valid."""
    size = checkpoint.block_size
    maker = RowMaker(checkpoint.text, cache.spec, size, context=None)
    rows: list[tuple[Row, np.ndarray]] = []
    for stored in documents_of(cache):
        view = maker.view(stored)
        if view is None:
            continue
        # Blocks that hold text alone; the first has no context and is left out.
        first_S = np.arange(size, len(view.encoded.ids_L) - size + 1, size) + MARGIN
        if len(first_S):
            masked_L = np.zeros(len(view.ids_L), np.bool_)
            masked_L[(first_S[:, None] + np.arange(WIDTH)).ravel()] = True
            rows.append((dataclasses.replace(maker.fresh_row(stored, 0), masked_L=masked_L), view.encoded.ids_L))
    records = []
    for steps in INFILL_STEPS:
        right, valid, spans = 0, 0, 0
        for start in range(0, len(rows), ROWS):
            for guess_SW, (row, ids_L) in _denoised(checkpoint, rows[start : start + ROWS], steps):
                first_S = np.flatnonzero(row.masked_L)[::WIDTH]
                for guess_W, first in zip(guess_SW, first_S, strict=True):
                    filled_L = ids_L.copy()
                    filled_L[first : first + WIDTH] = guess_W
                    right += bool((filled_L == ids_L).all())
                    valid += parses(_text(checkpoint, filled_L))
                    spans += 1
        records.append(
            {"tokens_per_forward": WIDTH / steps, "spans": spans, "exact": right / spans, "valid": valid / spans}
        )
    return records


def _text(checkpoint: Checkpoint, ids_L: np.ndarray) -> str:
    spelled = b"".join(checkpoint.text.token_bytes[token] for token in ids_L.tolist())
    return spelled.decode("utf-8", errors="replace")


def _denoised(
    checkpoint: Checkpoint, rows: list[tuple[Row, np.ndarray]], steps: int
) -> Iterator[tuple[np.ndarray, tuple[Row, np.ndarray]]]:
    """(guess_SW, row) of each row, its spans denoised in so many steps, the most certain tokens first."""
    student = checkpoint.student
    batch = Collator(student.mask_id, student.pad_id)([row for row, _ in rows])
    head = Head.of(student.model)
    noisy_BL = batch.noisy_BL.clone()
    open_SW = torch.ones(len(batch.sample_N) // WIDTH, WIDTH, dtype=torch.bool)
    for count in transferred_tokens(WIDTH, steps):
        hidden_ND = masked_hidden(student.model, dataclasses.replace(batch, noisy_BL=noisy_BL), checkpoint.block_size)
        best_N, logp_N = argmax_and_logp(hidden_ND, head)
        sure_SW = logp_N.view(open_SW.shape).masked_fill(~open_SW, -torch.inf)
        chosen_SW = torch.zeros_like(open_SW).scatter_(1, sure_SW.topk(count, dim=1).indices, True)
        open_SW &= ~chosen_SW
        chosen_N = chosen_SW.flatten()
        noisy_BL[batch.sample_N[chosen_N], batch.column_N[chosen_N]] = best_N[chosen_N]
    guess_SW = noisy_BL[batch.sample_N, batch.column_N].view(-1, WIDTH).numpy()
    start = 0
    for pair in rows:
        stop = start + int(pair[0].masked_L.sum()) // WIDTH
        yield guess_SW[start:stop], pair
        start = stop


@dataclass(frozen=True)
class Function:
    """A function of a document: the text before it, its source without its last statement (no newline at the end), the rest."""

    before: str
    given: str
    rest: str


def functions(cache: Cache) -> list[Function]:
    """All functions of two statements or more, a docstring counted as one."""
    found = []
    for stored in documents_of(cache):
        text = stored.messages[0].content
        module, added = parsed(text) or (ast.Module([], []), 0)
        lines = text.splitlines(keepends=True)
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef) and len(node.body) > 1 and node.lineno > added:
                first, given = node.lineno - 1 - added, (node.body[-2].end_lineno or 0) - added
                stop = (node.end_lineno or 0) - added
                source = "".join(lines[first:given]).removesuffix("\n")
                one = Function("".join(lines[:first]), source, "\n" + "".join(lines[given:stop]))
                if code_lines(one.rest):  # not `a; b` on one line
                    found.append(one)
    return found


def statements(source: str) -> int:
    """Of the function that `source` begins with; 0: it is not valid."""
    found = parsed(source)
    return len(next(node.body for node in ast.walk(found[0]) if isinstance(node, ast.FunctionDef))) if found else 0


def completions(checkpoint: Checkpoint, cache: Cache) -> list[dict[str, Any]]:
    """One record per number of steps: shares of functions that are valid with another statement, whose next line is right, and
    that are and end as the document's own, blank lines apart.
    """
    asked = functions(cache)
    prompts = [checkpoint.encode(one.before + one.given) for one in asked]
    records = []
    for steps in COMPLETION_STEPS:
        sampler = checkpoint.sampler()
        valid, line, exact = 0, 0, 0
        for start in range(0, len(asked), ROWS):
            options = SampleOptions(max_new_tokens=NEW_TOKENS, steps=steps, blocks=checkpoint.block_start)
            samples = sampler.sample(prompts[start : start + ROWS], options)
            for one, sample in zip(asked[start:], samples, strict=False):
                body, ended = function_body(one.given, checkpoint.decode(sample.ids), sample.finish == "length")
                written, right = code_lines(body), code_lines(one.rest)
                valid += statements(one.given + body) > statements(one.given)
                line += written[:1] == right[:1]
                exact += ended and written == right
        records.append(
            {
                "tokens_per_forward": sampler.usage.tokens_per_forward,
                "functions": len(asked),
                "valid": valid / len(asked),
                "next_line": line / len(asked),
                "exact": exact / len(asked),
            }
        )
    return records


def function_body(given: str, text: str, cut: bool) -> tuple[str, bool]:
    """What of `text`, written after `given`, still belongs to the function, and whether the function ended in it: the rest of the
    line, and the lines below it that are indented deeper than `def`; the last line is dropped where the text was cut in it.
    """
    indent = len(given) - len(given.lstrip())
    lines = text.splitlines(keepends=True)
    if cut and lines and not lines[-1].endswith("\n"):
        lines.pop()
    kept = lines[:1]
    for line in lines[1:]:
        if line.strip() and len(line) - len(line.lstrip()) <= indent:
            return "".join(kept), True
        kept.append(line)
    return "".join(kept), not cut


def code_lines(text: str) -> list[str]:
    """The lines that are not blank."""
    return [line.rstrip() for line in text.splitlines() if line.strip()]
