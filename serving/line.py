"""Feeds that wait for a thread: whichever is free takes those that wait, and computes them side by side.

One that comes while a thread rests is computed at once, alone: nobody waits for company.
"""

import asyncio
import contextvars
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from typing import Any, TypeVar

from serving.company import Path, Walk, together

Result = TypeVar("Result")
PathIn = Callable[[int], Path[Result]]
"""Makes a path, told how many go side by side."""
_Waiting = tuple[PathIn[Any], contextvars.Context, "asyncio.Future[Any]"]


class Line:
    """most: how many are computed side by side. heard: told how many were, each time."""

    def __init__(self, threads: Executor, num_threads: int, most: int, heard: Callable[[int], None]):
        self._threads, self._most, self._heard = threads, max(most, 1), heard
        self._waiting: deque[_Waiting] = deque()
        self._num_free, self._lock = num_threads, threading.Lock()

    def __len__(self) -> int:
        """Those that wait."""
        return len(self._waiting)

    async def computed(self, path_in: PathIn[Result]) -> Result:
        """The path's result, or what it raises. One that nobody waits for any more when its turn comes is left out."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((path_in, contextvars.copy_context(), future))  # the request's id and span
        self._threads.submit(self._take)
        return await future

    def _take(self) -> None:
        with self._lock:
            at_most = min(self._most, -(-len(self._waiting) // self._num_free))  # what is left is for threads as free as this
            taken = [one for one in (self._waiting.popleft() for _ in range(at_most)) if not one[2].cancelled()]
            self._num_free -= 1
        try:
            if taken:  # else those before took it along
                self._heard(len(taken))
                together([Walk(path_in(len(taken)), context, _told(future)) for path_in, context, future in taken])
        finally:
            with self._lock:
                self._num_free += 1


def _told(future: "asyncio.Future[Any]") -> Callable[[Walk[Any]], None]:
    loop = future.get_loop()

    def then(walk: Walk[Any]) -> None:
        with suppress(RuntimeError):  # the loop has been closed: nobody waits
            loop.call_soon_threadsafe(_settle, future, walk)

    return then


def _settle(future: "asyncio.Future[Any]", walk: Walk[Any]) -> None:
    if future.cancelled():
        return
    if walk.error is None:
        future.set_result(walk.result)
    else:
        future.set_exception(walk.error)
