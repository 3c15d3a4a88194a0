"""The paper's training mixture as a named corpus: `paper-mixture` (TIDE, arXiv 2604.26951, its released scripts).

It is tulu-3-sft-mixture, smoltalk, and of both stages of OpenCoder's fine-tuning data the rows whose answer speaks of
Python. Rows are chats. The parts take turns, row by row, so that the first N documents are a sample of all of them; a
part that is used up drops out. Everything is streamed, and nothing is held but one row of each part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shared.errors import TidecacheError

NAME = "paper-mixture"


@dataclass(frozen=True)
class Part:
    """One data set of the mixture. `word`: only rows whose answer contains it, as the released scripts filter."""

    dataset: str
    configuration: str | None = None
    word: str | None = None


PARTS = (
    Part("allenai/tulu-3-sft-mixture"),
    Part("HuggingFaceTB/smoltalk", "all"),
    *(
        Part("OpenCoder-LLM/opc-sft-stage1", name, "python")
        for name in ("filtered_infinity_instruct", "largescale_diverse_instruct", "realuser_instruct")
    ),
    *(
        Part("OpenCoder-LLM/opc-sft-stage2", name, "python")
        for name in ("educational_instruct", "evol_instruct", "mceval_instruct", "package_instruct")
    ),
)


def rows(split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (where it stands, {`messages`: …}) over all parts in turn.

    Raises:
        TidecacheError: a part cannot be read; names it and the command that fetches it.
    """
    streams = [_part_rows(part, split) for part in PARTS]
    while streams:
        remaining = []
        for stream in streams:
            row = next(stream, None)
            if row is not None:
                yield row
                remaining.append(stream)
        streams = remaining


def _part_rows(part: Part, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import datasets

    place = part.dataset if part.configuration is None else f"{part.dataset}/{part.configuration}"
    number = 0
    try:
        for row in datasets.load_dataset(part.dataset, part.configuration, split=split, streaming=True):
            messages = row["messages"] if "messages" in row else _turns(row)
            if part.word is None or part.word in messages[-1]["content"]:
                yield f"{place}:{split}#{number}", {"messages": messages}
            number += 1
    except Exception as error:  # hub, network and data errors of many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TidecacheError(
            f"the corpus {NAME}: its part {place} cannot be read after {number} rows ({reason}): fetch it with "
            f"`hf download --repo-type dataset {part.dataset}`, or give another --corpus"
        ) from error


def _turns(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """OpenCoder's rows: an instruction and its output."""
    return [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
