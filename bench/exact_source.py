"""A text source whose masked posterior is known exactly: a hidden Markov chain over a few symbols (for `bench/exact.py`).

Distillation is usually judged against data, so a teacher's errors, a student's and the noise of both are one number.
Here the teacher *is* the conditional distribution of the masked text given the visible one, by forward-backward, and every
error is absolute. A token is a run of `width` symbols: two widths over one text are two tokenizers whose common boundaries
lie at multiples of both.

Shape suffixes: S hidden states, V symbols, B texts, L symbols of a text, N tokens asked for, U = V^width token ids
(the first symbol is the most significant digit).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Source:
    """The chain in float64; rows sum to 1."""

    start_S: Tensor
    move_SS: Tensor
    emit_SV: Tensor

    @classmethod
    def random(cls, states: int, symbols: int, seed: int) -> Source:
        """A source with long-lived, distinguishable states: rows are drawn from sparse Dirichlet distributions."""
        generator = torch.Generator().manual_seed(seed)

        def rows(count: int, width: int, concentration: float) -> Tensor:
            shape = torch.full((count, width), concentration, dtype=torch.float64)
            gamma = torch._standard_gamma(shape, generator=generator).clamp_min(1e-9)
            return gamma / gamma.sum(dim=1, keepdim=True)

        move_SS = 0.5 * torch.eye(states, dtype=torch.float64) + 0.5 * rows(states, states, 0.3)
        start_S = torch.full((states,), 1.0 / states, dtype=torch.float64)
        return cls(start_S, move_SS, rows(states, symbols, 0.25))

    def sample(self, texts: int, length: int, generator: torch.Generator) -> Tensor:
        """symbol_BL, int64."""
        state_B = torch.multinomial(self.start_S, texts, replacement=True, generator=generator)
        symbols = []
        for _ in range(length):
            symbols.append(torch.multinomial(self.emit_SV[state_B], 1, generator=generator)[:, 0])
            state_B = torch.multinomial(self.move_SS[state_B], 1, generator=generator)[:, 0]
        return torch.stack(symbols, dim=1)

    def posterior(self, symbol_BL: Tensor, masked_BL: Tensor, row_N: Tensor, first_N: Tensor, width: int) -> Tensor:
        """log p(token | visible symbols) for N wholly masked tokens.

        Args:
            symbol_BL: the texts.
            masked_BL: which symbols are hidden.
            row_N: the text of each token.
            first_N: its first symbol; symbols [first, first + width) must be masked.
            width: symbols per token.

        Returns:
            logp_NU, float64, nats; normalised over the U token ids.
        """
        before_BLS, after_BLS = self._messages(symbol_BL, masked_BL)
        # joint_NPS: p(visible before, the P prefixes so far, the state after them)
        joint_NPS = before_BLS[row_N, first_N][:, None]
        for place in range(width):
            joint_NPVS = joint_NPS[:, :, None] * self.emit_SV.T
            joint_NPS = joint_NPVS.flatten(1, 2)
            if place < width - 1:
                joint_NPS = joint_NPS @ self.move_SS
        joint_NU = (joint_NPS * after_BLS[row_N, first_N + width - 1][:, None]).sum(dim=2)
        return torch.log(joint_NU / joint_NU.sum(dim=1, keepdim=True))

    def _messages(self, symbol_BL: Tensor, masked_BL: Tensor) -> tuple[Tensor, Tensor]:
        """(before_BLS, after_BLS): p(state, visible symbols before it) and p(visible symbols after it | state), scaled."""
        texts, length = symbol_BL.shape
        seen_BLS = torch.where(masked_BL[:, :, None], 1.0, self.emit_SV.T[symbol_BL])
        before, after = [self.start_S.expand(texts, -1)], [torch.ones_like(seen_BLS[:, 0])]
        for place in range(1, length):
            now_BS = (before[-1] * seen_BLS[:, place - 1]) @ self.move_SS
            before.append(now_BS / now_BS.sum(dim=1, keepdim=True))
            back_BS = (after[-1] * seen_BLS[:, length - place]) @ self.move_SS.T
            after.append(back_BS / back_BS.sum(dim=1, keepdim=True))
        return torch.stack(before, dim=1), torch.stack(after[::-1], dim=1)


def token_ids(symbol_BL: Tensor, width: int, symbols: int) -> Tensor:
    """The texts in tokens of `width` symbols: ids [B, L / width]."""
    digit_BNW = symbol_BL.unflatten(1, (-1, width))
    place_W = symbols ** torch.arange(width - 1, -1, -1)
    return (digit_BNW * place_W).sum(dim=2)
