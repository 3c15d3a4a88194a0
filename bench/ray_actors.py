"""What do two Ray actors do that one does not? Wall seconds for the same shards, one teacher and one thread in each actor.

Both crews are started once and take turns, round by round, so that what else the machine does hits both; the ratio is that of
the medians. Shards are committed to a new folder each time, as in a capture. The clock needs two idle cores: a third busy
process takes from the two actors what one alone would not miss. So CPU seconds are counted too, of the actors and of all
else (this process, Ray's own): two actors on two cores can't take less than half of the sum, and one no less than its own.

    python bench/ray_actors.py [--rounds 5] [--shards 12] [--documents 8]
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
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


def cpu_seconds() -> tuple[float, float]:
    """(of the actors, of all else) in the processes that descend from this one, Ray's included."""
    tick = os.sysconf("SC_CLK_TCK")
    parents, names, used = {}, {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:
            continue
        fields = text[text.rindex(")") + 2 :].split()
        process = int(path.parent.name)
        parents[process], names[process] = int(fields[1]), text[text.index("(") + 1 : text.rindex(")")]
        used[process] = (int(fields[11]) + int(fields[12])) / tick
    family = {os.getpid()}
    while more := {p for p, parent in parents.items() if parent in family} - family:
        family |= more
    actors = {p for p in family if names[p].startswith("ray::_Host")}
    return sum(used[p] for p in actors), sum(used[p] for p in family - actors)


@dataclass(frozen=True)
class Round:
    """One capture: seconds on the wall, and of CPUs in the actors and in all else."""

    wall: float
    actors: float
    others: float
    content: str  # digest of the cache


def measured(actors: Actors[Any, Any], draft: Draft, spec: CaptureSpec, todo: list[Segment]) -> Round:
    """A capture of these segments."""
    t = draft.tokenizer
    vocabulary = TeacherVocabulary(t.name, t.digest, t.token_bytes, t.special)
    with tempfile.TemporaryDirectory() as folder:
        writer = CacheWriter.open(folder, spec, vocabulary)
        before, begin = cpu_seconds(), time.perf_counter()
        RayEngine(actors).run(iter(todo), lambda shard: writer.commit(shard.encoded), Deaf())
        writer.finish()
        wall, after = time.perf_counter() - begin, cpu_seconds()
        return Round(wall, after[0] - before[0], after[1] - before[1], open_cache(folder).manifest.content)


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
        rounds: tuple[list[Round], list[Round]] = [], []
        for number, (crew, actors) in itertools.product(range(arguments.rounds + 1), enumerate((one, two))):
            done = measured(actors, draft, spec, todo)
            if number:  # the first round warms up
                rounds[crew].append(done)
    assert len({r.content for crew in rounds for r in crew}) == 1, "the caches differ"
    print(
        f"{len(todo)} shards of {arguments.documents} documents, {arguments.rounds} rounds in turn, medians; load "
        f"{os.getloadavg()[0]:.1f}\n{'actors':8} {'seconds':>8} {'shards/s':>9} {'CPU s':>7} {'others':>7}   seconds of the rounds"
    )
    medians = []
    for count, crew in enumerate(rounds, 1):
        wall, busy, others = (
            statistics.median(getattr(r, name) for r in crew) for name in ("wall", "actors", "others")
        )
        medians.append((wall, busy, others))
        each = ", ".join(f"{r.wall:.2f}" for r in crew)
        print(f"{count:<8} {wall:8.2f} {len(todo) / wall:9.2f} {busy:7.2f} {others:7.2f}   {each}")
    (wall_1, busy_1, _), (wall_2, busy_2, others_2) = medians
    print(
        f"two actors do {wall_1 / wall_2:.2f} x of one by the clock, and {2 * busy_1 / (busy_2 + others_2):.2f} x by CPU seconds "
        f"on two cores; the caches are identical"
    )


if __name__ == "__main__":
    main()
