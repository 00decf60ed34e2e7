"""Which keys of a group may read otherwise at a newer tick: those of which a block came to be known, or came into a window or
left one. All others keep their values, bit for bit.
"""

import numpy as np

from streaming_sql.group_state import GroupState
from streaming_sql.key_index import Key
from streaming_sql.online_store import StoreView

_NEVER_US = np.iinfo(np.int64).max


def changed_keys(before: StoreView, after: StoreView, name: str) -> set[Key] | None:
    """The keys of a group whose windows all hang from the tick (`assembled.can_be_assembled`); None where all may have changed.

    A window [T - L, T) loses the blocks of [T - L, T' - L) when the tick moves from T to T'. They are looked for where the
    earlier view has them: a merge may have left them out since. What it gains came to be known after T: blocks that have ended,
    late rows, and blocks made again without a retracted event.
    """
    group = after.groups[name].plan.group
    if after.tick_us < before.tick_us or any(w.session_gap_us is not None for m in group.measures for w in m.windows):
        return None  # a session ends by itself
    lengths_us = sorted({window.length_us for measure in group.measures for window in measure.windows})
    lost = np.array([(before.tick_us - length_us, after.tick_us - length_us) for length_us in lengths_us], dtype=np.int64)
    return _keys_with(before.groups[name], lost, _NEVER_US) | _keys_with(after.groups[name], lost[:0], before.tick_us)


def _keys_with(state: GroupState, spans_S2: np.ndarray, known_after_us: int) -> set[Key]:
    """Those with a block that starts in one of the spans [from, until), or that was known later than this."""
    found = [layer.rows_with(spans_S2, known_after_us) for layer in state.layers]
    return set(state.index.keys_of(np.unique(np.concatenate(found)))) if found else set()
