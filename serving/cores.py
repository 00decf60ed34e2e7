"""Each worker of a server on cores of its own.

Left alone, Linux keeps the computing threads of two workers on one core for tens of milliseconds at times, while the other core
runs nothing but a thread of the idle policy (the forward log's writer): a core that has one counts as busy when work is moved,
and as free only when a thread wakes. A worker that stays on one core also finds more of its memory in that core's cache. What
it gains is in `docs/LOG.md`.
"""

import contextlib
import logging
import os
from collections.abc import Collection

log = logging.getLogger(__name__)

WORKERS = "WEB_CONCURRENCY"
"""Variable of the environment: how many workers the server has, as uvicorn reads it too. Without it none keeps to its own."""


def share_of(worker: int, workers: int, cores: Collection[int]) -> set[int]:
    """worker: from 0. An equal share for each, and none of another's, unless there are more workers than cores."""
    in_order = sorted(cores)
    return set(in_order[worker % workers :: workers]) or {in_order[worker % len(in_order)]}


def keep_to_own(worker: int) -> set[int]:
    """All threads of this process, and those that they start, on its share of the cores that it may use. The share; nothing
    where the environment does not say how many workers there are, or threads cannot be kept to cores (no Linux, a sandbox)."""
    told = os.environ.get(WORKERS, "")
    if not told.isdigit() or int(told) < 2 or not hasattr(os, "sched_setaffinity"):
        return set()
    share = share_of(worker, int(told), os.sched_getaffinity(0))
    try:
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.sched_setaffinity(int(thread), share)
    except OSError as error:
        log.warning("workers run on any core, as threads cannot be kept to some: %s", error.strerror)
        return set()
    return share
