"""A worker that one shard kills, for the tests of the Ray engine; apart, so that an actor can import it."""

from __future__ import annotations

import os
import signal

from stage1_teacher.planning import Segment
from stage1_teacher.ray_engine import Delivery, ShardWorker

POISON = 8  # first document of the shard


class Poisoned(ShardWorker):
    """Dies at that shard, every time."""

    def work(self, segment: Segment) -> Delivery:
        """As its parent, if it lives."""
        if segment.first == POISON:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().work(segment)
