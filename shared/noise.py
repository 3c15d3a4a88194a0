"""Timesteps, masks and CompDemo splits, all counter-based (DESIGN §4, "Draws" and "Mask laws").

Every random number is a pure function of (seed, document key, purpose, draw, index): a BLAKE2b digest of the first four
seeds a SplitMix64 sequence whose index-th value it is. So a draw is the same whatever was drawn before it, in whatever
order, on whatever machine, and more draws or documents can be added later.

Shapes: C chunks of one document, L tokens of one sequence.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.integer]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def stream_key(seed: int, document: str, purpose: str, draw: int = 0) -> int:
    """The 64-bit start of the sequence for (seed, document, purpose, draw)."""
    text = f"{seed}\x00{document}\x00{purpose}\x00{draw}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def uniforms(key: int, count: int) -> FloatArray:
    """The first `count` values of SplitMix64 from `key`, as float64 in [0, 1) with 53 bits."""
    with np.errstate(over="ignore"):
        z = np.uint64(key) + _GOLDEN * np.arange(1, count + 1, dtype=np.uint64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def van_der_corput(index: int) -> float:
    """The base-2 radical inverse of `index`: 0, 1/2, 1/4, 3/4, 1/8, …"""
    value, scale = 0.0, 0.5
    while index:
        value += scale * (index & 1)
        index >>= 1
        scale *= 0.5
    return value


def timestep(seed: int, document: str, draw: int, epsilon: float) -> float:
    """t_k = ε + (1 − ε)·frac(φ(k) + u_doc), rounded to float32: what is stored is what was used."""
    offset = float(uniforms(stream_key(seed, document, "timestep"), 1)[0])
    return float(np.float32(epsilon + (1.0 - epsilon) * ((van_der_corput(draw) + offset) % 1.0)))


def mask_chunks(seed: int, document: str, draw: int, t: float, count: int) -> BoolArray:
    """Mask law `chunk`: masked_C, each chunk with probability t."""
    return uniforms(stream_key(seed, document, "mask", draw), count) < t


def mask_tokens(seed: int, document: str, draw: int, t: float, count: int) -> BoolArray:
    """Mask law `token`, first half: masked_L over all the student's tokens, each with probability t."""
    return uniforms(stream_key(seed, document, "mask-token", draw), count) < t


def chunks_with_masked_token(masked_L: BoolArray, first_C: IntArray, stop_C: IntArray) -> BoolArray:
    """Mask law `token`, second half: masked_C, the chunks [first, stop) that hold a masked token."""
    total = np.concatenate([[0], np.cumsum(masked_L)])
    return np.asarray(total[stop_C] > total[first_C])


def mask_rest(seed: int, document: str, draw: int, t: float, count: int) -> BoolArray:
    """masked_L for trainable student tokens that lie in no chunk, each with probability t (indexed by token)."""
    return uniforms(stream_key(seed, document, "mask-rest", draw), count) < t


def split_chunks(seed: int, document: str, draw: int, demo_ratio: float, count: int) -> BoolArray:
    """CompDemo split over all C chunks: True = A (shown in pass 1, scored in pass 2); only masked chunks use it."""
    return uniforms(stream_key(seed, document, "split", draw), count) < demo_ratio
