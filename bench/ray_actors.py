"""What do two Ray actors do that one does not? Wall seconds for the same shards, one teacher and one thread in each actor.

Both crews are started once and take turns, round by round, so that what else the machine does hits both; the ratio is that of
the medians. Shards are committed to a new folder each time, as in a capture. Needs two idle cores: a third busy process
takes from the two actors what one alone would not miss.

    python bench/ray_actors.py [--rounds 5] [--shards 12] [--documents 8]
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")  # before Ray starts what inherits it

from shared.cache import open_cache
from shared.cache.vocabulary import TeacherVocabulary
from shared.cache.writer import CacheWriter
from shared.spec import CaptureSpec
from stage1_teacher.actors import Actors, ActorSettings
from stage1_teacher.draft import Draft
from stage1_teacher.options import CaptureOptions
from stage1_teacher.planning import Segment, segments
from stage1_teacher.ray_engine import RayEngine, ShardWorker, same_spec, shard_name


class Deaf:
    """A watcher that does nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def seconds(actors: Actors[Any, Any], draft: Draft, spec: CaptureSpec, todo: list[Segment]) -> tuple[float, str]:
    """(wall seconds of a capture of these segments, digest of the cache)."""
    t = draft.tokenizer
    vocabulary = TeacherVocabulary(t.name, t.digest, t.token_bytes, t.special)
    with tempfile.TemporaryDirectory() as folder:
        writer = CacheWriter.open(folder, spec, vocabulary)
        begin = time.perf_counter()
        RayEngine(actors).run(iter(todo), lambda shard: writer.commit(shard.encoded), Deaf())
        writer.finish()
        elapsed = time.perf_counter() - begin
        return elapsed, open_cache(folder).manifest.content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shards", type=int, default=12)
    parser.add_argument("--documents", type=int, default=8, help="of one shard")
    arguments = parser.parse_args()
    import ray

    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    draft = Draft.of(CaptureOptions(held_out="none", limit=arguments.shards * arguments.documents))
    stream = draft.extent.stream(draft.spec, held_out=False)
    todo = list(segments(stream, (), 4, arguments.documents, Path()))
    crews = [Actors(ShardWorker(draft), ActorSettings(actors=n), shard_name, same_spec) for n in (1, 2)]
    with crews[0] as one, crews[1] as two:
        spec = one.describe(everyone=True)
        two.describe(everyone=True)
        times: tuple[list[float], list[float]] = [], []
        digests = set()
        # The first round warms up.
        for number, (crew, actors) in itertools.product(range(arguments.rounds + 1), enumerate((one, two))):
            elapsed, digest = seconds(actors, draft, spec, todo)
            digests.add(digest)
            if number:
                times[crew].append(elapsed)
    assert len(digests) == 1, "the caches differ"
    single, double = map(statistics.median, times)
    print(
        f"{len(todo)} shards of {arguments.documents} documents, {arguments.rounds} rounds in turn, medians; load {os.getloadavg()[0]:.1f}"
    )
    print(f"{'actors':8} {'seconds':>8} {'shards/s':>9}   rounds")
    for count, median, rounds in ((1, single, times[0]), (2, double, times[1])):
        print(f"{count:<8} {median:8.2f} {len(todo) / median:9.2f}   {', '.join(f'{x:.2f}' for x in rounds)}")
    print(f"two actors do {single / double:.2f} x of one; the caches are identical")


if __name__ == "__main__":
    main()
