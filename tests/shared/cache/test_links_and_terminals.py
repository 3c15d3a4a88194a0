"""What a folder of a cache may hold instead of files, and what its texts may do to a terminal."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from shared.cache import open_cache
from shared.errors import printable
from tests.shared.cache import resealed, synthetic
from tests.shared.cache.resealed import WAYS, command, outcome

DOCUMENTS = "shards/00000000-00000002.documents.parquet"
LIKELIHOODS = "shards/00000000-00000002.draws-0000-0002.likelihoods.parquet"
ESCAPES = "\x1b[31mred\x1b]0;title\x07\r\x08\x9b2J[bold]a[/bold] [/nothing] \u202eback"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("caches") / "sound"
    synthetic.build(path, documents=4, per_shard=2, draws=2, drop=())
    return path


def replace(root: Path, name: str, target: Path) -> None:
    (root / name).unlink()
    (root / name).symlink_to(target)


@pytest.mark.parametrize("name", [DOCUMENTS, LIKELIHOODS, "teacher_vocab.parquet", "manifest.json"])
def test_links_that_lead_out(folder, tmp_path, name) -> None:
    """Even to the very bytes: a cache does not depend on what is beside it."""
    root = resealed.copy_of(folder, tmp_path / "hostile")
    replace(root, name, folder / name)
    for way in (WAYS["iter_draws"], WAYS["stream"], WAYS["verify"]):
        message = outcome(way, root)
        assert message is not None
        assert "leads out of the cache's folder" in message


def test_a_folder_of_shards_that_is_elsewhere(folder, tmp_path) -> None:
    root = resealed.copy_of(folder, tmp_path / "hostile")
    shutil.rmtree(root / "shards")
    (root / "shards").symlink_to(folder / "shards", target_is_directory=True)
    assert "leads out of the cache's folder" in str(outcome(WAYS["iter_draws"], root))


def test_links_that_stay_inside_and_those_of_a_hub(folder, tmp_path) -> None:
    inside = resealed.copy_of(folder, tmp_path / "inside")
    shutil.move(inside / LIKELIHOODS, inside / "elsewhere.parquet")
    (inside / LIKELIHOODS).symlink_to("../elsewhere.parquet")
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        name = snapshot / path.relative_to(folder)
        name.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blobs / str(number))
        name.symlink_to(os.path.relpath(blobs / str(number), name.parent))
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)  # a whole cache may be reached by a link
    for root in (inside, snapshot, tmp_path / "link"):
        for name, way in WAYS.items():
            assert outcome(way, root) is None, (root, name)


@pytest.mark.parametrize("name", [DOCUMENTS, LIKELIHOODS, "teacher_vocab.parquet", "manifest.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file(folder, tmp_path, name, kind) -> None:
    """A pipe would be waited for, and /dev/zero read, for ever."""
    root = resealed.copy_of(folder, tmp_path / "hostile")
    (root / name).unlink()
    if kind == "pipe":
        os.mkfifo(root / name)
    elif kind == "device":
        (root / name).symlink_to("/dev/zero")
    else:
        (root / name).mkdir()
    for way in (WAYS["iter_draws"], WAYS["stream"], WAYS["verify"]):
        message = outcome(way, root)
        assert message is not None
        assert "refused" in message or "directory" in message, message


def test_texts_for_people_only(folder, tmp_path, capsys) -> None:
    """Names and roles of documents may be anything; none of it moves a cursor."""

    def renamed(table: pa.Table) -> pa.Table:
        messages = [[{**m, "role": ESCAPES} for m in row] for row in table["messages"].to_pylist()]
        at = table.schema.get_field_index
        field = table.schema.field("messages")
        table = table.set_column(at("messages"), field, pa.array(messages, field.type))
        return table.set_column(at("name"), "name", pa.array([ESCAPES] * len(table)))

    root = resealed.rows(folder, tmp_path / "hostile", "documents", renamed)
    for name in ("verify", "inspect"):
        _, out, err = command(capsys, "cache", name, root)
        for text in (out, err):
            assert all(c.isprintable() or c == "\n" for c in text), name
        assert "Traceback" not in err
    assert open_cache(root).read_documents(0)[0].name == ESCAPES  # readers get it as it is


def test_markup_in_the_spec_is_text(tmp_path, capsys) -> None:
    import dataclasses

    spec = synthetic.spec()
    teacher = dataclasses.replace(spec.teacher, name="[bold]x[/bold] [/nothing] [link=file:///etc]y[/link]")
    synthetic.build(tmp_path / "cache", documents=4, drop=(), teacher=teacher)
    code, out, err = command(capsys, "cache", "inspect", tmp_path / "cache")
    assert (code, err) == (0, "")
    assert "[/nothing]" in out


def test_printable() -> None:
    assert printable("a\x1b[31m\nb\u202e\x07ü日") == "a\\x1b[31m\\nb\\u202e\\x07ü日"
