"""Work in the time that no other process wants, for a while.

A process that is merely nice keeps a core for the rest of its slice, some milliseconds, when a request comes, and each step of
an answer waits for that. One of the idle policy (Linux, sched(7)) gives it up at once. It gets next to nothing where nothing is
left, so it is taken out of that policy when its time is over. That needs the right to: CAP_SYS_NICE, or an RLIMIT_NICE that
allows the process its nice value (`LimitNICE=` of systemd, `--ulimit nice=` of Docker).
"""

import contextlib
import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")


def in_idle_time(work: Callable[[], Result], at_most_s: float) -> Result:
    """What the work gives or raises; for a process that does nothing beside it.

    Done on other threads than this, its own and those of libraries, which are of the idle policy until the work is done or
    `at_most_s` are over. On this thread where the system has no such policy, or would not take threads back from it."""
    if not can_return_from_idle():
        return work()
    done: Future[Result] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=run, name="idle-time", daemon=True)
    try:
        thread.start()
        _give_others(os.SCHED_IDLE)  # threads that these start are as they are
        thread.join(at_most_s)
    finally:
        _give_others(os.SCHED_OTHER)
    return done.result()


@functools.cache
def can_return_from_idle() -> bool:
    """Tried on a thread that does nothing else."""
    tried: Future[bool] = Future()

    def run() -> None:
        try:
            for policy in (os.SCHED_IDLE, os.SCHED_OTHER):
                _give(threading.get_native_id(), policy)
            tried.set_result(True)
        except (AttributeError, OSError):  # not Linux; no right to
            tried.set_result(False)

    threading.Thread(target=run, name="idle-time", daemon=True).start()
    return tried.result()


def _give_others(policy: int) -> None:
    """To all threads of this process but the one that calls."""
    for name in os.listdir("/proc/self/task"):
        if int(name) != threading.get_native_id():
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                _give(int(name), policy)


def _give(thread: int, policy: int) -> None:
    """The nice value stays what it was."""
    os.sched_setscheduler(thread, policy, os.sched_param(0))
