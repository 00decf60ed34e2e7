"""Files that one process at a time may hold. A lock ends with the process that has it, however it ends."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import IO


def try_lock(path: Path, shared: bool = False) -> IO[str] | None:
    """The file, held until it is closed; None where another holds it. shared: any number may hold it together.

    What the file says is left as it is, to read and to add to. Raises OSError where it cannot be opened.
    """
    handle = open(path, "a+")  # noqa: SIM115  its life is the caller's
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        return None
    return handle


@contextlib.contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Waits for its turn, and holds the file for the block. Raises OSError where it cannot be opened."""
    with open(path, "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
