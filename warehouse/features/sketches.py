"""Sketches whose parts merge by plain addition or maximum: quantiles with relative error, and distinct counts.

DDSketch (Masson, Rim, Lee: "DDSketch: a fast and fully-mergeable quantile sketch with relative-error guarantees", VLDB 2019)
with its buckets' edges kept as a table, so that no engine's logarithm decides where a value falls. HyperLogLog (Flajolet et
al., 2007) over md5 of text, 4,096 registers, with linear counting below 2.5 values a register. The SQL twins are in
`warehouse/macros/algebra/sketches.sql`.
"""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Mapping
from functools import cache

SMALLEST = 1e-9
"""Numbers nearer to 0 than this count as 0."""
LARGEST = 1e18
"""Numbers beyond this share the last bucket."""
REGISTERS = 4096
ALPHA = 0.7213 / (1 + 1.079 / REGISTERS)
"""The bias correction of HyperLogLog for so many registers."""
_REGISTER_DIGITS = 3
_RANK_DIGITS = 13
_RANK_BITS = 4 * _RANK_DIGITS


@cache
def bounds(relative_error: float) -> tuple[float, ...]:
    """Edges of the buckets, ascending: SMALLEST × gamma^i, gamma = (1 + α) / (1 − α)."""
    gamma = (1 + relative_error) / (1 - relative_error)
    number = math.ceil(math.log(LARGEST / SMALLEST) / math.log(gamma)) + 1
    return tuple(SMALLEST * gamma**i for i in range(number))


def bucket_of(value: float, edges: tuple[float, ...]) -> int:
    """0 for zero, i for edges[i − 1] <= value < edges[i], and −i for its negative."""
    bucket = bisect_right(edges, abs(value))
    return bucket if value >= 0 else -bucket


def bucket_value(bucket: int, edges: tuple[float, ...], relative_error: float) -> float:
    """The number that stands for a bucket: within the relative error of all that are in it."""
    if bucket == 0:
        return 0.0
    middle = edges[abs(bucket) - 1] * (1 + relative_error)
    return middle if bucket > 0 else -middle


def quantile(counts: Mapping[int, int], q: float, edges: tuple[float, ...], relative_error: float) -> float | None:
    """The value of rank floor(q (n − 1)), counted from 0; None of nothing. counts: bucket → how many."""
    total = sum(counts.values())
    if total == 0:
        return None
    rank = math.floor(q * (total - 1))
    below = 0
    for bucket in sorted(counts):
        below += counts[bucket]
        if below > rank:
            return bucket_value(bucket, edges, relative_error)
    raise AssertionError("a rank is below the total")


def register_and_rank(text: str) -> tuple[int, int]:
    """The register (0 to 4,095) that a text falls into, and the place of the first 1 in the 52 bits after: 1 to 53."""
    digest = hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
    rest = int(digest[_REGISTER_DIGITS : _REGISTER_DIGITS + _RANK_DIGITS], 16)
    return int(digest[:_REGISTER_DIGITS], 16), _RANK_BITS - rest.bit_length() + 1


def count_distinct(ranks: Mapping[int, int]) -> int:
    """The estimate, rounded (halves away from 0). ranks: register → largest rank; registers without one are empty."""
    empty = REGISTERS - len(ranks)
    raw = ALPHA * REGISTERS * REGISTERS / (empty + sum(2.0**-rank for rank in sorted(ranks.values())))
    estimate = REGISTERS * math.log(REGISTERS / empty) if raw <= 2.5 * REGISTERS and empty else raw
    return math.floor(estimate + 0.5)
