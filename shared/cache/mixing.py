"""Several caches in one stream: which cache gives item n, by weight, as a pure function of the weights and n.

Not drawn at random but spread evenly: the j-th item of a cache with share w is due at the time (j + ½) / w, and items
come in the order of their times, the earlier cache first where two are due together. So the shares are exact in the
long run, and among the first n items of S caches one with share w has given n·w, up to ½ + w·S/2 items. The pattern
repeats after as many items as the weights, in whole numbers without a common divisor, add up to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

from shared.cache.records import IntArray
from shared.errors import TidecacheError
from shared.ragged import within

MAX_PERIOD = 1 << 20


@dataclass(frozen=True)
class WeightedCache:
    """A cache's folder or address and its share in a mixture, relative to the others'."""

    path: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> WeightedCache:
        """`PATH` or `PATH=WEIGHT`; what follows the last `=` is a weight if it is a number, else part of the path."""
        path, equals, weight = text.rpartition("=")
        try:
            return cls(path, float(weight)) if equals and path else cls(text)
        except ValueError:
            return cls(text)


@dataclass(frozen=True)
class Mixture:
    """See the module. `weights`: one for each cache, of any scale."""

    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuse weights that are no shares.

        Raises:
            TidecacheError: none, one that is not a positive number, or a pattern too long to be kept.
        """
        for weight in self.weights:
            if not (math.isfinite(weight) and weight > 0):
                raise TidecacheError(f"weight of a cache: expected a number above 0, found {weight:g}")
        if not self.weights or sum(self.counts) > MAX_PERIOD:
            raise TidecacheError(
                f"weights of caches: expected some whose pattern repeats after at most {MAX_PERIOD:,} items, found "
                f"{', '.join(f'{w:g}' for w in self.weights) or 'none'}: take weights with fewer digits"
            )

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """The weights as whole numbers without a common divisor: items of each cache in one period."""
        exact = [Fraction(repr(float(w))) for w in self.weights]
        whole = [int(w * math.lcm(*(f.denominator for f in exact))) for w in exact]
        return tuple(w // math.gcd(*whole) for w in whole)

    @property
    def shares(self) -> tuple[float, ...]:
        """The weights, adding up to 1."""
        return tuple(c / sum(self.counts) for c in self.counts)

    @cached_property
    def _pattern(self) -> tuple[IntArray, IntArray]:
        """For each item of one period: its cache, and how many of that cache came before in the period."""
        source = np.repeat(np.arange(len(self.counts)), self.counts)
        number = within(np.array(self.counts))
        # Equal fractions give equal quotients, and different ones differ by far more than rounding does.
        due = (2 * number + 1) / np.repeat(self.counts, self.counts)
        order = np.lexsort((source, due))
        return source[order], number[order]

    def place(self, item: int) -> tuple[int, int]:
        """(cache, how many of its items came before) of item `item`."""
        source, number = self._pattern
        period, within = divmod(item, len(source))
        chosen = int(source[within])
        return chosen, period * self.counts[chosen] + int(number[within])
