"""The capture spec: all that decides the content of a draw and its likelihoods, and its fingerprint (DESIGN §2, §3).

Two captures with the same spec give the same cache; any other field is another cache. Choices of stage 2 are no part of
it, nor is the extent (which documents, how many draws), which may grow.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shared.errors import TidecacheError, shown

FORMAT_VERSION = 1
CONTEXTS = ("compdemo", "plain")
LANES = ("gold", "topk")
MASK_LAWS = ("chunk", "token")
LAYOUTS = ("full", "block-causal", "bd3lm", "reordered")
TAIL_TEMPERATURE = 2.0  # of tail samples; one for all caches, so that temperatures can be added later
CODECS = ("raw", "packed")  # of the topk lane, see `shared.cache.codec`


@dataclass(frozen=True)
class TeacherSpec:
    """The teacher as the cache knows it. Digests are of content (`shared.digests`), never of names or paths."""

    name: str  # the preset, or the folder's last part; names the cache's folder
    architecture: str
    weights: str
    tokenizer: str
    vocabulary: int  # rows of the head that the tokenizer knows; the log-softmax runs over these
    layout: str
    block_size: int
    mask_id: int
    logit_shift: bool
    noise_kernel: str = "mask"
    dtype: str = "float32"


@dataclass(frozen=True)
class StudentTokenizerSpec:
    """One declared student tokenizer: its boundaries shape the chunks, its limit (tokens) cuts the documents."""

    name: str
    tokenizer: str
    length_limit: int


@dataclass(frozen=True)
class CaptureSpec:
    """See the module. Lengths in tokens, temperatures without unit, `batch_tokens` in tokens per teacher batch."""

    teacher: TeacherSpec
    students: tuple[StudentTokenizerSpec, ...]
    length_limit: int  # of the teacher's sequence
    normal_form: str = "none"  # or "NFC"; one form for all tokenizers
    mask_law: str = "chunk"
    demo_ratio: float = 0.5
    epsilon: float = 1e-3
    seed: int = 0
    contexts: tuple[str, ...] = ("compdemo",)
    lanes: tuple[str, ...] = ("gold", "topk")
    k: int = 16
    temperatures: tuple[float, ...] = (1.0, 2.0)
    tail_samples: int = 0  # per chunk of one token, of the tail beyond its k best tokens
    codec: str = "raw"
    batch_tokens: int = 4096
    dedup: str = "content"
    held_out: str = "hash:0.02"  # rule of the split: `hash:SHARE`, `corpus` (named by the corpus) or `none`
    format: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Refuse what no capture can mean."""
        for field, value, allowed in (
            ("mask_law", self.mask_law, MASK_LAWS),
            ("codec", self.codec, CODECS),
            ("teacher.layout", self.teacher.layout, LAYOUTS),
            ("normal_form", self.normal_form, ("none", "NFC")),
        ):
            if value not in allowed:
                raise TidecacheError(f"{field}: expected one of {', '.join(allowed)}, found {value!r}")
        if not self.contexts or set(self.contexts) - set(CONTEXTS):
            raise TidecacheError(
                f"contexts: expected some of {', '.join(CONTEXTS)}, found {', '.join(self.contexts) or 'none'}"
            )
        if "gold" not in self.lanes or set(self.lanes) - set(LANES):
            raise TidecacheError(f"lanes: expected gold, and topk or not, found {', '.join(self.lanes) or 'none'}")
        if self.mask_law == "token" and len(self.students) != 1:
            raise TidecacheError(
                f"the mask law `token` masks the tokens of one student and needs exactly one declared student tokenizer; "
                f"{len(self.students)} are declared: declare one, or take the mask law `chunk`"
            )
        if 1.0 not in self.temperatures or any(t <= 0 for t in self.temperatures):
            raise TidecacheError(f"temperatures: expected positive numbers, 1 among them, found {self.temperatures}")
        if not 0.0 < self.demo_ratio < 1.0:
            raise TidecacheError(f"demo_ratio: expected a number between 0 and 1, found {self.demo_ratio}")
        if self.tail_samples < 0 or (self.tail_samples and "topk" not in self.lanes):
            raise TidecacheError(
                f"tail_samples: expected 0, or a positive number and the topk lane, found {self.tail_samples} and the lanes "
                f"{', '.join(self.lanes)}"
            )
        if self.k < 1:
            raise TidecacheError(f"k: expected at least 1, found {self.k}")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, tuples as lists. `tail_samples` stands there only where it is not 0."""
        found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        if not self.tail_samples:
            del found["tail_samples"]  # caches from before there was such a thing keep their fingerprint
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CaptureSpec:
        """Read `to_json`'s form.

        Raises:
            TidecacheError: a field is missing, unknown, or of another type; it is named.
        """
        try:
            known = dict(data)
            teacher = TeacherSpec(**known.pop("teacher"))
            students = tuple(StudentTokenizerSpec(**s) for s in known.pop("students"))
            for name in ("contexts", "lanes", "temperatures"):
                known[name] = tuple(known[name]) if isinstance(known[name], list) else known[name]
            for part, where in ((teacher, "teacher."), *((s, f"students.{i}.") for i, s in enumerate(students))):
                _check_types(vars(part), type(part), where)
            _check_types(known, cls, "")
            return cls(teacher=teacher, students=students, **known)
        except (KeyError, TypeError, ValueError) as error:
            message = shown(str(error), 200)
            raise TidecacheError(f"the spec does not have the fields of format {FORMAT_VERSION}: {message}") from error

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits: BLAKE2b of the canonical JSON."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def unwidenable(base: CaptureSpec, wider: CaptureSpec) -> list[tuple[str, Any, Any]]:
    """(dotted field, base's value, wider's value) for every difference by which a cache of `base` cannot become one of
    `wider`: contexts, the topk lane, a larger k, temperatures and more tail samples can be added, and nothing else.
    """
    had, has = "topk" in base.lanes, "topk" in wider.lanes
    adds = {
        "contexts": set(base.contexts) < set(wider.contexts),
        "lanes": set(base.lanes) < set(wider.lanes),
        "k": has and (not had or base.k < wider.k),
        "temperatures": has and (not had or set(base.temperatures) < set(wider.temperatures)),
        "tail_samples": has and (not had or base.tail_samples < wider.tail_samples),
        "codec": has and not had,
    }
    return [difference for difference in differences(base, wider) if not adds.get(difference[0], False)]


_MAX_TEXT, _MAX_VALUES, _MAX_SIZE, _MAX_SEED = 1000, 64, (1 << 31) - 1, (1 << 63) - 1


def _check_types(values: Mapping[str, Any], kind: type, where: str) -> None:
    """What JSON gave for the fields of one of the classes above: types, finite numbers, text that can be printed.

    Raises:
        TidecacheError: a field is something else, or out of all bounds.
    """
    for field in dataclasses.fields(kind):
        expected, value = str(field.type), values.get(field.name)
        if field.name not in values or expected in ("TeacherSpec", "tuple[StudentTokenizerSpec, ...]"):
            continue
        several, element = expected.startswith("tuple["), expected.removeprefix("tuple[").removesuffix(", ...]")
        parts = value if isinstance(value, tuple) else (value,)
        if (
            isinstance(value, tuple) != several
            or len(parts) > _MAX_VALUES
            or not all(_is_sound(v, element, field.name) for v in parts)
        ):
            raise TidecacheError(f"{where}{field.name}: expected {expected}, found {shown(value)}")


def _is_sound(value: object, kind: str, name: str) -> bool:
    if kind == "bool":
        return type(value) is bool
    if kind == "str":
        return isinstance(value, str) and value.isprintable() and len(value) <= _MAX_TEXT
    if type(value) is not int and (type(value) is not float or kind == "int"):  # true is no number
        return False
    return abs(value) <= _MAX_SEED if name == "seed" else 0 <= value <= _MAX_SIZE  # never so of NaN


def differences(ours: CaptureSpec, theirs: CaptureSpec) -> list[tuple[str, Any, Any]]:
    """(dotted field, our value, their value) for every field that differs, in order."""

    def flat(value: Any, prefix: str) -> dict[str, Any]:
        if isinstance(value, dict):
            return {k: v for key, item in value.items() for k, v in flat(item, f"{prefix}{key}.").items()}
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return {k: v for i, item in enumerate(value) for k, v in flat(item, f"{prefix}{i}.").items()}
        return {prefix.rstrip("."): value}

    absent = {"tail_samples": 0}  # what `to_json` leaves out
    a, b = flat(absent | ours.to_json(), ""), flat(absent | theirs.to_json(), "")
    return [(name, a.get(name), b.get(name)) for name in {**a, **b} if a.get(name) != b.get(name)]
