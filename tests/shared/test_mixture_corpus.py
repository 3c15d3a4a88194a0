"""The paper's mixture: its parts take turns, OpenCoder's rows are filtered, and a missing part is named."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from shared import mixture_corpus
from shared.corpus import open_corpus
from shared.errors import TidecacheError


def chat(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": text}]}


def fake(name: str, configuration: str | None, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
    assert streaming
    assert split == "train"
    short = name.split("/")[1]
    if "opc" in short:
        for number in range(4):
            word = "python" if number % 2 else "java"
            yield {"instruction": "write", "output": f"{short} {configuration} {word} {number}", "tag": ""}
    else:
        count = 2 if short == "smoltalk" else 3
        yield from (chat(f"{short} {configuration} {number}") for number in range(count))


def test_parts_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", fake)
    documents = list(open_corpus("paper-mixture"))
    answers = [d.messages[-1].content for d in documents]
    assert len(answers) == 3 + 2 + 7 * 2
    assert [a.split()[0] for a in answers[:9]] == [p.dataset.split("/")[1] for p in mixture_corpus.PARTS]
    assert answers[0] == "tulu-3-sft-mixture None 0"
    assert answers[1] == "smoltalk all 0"
    assert answers[-1] == "tulu-3-sft-mixture None 2"
    assert all("python" in a for a in answers if a.startswith("opc"))
    assert all(d.chat and d.messages[-1].trainable and not d.messages[0].trainable for d in documents)
    assert [d.key for d in open_corpus("paper-mixture")] == [d.key for d in documents]
    assert len({d.name for d in documents}) == len(documents)
    assert len(list(open_corpus("paper-mixture", limit=4))) == 4


def test_a_part_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(name: str, *rest: Any, **more: Any) -> Any:
        if "stage2" in name:
            raise ConnectionError("no network\nat all")
        return fake(name, *rest, **more)

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        TidecacheError, match=r"hf download --repo-type dataset OpenCoder-LLM/opc-sft-stage2`"
    ) as caught:
        list(itertools.islice(open_corpus("paper-mixture"), 9))
    assert "\n" not in str(caught.value)
