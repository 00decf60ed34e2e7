"""Keeps short what stops the other threads of the process: full garbage collections, and long turns of the interpreter."""

import gc
import sys

_YOUNGER_COLLECTIONS = 1000
"""Collections of the middle generation before a full one; Python's own number is 10."""
_TURN_S = 0.0001
"""SQLite gives the interpreter away at each row that it reads or writes, PyTorch at each operation, and either may wait a
whole turn to get it back: at the default of 5 ms a post of 20 events takes 100 ms beside a busy thread, and a feed, which is
a hundred operations, several times what it takes alone."""


def settle() -> None:
    """Call once everything is loaded, in a process that serves: full collections look only at what comes later, and come a
    hundred times less often.

    With the libraries and a store loaded one takes 100 to 200 ms, the longest that an event waited to be seen. What the stream
    allocates has no cycles, so it goes without them.
    """
    gc.collect()
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, _YOUNGER_COLLECTIONS)
    sys.setswitchinterval(_TURN_S)
