"""From options to a capture: what they mean is checked first, the teacher is loaded last (`capture`, `plan`, …).

A `Draft` is all that can be known without the weights: the preset, the corpus, the tokenizers, and the spec but for its
teacher. So a mistake in a choice shows at once, not after the minutes that a large checkpoint takes to load.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shared.cache.manifest import MANIFEST_FILE, fingerprint_of
from shared.errors import TidecacheError
from shared.preparation import common_normal_form
from shared.spec import CaptureSpec, StudentTokenizerSpec, TeacherSpec
from shared.tokenization import TextTokenizer
from stage1_teacher.architectures.tokenizers import teacher_tokenizer
from stage1_teacher.capture import Extent
from stage1_teacher.options import CaptureOptions
from stage1_teacher.planning import WHOLE, ShardPart
from stage1_teacher.presets import PACKAGES, Preset, find_preset, local_folder

if TYPE_CHECKING:
    from stage1_teacher.backends import Teacher

ENGINES = ("local", "ray")
CONTEXTS = {"compdemo": ("compdemo",), "plain": ("plain",), "both": ("compdemo", "plain")}
EMBEDDED_STUDENT = "package:stage2_student/tiny"
LENGTH = 512  # tokens, where neither the preset nor a flag says
UNLOADED = TeacherSpec("", "", "", "", 0, "full", 1, 0, False)  # stands in the spec until the teacher is loaded


@dataclass(frozen=True)
class Draft:
    """A capture before its teacher is loaded: `spec` is complete but for the teacher."""

    options: CaptureOptions
    preset: Preset
    extent: Extent
    tokenizer: TextTokenizer  # the teacher's
    students: tuple[TextTokenizer, ...]
    spec: CaptureSpec

    @classmethod
    def of(cls, options: CaptureOptions) -> Draft:
        """Read the options.

        Raises:
            TidecacheError: there is no such corpus, preset or tokenizer, or a choice that no capture can mean.
        """
        o = options
        refuse_tail(o.tail_samples, o.backend)
        if o.engine not in ENGINES:
            raise TidecacheError(f"--engine: expected {' or '.join(ENGINES)}, found {o.engine!r}")
        if o.engine != "ray" and (o.actors, o.gpus_per_actor) != (None, None):
            raise TidecacheError(
                "--actors and --gpus-per-actor are of Ray's actors: add --engine ray, or leave them out"
            )
        preset = find_preset(o.teacher).with_flags(o.layout, o.block_size, o.mask_id, o.logit_shift, o.template)
        part = ShardPart.parse(o.part) if o.part is not None else WHOLE
        extent = Extent(o.corpus, o.draws, o.documents_per_shard, o.text_column, o.split, o.limit, part)
        extent.open()
        length = o.length or preset.length or LENGTH
        tokenizer = teacher_tokenizer(local_folder(preset.checkpoint), preset.name, preset.template)
        students = tuple(student_tokenizer(s) for s in o.students or preset.students or [EMBEDDED_STUDENT])
        spec = CaptureSpec(
            teacher=UNLOADED,
            students=tuple(StudentTokenizerSpec(s.name, s.digest, o.student_length or length) for s in students),
            length_limit=length,
            normal_form=common_normal_form([tokenizer, *students]),
            mask_law=o.mask_law,
            demo_ratio=o.demo_ratio,
            seed=o.seed,
            contexts=contexts_of(o.context),
            lanes=words(o.lanes),
            k=o.k,
            temperatures=numbers(o.temperatures),
            tail_samples=o.tail_samples,
            codec=o.codec,
            batch_tokens=o.batch_tokens or preset.batch_tokens,
            held_out=_held_out(o.held_out, o.corpus),
        )
        return cls(options, preset, extent, tokenizer, students, spec)

    def load(self) -> tuple[Teacher, CaptureSpec]:
        """The teacher, and the whole spec.

        Raises:
            TidecacheError: the weights cannot be loaded, or the teacher cannot do what the spec asks for.
        """
        from stage1_teacher.backends import load

        o = self.options
        loaded = load(
            o.teacher,
            o.backend,
            o.layout,
            o.block_size,
            o.mask_id,
            o.logit_shift,
            self.spec.temperatures,
            o.dtype or self.preset.dtype,
            self.spec.batch_tokens,
            o.tensor_parallel,
        )
        teacher = _teacher_spec(loaded, self.tokenizer, self.spec.length_limit)
        return loaded, dataclasses.replace(self.spec, teacher=teacher)

    def folder(self, spec: CaptureSpec) -> Path:
        """Where the cache of this spec lies: --out, or a name of its own under $TIDECACHE_HOME, or there under the name
        that it had before it was extended to this spec.
        """
        if self.options.out is not None:
            return self.options.out
        home = Path(os.environ.get("TIDECACHE_HOME") or "caches")
        own = home / f"{self.preset.name}-{spec.fingerprint[:12]}"
        others = sorted(home.glob(f"*/{MANIFEST_FILE}")) if not own.exists() else []
        others = [path for path in others if path.parent.name.startswith(f"{self.preset.name}-")]
        return next((path.parent for path in others if fingerprint_of(path) == spec.fingerprint), own)


def refuse_tail(tail_samples: int, backend: str) -> None:
    """Refuse tail samples from a backend that draws none.

    Raises:
        TidecacheError: it is so.
    """
    if tail_samples and backend != "transformers":
        raise TidecacheError(
            f"--tail-samples {tail_samples}: only the backend transformers samples the tail, found --backend {backend}: "
            f"take --backend transformers, or pass --tail-samples 0 and store a larger --k"
        )


def _teacher_spec(loaded: Teacher, tokenizer: TextTokenizer, length: int) -> TeacherSpec:
    if loaded.mask_id is None:
        raise TidecacheError(
            f"the teacher {loaded.name} has no mask token: neither its tokenizer nor its config.json names one; give its id with "
            f"--mask-id (a teacher that was not trained with one, such as a uniform-noise model, cannot be used)"
        )
    if loaded.length_limit is not None and length > loaded.length_limit:
        raise TidecacheError(
            f"--length {length}: the teacher {loaded.name} has positions for {loaded.length_limit} tokens; give at most that"
        )
    return TeacherSpec(
        name=loaded.name,
        architecture=loaded.architecture,
        weights=loaded.weights,
        tokenizer=tokenizer.digest,
        vocabulary=loaded.vocabulary,
        layout=loaded.layout,
        block_size=loaded.block_size,
        mask_id=loaded.mask_id,
        logit_shift=loaded.logit_shift,
        dtype=loaded.dtype,
    )


def student_tokenizer(source: str) -> TextTokenizer:
    """A declared student's tokenizer, by folder, hub id, or `package:FOLDER`."""
    if source.startswith("package:"):
        return TextTokenizer.load(PACKAGES / source.removeprefix("package:"))
    return TextTokenizer.load(source)


def contexts_of(text: str) -> tuple[str, ...]:
    """The contexts of --context."""
    if text not in CONTEXTS:
        raise TidecacheError(f"--context: expected one of {', '.join(CONTEXTS)}, found {text!r}")
    return CONTEXTS[text]


def words(text: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def numbers(text: str) -> tuple[float, ...]:
    """The temperatures of --temperatures."""
    try:
        return tuple(float(word) for word in words(text))
    except ValueError:
        raise TidecacheError(
            f"--temperatures: expected numbers parted by commas, such as 1,2, found {text!r}"
        ) from None


def _held_out(text: str | None, corpus: str) -> str:
    """The spec's rule of the split."""
    if text is None:
        return "corpus" if corpus == "stdlib" else "hash:0.02"
    if text in ("corpus", "none"):
        return text
    from shared.corpus import held_out_rule

    rule = f"hash:{text.removeprefix('hash:')}"
    try:
        held_out_rule(rule)
    except TidecacheError:
        raise TidecacheError(
            f"--held-out: expected a share from 0 to below 1 such as 0.02, `corpus` or `none`, found {text!r}"
        ) from None
    return f"hash:{float(rule.removeprefix('hash:'))}"
