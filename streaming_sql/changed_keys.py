"""Which keys of a group may read otherwise at a newer tick: those of which a block came to be known, or came into a window or
left one. All others keep their values, bit for bit.
"""

import numpy as np

from streaming_sql.group_state import GroupState
from streaming_sql.key_index import Key
from streaming_sql.online_store import StoreView


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
    left = [layer.rows_within(lost) for layer in before.groups[name].layers]
    came = [layer.rows_known_after(before.tick_us) for layer in after.groups[name].layers]
    return _keys_of(before.groups[name], left) | _keys_of(after.groups[name], came)


def _keys_of(state: GroupState, rows: list[np.ndarray]) -> set[Key]:
    return set(state.index.keys_of(np.unique(np.concatenate(rows)))) if rows else set()
