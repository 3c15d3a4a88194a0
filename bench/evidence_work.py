"""The work behind a cell of `bench/evidence.py`: corpora, captures, slices, training, and what is measured.

Texts are documents of this Python's standard library: students are trained on modules that both embedded models know, and
measured on modules that neither has seen, leaving out those that `make demo` looks at, since the embedded base's
settings were chosen on them. Learning rates are chosen on other documents than those of the results.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from evidence_cells import CacheChoice, Cell, Scale
from evidence_generation import completions, infilling
from evidence_teachers import Control
from rich.console import Console
from tiny import byte_level_bpe
from tokenizers import pre_tokenizers

from shared.cache import open_cache
from shared.cache.reader import Cache
from shared.cache.records import Draw, StoredDocument
from shared.cache.slicing import Cut, slice_cache
from shared.corpus import open_corpus
from shared.documents import RawDocument
from shared.embedded import embedded_or
from shared.noise import stream_key, uniforms
from shared.spec import CaptureSpec
from shared.tokenization import TextTokenizer
from stage1_teacher.backends import Teacher
from stage1_teacher.capture import Capture, Report
from stage1_teacher.draft import Draft
from stage1_teacher.options import CaptureOptions
from stage1_teacher.plan_sample import Unheard
from stage1_teacher.shards import LocalEngine, ShardMaker
from stage2_student import data
from stage2_student.config import base_defaults, load_recipe
from stage2_student.data import View
from stage2_student.evaluation import evaluate, evaluate_teacher
from stage2_student.inference import open_checkpoint
from stage2_student.run import train
from stage2_student.score import bound

DEMO_DOCUMENTS = 400  # of the corpus; the held-out ones among them are the demonstration's test set
VALIDATION_DOCUMENTS = 64
VOCABULARIES = (1024, 2048, 16384)  # of further declared tokenizers, trained on the same text


def remember_views() -> None:
    """Keep documents in the student's tokens, and what was spelled in them, from one student to the next: they are the same,
    and a fifth of an event-KL student's time. Times of training are measured elsewhere (`evidence_costs`).
    """
    make, kept = data.view_document, {}

    def view_document(tokenizer: TextTokenizer, stored: StoredDocument, *rest: Any) -> View:
        key = (tokenizer.digest, stored.key, stored.chunks.start_C.tobytes(), stored.chunks.stop_C.tobytes(), *rest)
        if key not in kept:
            kept[key] = make(tokenizer, stored, *rest)
        return kept[key]

    data.view_document = view_document


@dataclass(frozen=True)
class Pair:
    """Teacher and student base, as `teacher capture` and `student train` name them; `tokenizer`: the student's."""

    teacher: str = "tiny"
    base: str = "tiny"
    tokenizer: str = "package:stage2_student/tiny"
    layout: str | None = None
    block_size: int | None = None
    device: str = "cpu"


def capture(draft: Draft, teacher: Teacher, spec: CaptureSpec, folder: Path) -> Report:
    """As `tidecache teacher capture` does it, with any teacher."""
    engine = LocalEngine(teacher, ShardMaker(spec, draft.tokenizer, draft.students))
    return Capture(engine, draft.tokenizer, spec, draft.extent, folder, Unheard()).run()


@dataclass(frozen=True)
class Captured:
    """A captured cache and what it took; seconds of the whole capture and of the teacher in it."""

    folder: Path
    seconds: float
    teacher_seconds: float
    bytes: int


