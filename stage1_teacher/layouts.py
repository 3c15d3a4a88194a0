"""Attention layouts: what a teacher reads for one request, and which token may see which (DESIGN §7).

A teacher is a plain transformer; the layout is what makes it a diffusion model. `full` and `block-causal` read the
noised sequence x_t alone. `bd3lm` and `reordered` read the clean x_0 as well, at the same positions: a block of x_t
sees itself and x_0 of the blocks before it, so every block is predicted from a clean past. In `reordered` all attention
is causal, and inside a block of x_t the observed tokens come before the masked ones; since every mask here is explicit,
a token's place in that order is a rank, and nothing has to be moved.

Masks know each row's true length, so padding is never seen; a padding token sees itself only, which keeps its softmax
finite. A layout also says which tokens a prediction depends on: blocks of x_t never see each other in the layouts with
x_0, so blocks with nothing to predict are not run at all.

Shapes: B rows of a batch, S query tokens of a padded row, K key tokens, L tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from shared.errors import TidecacheError

if TYPE_CHECKING:
    import torch

    Rule = Callable[["Places", "Places"], torch.Tensor]

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Places:
    """Where the tokens of a padded batch stand. Integer tensors [B, S]; `valid_BS` is False for padding."""

    block_BS: torch.Tensor  # position // block_size
    rank_BS: torch.Tensor  # order of causal attention, see `token_ranks`
    valid_BS: torch.Tensor

    @property
    def queries(self) -> Places:
        """Shaped to be compared with keys: [B, S, 1]."""
        return Places(self.block_BS[:, :, None], self.rank_BS[:, :, None], self.valid_BS[:, :, None])

    @property
    def keys(self) -> Places:
        """Shaped to be compared with queries: [B, 1, S]."""
        return Places(self.block_BS[:, None], self.rank_BS[:, None], self.valid_BS[:, None])


@dataclass(frozen=True)
class Layout:
    """One attention layout; rules take queries and keys and give bool [B, S, K], True where a query may see a key."""

    name: str
    noisy: Rule  # among tokens of x_t
    clean: Rule | None  # among tokens of x_0; None: the layout does not read it

    @property
    def reads_clean(self) -> bool:
        """Whether x_0 is read beside x_t."""
        return self.clean is not None

    def needed(self, length: int, block_size: int, read_N: IntArray) -> tuple[BoolArray, int]:
        """What decides the predictions read at the rows `read_N`: (needed_L of x_t, so many first tokens of x_0)."""
        block_L = np.arange(length) // block_size
        if self.name == "full":
            return np.ones(length, dtype=np.bool_), 0
        last = int(block_L[read_N].max())
        if not self.reads_clean:
            return block_L <= last, 0
        read = np.zeros(int(block_L[-1]) + 1, dtype=np.bool_)
        read[block_L[read_N]] = True
        return read[block_L], last * block_size

    def clean_mask(self, places: Places) -> torch.Tensor:
        """Bool [B, S, S] among tokens of x_0."""
        assert self.clean is not None
        return _with_self(self.clean(places.queries, places.keys) & _both_valid(places, places))

    def noisy_mask(self, places: Places, clean: Places | None) -> torch.Tensor:
        """Bool [B, S, K]: queries are tokens of x_t; keys are those of x_0, if any, then those of x_t."""
        import torch

        within_BSS = _with_self(self.noisy(places.queries, places.keys) & _both_valid(places, places))
        if clean is None:
            return within_BSS
        earlier_BSK = (places.queries.block_BS > clean.keys.block_BS) & _both_valid(places, clean)
        return torch.cat([earlier_BSK, within_BSS], dim=2)


def _both_valid(queries: Places, keys: Places) -> torch.Tensor:
    return queries.queries.valid_BS & keys.keys.valid_BS


def _with_self(mask_BSS: torch.Tensor) -> torch.Tensor:
    import torch

    return mask_BSS | torch.eye(mask_BSS.shape[1], dtype=torch.bool, device=mask_BSS.device)


def token_ranks(position_L: IntArray, masked_L: BoolArray, block_size: int) -> IntArray:
    """Positions, with a block's masked tokens moved behind its observed ones; comparable within a block."""
    return position_L + block_size * masked_L


def _everything(query: Places, key: Places) -> torch.Tensor:
    return query.valid_BS & key.valid_BS


def _earlier_or_same_block(query: Places, key: Places) -> torch.Tensor:
    return query.block_BS >= key.block_BS


def _same_block(query: Places, key: Places) -> torch.Tensor:
    return query.block_BS == key.block_BS


def _same_block_in_order(query: Places, key: Places) -> torch.Tensor:
    return (query.block_BS == key.block_BS) & (query.rank_BS >= key.rank_BS)


def _in_order(query: Places, key: Places) -> torch.Tensor:
    return query.rank_BS >= key.rank_BS


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("full", _everything, None),
        Layout("block-causal", _earlier_or_same_block, None),
        Layout("bd3lm", _same_block, _earlier_or_same_block),
        Layout("reordered", _same_block_in_order, _in_order),
    )
}


def find_layout(name: str) -> Layout:
    """The layout of that name.

    Raises:
        TidecacheError: there is none; the message lists those that there are.
    """
    if name not in LAYOUTS:
        raise TidecacheError(f"layout: expected one of {', '.join(LAYOUTS)}, found {name!r}")
    return LAYOUTS[name]
