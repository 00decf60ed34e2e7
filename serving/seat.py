"""Which of a server's processes this is. One leads: it runs the stream's landing, publishes ticks and makes tables; the others
follow: they read the log for themselves and write to it, and serve.

A lock on a file of the home says who leads, so that a leader that was killed is succeeded by whoever starts next. The file also
says which server the leader belongs to (its parent process), so that a second server on the same home is refused. Knows nothing
of what leading means.
"""

import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from warehouse.errors import HeadraceError
from warehouse.locks import try_lock

LEADER_LOCK, FOLLOWERS_LOCK = "server.lock", "followers.lock"
MOST_WORKERS = 256
_READY = "ready"
_LOOKED_AT_EVERY_S = 0.1
_STALE_FOR_S = 3.0
"""How long the lock's file may still hold what an earlier server wrote, while a leader is about to write its own name."""


def own_server() -> str | None:
    """The server that this process is one worker of; None for a server of one process."""
    return str(os.getppid()) if multiprocessing.parent_process() is not None else None


@dataclass
class Seat:
    """Held until `leave`, or the end of the process. number: of the worker, from 0; the smallest that is free, so that a worker
    that is started in another's place has its number."""

    leads: bool
    number: int
    _server: str
    _held: list[IO[str]]

    def ready(self) -> None:
        """Of the leader: followers may start."""
        _write(self._held[0], f"{self._server}\n{_READY}\n")

    def leave(self) -> None:
        for handle in self._held:
            handle.close()


def take_seat(folder: Path, server: str | None, is_stopping: Callable[[], bool] = lambda: False) -> Seat:
    """The leader's seat if it is free; else a follower's, once the leader of the same server is ready.

    folder: of the home's log. server: as `own_server` says. Raises HeadraceError where another server leads, or if is_stopping
    comes true meanwhile.
    """
    name = server or str(os.getpid())
    refused_at = time.monotonic() + (0.0 if server is None else _STALE_FOR_S)
    while not is_stopping():
        leading = try_lock(folder / LEADER_LOCK)
        if leading is not None:
            _write(leading, f"{name}\n")
            number, handle = _number(folder)
            return Seat(True, number, name, [leading, handle])
        told = (folder / LEADER_LOCK).read_text().split()
        if server is not None and told == [server, _READY]:
            following = try_lock(folder / FOLLOWERS_LOCK, shared=True)
            number, handle = _number(folder)
            return Seat(False, number, name, [handle, *([following] if following else [])])
        if told[:1] != [server] and time.monotonic() >= refused_at:
            raise HeadraceError(
                f"another server runs on {folder.parent}; stop it first, or point HEADRACE_HOME at a home of its own"
            )
        time.sleep(_LOOKED_AT_EVERY_S)
    raise HeadraceError("the server stops before its leader was ready")


def _number(folder: Path) -> tuple[int, IO[str]]:
    for number in range(MOST_WORKERS):
        handle = try_lock(folder / f"worker-{number}.lock")
        if handle is not None:
            return number, handle
    raise HeadraceError(f"more than {MOST_WORKERS} workers run on {folder.parent}")


def _write(handle: IO[str], text: str) -> None:
    handle.truncate(0)
    handle.write(text)
    handle.flush()
