"""How many tokens of a block each denoising step reveals: the sampler's schedule (DESIGN §6, oracles).

A block-diffusion student generates a block at a time: the block starts all masked, and each denoising step turns the
most certain masked tokens into text. The schedule fixes how many per step, before anything is sampled.
"""

from __future__ import annotations

from shared.errors import TidecacheError


def transferred_tokens(masked: int, steps: int) -> list[int]:
    """Return how many of `masked` tokens each denoising step reveals; they sum to `masked`.

    From time t to s the linear schedule keeps s / t of what is masked, so a step reveals the share 1 − s / t of what is
    left, rounded (halves to even, as the released code rounds). Steps that would reveal nothing are left out.

    Args:
        masked: masked tokens of the block.
        steps: denoising steps, at most this many are used.

    Raises:
        TidecacheError: a negative number of tokens, or fewer than one step.
    """
    if masked < 0 or steps < 1:
        raise TidecacheError(
            f"denoising needs at least 1 step and no negative number of masked tokens, found {steps} and {masked}"
        )
    counts, left = [], masked
    for step in range(steps):
        now, then = (steps - step) / steps, (steps - step - 1) / steps
        count = min(left, round(left * (1.0 - then / now)))
        left -= count
        counts.append(count)
    return [count for count in counts if count]
