"""Where the session of each of many keys began: `time_algebra.session_start`, for all keys at once.

Shape letters: N keys asked for, E non-empty blocks of theirs.
"""

import numpy as np

from streaming_sql.ragged import opens
from warehouse.time_algebra import FIVE_MINUTES_US, floor_5m


def session_starts(owner_E: np.ndarray, block_us_E: np.ndarray, num_keys: int, upper_us: int, gap_us: int) -> np.ndarray:
    """int64 [N]: the start of the session that is on at upper_us, microseconds; floor_5m(upper_us) + 5m where none is.

    owner_E, block_us_E: the blocks that hold an event of the measure's set, in any order, repeated or not; all start before
    upper_us.
    """
    starts = np.full(num_keys, floor_5m(upper_us) + FIVE_MINUTES_US, dtype=np.int64)
    order = np.lexsort((block_us_E, owner_E))
    owner, block_us = owner_E[order], block_us_E[order]
    first = opens(owner)
    if not len(first):
        return starts
    last = np.append(first[1:], len(owner)) - 1
    following = np.append(block_us[1:], 0)
    following[last] = floor_5m(upper_us)
    breaks = following - (block_us + FIVE_MINUTES_US) >= gap_us
    last_break = np.maximum.reduceat(np.where(breaks, np.arange(len(owner)), -1), first)
    begins = np.maximum(last_break + 1, first)
    is_on = begins <= last
    starts[owner[first[is_on]]] = block_us[begins[is_on]]
    return starts
