"""Attention by blocks of diffusion on vLLM's stock kernels (DESIGN §7).

A metadata builder stands before that of the platform's attention backend: it replaces the requests of a batch by their
spans (`pages`), each a virtual request with its own rows of the block table, and turns causality off. vLLM itself does
the like for chunked local attention. Positions inside the text, which in `bd3lm` are not those in the prompt, are known
here too; the model takes them from the metadata.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata, subclass_attention_backend
from vllm.v1.attention.selector import get_attn_backend

from stage1_teacher.backends.vllm.pages import Placement, place, prompt_sizes, spans_of_batch
from stage1_teacher.backends.vllm.traits import ScorerTraits

POSITIONS = "tidecache_positions"  # attribute of the metadata


@functools.lru_cache
def _sizes(layout: str, longest: int, block: int, page: int) -> np.ndarray:
    return prompt_sizes(layout, longest, block, page)


def placements(traits: ScorerTraits, size_R: np.ndarray) -> list[Placement]:
    """The placements of requests from the sizes of their prompts alone, since these ascend strictly with the text's."""
    sizes_L = _sizes(traits.layout, 1 << int(size_R.max()).bit_length(), traits.block_size, traits.page)
    index_R = np.searchsorted(sizes_L, size_R)
    if not np.array_equal(sizes_L[index_R], size_R):
        # Only vLLM's own warm-up asks for other sizes; its results are thrown away.
        return [place("block-causal", int(size), traits.block_size, traits.page) for size in size_R]
    return [place(traits.layout, int(index) + 1, traits.block_size, traits.page) for index in index_R]


@functools.lru_cache
def block_backend(base: type[AttentionBackend], traits: ScorerTraits) -> type[AttentionBackend]:
    """The platform's attention backend with our metadata builder before its own."""
    base_builder: Any = base.get_builder_cls()

    class BlockMetadataBuilder(base_builder):  # the base is known at run time only
        """See the module."""

        def build(
            self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
        ) -> Any:
            """Metadata of the spans in place of the requests."""
            page = self.kv_cache_spec.block_size
            if page != traits.page:
                raise RuntimeError(f"vLLM gave the key/value cache pages of {page} tokens, expected {traits.page}")
            common, position_P = _as_spans(common_attn_metadata, traits)
            metadata = super().build(0, common, fast_build)
            setattr(metadata, POSITIONS, position_P)
            return metadata

    return subclass_attention_backend("TidecacheBlock_", base, BlockMetadataBuilder)


def _as_spans(common: CommonAttentionMetadata, traits: ScorerTraits) -> tuple[CommonAttentionMetadata, torch.Tensor]:
    """The batch with spans for requests, and the position of every computed token."""
    device = common.seq_lens.device
    requests = common.num_reqs
    start_R = common.query_start_loc_cpu[: requests + 1].numpy().astype(np.int64)
    sizes = common.seq_lens_cpu_upper_bound
    size_R = (common.seq_lens.cpu() if sizes is None else sizes)[:requests].numpy().astype(np.int64)
    batch = spans_of_batch(placements(traits, size_R), size_R - np.diff(start_R), traits.page)
    start_S = torch.from_numpy(np.concatenate([[0], np.cumsum(batch.count_S)]).astype(np.int32))
    keys_S = torch.from_numpy(batch.keys_S.astype(np.int32))
    request_S = torch.from_numpy(batch.request_S).to(device)
    table_RW = common.block_table_tensor
    column_SW = torch.from_numpy(np.minimum(batch.columns_SW, table_RW.shape[1] - 1)).to(device)
    replaced = common.replace(
        query_start_loc=start_S.to(device),
        query_start_loc_cpu=start_S,
        seq_lens=keys_S.to(device),
        seq_lens_cpu_upper_bound=keys_S,
        num_reqs=len(keys_S),
        max_query_len=int(batch.count_S.max()),
        max_seq_len=int(batch.keys_S.max()),
        block_table_tensor=table_RW[request_S].gather(1, column_SW),
        causal=False,
        is_prefilling=None,
        req_idx=None,
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )
    return replaced, torch.from_numpy(batch.positions_P).to(device)


class BlockAttention(Attention):
    """Takes the place of `Attention` in a model whose layout has blocks."""

    def __init__(
        self, num_heads: int, head_size: int, scale: float, *args: Any, cache_config: Any = None, **kwargs: Any
    ) -> None:
        dtype = "auto" if cache_config is None else cache_config.cache_dtype
        base = get_attn_backend(head_size, torch.get_default_dtype(), dtype)
        traits = ScorerTraits.of(get_current_vllm_config().model_config.hf_config)
        super().__init__(
            num_heads,
            head_size,
            scale,
            *args,
            cache_config=cache_config,
            attn_backend=block_backend(base, traits),
            **kwargs,
        )


def text_positions(positions_P: torch.Tensor) -> torch.Tensor:
    """Positions inside the text for a batch; those given (in the prompt) where the metadata has none."""
    metadata = get_forward_context().attn_metadata
    if isinstance(metadata, list):  # one for each half of a batch that vLLM splits in two
        raise RuntimeError("vLLM splits batches in two (dual batch overlap): turn this off for tidecache's models")
    if isinstance(metadata, dict):
        metadata = next(iter(metadata.values()), None)
    own_P = getattr(metadata, POSITIONS, None)
    if own_P is None:
        return positions_P
    replaced_P = positions_P.clone()  # may be longer than the batch: vLLM pads
    replaced_P[: len(own_P)] = own_P
    return replaced_P
