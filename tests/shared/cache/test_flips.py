"""200 flipped bits over all files of a cache of each kind: all found by `verify`, none in what any way of reading gives.

A way of reading gives what the sound cache gave, or one line of error that names the cache. The last is another process, as a
loader's worker is: what goes wrong there must come back as the same error.
"""

from __future__ import annotations

import multiprocessing
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.cache import open_cache
from shared.cache.records import Draw
from shared.cache.stream import DocumentStream, DrawStream
from shared.cache.verify import verify
from shared.errors import TidecacheError
from tests.shared.cache import synthetic

pytestmark = pytest.mark.slow
FLIPS = 200
KINDS: dict[str, dict[str, Any]] = {
    "gold": {"lanes": ("gold",), "contexts": ("compdemo", "plain")},
    "raw": {"tail_samples": 2},
    "packed": {"codec": "packed", "tail_samples": 2},
}


def comparable(draw: Draw) -> tuple:
    scores = draw.scores[draw.context]
    lanes = [x.tolist() for x in vars(scores).values() if x is not None]
    words = draw.candidates if scores.topk_ids is not None else None
    return draw.document, draw.stored.messages, draw.draw, draw.timestep, draw.chunks.tolist(), lanes, words


def iterated(path: Path) -> list[tuple]:
    return [comparable(d) for d in open_cache(path).iter_draws()]


def filtered(path: Path) -> list[tuple]:
    """By a name that all have, and in two halves by timestep, together again."""
    cache = open_cache(path)
    halves = [cache.iter_draws(low, high, names="document*") for low, high in ((0.0, 0.5), (0.5, 1.0))]
    return sorted((comparable(d) for half in halves for d in half), key=repr)


def streamed(path: Path) -> list[tuple]:
    stream = DrawStream([open_cache(path)], together=2)
    return [comparable(stream[n]) for n in range(stream.indexes[0].draws)]


def visited(path: Path) -> list[tuple]:
    documents = DocumentStream(DrawStream([open_cache(path)], topk=False))
    return [(v.stored.key, v.stored.messages) for v in (documents[n] for n in range(4))]


WAYS: tuple[Callable[[Path], list[tuple]], ...] = (iterated, filtered, streamed, visited)


def outcome(way: Callable[[Path], list[tuple]], path: Path) -> list[tuple] | TidecacheError:
    try:
        return way(path)
    except TidecacheError as error:
        return error


def flips(folder: Path, copy: Path, seed: int) -> Iterator[tuple[str, str]]:
    """Flip a bit, yield the part that it is in and its name, mend it; each file as often as any other, whatever its length."""
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    randomness = random.Random(seed)
    for number in range(FLIPS):
        name = files[number % len(files)]
        path = copy / name
        original = path.read_bytes()
        bit = randomness.randrange(8 * len(original))
        changed = bytearray(original)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        yield "held-out" if name.parts[0] == "held-out" else "", f"bit {bit} of {name}"
        path.write_bytes(original)


@pytest.fixture(scope="module", params=KINDS)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A sound cache with a held-out part, and a copy for damage."""
    folder = tmp_path_factory.mktemp(request.param)
    for part in ("sound", "sound/held-out"):
        synthetic.build(folder / part, documents=4, per_shard=2, draws=2, drop=(), **KINDS[request.param])
    shutil.copytree(folder / "sound", folder / "copy")
    return folder / "sound", folder / "copy"


def test_verify_finds_all(folders: tuple[Path, Path]) -> None:
    for _, name in flips(*folders, seed=1):
        try:
            assert verify(folders[1]).problems, name
        except TidecacheError as error:
            assert str(error).isprintable()
    assert verify(folders[1]).problems == ()


@pytest.mark.parametrize("way", WAYS)
def test_no_way_of_reading_takes_it(folders: tuple[Path, Path], way: Callable[[Path], list[tuple]]) -> None:
    sound, copy = folders
    expected, refused = {part: way(sound / part) for part in ("", "held-out")}, 0
    for part, name in flips(sound, copy, seed=2):
        found = outcome(way, copy / part)
        if isinstance(found, TidecacheError):
            refused += 1
            assert str(found).isprintable(), name
            assert str(copy) in str(found), name
        else:
            assert found == expected[part], name
    assert refused > FLIPS // 4
    assert {part: way(copy / part) for part in expected} == expected


def _worker(pipe: Any) -> None:
    while (path := pipe.recv()) is not None:
        pipe.send(outcome(streamed, path))


def test_a_loader_process_takes_none(folders: tuple[Path, Path]) -> None:
    sound, copy = folders
    expected, refused = {part: streamed(sound / part) for part in ("", "held-out")}, 0
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    worker = multiprocessing.get_context("fork").Process(target=_worker, args=(theirs,), daemon=True)
    worker.start()
    for part, name in flips(sound, copy, seed=3):
        ours.send(copy / part)
        assert ours.poll(60), name
        found = ours.recv()
        refused += isinstance(found, TidecacheError)
        assert isinstance(found, TidecacheError) or found == expected[part], name
    ours.send(None)
    worker.join(60)
    assert worker.exitcode == 0
    assert refused > FLIPS // 4
