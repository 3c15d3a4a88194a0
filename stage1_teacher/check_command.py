"""`tidecache teacher check`: measure a teacher's traits on real text and say which flag to change (`stage1_teacher.check`)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shared.errors import TidecacheError

if TYPE_CHECKING:
    from rich.console import Console

    from shared.documents import RawDocument
    from shared.tokenization import TextTokenizer
    from stage1_teacher.check import Check, Finding, Result
    from stage1_teacher.presets import Preset

FREQUENCY_DOCUMENTS = 400  # documents that token frequencies are counted on
COLOURS = {"ok": "green", "WRONG": "red", "unsure": "yellow"}


def check(
    teacher: Annotated[str, typer.Option(help="A preset, a TOML file, a model's folder, or a hub id.")] = "tiny",
    corpus: Annotated[str, typer.Option(help="Text that the teacher should know; as for capture.")] = "stdlib",
    documents: Annotated[int, typer.Option(min=2, help="Documents to measure on.")] = 16,
    length: Annotated[int, typer.Option(min=16, help="Tokens of each, at most.")] = 192,
    layout: Annotated[str | None, typer.Option(help="As for capture. Default: preset's.")] = None,
    block_size: Annotated[int | None, typer.Option(min=1, help="As for capture. Default: preset's.")] = None,
    mask_id: Annotated[int | None, typer.Option(min=0, help="As for capture. Default: preset's.")] = None,
    logit_shift: Annotated[
        bool | None, typer.Option("--logit-shift/--no-logit-shift", help="As for capture. Default: preset's.")
    ] = None,
    template: Annotated[Path | None, typer.Option(help="As for capture. Default: preset's.")] = None,
    dtype: Annotated[str | None, typer.Option(help="As for capture. Default: preset's.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(min=1, help="As for capture. Default: preset's.")] = None,
    text_column: Annotated[str | None, typer.Option(help="The corpus' column of plain text.")] = None,
    split: Annotated[str, typer.Option(help="The split of a dataset that has some.")] = "train",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers as JSON to this file.")] = None,
) -> None:
    """Measure on real text whether a teacher's layout, logit shift, mask token, tokenizer, template and type are right.

    Ends with an error that names the flags to change if something is wrong.
    """
    import torch
    from rich.console import Console

    from shared.corpus import open_corpus
    from stage1_teacher.architectures.tokenizers import teacher_tokenizer
    from stage1_teacher.backends import load
    from stage1_teacher.check import Check, unigram_nll
    from stage1_teacher.presets import find_preset, local_folder

    console = Console()
    preset = find_preset(teacher).with_flags(layout, block_size, mask_id, logit_shift, template)
    tokenizer = teacher_tokenizer(local_folder(preset.checkpoint), preset.name, preset.template)
    raws = list(itertools.islice(open_corpus(corpus, text_column=text_column, split=split), FREQUENCY_DOCUMENTS))
    chosen = _documents(raws, tokenizer, documents, length, preset.block_size or 32)
    wanted = dtype or preset.dtype
    # CPUs compute narrow types a hundred times slower: there the traits are measured in float32, and the type apart.
    measured_in = wanted if torch.cuda.is_available() else "float32"
    flags: dict[str, Any] = {
        "layout": layout, "block_size": block_size, "mask_id": mask_id, "logit_shift": logit_shift
    }  # fmt: skip
    budget = batch_tokens or preset.batch_tokens
    loaded: Any = load(teacher, **flags, dtype=measured_in, batch_tokens=budget)
    texts = ["".join(m.content for m in raw.messages) for raw in raws]
    checked = Check(loaded, tokenizer, chosen, unigram_nll(tokenizer, texts, chosen))
    result = checked.run()
    result.findings.append(_template(checked, tokenizer, raws[: 4 * documents], documents, length))
    result.findings.append(_dtype(checked, teacher, flags, wanted, measured_in, budget))
    _show(console, preset, result)
    if json_file is not None:
        json_file.write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
    if result.wrong:
        changes = "; ".join(f"{finding.trait}: change {finding.flag}" for finding in result.wrong)
        raise TidecacheError(f"the teacher {preset.name} is not read as it was trained: {changes}")


def _documents(
    raws: Sequence[RawDocument], tokenizer: TextTokenizer, count: int, length: int, block_size: int
) -> list[Any]:
    """Ids of the first documents that are long enough, those first that the corpus holds out from training."""
    from shared.tokenization import IrreproducibleText

    ordered = sorted(raws, key=lambda raw: raw.held_out is not True)
    chat = tokenizer.has_chat_template
    encoded = tokenizer.encode_many([(raw.messages, raw.chat and chat, False) for raw in ordered])
    long_enough = [e.ids_L[:length] for e in encoded if not isinstance(e, IrreproducibleText)]
    long_enough = [ids for ids in long_enough if len(ids) >= 3 * block_size + 2]
    if len(long_enough) < 2:
        raise TidecacheError(
            f"of the first {len(raws)} documents of the corpus {len(long_enough)} have {3 * block_size + 2} tokens, three "
            f"blocks of {block_size}: give a corpus with longer texts"
        )
    return long_enough[:count]


def _template(
    checked: Check, tokenizer: TextTokenizer, raws: Sequence[RawDocument], count: int, length: int
) -> Finding:
    """Whether the chat template helps the teacher to predict answers; only a corpus of chats can tell."""
    from shared.documents import Message
    from shared.tokenization import IrreproducibleText
    from stage1_teacher.check import Finding

    chats = [raw for raw in raws if raw.chat][:count]
    if not chats:
        return Finding("template", "unsure", "not measured: the corpus has no chats")
    if not tokenizer.has_chat_template:
        return Finding(
            "template", "WRONG", "the corpus has chats and the tokenizer has no chat template", "--template FILE"
        )
    plain = [
        (*(Message(m.role, f"{m.content}\n\n", m.trainable) for m in raw.messages[:-1]), raw.messages[-1])
        for raw in chats
    ]
    pairs = zip(
        tokenizer.encode_many([(raw.messages, True, False) for raw in chats]),
        tokenizer.encode_many([(messages, False, False) for messages in plain]),
        strict=True,
    )
    usable = [
        (a, b)
        for a, b in pairs
        if not isinstance(a, IrreproducibleText)
        and not isinstance(b, IrreproducibleText)
        and max(len(a.ids_L), len(b.ids_L)) <= 4 * length
    ]
    if len(usable) < 2:
        return Finding("template", "unsure", f"not measured: fewer than 2 of {len(chats)} chats are short enough")
    return checked.template([a for a, _ in usable], [b for _, b in usable])


def _dtype(
    checked: Check, teacher: str, flags: Mapping[str, Any], wanted: str, measured_in: str, batch_tokens: int
) -> Finding:
    from stage1_teacher.backends import load
    from stage1_teacher.check import Finding

    if wanted == "float32":
        return Finding("dtype", "ok", "float32")
    other = "float32" if measured_in != "float32" else wanted
    try:
        second: Any = load(teacher, **flags, dtype=other, batch_tokens=batch_tokens)
    except TidecacheError as error:
        return Finding("dtype", "unsure", f"{wanted} against float32 not measured: {error}")
    return checked.drift(second, wanted)


def _show(console: Console, preset: Preset, result: Result) -> None:
    from rich.table import Table

    from stage1_teacher.check import TIMESTEPS

    console.print(
        f"[bold]{preset.name}[/bold] on {result.documents} documents, {result.tokens:,} tokens; nats per token of the gold, "
        f"and how often it is the most likely token",
        highlight=False,
    )
    table = Table(title="as captured", title_justify="left", box=None, pad_edge=False)
    table.add_column("layout")
    for t in TIMESTEPS:
        table.add_column(f"t = {t}", justify="right")
    for name, row in result.by_timestep:
        table.add_row(name, *(f"{m.mean:.3f}  {m.top1:4.0%}" for m in row))
    console.print(table, highlight=False)
    table = Table(
        title="one block in the middle masked, all else clean", title_justify="left", box=None, pad_edge=False
    )
    for title in ("layout", "logits from row", "nats", "first"):
        table.add_column(title, justify="left" if title == "layout" else "right")
    for name, shift, measured in result.one_block:
        row_name = {0: "i", 1: "i − 1", -1: "i + 1"}[shift]
        table.add_row(name, row_name, f"{measured.mean:.3f}", f"{measured.top1:.0%}")
    console.print(table, highlight=False)
    findings = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for finding in result.findings:
        colour = COLOURS[finding.verdict]
        change = f" → change {finding.flag}" if finding.flag else ""
        findings.add_row(f"[{colour}]{finding.verdict}[/{colour}]", finding.trait, finding.detail + change)
    console.print(findings, highlight=False)
