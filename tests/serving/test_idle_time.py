"""Work that gives way to all else, for a while."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from serving import idle_time
from serving.idle_time import can_return_from_idle, in_idle_time

needs_idle = pytest.mark.skipif(not can_return_from_idle(), reason="needs Linux and the right to raise a priority")


def policy() -> int:
    return os.sched_getscheduler(0)


def wait_for(wanted: int) -> bool:
    until = time.monotonic() + 20
    while policy() != wanted and time.monotonic() < until:
        time.sleep(0.002)
    return policy() == wanted


@pytest.fixture
def library():
    """A library's threads, which live on."""
    with ThreadPoolExecutor(1) as threads:
        yield threads


@needs_idle
def test_work_and_the_threads_of_libraries_are_of_the_idle_policy_until_it_is_done(library):
    def work() -> tuple[bool, bool]:
        return wait_for(os.SCHED_IDLE), library.submit(wait_for, os.SCHED_IDLE).result()

    for _ in range(2):
        assert in_idle_time(work, 60.0) == (True, True)
        assert (policy(), library.submit(policy).result()) == (os.SCHED_OTHER, os.SCHED_OTHER)


@needs_idle
def test_after_its_time_it_is_as_the_others(library):
    def work() -> list[bool]:
        return [library.submit(wait_for, wanted).result() for wanted in (os.SCHED_IDLE, os.SCHED_OTHER)]

    assert in_idle_time(work, 0.5) == [True, True]


def test_it_is_done_at_once_where_nobody_could_end_its_idleness(monkeypatch):
    real_give = idle_time._give

    def refused(thread: int, policy: int) -> None:
        if policy == os.SCHED_OTHER:
            raise PermissionError("Operation not permitted")
        real_give(thread, policy)

    monkeypatch.setattr(idle_time, "_give", refused)
    can_return_from_idle.cache_clear()
    try:
        assert not can_return_from_idle()
        assert in_idle_time(threading.get_ident, 60.0) == threading.get_ident()
    finally:
        can_return_from_idle.cache_clear()


def test_what_it_raises_is_raised():
    def failing() -> None:
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        in_idle_time(failing, 60.0)
