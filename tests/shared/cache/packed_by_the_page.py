"""The packed column by docs/cache-format.md alone: plain Python, one number at a time."""

from __future__ import annotations

import itertools


class Bits:
    """The stream of a packed row, a number at a time."""

    def __init__(self, data: bytes) -> None:
        self.rest, self.left = int.from_bytes(data, "little"), 8 * len(data)

    def number(self, width: int) -> int:
        assert width <= self.left
        value = self.rest & ((1 << width) - 1)
        self.rest, self.left = self.rest >> width, self.left - width
        return value

    def unary(self) -> int:
        n = 0
        while not self.number(1):
            n += 1
        return n


def unpack(context: str, data: bytes) -> dict[str, list]:
    """The plain columns that a row's packed column stands for."""
    values = read_packed(data) if data else ([], [], [])
    return {f"{context}_{name}": v for name, v in zip(("topk_ids", "topk_logp", "log_z"), values, strict=True)}


def read_packed(data: bytes) -> tuple[list[int], list[float], list[float]]:
    """(ids of all fillings, their log-likelihoods, log Z), each flat, chunk after chunk."""
    at = 0

    def head() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    def zigzag() -> int:
        value = head()
        return -(value + 1) // 2 if value % 2 else value // 2

    version, V, k, H, step, N, M = (head() for _ in range(7))
    assert version == 1
    series = [(zigzag(), [head() for _ in range(4)]) for _ in range(1 + H)]
    D = head()
    D_unary = head() if D else 0
    b = head()
    exponents = [head() for _ in range((1 << b) - 1)]
    r_1, r_2, levels_unary = (head(), head(), head()) if k > 1 else (0, 0, 0)
    stream = Bits(data[at:])

    counts = [0]
    for _ in range(N):
        counts[-1] += 1
        if stream.number(1):
            counts.append(0)
    assert counts.pop() == 0
    assert len(counts) == M
    scales = [stream.number(2) + 1 for _ in range(M)]
    values = []
    for base, widths in series:
        classes = [stream.number(2) for _ in range(M)]
        values.append([base + (stream.number(widths[c]) << (0, 3, 6, 8)[c]) for c in classes])

    bounds = [0, *(2**e for e in exponents), D + V]
    sizes = [min(y, D) - min(x, D) for x, y in itertools.pairwise(bounds)]
    parameters = [(V // g).bit_length() - 1 for g in sizes if g for _ in range(g)]
    before = stream.left
    quotients = [stream.unary() for _ in range(D)]
    assert before - stream.left == D_unary
    differences = [(q << r) + stream.number(r) for q, r in zip(quotients, parameters, strict=True)]
    dictionary: list[int] = []
    for g in sizes:
        entry = -1
        for _ in range(g):
            entry += differences[len(dictionary)] + 1
            dictionary.append(entry)

    distinct = [[k] if n == 1 else [1 + stream.number((k - 1).bit_length()) for _ in range(n)] for n in counts]
    S = sum(map(sum, distinct))
    classes = [stream.number(b) for _ in range(S)]
    of_class = []
    for low, high in itertools.pairwise(bounds):
        w = (high - low).bit_length() - 1
        of_class.append((low, w, (2 << w) - (high - low)))
    places = [stream.number(of_class[c][1]) for c in classes]
    ids = []
    for c, p in zip(classes, places, strict=True):
        low, _, u = of_class[c]
        symbol = low + (p if p < u else 2 * p + stream.number(1) - u)
        ids.append(dictionary[symbol] if symbol < D else symbol - D)
    of_token, fillings = iter(ids), []
    for n, each in zip(counts, distinct, strict=True):
        tokens = [[next(of_token) for _ in range(d)] for d in each]
        if n > 1:
            tokens = [[t[stream.number((len(t) - 1).bit_length())] for _ in range(k)] for t in tokens]
        fillings += [t[filling] for filling in range(k) for t in tokens]

    before = stream.left
    quotients = [stream.unary() for _ in range(M * (k - 1))]
    assert before - stream.left == levels_unary
    parameters = [r_1 if i == 2 else max(r_2 - (i - 1).bit_length() + 2, 0) for i in range(2, k + 1)] * M
    remainders = [stream.number(r) for r in parameters]
    steps = [
        stream.number(24) if q == 24 else (q << r) + rest
        for q, r, rest in zip(quotients, parameters, remainders, strict=True)
    ]
    logps = []
    for chunk, (best, scale) in enumerate(zip(values[0], scales, strict=True)):
        level = 0
        for difference in [0, *steps[chunk * (k - 1) : (chunk + 1) * (k - 1)]]:
            level += difference
            logps.append(-(best + level * step * scale) * 2.0**-15 or 0.0)
    assert stream.left < 8
    assert stream.rest == 0
    log_z = [values[1 + h][m] * 2.0**-15 for m in range(M) for h in range(H)]
    return fillings, logps, log_z
