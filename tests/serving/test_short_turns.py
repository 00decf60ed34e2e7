"""What a thread's turns are is what the kernel says they are."""

import ctypes
import platform
import sys
import threading

import pytest

from serving import short_turns
from serving.short_turns import TURN_NS, take_short_turns

GET_ATTRIBUTES = {"x86_64": 315, "aarch64": 275}


def turn_ns() -> int:
    """Of the thread that calls; 0 where the kernel does not say."""
    attributes = ctypes.create_string_buffer(short_turns._ATTRIBUTES.size)
    number = GET_ATTRIBUTES[platform.machine()]
    assert ctypes.CDLL(None).syscall(number, 0, attributes, len(attributes), 0) == 0
    return short_turns._ATTRIBUTES.unpack(attributes.raw)[5]


def on_a_thread(work) -> list:
    said = []
    thread = threading.Thread(target=lambda: said.append(work()))
    thread.start()
    thread.join()
    return said


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in GET_ATTRIBUTES, reason="turns are asked for on Linux only"
)
def test_a_thread_has_short_turns_and_those_that_it_starts_have_not():
    if (usual := turn_ns()) == 0:
        pytest.skip("this kernel's turns are all of one length")

    def work():
        return take_short_turns(), turn_ns(), *on_a_thread(turn_ns)

    assert on_a_thread(work) == [(True, TURN_NS, usual)]
    assert turn_ns() == usual


def test_elsewhere_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(short_turns.platform, "machine", lambda: "vax")
    assert on_a_thread(take_short_turns) == [False]
