"""Short turns at a core for a thread that does a little, often: it is then let in at once.

Linux from 6.12 on lets a thread that wakes take a core at once where its turns (slices) are shorter than those of the thread
that has the core; else it waits for the rest of that one's turn, some milliseconds at times, at each step of an answer. Short
turns give no larger share of a core and need no right. Numbers and structure are those of sched_setattr(2).
"""

import ctypes
import os
import platform
import struct
import sys

TURN_NS = 100_000
"""The shortest there is."""
_SET_ATTRIBUTES = {"x86_64": 314, "aarch64": 274}
_ATTRIBUTES = struct.Struct("IIQiIQQQ")
"""Size, policy, flags, nice value, priority, runtime (for SCHED_OTHER: the turn), deadline, period."""
_NOT_INHERITED = 1


def take_short_turns() -> bool:
    """For the thread that calls; threads that it starts have usual turns. Whether the system took it; older ones take it and go
    on as before."""
    number = _SET_ATTRIBUTES.get(platform.machine())
    if sys.platform != "linux" or number is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = _ATTRIBUTES.pack(_ATTRIBUTES.size, os.SCHED_OTHER, _NOT_INHERITED, nice, 0, TURN_NS, 0, 0)
    return ctypes.CDLL(None).syscall(number, 0, attributes, 0) == 0