class Workshop:
    """Everything that the cells of one run share, made when it is first asked for and kept in `folder`."""

    def __init__(self, folder: Path, scale: Scale, console: Console, pair: Pair = Pair()) -> None:
        self.folder = folder
        self.scale = scale
        self.console = console
        self.pair = pair
        folder.mkdir(parents=True, exist_ok=True)

    # --- texts ---------------------------------------------------------------------------------------------------

    @cached_property
    def corpora(self) -> dict[str, Path]:
        """JSON Lines files: `train`, `validation`, `test`, `wide`."""
        held_out = [raw for raw in open_corpus("stdlib") if raw.held_out]
        shown = {raw.key for raw in islice(open_corpus("stdlib"), DEMO_DOCUMENTS)}
        unseen = [raw for raw in held_out if raw.key not in shown]
        texts = {
            "train": list(islice((r for r in open_corpus("stdlib") if not r.held_out), self.scale.documents)),
            "validation": unseen[:VALIDATION_DOCUMENTS],
            "test": unseen[VALIDATION_DOCUMENTS:][: self.scale.test_documents],
            "wide": unseen[VALIDATION_DOCUMENTS + self.scale.test_documents :][: self.scale.wide_documents],
        }
        return {name: self._write(name, documents) for name, documents in texts.items()}

    def _write(self, name: str, documents: list[RawDocument]) -> Path:
        path = self.folder / f"{name}.jsonl"
        lines = [json.dumps({"text": raw.messages[0].content, "name": raw.name}) for raw in documents]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    # --- caches --------------------------------------------------------------------------------------------------

    def captured(self, choice: CacheChoice) -> Captured:
        """Capture what `choice` is sliced from, or find it done."""
        choice = choice.captured()
        declared = "" if choice.declared else "-undeclared"
        name = f"{choice.teacher}-{choice.mask_law}-{choice.tokenizers}{declared}"
        return self.capture(name, self._corpus_of(choice), choice, self.scale.draws)

    def measured_on(self, name: str) -> Cache:
        """The held-out cache `test`, `validation` or `wide`: two draws per document, by the embedded teacher."""
        found = self.capture(f"held-out-{name}", self.corpora[name], CacheChoice(k=1), 2)
        return open_cache(found.folder)

    def capture(self, name: str, corpus: Path, choice: CacheChoice, draws: int, context: str | None = None) -> Captured:
        """Capture a corpus as `choice` says (its draws apart), or find it done; `context`: another than the scale's."""
        folder, note = self.folder / "caches" / name, self.folder / "caches" / f"{name}.json"
        if note.exists():
            return Captured(folder, **json.loads(note.read_text(encoding="utf-8")))
        options = CaptureOptions(
            teacher=self.pair.teacher,
            layout=self.pair.layout,
            block_size=self.pair.block_size,
            corpus=str(corpus),
            draws=draws,
            context=context or self.scale.contexts,
            held_out="none",
            k=choice.k,
            mask_law=choice.mask_law,
            students=self._students(choice),
        )
        draft = Draft.of(options)
        teacher, spec = draft.load()
        if choice.teacher not in ("tiny", "completed"):
            teacher = Control(teacher, choice.teacher)
            spec = replace(spec, teacher=replace(spec.teacher, name=teacher.name, weights=teacher.weights))
        report = capture(draft, teacher, spec, folder)
        took = {
            "seconds": report.seconds,
            "teacher_seconds": report.timing.teacher,
            "bytes": report.train.manifest.totals.size_bytes,
        }
        note.write_text(json.dumps(took), encoding="utf-8")
        self.console.print(f"captured {name}: {report.seconds:.0f} s, {took['bytes']:,} bytes", highlight=False)
        return Captured(folder, **took)

    def cache_of(self, choice: CacheChoice) -> Path:
        """The cache that a cell is trained from: captured, then cut to its draws and candidates."""
        whole = self.captured(choice).folder
        draws = min(choice.draws or self.scale.draws, self.scale.draws)
        out = whole.with_name(f"{whole.name}-draws{draws}-k{choice.k}")
        slice_cache(whole, out, Cut(draws=draws, k=choice.k))
        return out

    def _corpus_of(self, choice: CacheChoice) -> Path:
        return self._completed() if choice.teacher == "completed" else self.corpora["train"]

    def _completed(self) -> Path:
        """The training texts with the masked chunks of each document's first draw sampled from the teacher."""
        path = self.folder / "completed.jsonl"
        if not path.exists():
            cache = open_cache(self.captured(CacheChoice()).folder)
            lines = [
                json.dumps({"text": completed_text(draw), "name": draw.stored.name})
                for draw in cache.iter_draws()
                if draw.draw == 0
            ]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    def _students(self, choice: CacheChoice) -> list[str]:
        """The student's tokenizer, if it is declared, and as many others trained on the same text as make up the count."""
        own = [self.pair.tokenizer] if choice.declared else []
        return [*own, *(str(self._tokenizer(size)) for size in VOCABULARIES[: choice.tokenizers - len(own)])]

    def _tokenizer(self, size: int) -> Path:
        folder = self.folder / f"tokenizer-{size}"
        if not (folder / "tokenizer.json").exists():
            texts = [json.loads(line)["text"] for line in self.corpora["train"].read_text().splitlines()]
            byte_level_bpe(size, texts, pre_tokenizers.ByteLevel(add_prefix_space=False)).save_pretrained(folder)
        return folder

    # --- students ------------------------------------------------------------------------------------------------

    def result(self, cell: Cell) -> dict[str, Any]:
        """Train a cell's student and measure it."""
        took = self.train(cell)
        totals = open_cache(self.cache_of(cell.cache)).manifest.totals
        chunks = {"tokens_per_chunk": totals.scored_tokens / totals.masked_chunks, "cut": totals.cut}
        return {"train_seconds": took, "cache": chunks, **self.measure(self.student, cell.documents)}

    @property
    def student(self) -> Path:
        """Where the student in work lies."""
        return self.folder / "student"

    def train(self, cell: Cell) -> float:
        """Train a cell's student; seconds."""
        cache, out = self.cache_of(cell.cache), self.student
        shutil.rmtree(out, ignore_errors=True)
        base = embedded_or(self.pair.base)
        overrides = {
            "batch": self.scale.batch,
            "steps": self.scale.steps,
            "learning_rate": self.scale.learning_rate,
            "tidal": "none",
            "fresh": 0.0,
            "reuse": "same",
            "save_steps": 0,
            "seed": cell.seed,
            **dict(cell.recipe),
        }
        config = load_recipe("reverse-calm-tidal", overrides, base_defaults(base))
        return float(train(config, str(cache), base, out, console=Console(quiet=True))["seconds"])

    def measure(self, model: Path | str, documents: str = "test") -> dict[str, Any]:
        """Likelihood, accuracy and calibration on held-out draws; infilling on all but `validation`, and completion on `wide`,
        the others having few functions.
        """
        checkpoint = open_checkpoint(model, device=self.pair.device)
        cache = self.measured_on(documents)
        found = evaluate(checkpoint.student, cache, checkpoint.block_size, device=self.pair.device)
        measured: dict[str, Any] = {"quality": found.to_json(), "bits_per_byte": bound(found)}
        if documents != "validation":
            measured["infilling"] = infilling(checkpoint, cache)
        if documents == "wide":
            measured["completion"] = completions(checkpoint, cache)
        return measured

    def teacher_quality(self) -> dict[str, Any]:
        """The embedded teacher on the same draws, by context: a reference, since it sees another context."""
        return {name: found.to_json() for name, found in evaluate_teacher(self.measured_on("test")).items()}


def completed_text(draw: Draw) -> str:
    """A document with every masked chunk of a draw replaced by a candidate, sampled in proportion to its likelihood.

    Chunks are independent given the rest, as the teacher says them. A sample that is no valid UTF-8 leaves the text's own.
    """
    chance_M = uniforms(stream_key(0, draw.document, "completed"), len(draw.chunks))
    filling = {}
    for chunk, candidates, chance in zip(draw.chunks.tolist(), draw.candidates, chance_M, strict=True):
        share_K = np.exp([logp for _, logp in candidates])
        place = int(np.searchsorted(np.cumsum(share_K), chance * share_K.sum(), side="right"))
        filling[chunk] = candidates[min(place, len(candidates) - 1)][0]
    chunks, content = draw.stored.chunks, draw.stored.contents[0]
    parts, at = [], 0
    for chunk, (start, stop) in enumerate(zip(chunks.start_C.tolist(), chunks.stop_C.tolist(), strict=True)):
        spelled = filling.get(chunk, content[start:stop])
        parts += [content[at:start], spelled]
        at = stop
    text = b"".join([*parts, content[at:]])
    return text.decode("utf-8", errors="ignore")
