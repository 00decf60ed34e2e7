"""Stretches of sorted arrays, for many keys at once: where each key's blocks of a window lie, and what is in them.

Blocks, list entries and map entries are all laid out by *place*: the key's row (or run) and the block number in one int64.
Shape letters: N keys asked for, R sorted items, E items found. Knows nothing of what the items are.
"""

import numpy as np
from numba import types

from warehouse.compiled import compiled, only_read
from warehouse.time_algebra import FIVE_MINUTES_US

ROW_SHIFT = 32  # block numbers stay below 2**32 until the year 42,000
Instants = np.ndarray | int
"""Microseconds, a multiple of five minutes: one for all keys, or one for each."""


def places(row: np.ndarray, instant_us: np.ndarray) -> np.ndarray:
    """One int64 per (row, block that holds the instant), ascending in that order."""
    return (row.astype(np.int64) << ROW_SHIFT) + instant_us // FIVE_MINUTES_US


def blocks_of(place: np.ndarray) -> np.ndarray:
    """Start of each place's block, microseconds."""
    return (place & ((1 << ROW_SHIFT) - 1)) * FIVE_MINUTES_US


def stretches(place: np.ndarray, row: np.ndarray, lower_us: Instants, upper_us: int) -> tuple[np.ndarray, np.ndarray]:
    """(low [N], high [N]): place[low:high] are the blocks of the row with lower_us <= block_start < upper_us.

    place: [R] ascending. row: [N], -1 where there is none. Low equals high where nothing is found. A lower edge before 1970, of
    a lifetime, is 1970.
    """
    edges = np.empty((2, len(row)), dtype=np.int64)
    _find_edges(place, row, one_or_each(lower_us), upper_us, ROW_SHIFT, FIVE_MINUTES_US, edges)
    return edges[0], edges[1]


def one_or_each(instants: Instants) -> np.ndarray:
    """int64 [1] or [N]."""
    return instants if isinstance(instants, np.ndarray) else np.array([instants], dtype=np.int64)


def laid_out(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index [E], owner [E]): the stretches' items one after the other, and which of the N stretches each is from."""
    length = high - low
    ends = np.cumsum(length)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(low - (ends - length), length), np.repeat(np.arange(len(low)), length)


def opens(*sorted_columns: np.ndarray) -> np.ndarray:
    """int64: where a new value of the columns begins; they are sorted together."""
    size = len(sorted_columns[0])
    changed = np.zeros(size, dtype=bool)
    changed[:1] = True
    for column in sorted_columns:
        changed[1:] |= column[1:] != column[:-1]
    return np.flatnonzero(changed)


_NUMBERS = only_read(types.int64)


@compiled(types.void(_NUMBERS, _NUMBERS, _NUMBERS, types.int64, types.int64, types.int64, types.int64[:, ::1]))
def _find_edges(
    place: np.ndarray, row: np.ndarray, lower: np.ndarray, upper: int, row_shift: int, block_us: int, edges: np.ndarray
) -> None:
    """`stretches` into edges [2, N]. lower: [N], or [1] for all."""
    for n in range(len(row)):
        base = row[n] << row_shift
        found = 0
        for edge in range(2):
            instant = max(lower[n if len(lower) > 1 else 0], 0) if edge == 0 else upper
            wanted = base + instant // block_us
            if row[n] >= 0:
                found += np.searchsorted(place[found:], wanted)
            edges[edge, n] = found
