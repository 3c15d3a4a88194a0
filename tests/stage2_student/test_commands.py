"""The commands as users type them: defaults, overrides, one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shared.cache.reader import Cache
from shared.errors import TidecacheError
from stage2_student import commands
from stage2_student.config import base_defaults, load_recipe
from tests.stage2_student import synthetic

runner = CliRunner()


def test_commands_import_no_torch() -> None:
    code = "import sys, stage2_student.commands; print('torch' in sys.modules, 'transformers' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]


def test_train_then_score(cache: Cache, student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--steps", "2", "--batch", "2", "--learning-rate", "1e-3", "--recipe", "tide-cross", "--save-steps", "0"]
    result = runner.invoke(commands.app, ["train", "--cache", str(cache.path), "--base", str(student_folder), *options])
    assert result.exit_code == 0, result.output
    out = tmp_path / "runs" / "tide-cross"
    assert "trained 2 steps" in result.output
    config = json.loads((out / "tidecache.json").read_text())["config"]
    assert (config["objective"], config["context"], config["steps"], config["learning_rate"]) == (
        "reverse-calm",
        "plain",
        2,
        1e-3,
    )

    saved = tmp_path / "new" / "scores.json"
    arguments = ["score", "--cache", str(cache.path), "--limit", "2", "--json", str(saved)]
    result = runner.invoke(commands.app, [*arguments, "--model", str(student_folder), "--model", str(out)])
    assert result.exit_code == 0, result.output
    written = json.loads(saved.read_text())
    assert [row["name"] for row in written["rows"]] == [
        str(student_folder),
        str(out),
        "teacher, compdemo",
        "teacher, plain",
    ]
    assert written["rows"][0]["all"]["chunks"] == written["rows"][2]["all"]["chunks"] > 0
    assert written["rows"][0]["all"]["bits_per_byte"] != written["rows"][1]["all"]["bits_per_byte"]


def test_mistakes_are_tidecache_errors(cache: Cache, student_folder: Path, tmp_path: Path) -> None:
    for arguments, said in (
        (["--recipe", "reverse-calm-tidle"], "did you mean reverse-calm-tidal"),
        (["--objective", "rkl"], "objective: expected one of"),
        (["--cache", str(tmp_path / "none")], "none"),
        (["--cache", str(cache.path), "--base", str(tmp_path)], "no tokenizer could be loaded"),
        (["--cache", str(cache.path), "--recipe", "events", "--temperature", "3"], "needs the teacher's normaliser"),
    ):
        result = runner.invoke(commands.app, ["train", *arguments])
        assert isinstance(result.exception, TidecacheError), (arguments, result.output, result.exception)
        assert said in str(result.exception)
        assert "\n" not in str(result.exception)


def test_the_newest_cache_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("TIDECACHE_HOME", str(tmp_path))
    with pytest.raises(TidecacheError, match="no cache found there: capture one with `make cache`"):
        commands.newest_cache()
    for age, name in ((20, "old"), (5, "new"), (10, "middle")):
        (tmp_path / name).mkdir()
        manifest = tmp_path / name / "manifest.json"
        manifest.write_text("{}")
        os.utime(manifest, (1e9 - age, 1e9 - age))
    assert commands.newest_cache().name == "new"


def test_a_bases_own_defaults_stand_behind_the_recipe(tmp_path: Path) -> None:
    assert base_defaults(tmp_path) == {}
    (tmp_path / "tidecache.json").write_text(json.dumps({"defaults": {"learning_rate": 0.003, "objective": "calm"}}))
    config = load_recipe("reverse-calm-tidal", {"batch": 3}, base_defaults(tmp_path))
    assert (config.learning_rate, config.objective, config.batch) == (0.003, "reverse-calm", 3)
    assert load_recipe("reverse-calm-tidal", {"learning_rate": 0.1}, base_defaults(tmp_path)).learning_rate == 0.1
    (tmp_path / "tidecache.json").write_text(json.dumps({"defaults": {"learning_rat": 0.003}}))
    with pytest.raises(
        TidecacheError, match=r"tidecache\.json: unknown field 'learning_rat' \(did you mean learning_rate"
    ):
        base_defaults(tmp_path)


def test_tiny_is_the_embedded_base_unless_there_is_such_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(commands.embedded_or("tiny")) == Path(commands.__file__).parent / "tiny"
    (tmp_path / "tiny").mkdir()
    assert commands.embedded_or("tiny") == "tiny"
    assert commands.embedded_or("elsewhere") == "elsewhere"


def test_a_dry_run_on_an_undeclared_base(cache: Cache, tmp_path: Path) -> None:
    base = synthetic.undeclared_tokenizer(synthetic.save_student(tmp_path / "base", vocabulary=700))
    arguments = ["train", "--cache", str(cache.path), "--base", str(base), "--out", str(tmp_path / "out"), "--dry-run"]
    result = runner.invoke(commands.app, arguments)
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "out").exists()
