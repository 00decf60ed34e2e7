"""The order of values, largest first, that does not depend on luck: ties stand by a number of their own."""

import numpy as np
from numba import types

from warehouse.compiled import compiled, only_read

_FLOATS, _INTS = only_read(types.float64, 1), only_read(types.int64, 1)

_FEW = 32
"""Ties that are put in order one by one."""


def largest_first(value_N: np.ndarray, number_N: np.ndarray) -> np.ndarray:
    """int64 [N]: positions of the values (float64), largest first, ties by the number (int64), smallest first; NaN is last, in
    no order of its own."""
    order_N = np.argsort(-value_N)  # not stable, but vectorized: what is equal is put right afterwards
    _settle_ties(order_N, value_N, number_N)
    return order_N


@compiled(types.void(types.int64[::1], _FLOATS, _INTS))
def _settle_ties(order_N, value_N, number_N):
    end = 0
    while end < len(order_N):
        start, end = end, end + 1
        while end < len(order_N) and value_N[order_N[end]] == value_N[order_N[start]]:
            end += 1
        if end - start > _FEW:
            tied = order_N[start:end].copy()
            order_N[start:end] = tied[np.argsort(number_N[tied], kind="mergesort")]
            continue
        for place in range(start + 1, end):
            position = order_N[place]
            while place > start and number_N[order_N[place - 1]] > number_N[position]:
                order_N[place] = order_N[place - 1]
                place -= 1
            order_N[place] = position
