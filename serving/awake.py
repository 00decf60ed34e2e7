"""Cores that do not go to sleep between requests.

A core that rests for some milliseconds is put to sleep: its caches are cold when it wakes, and the core of a virtual machine
first has to be given one of its host again. Linux lets root say how soon all cores of a machine have to be awake
(`/dev/cpu_dma_latency`, PM quality of service); at 0 they never sleep, for as long as the file is held open. It is what the
profile `latency-performance` of tuned does. They then take as much power at rest as at work.
"""

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path

from warehouse.errors import HeadraceError

WITHIN = Path("/dev/cpu_dma_latency")
_AT_ONCE = struct.pack("i", 0)
"""Microseconds."""


@contextlib.contextmanager
def cores_awake() -> Iterator[None]:
    """All cores of this machine, until the block ends or the process dies. Raises HeadraceError where that is not allowed."""
    with contextlib.ExitStack() as stack:
        try:
            held = stack.enter_context(WITHIN.open("wb", buffering=0))
            held.write(_AT_ONCE)
        except OSError as error:
            raise HeadraceError(
                f"cannot keep the cores awake: {WITHIN}: {error.strerror}; that takes Linux and root (in a container "
                f"--device {WITHIN}). Leave --awake out, or let the machine do it: `tuned-adm profile latency-performance`"
            ) from None
        yield
