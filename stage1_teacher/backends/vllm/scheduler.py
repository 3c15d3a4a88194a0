"""Which pages of a prompt later requests may reuse: those of x_0, between draws of the same document (DESIGN §7).

vLLM keys a page by its tokens and all those before it, which is right for causal models only. Here a page's keys and
values depend on the rest of its block as well, and of x_t nothing may be reused at all, since scored rows must be
computed. So the keys are replaced: x_0's pages are known by the whole of x_0, all others by the request that owns them.
"""

from __future__ import annotations

import hashlib

from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request


class DocumentScheduler(Scheduler):
    """vLLM's scheduler with tidecache's page keys. `extra_kwargs` of a request: `document`, bytes that name its x_0, and
    `clean_pages`, how many pages x_0 fills."""

    def add_request(self, request: Request) -> None:
        """Set the keys of a new request's pages, then queue it."""
        given = (request.pooling_params.extra_kwargs if request.pooling_params else None) or {}
        document, clean = given.get("document", b""), int(given.get("clean_pages", 0))
        own = request.request_id.encode()
        request.block_hashes[:] = [
            _key(document if page < clean else own, page, page < clean) for page in range(len(request.block_hashes))
        ]
        super().add_request(request)


def _key(owner: bytes, page: int, clean: bool) -> BlockHash:
    text = b"x_0 " if clean else b"x_t "
    return BlockHash(hashlib.blake2b(text + page.to_bytes(8, "little") + owner, digest_size=32).digest())
