"""Caches behind an address: the same draws, the same checks."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import fsspec
import numpy as np
import pytest

from shared.cache import open_cache
from shared.cache.inspect import inspect_cache
from shared.cache.manifest import seal
from shared.cache.remote import RemotePath, folder_of
from shared.cache.selection import Selection
from shared.cache.stream import DrawStream
from shared.errors import TidecacheError
from tests.shared.cache import synthetic
from tests.shared.cache.servers import Quiet, WithRanges, serve


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("caches") / "one"
    synthetic.build(path, contexts=("compdemo", "plain"))
    return path


@pytest.fixture
def memory(folder):
    """The cache in fsspec's memory file system, to be changed as a test likes."""
    system = fsspec.filesystem("memory")
    for path in folder.rglob("*.*"):
        system.pipe(f"/one/{path.relative_to(folder)}", path.read_bytes())
    yield system
    system.store.clear()


def same_draws(a, b) -> None:
    for left, right in zip(a, b, strict=True):
        assert (left.document, left.draw, left.timestep) == (right.document, right.draw, right.timestep)
        assert left.candidates == right.candidates
        np.testing.assert_array_equal(left.gold_logp, right.gold_logp)


def test_memory(folder, memory) -> None:
    same_draws(open_cache(folder).iter_draws(), open_cache("memory://one").iter_draws())
    same_draws(open_cache(folder).iter_draws(0.2, 0.7), open_cache("memory://one/").iter_draws(0.2, 0.7))


def test_a_chain_of_file_systems(folder, tmp_path) -> None:
    fsspec.filesystem("zip", fo=str(tmp_path / "a.zip"), mode="w").put(str(folder), "one", recursive=True)
    same_draws(open_cache(folder).iter_draws(), open_cache(f"zip://one::{tmp_path}/a.zip").iter_draws())


@pytest.mark.parametrize("handler", [Quiet, WithRanges])
def test_http(folder, handler) -> None:
    with serve(folder.parent, handler) as (address, _):
        there, here = DrawStream([open_cache(f"{address}/one")], seed=3), DrawStream([open_cache(folder)], seed=3)
        same_draws((there[n] for n in range(50)), (here[n] for n in range(50)))
        assert list(open_cache(f"{address}/one").vocabulary().token_bytes) == list(
            open_cache(folder).vocabulary().token_bytes
        )
        assert inspect_cache(f"{address}/one").lane_bytes == inspect_cache(folder).lane_bytes


def test_the_index_of_a_server_with_ranges_leaves_the_lanes_there(tmp_path) -> None:
    synthetic.build(tmp_path / "wide", documents=32, per_shard=32, draws=8, k=64, drop=())
    size = open_cache(tmp_path / "wide").shards[0].likelihoods[0].size_bytes
    with serve(tmp_path, WithRanges) as (address, requests):
        opened = open_cache(f"{address}/wide")
        requests.clear()
        DrawStream([opened], selection=Selection(0.3, 1.0))
        asked = [range_ for command, _, range_ in requests if command == "GET"]
    assert asked
    assert all(asked)
    bounds = [tuple(map(int, r.removeprefix("bytes=").split("-"))) for r in asked]
    assert sum(last + 1 - first for first, last in bounds) < size / 2  # the footer is looked for in the last 64 KB


def test_addresses_and_paths(tmp_path) -> None:
    assert folder_of("s3://bucket/a/") / "b" == RemotePath("s3://bucket/a/b")
    assert folder_of("memory://") / "b/c" == RemotePath("memory://b/c")
    assert folder_of("zip://::http://h/x.zip") / "b" == RemotePath("zip://b::http://h/x.zip")
    assert folder_of(str(tmp_path)) == tmp_path


def test_an_open_cache_goes_to_another_process(memory) -> None:
    stream = DrawStream([open_cache("memory://one")])
    first = stream[0]
    assert pickle.loads(pickle.dumps(stream))[0].document == first.document


def test_a_local_cache_never_imports_fsspec(folder) -> None:
    code = (
        "import sys; from shared.cache import open_cache; from shared.cache.stream import DrawStream; "
        f"DrawStream([open_cache({str(folder)!r})])[0]; print([m for m in sys.modules if m in ('fsspec', 'torch')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- refusals ----------------------------------------------------------------------------------------------------


def damage(system, name: str, change) -> None:
    system.pipe(f"/one/{name}", change(system.cat(f"/one/{name}")))


def flip(data: bytes) -> bytes:
    return data[:200] + bytes([data[200] ^ 1]) + data[201:]


@pytest.mark.parametrize(
    ("change", "finding"),
    [(flip, "damaged"), (lambda d: d[:-1], "cut off"), (lambda d: d + b"x", "cut off or replaced")],
)
def test_damage_is_found_there_too(memory, change, finding) -> None:
    cache = open_cache("memory://one")
    name = cache.shards[1].likelihoods[0].path
    damage(memory, name, change)
    with pytest.raises(TidecacheError, match=f"memory://one/{name}.*{finding}"):
        list(cache.iter_draws())


def test_a_missing_shard_and_a_missing_cache(memory) -> None:
    cache = open_cache("memory://one")
    memory.rm(f"/one/{cache.shards[0].documents.path}")
    with pytest.raises(TidecacheError, match=r"documents\.parquet: the file is missing"):
        cache.read_documents(0)
    with pytest.raises(TidecacheError, match=r"memory://two: expected the address of a cache's folder"):
        open_cache("memory://two")


def test_a_path_that_leads_out_is_refused(memory) -> None:
    data = json.loads(memory.cat("/one/manifest.json"))
    data["shards"][0]["documents"]["path"] = "../two/x.parquet"
    memory.pipe("/one/manifest.json", seal(data))
    with pytest.raises(TidecacheError, match="lead out of it"):
        open_cache("memory://one")


def test_a_huge_manifest_is_not_read_whole(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("shared.cache.manifest.MAX_MANIFEST_BYTES", 1 << 20)
    (tmp_path / "one").mkdir()
    with open(tmp_path / "one" / "manifest.json", "wb") as file:
        file.truncate(1 << 30)
    taken = []
    original = RemotePath.read_bytes

    def watched(self, limit):
        data = original(self, limit)
        taken.append(data)
        return data

    monkeypatch.setattr(RemotePath, "read_bytes", watched)
    with serve(tmp_path) as (address, _), pytest.raises(TidecacheError, match="expected at most 1048576 bytes"):
        open_cache(f"{address}/one")
    assert taken == [None]


def test_a_server_that_is_gone_and_a_protocol_that_is_unknown(folder) -> None:
    with serve(folder.parent) as (address, _):
        cache = open_cache(f"{address}/one")
        with pytest.raises(TidecacheError, match=r"found no manifest\.json there"):
            open_cache(f"{address}/two")
    with pytest.raises(TidecacheError, match=r"documents\.parquet: cannot be read \(.*[Cc]onnect"):
        list(cache.iter_draws())
    with pytest.raises(TidecacheError, match=r"nonsense://one/manifest.json: cannot be read \(Protocol not known"):
        open_cache("nonsense://one")
