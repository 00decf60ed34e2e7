"""The memory of a loaded process in huge pages: a request goes all over it, and to look up so many small ones takes time, most
of all in a virtual machine, where each step through its own tables is one through those of its host."""

import ctypes
import logging
import sys
from collections.abc import Iterator

log = logging.getLogger(__name__)

HUGE_PAGE = 2 << 20
_COLLAPSE = 25
"""MADV_COLLAPSE of Linux 6.1, which Python's `mmap` does not name. It needs no setting of the system, and changes none."""


def collapse() -> int:
    """Puts what this process holds of its own, the stacks aside, into huge pages now; pages that were never touched in between
    become memory. Bytes that are in huge pages then; 0 on other systems. Takes half a second for a gigabyte, beside which
    other threads run."""
    if sys.platform != "linux":
        return 0
    libc = ctypes.CDLL(None)
    size = ctypes.c_size_t(HUGE_PAGE)
    pages = sum(
        libc.madvise(ctypes.c_void_p(start), size, _COLLAPSE) == 0
        for first, end in _own_memory()
        for start in range(-(-first // HUGE_PAGE) * HUGE_PAGE, end - HUGE_PAGE + 1, HUGE_PAGE)
    )
    log.info("%d MiB are in huge pages", pages * HUGE_PAGE >> 20)
    return pages * HUGE_PAGE


def _own_memory() -> Iterator[tuple[int, int]]:
    """(first address, one after the last) of memory that is private, can be written and belongs to no file."""
    with open("/proc/self/maps") as maps:
        for line in maps.readlines():
            addresses, rights, _, _, inode, *name = line.split()
            if rights == "rw-p" and inode == "0" and name != ["[stack]"]:
                first, end = (int(address, 16) for address in addresses.split("-"))
                yield first, end
