"""The spec is the cache's identity: any field changes the fingerprint, and the change is named."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from shared.errors import TidecacheError
from shared.spec import CaptureSpec, StudentTokenizerSpec, TeacherSpec, differences
from tests.conftest import ROOT

TEACHER = TeacherSpec("tiny", "Qwen3ForCausalLM", "a" * 32, "b" * 32, 8192, "full", 32, 3, False)
STUDENT = StudentTokenizerSpec("small", "c" * 32, 512)
SPEC = CaptureSpec(TEACHER, (STUDENT,), 512)

OTHER_VALUES = {
    "length_limit": 256,
    "normal_form": "NFC",
    "mask_law": "token",
    "demo_ratio": 0.25,
    "epsilon": 1e-2,
    "seed": 1,
    "codec": "packed",
    "contexts": ("compdemo", "plain"),
    "lanes": ("gold",),
    "k": 8,
    "temperatures": (1.0,),
    "tail_samples": 4,
    "batch_tokens": 2048,
    "dedup": "none",
    "held_out": "corpus",
    "format": 2,
}
OTHER_TEACHER = {
    "name": "huge",
    "architecture": "LlamaForCausalLM",
    "weights": "d" * 32,
    "tokenizer": "e" * 32,
    "vocabulary": 8191,
    "layout": "bd3lm",
    "block_size": 16,
    "mask_id": 4,
    "logit_shift": True,
    "noise_kernel": "uniform",
    "dtype": "bfloat16",
}
OTHER_STUDENT = {"name": "large", "tokenizer": "f" * 32, "length_limit": 256}


def mutations() -> list[tuple[str, CaptureSpec]]:
    changed = [(f, dataclasses.replace(SPEC, **{f: v})) for f, v in OTHER_VALUES.items()]
    for field, value in OTHER_TEACHER.items():
        changed.append(
            (f"teacher.{field}", dataclasses.replace(SPEC, teacher=dataclasses.replace(TEACHER, **{field: value})))
        )
    for field, value in OTHER_STUDENT.items():
        student = dataclasses.replace(STUDENT, **{field: value})
        changed.append((f"students.0.{field}", dataclasses.replace(SPEC, students=(student,))))
    return changed


def test_the_mutations_cover_every_field():
    covered = {name.split(".")[0] for name, _ in mutations()}
    assert covered == {f.name for f in dataclasses.fields(CaptureSpec)}
    assert set(OTHER_TEACHER) == {f.name for f in dataclasses.fields(TeacherSpec)}
    assert set(OTHER_STUDENT) == {f.name for f in dataclasses.fields(StudentTokenizerSpec)}


@pytest.mark.parametrize(("field", "other"), mutations(), ids=[name for name, _ in mutations()])
def test_each_field_changes_the_fingerprint_and_is_named(field, other):
    assert other.fingerprint != SPEC.fingerprint
    assert [name for name, _, _ in differences(SPEC, other)] == [field]
    [(_, ours, theirs)] = differences(SPEC, other)
    assert ours != theirs


def test_mutations_give_distinct_fingerprints():
    prints = [SPEC.fingerprint, *(s.fingerprint for _, s in mutations())]
    assert len(set(prints)) == len(prints)


def test_another_student_is_named_with_all_its_fields():
    both = dataclasses.replace(SPEC, students=(STUDENT, StudentTokenizerSpec("large", "f" * 32, 256)))
    assert [n for n, _, _ in differences(SPEC, both)] == [
        "students.1.name",
        "students.1.tokenizer",
        "students.1.length_limit",
    ]


def test_fingerprint_is_pinned():
    """A change here makes every existing cache unreadable: it must never change within format 1."""
    assert SPEC.fingerprint == "50ca9ba6c76560d76d3af13c361d38d1"


def test_fingerprint_does_not_depend_on_the_process():
    code = "from tests.shared.test_spec import SPEC; print(SPEC.fingerprint)"
    for seed in ("1", "2"):
        out = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed},
        )
        assert out.stdout.strip() == SPEC.fingerprint


@pytest.mark.parametrize(("field", "spec"), [m for m in mutations() if m[0] != "format"])
def test_json_round_trip(field, spec):
    assert CaptureSpec.from_json(spec.to_json()) == spec


def test_unknown_and_missing_fields_are_refused():
    with pytest.raises(TidecacheError, match="colour"):
        CaptureSpec.from_json({**SPEC.to_json(), "colour": "red"})
    with pytest.raises(TidecacheError, match="length_limit"):
        CaptureSpec.from_json({k: v for k, v in SPEC.to_json().items() if k != "length_limit"})


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"mask_law": "word"}, "mask_law"),
        ({"codec": "zip"}, "codec"),
        ({"normal_form": "NFKC"}, "normal_form"),
        ({"contexts": ()}, "contexts"),
        ({"contexts": ("demo",)}, "contexts"),
        ({"lanes": ("topk",)}, "lanes"),
        ({"temperatures": (2.0,)}, "temperatures"),
        ({"temperatures": (1.0, 0.0)}, "temperatures"),
        ({"demo_ratio": 1.0}, "demo_ratio"),
        ({"k": 0}, "k: "),
        ({"tail_samples": -1}, "tail_samples"),
        ({"tail_samples": 4, "lanes": ("gold",)}, "tail_samples: expected 0, or a positive number and the topk lane"),
        ({"mask_law": "token", "students": (STUDENT, STUDENT)}, "exactly one declared student"),
    ],
)
def test_what_no_capture_can_mean_is_refused(changes, word):
    with pytest.raises(TidecacheError, match=word):
        dataclasses.replace(SPEC, **changes)
