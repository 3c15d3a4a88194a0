"""A process that reads a whole cache as a stream and prints by how many bytes its memory grew at most."""

from __future__ import annotations

import resource
import sys

from shared.cache import open_cache, order
from shared.cache.stream import DrawStream

if __name__ == "__main__":
    folder, window, together = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    order.WINDOW_DRAWS = window
    stream = DrawStream([open_cache(folder)], together=together)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = sum(stream[n].scores["compdemo"].topk_ids.nbytes for n in range(stream.indexes[0].draws))
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, size)
