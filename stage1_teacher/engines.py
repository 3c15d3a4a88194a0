"""Where a capture's teacher runs: in this process, or on Ray actors (`--engine`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from shared.spec import CaptureSpec
from stage1_teacher.draft import Draft
from stage1_teacher.shards import Engine, LocalEngine, ShardMaker


@contextlib.contextmanager
def open_engine(draft: Draft) -> Iterator[tuple[Engine, CaptureSpec]]:
    """The engine that the draft's options name, its teacher loaded, and the whole spec.

    Raises:
        TidecacheError: the teacher cannot be loaded, or Ray not be used.
    """
    options = draft.options
    if options.engine == "local":
        teacher, spec = draft.load()
        yield LocalEngine(teacher, ShardMaker(spec, draft.tokenizer, draft.students)), spec
        return
    from stage1_teacher.actors import Actors, ActorSettings
    from stage1_teacher.ray_engine import RayEngine, ShardWorker, same_spec, shard_name

    settings = ActorSettings(
        options.actors, options.cpus_per_actor, options.gpus_per_actor, devices=options.tensor_parallel
    )
    with Actors(ShardWorker(draft), settings, shard_name, same_spec) as actors:
        yield RayEngine(actors), actors.describe()
